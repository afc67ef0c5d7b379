"""The interface of every teacher: its identity, known before any weight is loaded, and scoring."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from logitcache.assembly.placement import WorkerLost
from logitcache.capture.settings import CaptureSettings
from logitcache.errors import UserError, one_line
from logitcache.format.sequences import TokenSequence
from logitcache.format.tail_basis import TailBasis
from logitcache.format.targets import SparseTargets
from logitcache.format.tokenizer import tokenizer_fingerprint

DTYPES = ("auto", "float32", "bfloat16", "float16")


class EngineLost(WorkerLost):
    """The engine ended while it was working: its last request is lost, another engine can take it over."""


class Teacher(Protocol):
    """An engine with the teacher's weights loaded."""

    def score(self, sequences: Iterable[TokenSequence], settings: CaptureSettings) -> Iterator[SparseTargets]:
        """Yields the SparseTargets of the stored positions of each sequence, in order.

        Sequences are read ahead as far as keeps the engine busy, and no further than bounded memory allows.
        """

    def close(self) -> None:
        """Frees the engine."""


class LogitTeacher(Teacher, Protocol):
    """A teacher that sees the logits, and so can give all parts of the tail."""

    def mean_probability(self, sequences: Iterable[TokenSequence]) -> np.ndarray:
        """Returns the mean over the stored positions of the full next-token distribution, float64 [V].

        Positions whose logits are not numbers do not count; NaN if there is no other.
        """

    def covariance_product(
        self, sequences: Iterable[TokenSequence], block: np.ndarray, offset: np.ndarray, weights: np.ndarray
    ) -> np.ndarray:
        """Returns Σ xᵀ (x diag(w) block) [V, B], beside it Σ x, and below both the number of x, float32 [V + 1, B + 1].

        x: the logits of a stored position less the offset, centred under the weights w; those that are not numbers do not
        count.  block: float32 [V, B], centred under the weights.  offset, weights: float32 [V].
        """

    def set_tail_groups(self, tail_groups: np.ndarray) -> None:
        """Sets the group of each id, int [V]. It comes before scoring with `settings.tail_parts.groups`."""

    def set_tail_basis(self, basis: TailBasis) -> None:
        """Sets the basis of the coefficients. It comes before scoring with `settings.tail_parts.rank`."""


@dataclass(frozen=True)
class TeacherModel:
    """A teacher's name, configuration and tokenizer.

    vocab_size: tokens that the tokenizer knows; logit columns beyond them are padding. num_logits: columns with padding.
    max_positions: longest context of the architecture, or None if the configuration does not say.
    dtype: of the weights in the engine, "auto" already resolved to the checkpoint's own.
    """

    name: str
    revision: str | None
    dtype: str
    trust_remote_code: bool
    config: Any = field(repr=False)
    tokenizer: Any = field(repr=False)
    vocab_size: int
    num_logits: int
    max_positions: int | None

    @classmethod
    def load(cls, name: str, revision: str | None, dtype: str, trust_remote_code: bool) -> TeacherModel:
        """Reads configuration and tokenizer, no weights.  name: a folder, or a name on the Hugging Face Hub.

        Raises UserError if the configuration or the tokenizer is missing or does not load.
        """
        from transformers import AutoConfig, AutoTokenizer

        if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
            raise UserError(f"--teacher {name}: no such folder")
        if Path(name).expanduser().is_dir():
            name = str(Path(name).expanduser().absolute())
        options = {"revision": revision, "trust_remote_code": trust_remote_code}
        try:
            config = AutoConfig.from_pretrained(name, **options)
            tokenizer = AutoTokenizer.from_pretrained(name, **options)
            tokenizer("")  # a setting of the wrong kind is found here, or in the middle of the corpus
            known = max(tokenizer.get_vocab().values()) + 1
        except Exception as error:  # of whatever kind the files lead to, those in Rust raise Exception itself
            raise UserError(
                f"--teacher {name}: its configuration or tokenizer does not load "
                f"({one_line(error) or type(error).__name__})"
            ) from error
        text = config.get_text_config()
        if known > text.vocab_size:
            raise UserError(
                f"--teacher {name}: its tokenizer has {known} tokens, the model only {text.vocab_size} logits"
            )
        if dtype not in DTYPES:
            raise UserError(f"--dtype {dtype}: choose one of {', '.join(DTYPES)}")
        if dtype == "auto":
            dtype = str(getattr(text, "dtype", None) or config.dtype or "float32").removeprefix("torch.")
        return cls(
            name,
            getattr(config, "_commit_hash", None) or revision,
            dtype,
            trust_remote_code,
            config,
            tokenizer,
            known,
            text.vocab_size,
            getattr(text, "max_position_embeddings", None),
        )

    def __reduce__(self) -> Any:
        """Lets another process read configuration and tokenizer itself."""
        return TeacherModel.load, (self.name, self.revision, self.dtype, self.trust_remote_code)

    def fingerprint(self) -> dict[str, Any]:
        """Returns what decides the teacher's distributions, as plain JSON types.

        These are name and revision (on the Hub) or the content's hash (of a folder), architecture, dtype and vocabulary.
        """
        identity: dict[str, Any] = {"name": self.name, "revision": self.revision}
        if Path(self.name).is_dir():
            identity = {"name": Path(self.name).resolve().name, "content_sha256": _folder_sha256(Path(self.name))}
        return {
            **identity,
            "architecture": (self.config.architectures or ["?"])[0],
            "dtype": self.dtype,
            "vocab_size": self.vocab_size,
        }

    def tokenizer_fingerprint(self) -> dict[str, Any]:
        """Returns what decides the meaning of token ids, see `logitcache.format.tokenizer`."""
        return tokenizer_fingerprint(self.tokenizer)


def _folder_sha256(folder: Path) -> str:
    """Returns the SHA-256 over names and contents of the files that make a model: configuration and weights."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.name == "config.json" or path.suffix in (".safetensors", ".bin", ".gguf"):
            with path.open("rb") as file:
                digest.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
