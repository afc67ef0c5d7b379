"""Whatever goes wrong as one line."""

from argparse import ArgumentParser
from typing import NoReturn

from logitcache import UserError


class Parser(ArgumentParser):
    """An ArgumentParser that raises UserError in place of printing its usage and exiting."""

    def error(self, message: str) -> NoReturn:
        """Raises UserError."""
        raise UserError(message)


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks."""
    return " ".join(str(error).split())
