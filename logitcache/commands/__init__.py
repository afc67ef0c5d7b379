"""The commands: each has its options and a handler that calls the Python function of its name and prints."""
