"""The one exception that means: the user can fix this. Command lines print it as one line and exit with status 2."""


class UserError(ValueError):
    """Bad input or contradictory settings; the message says what, where and what to do."""
