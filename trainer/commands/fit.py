"""`trainer fit`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from logitcache.urls import without_secrets
from trainer.commands.shared import INTERRUPTED, metrics_table, quieten
from trainer.terminal import say

if TYPE_CHECKING:
    from trainer.config.config import DistillConfig


def run(argv: Sequence[str]) -> int:
    """Trains; returns the exit status."""
    from trainer.config.arguments import parse

    config = parse(argv)
    quieten()
    from trainer.run.output_folder import output_held

    with output_held(config):
        return _fit(config, argv)


def _fit(config: DistillConfig, argv: Sequence[str]) -> int:
    from trainer.run.fit import fit
    from trainer.run.prepare import prepare

    prepared = prepare(config)
    width = max(map(len, prepared.choices))

    def tell(choices: Mapping[str, str]) -> None:
        if config.process_index == 0:
            say("\n".join(f"{name.ljust(width)}  {value}" for name, value in choices.items()))

    tell(prepared.choices)
    if config.process_index == 0:
        for warning in prepared.warnings:
            say(f"trainer: warning: {warning}", error=True)
    outcome = fit(prepared, tell)
    status = INTERRUPTED if outcome.stopped_at else 0
    if config.process_index != 0:
        return status
    if outcome.stopped_at:
        arguments = map(without_secrets, _begun_anew(argv))
        again = shlex.join(["trainer", "fit", *arguments, "--resume_from_checkpoint", outcome.stopped_at])
        ranks = f", on {config.world_size} ranks as before" if config.world_size > 1 else ""
        say(f"trainer: stopped after step {outcome.steps}. This continues{ranks}:\n  {again}")
        return status
    already = f"nothing was left to train: {prepared.checkpoint} is where the run had ended"
    done = f"{outcome.steps} steps done; model, tokenizer and run.json are in {config.output_dir}"
    say("\n" + "\n".join(filter(None, [already * (not outcome.trained), outcome.early, done])))
    if outcome.metrics:
        say(metrics_table(outcome.metrics))
    return 0


def _begun_anew(argv: Sequence[str]) -> list[str]:
    """Returns the arguments without the checkpoint that they continue from."""
    kept: list[str] = []
    for before, argument in zip(["", *argv], argv, strict=False):
        options = [part.replace("-", "_") for part in (before, argument.partition("=")[0])]
        if "__resume_from_checkpoint" not in options:
            kept.append(argument)
    return kept
