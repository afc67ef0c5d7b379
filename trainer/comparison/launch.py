"""What starts the ranks of a recipe's runs."""

from __future__ import annotations

import shlex
import sys
from argparse import ArgumentError, ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass

from logitcache import UserError

MODULES = {("torchrun",): "torch.distributed.run", ("accelerate", "launch"): "accelerate.commands.launch"}


@dataclass(frozen=True)
class Launcher:
    """command: before `-m trainer fit …`.  ranks: of a run; None where the line does not say."""

    command: list[str]
    ranks: int | None


def launcher(line: object) -> Launcher:
    """Starts ranks in this interpreter. Raises UserError for a line of no known launcher."""
    try:
        words = shlex.split(line) if isinstance(line, str) else []
        for names, module in MODULES.items():
            if tuple(words[: len(names)]) == names:
                options = words[len(names) :]
                return Launcher([sys.executable, "-m", module, *options], _ranks(options))
    except (ValueError, ArgumentError) as error:
        raise UserError(f"launch: {line}: {error}") from error
    raise UserError(f"launch: `torchrun …` or `accelerate launch …` is expected, got {line!r}")


def _ranks(options: Sequence[str]) -> int | None:
    """torchrun counts processes of a host, accelerate those of all hosts."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--nproc-per-node", "--nproc_per_node", "--num_processes", "--num-processes", dest="ranks")
    parser.add_argument("--nnodes", default="1")
    named = parser.parse_known_args(options)[0]
    return int(named.ranks) if (named.ranks or "").isdecimal() and named.nnodes == "1" else None
