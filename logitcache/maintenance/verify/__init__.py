"""Everything that is wrong with a cache."""
