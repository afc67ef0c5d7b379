"""What is inside a cache, computed and shown."""
