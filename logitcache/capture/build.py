"""logitcache.build: plan → shards → finished cache, and the same call again continues where it was stopped."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from logitcache.cache import LogitCache, open_cache
from logitcache.capture.corpus.documents import find_sources
from logitcache.capture.corpus.tokenize import Corpus, CorpusSettings
from logitcache.capture.partition import CALIBRATION_POSITIONS, rank_bands
from logitcache.capture.plan import Plan, make_plan, read_plan, read_request
from logitcache.capture.progress import Progress, duration
from logitcache.capture.request import choose_backend, differences, engine_identity, longest_sequence, refuse_changes
from logitcache.capture.settings import CaptureSettings
from logitcache.capture.teachers.base import LogitTeacher, Teacher, TeacherModel
from logitcache.capture.workspace import remove_former, workspace
from logitcache.errors import UserError
from logitcache.format.atomic import TEMPORARY_SUFFIX, atomic_path, file_sha256, space_needed, write_text
from logitcache.format.codec import FORMAT_VERSION, LOGPROB_STEP, Layout
from logitcache.format.manifest import (
    BUILD_DIRECTORY,
    MANIFEST_NAME,
    TOKENIZER_DIRECTORY,
    Manifest,
)
from logitcache.format.sequences import TokenSequence
from logitcache.format.shards import ShardInfo, ShardWriter
from logitcache.format.tail_groups import TAIL_GROUPS_NAME, read_tail_groups, write_tail_groups
from logitcache.format.targets import find_defect
from logitcache.sharing.card import CARD_NAME, dataset_card
from logitcache.version import __version__

logger = logging.getLogger("logitcache")

SHARD_POSITIONS = 1 << 18


def build(
    teacher: str,
    data: str | Sequence[str],
    out: str | Path,
    *,
    top_k: int = 64,
    top_p: float = 1.0,
    min_k: int | None = None,
    tail_groups: int = 0,
    temperatures: Sequence[float] = (1.0,),
    tail_entropy: bool = False,
    tail_samples: int = 0,
    backend: str = "auto",
    revision: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    layout: str | None = None,
    columns: Mapping[str, str] | None = None,
    max_length: int | None = None,
    long: str | None = None,
    keep: Sequence[str] = (),
    skip_bad: bool = False,
    data_split: str = "train",
    data_config: str | None = None,
    shard_positions: int = SHARD_POSITIONS,
    overwrite: bool = False,
    **engine_options: Any,
) -> LogitCache:
    """Runs a teacher once over a corpus and writes its sparse targets to a cache directory.

    teacher, revision, dtype, trust_remote_code: as in transformers and vLLM; dtype "auto" is the checkpoint's own.
    data, data_split, data_config: see `find_sources`.  layout … skip_bad: see `CorpusSettings`; max_length defaults to what
    the teacher can score, at most 4096.  top_k … tail_samples: see `CaptureSettings`.
    backend: "vllm", "transformers", or "auto": vLLM where it imports and can capture what is asked for.
    shard_positions: stored positions of a shard, the most that an interruption loses.
    overwrite: replace what `out` holds, once the new corpus is read.  engine_options: vLLM's, under their own names.

    The same call continues an interrupted build. Raises UserError for bad input, contradictory settings, and an `out` that
    holds something else. vLLM runs in a process of its own: call this under `if __name__ == "__main__":`.
    """
    root = Path(out)
    model = TeacherModel.load(teacher, revision, dtype, trust_remote_code)
    settings = CaptureSettings.checked(
        model.vocab_size, top_k, top_p, min_k, tail_groups, temperatures, tail_entropy, tail_samples
    )
    backend = choose_backend(backend, settings, engine_options)
    corpus_settings = CorpusSettings(
        max_length=longest_sequence(max_length, model, backend, engine_options),
        layout=layout,
        columns=columns or {},
        long=long,
        keep=tuple(keep),
        skip_bad=skip_bad,
    )
    sources = find_sources(data, data_split, data_config)
    with workspace(root), space_needed(root):
        request = {
            "teacher": model.fingerprint() | engine_identity(backend, engine_options),
            "tokenizer": model.tokenizer_fingerprint(),
            "corpus": corpus_settings.to_json() | {"sources": [source.identity() for source in sources]},
            "capture": settings.to_json() | {"shard_positions": shard_positions},
            "format": {"version": FORMAT_VERSION, "logprob_step": LOGPROB_STEP},
        }
        if not overwrite and (finished := _finished(root, request)):
            logger.info("%s is already complete", root)
            return finished
        plan = _begun(root, request, overwrite)
        if plan is None:
            logger.info("reading %s", ", ".join(source.name for source in sources))
            corpus = Corpus(sources, model.tokenizer, model.vocab_size, corpus_settings)
            plan = make_plan(root, request, corpus, shard_positions)
            remove_former(root)
        _announce(plan, settings, backend, model)
        _capture(plan, model, settings, backend, engine_options)
        return _finish(plan, model, settings)


def _finished(root: Path, request: Mapping[str, Any]) -> LogitCache | None:
    """The cache in `root`, if it is complete and was made from the same request."""
    if not (root / MANIFEST_NAME).exists():
        return None
    try:
        cache = open_cache(root)
    except UserError as error:
        raise UserError(f"{error}, or make the whole cache anew with --overwrite") from error
    refuse_changes(_without_result(cache.manifest.fingerprint), request, root, "a finished cache")
    shutil.rmtree(root / BUILD_DIRECTORY, ignore_errors=True)
    return cache


def _begun(root: Path, request: Mapping[str, Any], overwrite: bool) -> Plan | None:
    """The plan of an interrupted build that this request continues; under `overwrite` no other is refused."""
    recorded = read_request(root)
    if recorded is None or (overwrite and differences(recorded, request)):
        return None
    refuse_changes(recorded, request, root, "an unfinished build")
    if (root / MANIFEST_NAME).exists():
        remove_former(root)  # interrupted between planning and removing the cache that it overwrites
    return read_plan(root)


def _without_result(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """The request in a finished cache's fingerprint."""
    corpus = {name: value for name, value in fingerprint["corpus"].items() if name != "sequences_sha256"}
    return {**fingerprint, "corpus": corpus}


def _announce(plan: Plan, settings: CaptureSettings, backend: str, model: TeacherModel) -> None:
    sequences = sum(shard.num_sequences for shard in plan.shards)
    logger.info(
        "plan: %s positions in %s sequences (layout %s, longest %d tokens) from %s documents, %d shard(s)",
        f"{plan.num_positions:,}",
        f"{sequences:,}",
        plan.layout,
        plan.longest,
        f"{plan.num_documents:,}",
        len(plan.shards),
    )
    if plan.skipped:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in plan.skipped.items())
        logger.info("left out: %s%s", counts, f"; first bad: {plan.first_bad}" if plan.first_bad else "")
    logger.info(
        "teacher: %s on %s, %s, vocabulary %s; up to %d entries per position",
        model.name,
        backend,
        model.dtype,
        f"{model.vocab_size:,}",
        settings.top_k,
    )


def _capture(
    plan: Plan, model: TeacherModel, settings: CaptureSettings, backend: str, engine_options: Mapping[str, Any]
) -> None:
    """Scores every shard that is not there yet."""
    missing = [index for index in range(len(plan.shards)) if plan.finished(index) is None]
    if not missing:
        return
    done = plan.num_positions - sum(plan.shards[index].num_positions for index in missing)
    if done:
        logger.info("continuing: %d of %d shards are complete", len(plan.shards) - len(missing), len(plan.shards))
    for leftover in (plan.root / "data").glob(f"*{TEMPORARY_SUFFIX}"):
        leftover.unlink()
    teacher = _load_teacher(model, settings, backend, plan.longest, engine_options)
    progress = Progress("scoring", plan.num_positions, done, "positions")
    try:
        if settings.tail_groups:
            _partition(plan, cast(LogitTeacher, teacher), settings.tail_groups)
        layout = _layout(plan, model, settings)
        for index in missing:
            plan.record(index, _capture_shard(plan, index, teacher, layout, progress))
    finally:
        progress.close()
        teacher.close()


def _load_teacher(
    model: TeacherModel, settings: CaptureSettings, backend: str, longest: int, engine_options: Mapping[str, Any]
) -> Teacher:
    began = time.monotonic()
    teacher: Teacher
    if backend == "vllm":
        from logitcache.capture.teachers.vllm_engine import VllmTeacher

        logger.info("starting vLLM (tens of seconds)")
        teacher = VllmTeacher(model, settings, longest, engine_options)
    else:
        from logitcache.capture.teachers.hf import TransformersTeacher

        teacher = TransformersTeacher(model, settings)
    logger.info("teacher ready in %s", duration(time.monotonic() - began))
    return teacher


def _partition(plan: Plan, teacher: LogitTeacher, num_groups: int) -> None:
    """Gives the teacher the partition of this build, made once from the first positions of the corpus."""
    path = plan.root / BUILD_DIRECTORY / TAIL_GROUPS_NAME
    if not path.exists():
        sample: list[TokenSequence] = []
        for sequence in plan.sequences(0):
            sample.append(sequence)
            if sum(len(s.positions) for s in sample) >= CALIBRATION_POSITIONS:
                break
        write_tail_groups(path, rank_bands(teacher.mean_probability(sample), num_groups))
    teacher.set_tail_groups(read_tail_groups(path))


def _capture_shard(plan: Plan, index: int, teacher: Teacher, layout: Layout, progress: Progress) -> ShardInfo:
    with ShardWriter(plan.root, plan.shard_name(index), layout) as writer:
        for window in _windows(plan.sequences(index), teacher.window_tokens):
            for sequence, targets in zip(window, teacher.score(window), strict=True):
                if defect := find_defect(targets, layout.vocab_size, mass_tolerance=1e-5):
                    raise UserError(
                        f"row {sequence.row_id}, position {sequence.positions[defect[0]]}: the teacher gave {defect[1]}; "
                        "nothing of this shard is kept"
                    )
                writer.write(sequence, targets)
                progress.advance(len(targets))
    return writer.info


def _windows(sequences: Iterator[TokenSequence], window_tokens: int) -> Iterator[list[TokenSequence]]:
    """Consecutive sequences of about `window_tokens` tokens together."""
    window: list[TokenSequence] = []
    tokens = 0
    for sequence in sequences:
        window.append(sequence)
        tokens += len(sequence.input_ids)
        if tokens >= window_tokens:
            yield window
            window, tokens = [], 0
    if window:
        yield window


def _layout(plan: Plan, model: TeacherModel, settings: CaptureSettings) -> Layout:
    return Layout(
        vocab_size=model.vocab_size,
        num_tail_groups=settings.tail_groups,
        temperatures=settings.temperatures,
        tail_entropy=settings.tail_entropy,
        num_tail_samples=settings.tail_samples,
        columns=plan.column_types,
    )


def _finish(plan: Plan, model: TeacherModel, settings: CaptureSettings) -> LogitCache:
    """Tokenizer, partition and card, then the manifest: from then on the cache exists."""
    shards = tuple(cast(ShardInfo, plan.finished(index)) for index in range(len(plan.shards)))
    fingerprint = {**plan.request, "corpus": plan.request["corpus"] | {"sequences_sha256": plan.sequences_sha256}}
    _save_tokenizer(plan.root, model)
    if settings.tail_groups:
        groups = read_tail_groups(plan.root / BUILD_DIRECTORY / TAIL_GROUPS_NAME)
        write_tail_groups(plan.root / TAIL_GROUPS_NAME, groups)
    files = [*sorted((plan.root / TOKENIZER_DIRECTORY).iterdir()), plan.root / TAIL_GROUPS_NAME]
    digests = {path.relative_to(plan.root).as_posix(): file_sha256(path) for path in files if path.exists()}
    layout = _layout(plan, model, settings)
    manifest = Manifest(layout, fingerprint, shards, plan.skipped, f"logitcache {__version__}", digests)
    for path in (plan.root / "data").iterdir():
        if path.relative_to(plan.root).as_posix() not in {shard.name for shard in shards}:
            path.unlink()  # of a cache that was overwritten
    write_text(plan.root / CARD_NAME, dataset_card(manifest))
    manifest.write(plan.root)
    shutil.rmtree(plan.root / BUILD_DIRECTORY)
    return open_cache(plan.root)


def _save_tokenizer(root: Path, model: TeacherModel) -> None:
    draft = root / BUILD_DIRECTORY / TOKENIZER_DIRECTORY
    model.tokenizer.save_pretrained(draft)
    (root / TOKENIZER_DIRECTORY).mkdir(exist_ok=True)
    for path in draft.iterdir():
        with atomic_path(root / TOKENIZER_DIRECTORY / path.name) as temporary:
            shutil.copyfile(path, temporary)
