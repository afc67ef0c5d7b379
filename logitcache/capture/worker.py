"""One engine at work on shards: scoring in this thread, checking, encoding and writing in another."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from types import TracebackType
from typing import Self, cast

from logitcache.capture.engine import Engine
from logitcache.capture.partition import CALIBRATION_POSITIONS, rank_bands
from logitcache.capture.plan import PARTITION_NAME, Plan, read_plan
from logitcache.capture.settings import CaptureSettings
from logitcache.capture.teachers.base import LogitTeacher, Teacher, TeacherModel
from logitcache.capture.teachers.start import start_teacher
from logitcache.errors import UserError
from logitcache.format.sequences import TokenSequence
from logitcache.format.shards import ShardWriter
from logitcache.format.storage import Folder
from logitcache.format.tail_groups import read_tail_groups, write_tail_groups
from logitcache.format.targets import SparseTargets, find_defect

CALIBRATION_SEQUENCES = 256
"""An engine may return a distribution over the vocabulary for each."""
WAITING_SEQUENCES = 16
"""Scored sequences that may wait to be written: then the engine waits."""

Scored = tuple[int, TokenSequence, SparseTargets]


@dataclass(frozen=True)
class Job:
    """What a process must know to score shards of a build; travels to other hosts."""

    out: str
    model: TeacherModel
    engine: Engine
    settings: CaptureSettings


class ShardWorker:
    """A teacher and the plan that it works on."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._plan = read_plan(Folder(job.out))

    def start(self) -> None:
        """Loads the teacher. Raises UserError where it does not load."""
        self._teacher: Teacher = start_teacher(
            self._job.model, self._job.engine, self._plan.longest, self._job.settings.top_k
        )

    def make_partition(self) -> None:
        """Cuts the vocabulary into tail groups by the first positions of the corpus, unless that has been done."""
        if not self._job.settings.tail_groups or self._plan.folder.exists(PARTITION_NAME):
            return
        probability = cast(LogitTeacher, self._teacher).mean_probability(_calibration(self._plan))
        write_tail_groups(self._plan.folder, rank_bands(probability, self._job.settings.tail_groups), PARTITION_NAME)

    def capture(self, indices: Iterable[int], advance: Callable[[int], None] = lambda tokens: None) -> None:
        """Scores shards one after the other, without a pause between them, and records each when it is complete.

        advance: told the tokens of every sequence that was written. Raises UserError where the teacher's rows cannot be.
        """
        if self._job.settings.tail_groups:
            with self._plan.folder.open(PARTITION_NAME) as file:
                cast(LogitTeacher, self._teacher).set_tail_groups(read_tail_groups(file))
        submitted: deque[tuple[int, TokenSequence]] = deque()

        def sequences() -> Iterator[TokenSequence]:
            for index in indices:
                for sequence in self._plan.sequences(index):
                    submitted.append((index, sequence))
                    yield sequence

        with _ShardThread(self._plan, advance) as shards:
            for targets in self._teacher.score(sequences(), self._job.settings):
                shards.put((*submitted.popleft(), targets))

    def close(self) -> None:
        """Frees the engine."""
        self._teacher.close()


def _calibration(plan: Plan) -> Iterator[TokenSequence]:
    positions = 0
    for sequence in islice(plan.sequences(0), CALIBRATION_SEQUENCES):
        yield sequence
        positions += len(sequence.positions)
        if positions >= CALIBRATION_POSITIONS:
            return


class _ShardThread:
    """Context manager: a thread that writes what it is given. Leaving it with an exception leaves no half shard."""

    def __init__(self, plan: Plan, advance: Callable[[int], None]) -> None:
        self._plan = plan
        self._layout = plan.cache_layout
        self._advance = advance
        self._queue: queue.Queue[Scored | BaseException | None] = queue.Queue(WAITING_SEQUENCES)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="logitcache-writer", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def put(self, scored: Scored) -> None:
        """Hands a sequence over; raises what went wrong with an earlier one."""
        self._send(scored)
        if self._error is not None:
            raise self._error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._send(error)
        self._thread.join()
        if self._error is not None and error is None:
            raise self._error

    def _send(self, item: Scored | BaseException | None) -> None:
        while self._error is None:
            try:
                return self._queue.put(item, timeout=1)
            except queue.Full:
                continue

    def _run(self) -> None:
        try:
            for index, shard in groupby(self._scored(), key=lambda scored: scored[0]):
                with ShardWriter(self._plan.folder, self._plan.shard_name(index), self._layout) as writer:
                    written = 0
                    for _, sequence, targets in shard:
                        self._check(sequence, targets)
                        writer.write(sequence, targets)
                        self._advance(len(sequence.input_ids))
                        written += 1
                    self._check_count(index, written)
                self._plan.record(index, writer.info)
        except BaseException as error:
            self._error = error

    def _scored(self) -> Iterator[Scored]:
        while (item := self._queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def _check_count(self, index: int, written: int) -> None:
        if written != (planned := self._plan.shards[index].num_sequences):
            raise UserError(
                f"shard {index}: the teacher scored {written} of {planned} sequences; nothing of this shard is kept"
            )

    def _check(self, sequence: TokenSequence, targets: SparseTargets) -> None:
        if defect := find_defect(targets, self._layout.vocab_size, mass_tolerance=1e-5):
            raise UserError(
                f"row {sequence.row_id}, position {sequence.positions[defect[0]]}: the teacher gave {defect[1]}; "
                "nothing of this shard is kept"
            )
