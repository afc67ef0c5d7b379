"""One engine works on shards: it scores in this thread; another thread checks, encodes and writes."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self, cast

import numpy as np

from logitcache.assembly.write import StoredRow, write_shard
from logitcache.capture.calibration import CALIBRATION_SEQUENCES, make_tail_basis, make_tail_groups
from logitcache.capture.engine import Engine, start_teacher
from logitcache.capture.plan import BASIS_NAME, PARTITION_NAME, BuildPlan, calibration_files
from logitcache.capture.reuse import ReusedCaches, read_places, record_copied
from logitcache.capture.settings import CaptureSettings
from logitcache.capture.teachers.base import LogitTeacher, Teacher, TeacherModel
from logitcache.errors import UserError
from logitcache.format.layout import Layout
from logitcache.format.quantization import mass_tolerance
from logitcache.format.sequences import CachedSequence, TokenSequence
from logitcache.format.tail_basis import write_tail_basis
from logitcache.format.tail_groups import read_tail_groups, write_tail_groups
from logitcache.format.targets import SparseTargets, find_defect
from logitcache.storage.folder import Folder

WAITING_SEQUENCES = 16
"""Scored sequences that may wait to be written: then the engine waits."""

logger = logging.getLogger("logitcache")


@dataclass(frozen=True)
class Job:
    """The knowledge that a process needs to score shards of a build; it travels to other hosts.

    reused: the caches that rows are copied from.
    """

    out: str
    model: TeacherModel
    engine: Engine
    settings: CaptureSettings
    reused: ReusedCaches | None = None


class ShardWorker:
    """A teacher and the plan that it works on."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._plan = BuildPlan.read(Folder(job.out))

    def start(self) -> None:
        """Loads the teacher. Raises UserError if it does not load."""
        self._teacher: Teacher = start_teacher(
            self._job.model, self._job.engine, self._plan.longest, self._job.settings.top_k
        )

    def calibrate(self) -> None:
        """Makes the tail groups and the tail basis by the first positions of the corpus, unless that has been done."""
        folder, parts = self._plan.folder, self._job.settings.tail_parts
        missing = [name for name in calibration_files(parts) if not folder.exists(name)]
        if not missing:
            return
        first = self._plan.calibration_sequences()
        teacher = cast(LogitTeacher, self._teacher)
        if PARTITION_NAME in missing:
            write_tail_groups(
                folder, make_tail_groups(teacher, first[:CALIBRATION_SEQUENCES], parts.groups), PARTITION_NAME
            )
        if BASIS_NAME in missing:
            logger.info("finding the %d directions in which the teacher's logits vary most", parts.rank)
            write_tail_basis(folder, make_tail_basis(teacher, first, parts.rank), BASIS_NAME)

    def capture(self, shards: Sequence[int], advance: Callable[[int], None] = lambda tokens: None) -> None:
        """Scores shards one after the other, without a pause between them, and records each when it is complete.

        Rows that other caches have are copied between the scored ones.  advance: told the tokens of every sequence that was
        scored and written. Raises UserError for rows that cannot be scored.
        """
        if self._job.settings.tail_parts.groups:
            with self._plan.folder.open(PARTITION_NAME) as file:
                cast(LogitTeacher, self._teacher).set_tail_groups(read_tail_groups(file))
        if self._job.settings.tail_parts.rank:
            cast(LogitTeacher, self._teacher).set_tail_basis(self._plan.tail_basis)
        plan, reused = self._plan, self._job.reused
        to_score = (
            sequence
            for shard in shards
            for sequence, is_copied in zip(plan.sequences(shard), _is_copied(plan, shard, reused), strict=True)
            if not is_copied
        )
        with ShardWriterThread(plan, shards, reused, advance) as writing:
            for targets in self._teacher.score(to_score, self._job.settings):
                writing.put(targets)

    def capture_shard(self, shard: int) -> None:
        """Scores one shard, as an actor does."""
        self.capture([shard])

    def close(self) -> None:
        """Frees the engine."""
        self._teacher.close()


def write_scored(
    plan: BuildPlan,
    shard: int,
    scored: Iterator[SparseTargets],
    reused: ReusedCaches | None,
    advance: Callable[[int], None] = lambda tokens: None,
) -> None:
    """Writes a shard and records it. Under --skip-bad, rows for which the teacher gave NaN are left out and recorded.

    scored: targets of the rows that are not copied from `reused`, in order; targets of later shards are left alone.  advance:
    told the tokens of each scored row. Raises UserError if `scored` ends too early, for targets that no teacher can have given,
    and if all rows are left out.
    """
    write_shard(plan, shard, plan.cache_layout, _rows(plan, shard, scored, reused, advance))


def _rows(
    plan: BuildPlan,
    shard: int,
    scored: Iterator[SparseTargets],
    reused: ReusedCaches | None,
    advance: Callable[[int], None],
) -> Iterator[StoredRow]:
    layout = plan.cache_layout
    copies: Iterator[CachedSequence] = iter(())
    sources = []
    if reused is not None:
        places, positions = read_places(plan.folder, shard)
        found = places >= 0
        copies, sources = reused.rows(places[found], positions[found]), reused.sources(places[found], positions[found])
    num_scored = 0
    left_out: dict[int, str] = {}
    for row, (sequence, is_copied) in enumerate(
        zip(plan.sequences(shard), _is_copied(plan, shard, reused), strict=True)
    ):
        if is_copied:
            yield sequence, _checked_copy(sequence, next(copies), layout)
            continue
        targets = next(scored, None)
        if targets is None:
            raise UserError(
                f"shard {shard}: the teacher scored {num_scored} sequences and then no more; nothing of this shard is kept"
            )
        nan = find_nan(sequence, targets)
        if nan and plan.skips_bad:
            left_out[row] = nan
        elif nan:
            raise UserError(
                f"{nan}; or leave such rows out with --skip-bad, and --overwrite where the build began without it. "
                "Nothing of this shard is kept"
            )
        else:
            _check(sequence, targets, layout, 1e-5, "the teacher")
            yield sequence, targets
        num_scored += 1
        advance(len(sequence.input_ids))
    if len(left_out) == plan.shards[shard].num_sequences:
        raise UserError(f"shard {shard}: no row of it could be scored; {left_out[0]}")
    plan.record_left_out(shard, left_out)
    record_copied(plan.folder, shard, sources)


def find_nan(sequence: TokenSequence, targets: SparseTargets) -> str | None:
    """Returns an error message if the teacher gave NaN for a row, otherwise None."""
    wrong = np.isnan(targets.logprobs).any(axis=1) | np.isnan(targets.tail_logprob)
    if not wrong.any():
        return None
    where = f"{sequence.where} (row {sequence.row_id})" if sequence.where else f"row {sequence.row_id}"
    return (
        f"{where}: the teacher gave log-probabilities that are not numbers at position "
        f"{sequence.positions[int(wrong.argmax())]}; where its activations overflow, --dtype float32 helps"
    )


def _is_copied(plan: BuildPlan, shard: int, reused: ReusedCaches | None) -> list[bool]:
    """Tells of each row of a shard whether it is copied."""
    if reused is None:
        return [False] * plan.shards[shard].num_sequences
    copied: list[bool] = (read_places(plan.folder, shard)[0] >= 0).tolist()
    return copied


def _checked_copy(sequence: TokenSequence, cached: CachedSequence, layout: Layout) -> SparseTargets:
    if cached.row_id != sequence.row_id:
        raise UserError(f"row {sequence.row_id}: --reuse has row {cached.row_id} there by now; repeat the command")
    _check(sequence, cached.targets, layout, mass_tolerance(layout.precision), "the cache of --reuse")
    return cached.targets


def _check(sequence: TokenSequence, targets: SparseTargets, layout: Layout, tolerance: float, source: str) -> None:
    if len(targets) != len(sequence.positions):
        defect = f"{len(targets)} positions where {len(sequence.positions)} are wanted"
    elif found := find_defect(targets, layout.vocab_size, mass_tolerance=tolerance):
        defect = f"{found[1]} at position {sequence.positions[found[0]]}"
    else:
        return
    raise UserError(f"row {sequence.row_id}: {source} gave {defect}; nothing of this shard is kept")


class ShardWriterThread:
    """A context manager whose thread writes shards with the targets that it is given, in the order of their rows.

    Leaving it with an exception leaves no half shard.
    """

    def __init__(
        self, plan: BuildPlan, shards: Sequence[int], reused: ReusedCaches | None, advance: Callable[[int], None]
    ) -> None:
        self._plan = plan
        self._shards = shards
        self._reused = reused
        self._advance = advance
        self._queue: queue.Queue[SparseTargets | BaseException | None] = queue.Queue(WAITING_SEQUENCES)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="logitcache-writer", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def put(self, targets: SparseTargets) -> None:
        """Hands the targets of a row over; raises what went wrong with an earlier one."""
        self._send(targets)
        if self._error is not None:
            raise self._error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._send(error)
        self._thread.join()
        if self._error is not None and error is None:
            raise self._error

    def _send(self, item: SparseTargets | BaseException | None) -> None:
        while self._error is None:
            try:
                return self._queue.put(item, timeout=1)
            except queue.Full:
                continue

    def _run(self) -> None:
        try:
            scored = self._scored()
            for shard in self._shards:
                write_scored(self._plan, shard, scored, self._reused, self._advance)
            if next(scored, None) is not None:
                raise UserError("the teacher scored more sequences than it was given")
        except BaseException as error:
            self._error = error

    def _scored(self) -> Iterator[SparseTargets]:
        while (item := self._queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
