"""DistillKit's bytes decode to DistillKit's numbers, whatever the configuration."""

from __future__ import annotations

import math
import struct
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitcache.errors import UserError
from logitcache.exchange.distillkit import decode
from logitcache.exchange.distillkit_config import CompressionConfig, ResidualBin, parse_config
from tests.helpers.exchanging import FIXTURES
from tests.helpers.smallcaches import small

EPSILON = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}
LARGEST_FLOAT16 = 65504.0


@pytest.mark.parametrize("sample", ["recommended", "residual_bins"])
def test_the_samples_decode_to_the_last_bit(sample: str) -> None:
    folder = FIXTURES / sample
    config = parse_config((folder / "compression_config.yaml").read_bytes(), sample)
    expected = np.load(folder / "expected.npz")
    table = pq.read_table(folder / "data_0.parquet")
    for row in range(len(table)):
        ids, logprobs = decode(
            np.array(table["bytepacked_indices"][row].as_py(), dtype=np.uint8),
            np.array(table["compressed_logprobs"][row].as_py(), dtype=np.uint8),
            config,
        )
        assert logprobs.dtype == expected["logprobs"].dtype == np.float32
        assert np.array_equal(ids, expected["token_ids"][row])
        assert np.array_equal(logprobs, expected["logprobs"][row])


class Encoded:
    """A position as a DistillKit file has it, written and read back bit by bit and number by number."""

    def __init__(self, random: np.random.Generator, config: CompressionConfig) -> None:
        self.config = config
        on_curve = config.k - config.exact_k
        self.ids = [int(one) for one in random.choice(config.d, config.k, replace=False)]
        self.exact = [_float(-random.random() * 5, config.exact_dtype) for _ in range(config.exact_k)]
        self.coefficients = [_float(random.normal() / 10, config.term_dtype) for _ in config.polynomial_terms]
        self.scales = [_float(random.random() / 100, part.scale_dtype) for part in config.residual_bins]
        self.integers = [
            [int.from_bytes(random.bytes(8)) % 2**part.element_bits for _ in range(part.num_elements)]
            for part in config.residual_bins
        ]
        self.on_curve = on_curve

    @property
    def id_bytes(self) -> bytes:
        return _stream(self.ids, math.ceil(math.log2(self.config.d)))

    @property
    def logprob_bytes(self) -> bytes:
        config = self.config
        content = b"".join(_bytes(value, config.exact_dtype) for value in self.exact)
        content += b"".join(_bytes(value, config.term_dtype) for value in self.coefficients)
        for part, scale, integers in zip(config.residual_bins, self.scales, self.integers, strict=True):
            content += _bytes(scale, part.scale_dtype) + _stream(integers, part.element_bits)
        return content

    def values_and_sizes(self) -> tuple[list[float], list[float]]:
        """What is meant, computed in float64, and the size of what was added up on the way to it."""
        config = self.config
        values, sizes = list(self.exact), [abs(value) for value in self.exact]
        residuals = [0.0] * self.on_curve
        place = 0
        for part, scale, integers in zip(config.residual_bins, self.scales, self.integers, strict=True):
            for integer in integers:
                signed = 2 * integer - 1 if part.element_bits == 1 else integer - 2 ** (part.element_bits - 1)
                residuals[place] = signed * scale
                place += 1
        for number, residual in enumerate(residuals):
            x = number / max(self.on_curve - 1, 1) if config.normalize_t else float(number)
            powers = [getattr(math, term)(x) if isinstance(term, str) else x**term for term in config.polynomial_terms]
            terms = [c * power for c, power in zip(self.coefficients, powers, strict=True)]
            values.append(sum(terms) + residual)
            beyond = config.term_dtype == "float16" and max(powers, default=0) > LARGEST_FLOAT16
            sizes.append(math.inf if beyond else sum(map(abs, terms)) + abs(residual))
        if config.delta_encoding:
            values, sizes = list(accumulate(values)), list(accumulate(sizes))
        return values, sizes


def _stream(integers: list[int], num_bits: int) -> bytes:
    bits = "".join(format(one, f"0{num_bits}b") for one in integers)
    bits += "0" * (-len(bits) % 8)
    return bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))


def _bytes(value: float, dtype: str) -> bytes:
    if dtype == "bfloat16":
        return struct.pack("<f", value)[2:]
    return struct.pack({"float16": "<e", "float32": "<f", "float64": "<d"}[dtype], value)


def _float(value: float, dtype: str) -> float:
    """The value as `dtype` has it (bfloat16: the one towards 0)."""
    content = _bytes(value, dtype)
    if dtype == "bfloat16":
        return float(struct.unpack("<f", b"\0\0" + content)[0])
    return float(struct.unpack({"float16": "<e", "float32": "<f", "float64": "<d"}[dtype], content)[0])


@st.composite
def configs(draw: st.DrawFn) -> CompressionConfig:
    dtypes = st.sampled_from(sorted(EPSILON))
    k = draw(st.integers(1, 20))
    exact_k = draw(st.integers(0, k))
    left = k - exact_k
    bins: list[ResidualBin] = []
    while left and draw(st.booleans()):
        count = draw(st.integers(1, left))
        bins.append(ResidualBin(count, draw(st.integers(1, 64)), draw(dtypes)))
        left -= count
    terms: list[Any] = draw(st.lists(st.sampled_from([0, 1, 2, 3, "sqrt", "exp"]), max_size=10))
    if k > exact_k and not bins and not terms:
        terms = [0]
    return CompressionConfig(
        d=draw(st.integers(max(k, 2), 300_000)),
        k=k,
        exact_k=exact_k,
        exact_dtype=draw(dtypes),
        polynomial_terms=tuple(terms),
        term_dtype=draw(dtypes),
        residual_bins=tuple(bins),
        delta_encoding=draw(st.booleans()),
        error_diffusion=draw(st.booleans()),
        normalize_t=draw(st.booleans()),
    )


@small
@given(configs(), st.integers(0, 2**32))
def test_any_configuration_decodes_to_what_it_means(config: CompressionConfig, seed: int) -> None:
    random = np.random.default_rng(seed)
    positions = [Encoded(random, config) for _ in range(3)]
    packed_ids = np.array([list(position.id_bytes) for position in positions], dtype=np.uint8)
    packed = np.array([list(position.logprob_bytes) for position in positions], dtype=np.uint8)
    assert packed_ids.shape[1] == config.id_bytes
    assert packed.shape[1] == config.logprob_bytes
    ids, logprobs = decode(packed_ids, packed, config)
    assert ids.tolist() == [position.ids for position in positions]
    coarsest = max(EPSILON[dtype] for dtype in (config.exact_dtype, config.term_dtype, "float32"))
    for found, position in zip(logprobs, positions, strict=True):
        values, sizes = position.values_and_sizes()
        for one, value, size in zip(found.tolist(), values, sizes, strict=True):
            if math.isfinite(one):
                assert abs(one - value) <= (len(config.polynomial_terms) + 6) * coarsest * size + 1e-6
            else:
                assert size > LARGEST_FLOAT16
        if not config.polynomial_terms and not config.delta_encoding and config.exact_dtype != "float64":
            exact = [np.float32(value) for value in position.exact]
            assert found[: config.exact_k].tolist() == exact


def test_error_diffusion_changes_nothing_of_how_bytes_are_read() -> None:
    config = CompressionConfig(
        500, 6, 2, "float32", (0, 1), "float16", (ResidualBin(3, 5, "float16"),), True, False, False
    )
    position = Encoded(np.random.default_rng(0), config)
    packed = [np.frombuffer(part, np.uint8)[None] for part in (position.id_bytes, position.logprob_bytes)]
    plain = decode(packed[0], packed[1], config)
    diffused = decode(packed[0], packed[1], replace(config, error_diffusion=True))
    assert np.array_equal(plain[1], diffused[1])


GOOD = "{d: 500, k: 6, exact_k: 2, exact_dtype: float32, polynomial_terms: [0], term_dtype: float32, residual_bins: []"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{d: [", "not YAML"),
        ("- 1", "fields such as d and k are wanted, this is list"),
        (GOOD + ", d: 1}", "d is 1, a whole number from 2"),
        (GOOD + ", k: many}", "k is 'many', a whole number"),
        (GOOD + ", k: 501}", "k is 501, of a vocabulary d of 500"),
        (GOOD + ", exact_k: 7}", "exact_k is 7, more than k, 6"),
        (GOOD + ", exact_dtype: int8}", "exact_dtype is 'int8', one of float16, bfloat16, float32, float64"),
        (GOOD + ", term_dtype: [float32]}", "term_dtype is"),
        (GOOD + ", polynomial_terms: [cos]}", "polynomial_terms is ['cos'], a list of powers from 0 and of sqrt, exp"),
        (GOOD + ", polynomial_terms: []}", "neither polynomial_terms nor residual_bins"),
        (GOOD + ", residual_bins: [3]}", "residual_bins is [3]"),
        (GOOD + ", residual_bins: [{num_elements: 5, element_bits: 8, scale_dtype: float16}]}", "hold 5 elements"),
        (GOOD + ", residual_bins: [{num_elements: 4, element_bits: 65, scale_dtype: float16}]}", "element_bits is 65"),
        (GOOD + ", residual_bins: [{num_elements: 4, element_bits: 1}]}", "residual_bins[0]: scale_dtype is ''"),
        (GOOD + ", delta_encoding: 1}", "delta_encoding is 1, true or false"),
        (GOOD + ", zigzag: true}", "zigzag is no field that is known here"),
        ("!!python/object/apply:os.system ['true']", "not YAML"),
    ],
)
def test_a_configuration_that_distillkit_does_not_write_is_refused(content: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_config(content.encode(), "compression_config.yaml")
    assert message in str(error.value)
    assert str(error.value).startswith("compression_config.yaml")
    assert "\n" not in str(error.value)
