"""The commands: each parses and prints, and decides nothing."""
