"""compression_config.yaml of a DistillKit dataset: how the bytes of a position are to be read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from logitcache.errors import UserError, one_line
from logitcache.exchange.bits import FLOAT_BYTES

CONFIG_NAME = "compression_config.yaml"
FUNCTIONS = {"sqrt": np.sqrt, "exp": np.exp}
"""Terms of the curve that are no powers."""


@dataclass(frozen=True)
class ResidualBin:
    """A part of the numbers beyond the curve: num_elements integers of element_bits, 1 … 64, times a scale of scale_dtype."""

    num_elements: int
    element_bits: int
    scale_dtype: str

    @property
    def num_bytes(self) -> int:
        """Bytes of scale and integers."""
        return FLOAT_BYTES[self.scale_dtype] + -(-self.num_elements * self.element_bits // 8)


@dataclass(frozen=True)
class CompressionConfig:
    """The fields of the file under their own names.

    d: vocabulary.  k: entries of a position.  exact_k: of these, stored as exact_dtype.  polynomial_terms: powers, or names in
    FUNCTIONS, of the curve that the others follow; coefficients are of term_dtype.  residual_bins: what is added to the curve.
    delta_encoding: values are differences.  normalize_t: the curve runs over [0, 1].  error_diffusion decides what the
    encoder writes, nothing of how it is read: it carries an element's rounding error to the next before rounding that.
    """

    d: int
    k: int
    exact_k: int
    exact_dtype: str
    polynomial_terms: tuple[int | str, ...]
    term_dtype: str
    residual_bins: tuple[ResidualBin, ...]
    delta_encoding: bool
    error_diffusion: bool
    normalize_t: bool

    @property
    def id_bits(self) -> int:
        """Bits of a token id: ceil(log2 d)."""
        return (self.d - 1).bit_length()

    @property
    def id_bytes(self) -> int:
        """Bytes of a position's ids."""
        return -(-self.k * self.id_bits // 8)

    @property
    def logprob_bytes(self) -> int:
        """Bytes of a position's log-probabilities."""
        exact = self.exact_k * FLOAT_BYTES[self.exact_dtype]
        curve = len(self.polynomial_terms) * FLOAT_BYTES[self.term_dtype]
        return exact + curve + sum(part.num_bytes for part in self.residual_bins)

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as plain JSON types, for the fingerprint."""
        return asdict(self) | {
            "polynomial_terms": list(self.polynomial_terms),
            "residual_bins": [asdict(part) for part in self.residual_bins],
        }


def parse_config(content: bytes, where: str) -> CompressionConfig:
    """Reads the settings of a file. A field that it leaves out has DistillKit's own default.

    Raises UserError naming the file and the field for anything that DistillKit does not write.
    """
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise UserError(
            "pyyaml is not installed, which reads DistillKit's configuration: pip install 'logitcache[exchange]'"
        ) from error
    try:
        data = yaml.safe_load(content)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: not YAML ({one_line(error)})") from error
    if not isinstance(data, dict):
        raise UserError(f"{where}: fields such as d and k are wanted, this is {type(data).__name__}")
    fields = _Fields(data, where)
    config = CompressionConfig(
        d=fields.whole("d", 2, 1 << 31),
        k=fields.whole("k", 1, 1 << 20),
        exact_k=fields.whole("exact_k", 0, 1 << 20),
        exact_dtype=fields.dtype("exact_dtype"),
        polynomial_terms=fields.terms(),
        term_dtype=fields.dtype("term_dtype"),
        residual_bins=fields.bins(),
        delta_encoding=fields.truth("delta_encoding", True),
        error_diffusion=fields.truth("error_diffusion", False),
        normalize_t=fields.truth("normalize_t", False),
    )
    fields.refuse_unknown()
    on_curve = config.k - config.exact_k
    in_bins = sum(part.num_elements for part in config.residual_bins)
    for holds, message in [
        (config.k <= config.d, f"k is {config.k}, of a vocabulary d of {config.d}"),
        (on_curve >= 0, f"exact_k is {config.exact_k}, more than k, {config.k}"),
        (in_bins <= on_curve, f"residual_bins hold {in_bins} elements, more than k − exact_k, {on_curve}"),
        (
            not on_curve or config.polynomial_terms or config.residual_bins,
            f"exact_k is {config.exact_k}, less than k, and there are neither polynomial_terms nor residual_bins",
        ),
    ]:
        if not holds:
            raise UserError(f"{where}: {message}")
    return config


class _Fields:
    """Fields taken one by one."""

    def __init__(self, data: Mapping[str, Any], where: str) -> None:
        self._left, self._where = dict(data), where

    def whole(self, name: str, least: int, most: int) -> int:
        value = self._left.pop(name, None)
        if type(value) is not int or not least <= value <= most:
            raise self._wrong(name, value, f"a whole number from {least} to {most}")
        return value

    def dtype(self, name: str, default: str = "float32") -> str:
        value = self._left.pop(name, default)
        if value not in list(FLOAT_BYTES):
            raise self._wrong(name, value, f"one of {', '.join(FLOAT_BYTES)}")
        return str(value)

    def truth(self, name: str, default: bool) -> bool:
        value = self._left.pop(name, default)
        if type(value) is not bool:
            raise self._wrong(name, value, "true or false")
        return value

    def terms(self) -> tuple[int | str, ...]:
        value = self._left.pop("polynomial_terms", None) or []
        known = isinstance(value, list) and all(
            (type(term) is int and 0 <= term <= 64) or term in list(FUNCTIONS) for term in value
        )
        if not known:
            raise self._wrong("polynomial_terms", value, f"a list of powers from 0 and of {', '.join(FUNCTIONS)}")
        return tuple(value)

    def bins(self) -> tuple[ResidualBin, ...]:
        value = self._left.pop("residual_bins", None) or []
        if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
            raise self._wrong("residual_bins", value, "a list of num_elements, element_bits and scale_dtype")
        parts = []
        for number, data in enumerate(value):
            fields = _Fields(data, f"{self._where}, residual_bins[{number}]")
            part = ResidualBin(
                num_elements=fields.whole("num_elements", 1, 1 << 20),
                element_bits=fields.whole("element_bits", 1, 64),
                scale_dtype=fields.dtype("scale_dtype", ""),
            )
            fields.refuse_unknown()
            parts.append(part)
        return tuple(parts)

    def refuse_unknown(self) -> None:
        """Raises UserError for an unknown field, which may change what the bytes mean."""
        if self._left:
            raise UserError(f"{self._where}: {sorted(map(str, self._left))[0]} is no field that is known here")

    def _wrong(self, name: str, value: Any, wanted: str) -> UserError:
        return UserError(f"{self._where}: {name} is {value!r}, {wanted} is wanted")
