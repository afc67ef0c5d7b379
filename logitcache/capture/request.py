"""What a build was asked to do, as its fingerprint records it, and what a resumed build may not change."""

from __future__ import annotations

from typing import Any

from logitcache.capture.inputs import Inputs
from logitcache.format.layout import FORMAT_VERSION
from logitcache.format.quantization import PRESETS


def make_request(inputs: Inputs, shard_positions: int) -> dict[str, Any]:
    """Everything that decides what the cache will hold, as plain JSON types."""
    quantization = PRESETS[inputs.settings.precision]
    return {
        "teacher": inputs.model.fingerprint() | inputs.engine.identity(),
        "tokenizer": inputs.model.tokenizer_fingerprint(),
        "corpus": inputs.corpus_settings.to_json() | {"sources": [source.identity() for source in inputs.sources]},
        **({"generation": dict(inputs.generation.params)} if inputs.generation else {}),
        "capture": inputs.settings.to_json() | {"shard_positions": shard_positions},
        "format": {"version": FORMAT_VERSION, "rounding": quantization.to_json() if quantization else None},
    }
