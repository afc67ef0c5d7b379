"""trainer: trains a student from a cache of teacher log-probabilities.

usage: trainer fit --cache DIR --student NAME [options]     train
       trainer eval MODEL --cache DIR [options]             measure a model against a held-out cache
       trainer eval MODEL --generate --data FILE [options]  let it answer prompts, and score the answers
       trainer compare RECIPE.yaml | RUN… [options]         runs × losses × seeds, side by side

`trainer COMMAND --help` lists the options of a command.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from logitcache import UserError
from logitcache.errors import one_line
from trainer.commands.shared import INTERRUPTED

CONTINUE = {
    "fit": "`trainer fit … --resume_from_checkpoint true` continues from the last checkpoint, if there is one",
    "eval": "The same command continues",
    "compare": "The same command continues",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status: 0, 2 after bad input, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    name, *rest = arguments
    try:
        if name not in CONTINUE:
            raise UserError(f"unknown command {name}: choose {', '.join(CONTINUE)}")
        return import_module(f"trainer.commands.{name}").run(rest)
    except UserError as error:
        print(f"trainer: error: {one_line(error)}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # of `| head`: there is nobody left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":  # of several that were started together
            print(f"trainer: stopped. {CONTINUE[name]}")
        return INTERRUPTED
