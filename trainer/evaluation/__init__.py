"""Measurements of a student: against a held-out cache, and by its answers."""
