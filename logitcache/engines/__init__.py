"""Processes of inference engines: the knowledge that capture and evaluation share. Standard library only."""
