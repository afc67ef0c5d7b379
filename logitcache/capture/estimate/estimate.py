"""`logitcache plan`: an estimate of what a build will take and what it will keep, from a random sample of the corpus.

The corpus is read and its documents counted; only a sample is tokenised, and of that only some thousand positions are
scored: once with many entries, from which the gradient's error at every smaller k follows, once with the entries of the
largest k that is priced, and then as the build will do it, for the rate and the bytes.
"""

from __future__ import annotations

import json
import logging
import math
import random
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Unpack, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from logitcache.capture.calibration import make_tail_basis
from logitcache.capture.corpus.sample import CorpusSample, sample_corpus
from logitcache.capture.engine import start_teacher
from logitcache.capture.estimate.judgement import Judgement, judge, with_probe_ids
from logitcache.capture.inputs import resolve_inputs
from logitcache.capture.options import InputOptions, passes_on_to
from logitcache.capture.plan import cache_layout
from logitcache.capture.settings import CaptureSettings
from logitcache.capture.teachers.base import LogitTeacher, Teacher
from logitcache.capture.worker import find_nan
from logitcache.errors import UserError
from logitcache.format.codebook import Codebook
from logitcache.format.codec import encode
from logitcache.format.layout import Layout
from logitcache.format.sequences import ColumnTypes, TokenSequence, columns_text, stored_columns
from logitcache.format.tail_basis import TailBasis, with_rank
from logitcache.format.tail_parts import TailParts
from logitcache.format.targets import SparseTargets, concatenate
from logitcache.format.truncation import nucleus, truncate
from logitcache.progress import duration
from logitcache.table import aligned

PRICED_POSITIONS = 4096
"""Stored positions, at least, whose encoded bytes are measured and whose mean probability orders the vocabulary."""
CANDIDATE_KS = (8, 16, 32, 64, 128, 256)
SHOWN_TAIL_GROUPS = 32
"""Beside every k, unless the build asks for another number."""
TIMED_S = 10.0
"""How long scoring is timed as the build does it; longer if the priced positions take longer."""

logger = logging.getLogger("logitcache")


@passes_on_to(resolve_inputs)
def plan(teacher: str | None, data: str | Sequence[str], **options: Unpack[InputOptions]) -> Estimate:
    """Estimates what `logitcache.build` with the same arguments would take and give. Loads the teacher, writes nothing.

    Args:
        teacher: Model name or folder, as of `logitcache.build`.
        data: Documents, as of `logitcache.build`.
        **options: The options of `logitcache.build` that decide what the cache will hold, and those of vLLM.

    Returns:
        Documents, positions, bytes, seconds of one engine, and what each k would take and give; `table()` is text.

    Raises:
        UserError: The build would refuse this before it scores.
    """
    given: dict[str, Any] = dict(options)
    if given.pop("generate", False):
        raise UserError("--generate: a plan cannot know how long the teacher's answers will be")
    if given.pop("sampling_params", None):
        raise UserError("--sampling-params needs --generate")
    inputs = resolve_inputs(teacher, data, **given)
    logger.info("reading %s", ", ".join(source.name for source in inputs.sources))
    sample = sample_corpus(inputs.sources, inputs.model.tokenizer, inputs.model.vocab_size, inputs.corpus_settings)
    inputs = inputs.fitted(sample.sequences)
    types = ColumnTypes()
    for sequence in sample.sequences:
        types.see(sequence.columns)
    layout = cache_layout(inputs.settings, inputs.model.vocab_size, types.names())
    kept = [json.loads(columns_text(sequence.columns)) for sequence in sample.sequences]  # as a build stores them
    pairs = zip(sample.sequences, kept, strict=True)
    sample = replace(sample, sequences=[replace(s, columns=stored_columns(layout.columns, c)) for s, c in pairs])
    loaded = start_teacher(inputs.model, inputs.engine, sample.longest, inputs.settings.top_k)
    try:
        skip_bad = inputs.corpus_settings.skip_bad
        return estimate(
            loaded, sample, layout, inputs.settings, sees_logits=inputs.engine.sees_logits, skip_bad=skip_bad
        )
    finally:
        loaded.close()


@dataclass(frozen=True)
class Choice:
    """The price and the worth of storing `top_k` entries and the masses of `tail_groups` (0: of the whole tail).

    mass_covered: mean probability of the entries.  gradient_error: (loss, stage) → relative error of the summed gradient
    for a student that stands in for a real one of that stage; empty if the teacher gives only its top-k.  tail_rank: its
    coefficients in place of groups, or 0.  variance_captured: their share of the variance of the logits.  tail_divergence: mean
    divergence of the tail that they rebuild, nats. None without coefficients.
    """

    top_k: int
    tail_groups: int
    bytes_per_position: float
    mass_covered: float
    gradient_error: Mapping[tuple[str, str], float]
    tail_rank: int = 0
    variance_captured: float | None = None
    tail_divergence: float | None = None


@dataclass(frozen=True)
class Estimate:
    """A build's cost, and what other choices of k, of tail groups and of a rank would cost and keep.

    bytes_per_position: encoded with `settings`, input ids and kept columns included.  tokens_per_s: scored with them, by
    one engine.  not_told_apart: mean probability beyond the entries that stand for the full vocabulary in gradient errors.
    """

    sample: CorpusSample
    settings: CaptureSettings
    bytes_per_position: float
    tokens_per_s: float
    choices: tuple[Choice, ...]
    not_told_apart: float | None

    @property
    def num_bytes(self) -> float:
        """Bytes of the cache."""
        return self.bytes_per_position * self.sample.num_positions.value

    @property
    def scoring_s(self) -> float:
        """Seconds that one engine needs for the corpus."""
        return self.sample.num_tokens.value / self.tokens_per_s

    def table(self) -> str:
        """Returns everything as aligned text."""
        sample, settings = self.sample, self.settings
        scale = sample.num_documents / sample.num_sampled
        left_out = [f"{count * scale:,.0f} {reason}" for reason, count in sample.skipped.items()]
        parts = settings.tail_parts
        lines = [
            f"documents  {sample.num_documents:,}, {sample.num_sampled:,} of them tokenised (layout {sample.document_type})",
            f"sequences  {sample.num_sequences}, the longest seen has {sample.longest:,} tokens",
            f"positions  {sample.num_positions} of {sample.num_tokens} tokens",
            f"left out   {', '.join(left_out) or 'nothing'}"
            + (f"; first bad: {sample.first_bad}" if sample.first_bad else ""),
            f"bytes      {_size(self.num_bytes)}, {self.bytes_per_position:,.0f} per position "
            f"({_stored(settings.top_k, parts.groups, parts.rank)}, {settings.precision})",
            f"time       {duration(self.scoring_s)} at {self.tokens_per_s:,.0f} tokens/s of one engine",
            "",
            aligned([self._heading(), *(self._cells(choice) for choice in self.choices)]),
        ]
        if self.not_told_apart is None:
            lines.append("This teacher gives its top-k only: gradient errors and tail groups need its logits.")
        else:
            lines.append(
                "Relative error of the gradient summed over positions, for stand-ins of an early and a late student; "
                f"{self.not_told_apart:.2%} of the probability is known by group only."
            )
            if parts.rank:
                lines.append(
                    "With a rank: the share of the logits' variance at random tokens, the KL of the rebuilt tail, errors with "
                    "the student's residuals as in training."
                )
        return "\n".join(lines)

    def _heading(self) -> list[str]:
        errors = [f"{loss} {stage}" for loss, stage in self.choices[0].gradient_error]
        low_rank = ["variance", "KL of tail"] * bool(self.settings.tail_parts.rank)
        return ["stored", "bytes/position", "cache", "mass covered", *low_rank, *errors]

    def _cells(self, choice: Choice) -> list[str]:
        of_rank = [
            "" if choice.variance_captured is None else f"{choice.variance_captured:.1%}",
            "" if choice.tail_divergence is None else f"{choice.tail_divergence:.3f}",
        ]
        return [
            _stored(choice.top_k, choice.tail_groups, choice.tail_rank),
            f"{choice.bytes_per_position:,.0f}",
            _size(choice.bytes_per_position * self.sample.num_positions.value),
            f"{choice.mass_covered:.2%}",
            *of_rank * bool(self.settings.tail_parts.rank),
            *(f"{error:.3f}" for error in choice.gradient_error.values()),
        ]


def estimate(
    teacher: Teacher,
    sample: CorpusSample,
    layout: Layout,
    settings: CaptureSettings,
    *,
    sees_logits: bool,
    skip_bad: bool = False,
) -> Estimate:
    """Scores some thousand positions of a sample, a few times over. Tail groups that the teacher has are replaced.

    layout, settings: of the build.  skip_bad: rows for which the teacher gives NaN are left out, otherwise refused.
    """
    sequences = random.Random(0).sample(sample.sequences, len(sample.sequences))
    priced = _first(sequences, [len(sequence.positions) for sequence in sequences], PRICED_POSITIONS)
    most = layout.vocab_size if sees_logits else settings.top_k
    ks = sorted({k for k in CANDIDATE_KS if k <= most} | {settings.top_k})
    logger.info("scoring %d sequences of the sample", len(priced))
    priced = _with_numbers(teacher, priced, skip_bad)
    judgement, parts, basis = None, TailParts(), None
    tails = [parts]
    if sees_logits:
        num_groups = settings.tail_parts.groups or min(SHOWN_TAIL_GROUPS, layout.vocab_size)
        parts = TailParts(groups=num_groups, rank=settings.tail_parts.rank, probes=settings.tail_parts.probes)
        tails = [
            *tails,
            TailParts(groups=num_groups),
            *(replace(parts, groups=0, rank=rank) for rank in _ranks(parts.rank)),
        ]
        if parts.rank:
            basis = make_tail_basis(cast(LogitTeacher, teacher), priced, parts.rank)
            cast(LogitTeacher, teacher).set_tail_basis(basis)
            layout = layout.with_coefficient_step(basis.step)
        judgement = judge(cast(LogitTeacher, teacher), priced, parts, layout, basis, ks, _ranks(parts.rank))
    began = time.monotonic()
    scored = list(teacher.score(priced, CaptureSettings(top_k=ks[-1], tail_parts=parts)))
    tokens_per_s = _num_tokens(priced) / (time.monotonic() - began)
    if basis is not None:
        scored = with_probe_ids(priced, scored, layout.vocab_size)
    choices = [
        _choice(priced, scored, k, replace(layout, tail_parts=tail), basis, judgement) for k in ks for tail in tails
    ]

    lengths = [len(sequence.input_ids) for sequence in sequences]
    timed = _first(sequences, lengths, max(tokens_per_s * TIMED_S, _num_tokens(priced)))
    began = time.monotonic()
    results = teacher.score(timed, settings)
    kept = list(islice(results, len(priced)))
    deque(results, maxlen=0)
    seconds = time.monotonic() - began
    return Estimate(
        sample=sample,
        settings=settings,
        bytes_per_position=stored_bytes(priced, kept, layout) / _num_positions(priced),
        tokens_per_s=_num_tokens(timed) / seconds,
        choices=tuple(choices),
        not_told_apart=judgement.not_told_apart if judgement else None,
    )


def _with_numbers(teacher: Teacher, sequences: Sequence[TokenSequence], skip_bad: bool) -> Sequence[TokenSequence]:
    """Returns the sequences without those for which the teacher gives NaN. Raises UserError for one unless `skip_bad`."""
    scored = teacher.score(sequences, CaptureSettings(top_k=1))
    wrong = [find_nan(sequence, targets) for sequence, targets in zip(sequences, scored, strict=True)]
    reasons = [reason for reason in wrong if reason]
    if reasons and (not skip_bad or len(reasons) == len(sequences)):
        raise UserError(reasons[0])
    if reasons:
        logger.warning("%d of them cannot be scored; the first: %s", len(reasons), reasons[0])
    return [sequence for sequence, reason in zip(sequences, wrong, strict=True) if not reason]


def _ranks(rank: int) -> list[int]:
    """Returns the first coefficients of `rank` that are shown by themselves."""
    return sorted({rank // 4, rank // 2, rank} - {0})


def _choice(
    sequences: Sequence[TokenSequence],
    scored: Sequence[SparseTargets],
    k: int,
    layout: Layout,
    basis: TailBasis | None,
    judgement: Judgement | None,
) -> Choice:
    """Prices k entries and the tail parts of a layout.  scored: with at least as many of each."""
    parts = layout.tail_parts
    tail_groups = judgement.tail_groups if judgement and parts.groups else None
    if basis is not None and parts.rank:
        scored = [with_rank(targets, basis, parts.rank) for targets in scored]
    stored = [truncate_to_top_k(targets, k, tail_groups) for targets in scored]
    tail_mass = np.concatenate([np.exp(targets.tail_logprob, dtype=np.float64) for targets in stored]).mean()
    return Choice(
        top_k=k,
        tail_groups=parts.groups,
        bytes_per_position=stored_bytes(sequences, stored, layout) / _num_positions(sequences),
        mass_covered=1 - float(tail_mass),
        gradient_error=judgement.gradient_error[k, parts.groups, parts.rank] if judgement else {},
        tail_rank=parts.rank,
        variance_captured=judgement.variance_captured[parts.rank] if judgement and parts.rank else None,
        tail_divergence=judgement.tail_divergence[k, parts.rank] if judgement and parts.rank else None,
    )


def stored_bytes(sequences: Sequence[TokenSequence], targets: Sequence[SparseTargets], layout: Layout) -> int:
    """Returns the bytes of the rows' columns in a shard, encoded and compressed, without the file's footer."""
    table = encode(sequences, targets, layout, Codebook.of(concatenate(targets), layout.quantization))
    buffer = pa.BufferOutputStream()
    with pq.ParquetWriter(buffer, table.schema, **layout.parquet_options()) as writer:
        writer.write_table(table, row_group_size=len(table))
    group = pq.ParquetFile(pa.BufferReader(buffer.getvalue())).metadata.row_group(0)
    return sum(group.column(i).total_compressed_size for i in range(group.num_columns))


def truncate_to_top_k(targets: SparseTargets, k: int, tail_groups: np.ndarray | None) -> SparseTargets:
    """Returns the first k entries; the others join the tail and, with `tail_groups`, int [V], the groups."""
    known = targets if tail_groups is not None else replace(targets, group_logprobs=None)
    return truncate(known, nucleus(targets.logprobs, top_k=k, top_p=1.0, min_k=k).sum(axis=1), tail_groups)


def _first(sequences: Sequence[TokenSequence], sizes: Sequence[int], enough: float) -> Sequence[TokenSequence]:
    """Returns the fewest sequences from the front whose sizes reach `enough`, or all."""
    return sequences[: int(np.searchsorted(np.cumsum(sizes), enough)) + 1]


def _num_positions(sequences: Sequence[TokenSequence]) -> int:
    return sum(len(sequence.positions) for sequence in sequences)


def _num_tokens(sequences: Sequence[TokenSequence]) -> int:
    return sum(len(sequence.input_ids) for sequence in sequences)


def _stored(top_k: int, tail_groups: int, tail_rank: int) -> str:
    groups, rank = f" + {tail_groups} groups" * bool(tail_groups), f" + rank {tail_rank}" * bool(tail_rank)
    return f"k = {top_k}{groups}{rank}"


def _size(num_bytes: float) -> str:
    power = min(int(math.log10(max(num_bytes, 1)) // 3), 4)
    return f"{num_bytes / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
