"""`logitcache plan`."""

from __future__ import annotations

import argparse
from typing import Any

from logitcache.commands.build import input_options
from logitcache.commands.shared import engines_needed

HELP = "what a build would take and give, from a sample: positions, bytes, hours, fidelity of each k"
DESCRIPTION = (
    "Counts the corpus, tokenises and scores a sample of it, and prints what `logitcache build` with the "
    "same options would take (positions, bytes, hours) and what each --top-k would give. Writes nothing."
)
CONTINUES = False


def add_options(parser: argparse.ArgumentParser) -> None:
    input_options(parser)


def run(options: dict[str, Any], rest: list[str]) -> None:
    with engines_needed():
        from logitcache.capture.estimate.estimate import plan
        from logitcache.capture.options import parse_engine_options

    print(plan(**options, **parse_engine_options(rest)).table())
