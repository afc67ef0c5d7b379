"""Options of a divergence, from a command line, a YAML file or Python."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from logitcache import UserError
from trainer.losses.registry import options_of

TRUTHS = {"true": True, "false": False}


def parse_loss_args(losses: Sequence[str], given: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """Reads the options of a run's divergences from a mapping, a JSON object, or key=value,key=value.

    Returns the options that differ from their defaults, each of the default's type. Raises UserError for any other text
    and for a value of another type.
    """
    pairs = _pairs(given) if isinstance(given, str) else dict(given or {})
    by_loss = [options_of(loss) for loss in losses]
    defaults = {name: [options[name] for options in by_loss if name in options] for name in pairs}
    typed = {name: _typed(name, value, next(iter(defaults[name]), None)) for name, value in pairs.items()}
    return {
        name: value
        for name, value in typed.items()
        if not defaults[name] or any(value != default for default in defaults[name])
    }


def _pairs(text: str) -> dict[str, Any]:
    if text.lstrip().startswith("{"):
        try:
            return dict(json.loads(text))
        except ValueError as error:
            raise UserError(f"--loss_args {text}: not JSON ({error})") from error
    pairs = {}
    for pair in filter(None, text.split(",")):
        name, equals, value = pair.partition("=")
        if not (name.strip() and equals):
            raise UserError(
                f"--loss_args {text}: {pair!r} is not key=value; beta=0.5 or alpha=0.2,beta=0.7 is expected"
            )
        pairs[name.strip()] = value.strip()
    return pairs


def _typed(name: str, value: Any, default: Any) -> Any:
    """Converts a value to the type of an option's default."""
    if isinstance(default, bool):
        if str(value).lower() not in TRUTHS:
            raise UserError(f"--loss_args {name}={value}: true or false is expected")
        return TRUTHS[str(value).lower()]
    if not isinstance(default, int | float):
        return value
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"--loss_args {name}={value}: a number is expected") from error
    if isinstance(default, float):
        return number
    if not number.is_integer():
        raise UserError(f"--loss_args {name}={value}: a whole number is expected")
    return int(number)
