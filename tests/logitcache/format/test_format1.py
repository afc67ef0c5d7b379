"""A cache that was written in format 1 opens and reads as it did then."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

import logitcache

FOLDER = Path(__file__).parents[2] / "data/format1"


def test_a_cache_of_format_1_reads_as_it_did() -> None:
    cache = logitcache.open(FOLDER / "cache")
    assert len(cache) == 12
    assert cache.manifest.layout.precision == "exact"
    assert cache.tail_groups is not None
    with np.load(FOLDER / "expected.npz") as expected:
        for number, sequence in enumerate(cache):
            targets = sequence.targets
            found = {
                "row_id": np.array(sequence.row_id),
                "input_ids": sequence.input_ids,
                "loss_mask": sequence.loss_mask,
                "columns": np.array(json.dumps(dict(sequence.columns))),
                **{f"T{temperature}": values for temperature, values in targets.tempered_tail.items()},
            }
            for name in ("token_ids", "logprobs", "tail_logprob", "tail_entropy", "sample_ids", "sample_logprobs"):
                found[name] = getattr(targets, name)
            for name, values in found.items():
                assert np.array_equal(values, expected[f"{number}.{name}"]), name
            # Then they were scaled to the tail on reading; they lie in the file in steps of 2⁻⁵.
            scaled = expected[f"{number}.group_logprobs"]
            held = np.isfinite(scaled)
            assert targets.group_logprobs is not None
            assert np.array_equal(np.isfinite(targets.group_logprobs), held)
            assert np.allclose(targets.group_logprobs[held], scaled[held], atol=2**-5)
