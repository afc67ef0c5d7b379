"""What a cache is on disk and in memory. The only package that knows the bytes."""
