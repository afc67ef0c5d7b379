"""Fields of settings: a default and a help text, in the way that transformers' HfArgumentParser reads them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from transformers import TrainingArguments


def setting(default: Any, help: str, choices: Sequence[str] | None = None) -> Any:
    """A setting of our own."""
    return dataclasses.field(default=default, metadata={"help": help} | ({"choices": list(choices)} if choices else {}))


def redefault(name: str, default: Any) -> Any:
    """A field of TrainingArguments with its help and another default."""
    return dataclasses.field(default=default, metadata=TrainingArguments.__dataclass_fields__[name].metadata)
