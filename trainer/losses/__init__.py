"""Divergences between a student and a teacher of whom only some log-probabilities are known; torch only."""
