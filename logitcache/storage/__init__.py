"""Where a cache lies: folders, local and remote, and files that appear when they are complete."""
