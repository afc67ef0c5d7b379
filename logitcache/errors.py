"""Errors that the user can mend. Command lines print them as one line and exit with status 2."""

from argparse import ArgumentParser
from typing import NoReturn

from logitcache.urls import without_secrets


class UserError(ValueError):
    """Bad input or contradictory settings; the message says what, where and what to do, and no password of a URL."""

    def __init__(self, message: str) -> None:
        super().__init__(without_secrets(message))


class Parser(ArgumentParser):
    """An ArgumentParser that raises UserError in place of printing its usage and exiting."""

    def error(self, message: str) -> NoReturn:
        """Raises UserError."""
        raise UserError(f"{message} (`{self.prog} --help` lists the options)")


def one_line(error: BaseException) -> str:
    """Returns the message of an error without line breaks, and without the secrets of URLs in it."""
    return without_secrets(" ".join(str(error).split()))


def printable(text: str) -> str:
    """Makes text that may come from someone else's file fit for a terminal or a log."""
    return "".join(sign if sign.isprintable() or sign == "\n" else ascii(sign)[1:-1] for sign in without_secrets(text))


def is_out_of_memory(error: BaseException) -> bool:
    """Tells whether memory ran out; torch, which is not imported for this, has two errors of its own for it."""
    of_device = type(error).__name__ == "OutOfMemoryError"
    return isinstance(error, MemoryError) or of_device or "can't allocate memory" in str(error)
