"""What starts the ranks of a recipe's runs."""

from __future__ import annotations

import shlex
import sys

from logitcache import UserError

MODULES = {("torchrun",): "torch.distributed.run", ("accelerate", "launch"): "accelerate.commands.launch"}


def launcher(line: object) -> list[str]:
    """The command before `-m trainer fit …`, in this interpreter. Raises UserError for a line of no known launcher."""
    try:
        words = shlex.split(line) if isinstance(line, str) else []
    except ValueError as error:
        raise UserError(f"launch: {line}: {error}") from error
    for names, module in MODULES.items():
        if tuple(words[: len(names)]) == names:
            return [sys.executable, "-m", module, *words[len(names) :]]
    raise UserError(f"launch: `torchrun …` or `accelerate launch …` is expected, got {line!r}")
