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
from logitcache.errors import is_out_of_memory, one_line
from trainer.commands.shared import INTERRUPTED
from trainer.terminal import printable_logs, say

CONTINUE = {
    "fit": "`trainer fit … --resume_from_checkpoint true` continues from the last checkpoint, if there is one",
    "eval": "The same command continues",
    "compare": "The same command continues",
}

SMALLER = {
    "fit": "lower --per_device_train_batch_size and raise --gradient_accumulation_steps, or take shorter sequences",
    "eval": "lower --batch_size",
    "compare": "lower --jobs",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status: 0, 2 after bad input, 130 after Ctrl-C."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    with printable_logs():
        return _run(name, rest)


def _run(name: str, rest: Sequence[str]) -> int:
    try:
        if name in ("-h", "--help"):
            print(__doc__, flush=True)
            return 0
        if name not in CONTINUE:
            raise UserError(f"unknown command {name}: choose {', '.join(CONTINUE)}")
        return int(import_module(f"trainer.commands.{name}").run(rest))
    except UserError as error:
        return _refused(one_line(error))
    except BrokenPipeError:  # of `| head`: there is nobody left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":  # of several that were started together
            print(f"trainer: stopped. {CONTINUE[name]}")
        return INTERRUPTED
    except OSError as error:
        return _refused(f"{error.filename}: {error.strerror}" if error.filename else one_line(error))
    except ImportError as error:  # a setting wants a package that is not here
        return _refused(one_line(error))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return _refused(f"out of memory ({one_line(error) or 'of this machine'}): {SMALLER[name]}")


def _refused(message: str) -> int:
    say(f"trainer: error: {message}", error=True)
    return 2
