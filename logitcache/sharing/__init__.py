"""What makes a cache something that other people can use."""
