"""The teacher's own answers to prompts."""
