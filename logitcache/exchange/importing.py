"""logitcache import: other people's logit datasets become a cache."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Unpack, overload

from logitcache.assembly.finalize import finalize_cache, history_step, trusted_files
from logitcache.assembly.make import Work, make_cache
from logitcache.assembly.placement import OutputOptions, Placement
from logitcache.assembly.plan import SHARD_POSITIONS, Plan, PlannedShard
from logitcache.assembly.write import RowsOf, StoredRow
from logitcache.errors import UserError, one_line
from logitcache.exchange.formats import FORMATS, SourceFormat
from logitcache.exchange.import_plan import ImportPlan, Written, bad_row, cut, no_positions, rows_from
from logitcache.exchange.sequences import SequenceReader
from logitcache.exchange.source_files import SourceFile, find_sources
from logitcache.exchange.source_rows import SourceRow
from logitcache.exchange.tails import APPROXIMATE, finish_targets
from logitcache.exchange.values import BadRow
from logitcache.format.manifest import MAX_VOCAB_SIZE, Manifest
from logitcache.format.quantization import DEFAULT_PRECISION, check_precision
from logitcache.format.sequences import stored_columns
from logitcache.format.shards import ShardInfo
from logitcache.format.tail_parts import TAIL_FILES
from logitcache.format.tokenizer import save_tokenizer, tokenizer_fingerprint
from logitcache.ranges import one_or_more
from logitcache.reading.cache import LogitCache
from logitcache.storage.folder import Folder
from logitcache.urls import public_url
from logitcache.version import CREATED_BY

logger = logging.getLogger("logitcache")


class ImportOptions(OutputOptions, total=False):
    """The options of `import_logits` that may be left out, but for its shard range."""

    vocab_size: int | None
    config: str | None
    loss_mask: str | None
    top_k: int | None
    precision: str
    keep: Sequence[str]
    data_name: str | None
    skip_bad: bool


@overload
def import_logits(
    sources: str | Sequence[str],
    out: str | Path,
    *,
    source_format: str,
    teacher: str,
    tokenizer: str,
    shard_range: None = None,
    **options: Unpack[ImportOptions],
) -> LogitCache: ...
@overload
def import_logits(
    sources: str | Sequence[str],
    out: str | Path,
    *,
    source_format: str,
    teacher: str,
    tokenizer: str,
    shard_range: tuple[int, int],
    **options: Unpack[ImportOptions],
) -> None: ...
def import_logits(
    sources: str | Sequence[str],
    out: str | Path,
    *,
    source_format: str,
    teacher: str,
    tokenizer: str,
    vocab_size: int | None = None,
    config: str | None = None,
    loss_mask: str | None = None,
    top_k: int | None = None,
    precision: str = DEFAULT_PRECISION,
    keep: Sequence[str] = (),
    data_name: str | None = None,
    skip_bad: bool = False,
    shard_positions: int = SHARD_POSITIONS,
    executor: str = "local",
    ray_address: str | None = None,
    workers: int | None = None,
    shard_range: tuple[int, int] | None = None,
    overwrite: bool = False,
) -> LogitCache | None:
    """Writes the rows of a logit dataset in another tool's format to a cache.

    The same call continues an interrupted one.

    Args:
        sources: .parquet and .jsonl[.gz|.zst] files, folders and patterns, local or at any URL that fsspec reads.
        out: The new cache: a folder, or a URL that fsspec writes.
        source_format: "distillkit" or "topk".
        teacher: Name of the model that gave the log-probabilities.
        tokenizer: Its tokenizer, a model name or folder.
        vocab_size: Tokens that the log-probabilities are normalised over. None: what the format says, or the tokenizer.
        config: File with DistillKit's configuration. None: it lies beside the data.
        loss_mask: Column of 0 and 1 for each token, or of labels. None: every mask of a known name, which must agree; without
            one all tokens but a row's first are trained.
        top_k: The most probable entries that are kept. None: all.
        precision: "exact", "balanced" or "compact": how finely they are stored.
        keep: Columns of the source that the cache stores.
        data_name: Name of the corpus in the cache. None: the source's name.
        skip_bad: Leaves bad rows out and counts them.
        shard_positions: Stored positions of a shard.
        executor: "local", this process; "ray", several in a cluster.
        ray_address: HOST:PORT of a running Ray cluster. None: one is started on this machine.
        workers: Processes on Ray, with a core each. None: as many as the cluster has cores.
        shard_range: (i, n): this call writes the i-th of n parts of the shards, which n processes share; then call `finish`.
        overwrite: Replaces what `out` holds.

    Returns:
        The new cache; None with a `shard_range`.

    Raises:
        UserError: Bad input (the message names file and row), or settings or sources that `out` was not begun with.
    """
    placement = Placement(executor, ray_address, workers, shard_range, overwrite=overwrite)
    if source_format not in FORMATS:
        raise UserError(f"--from {source_format}: choose one of {', '.join(FORMATS)}")
    check_precision(precision)
    for name, value in [("shard-positions", shard_positions), ("top-k", top_k), ("vocab-size", vocab_size)]:
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: at least 1 is needed")
    found = find_sources(one_or_more(sources))
    kind = FORMATS[source_format](found, config)
    loaded, num_known = _load_tokenizer(tokenizer)
    vocabulary = vocab_size or kind.vocab_size or num_known
    if vocabulary > MAX_VOCAB_SIZE:
        raise UserError(f"--vocab-size {vocabulary}: at most {MAX_VOCAB_SIZE:,} tokens are read")
    reader = SequenceReader(
        loss_mask or kind.loss_mask, loss_mask is not None, min(num_known, vocabulary), tuple(one_or_more(keep))
    )
    job = _Job(
        kind=kind,
        files=[file for source in found for file in source.files],
        reader=reader,
        vocab_size=vocabulary,
        top_k=top_k,
        precision=precision,
        skip_bad=skip_bad,
    )
    folder = Folder(out)
    folder.check_writable()
    for source in found:
        if source.is_folder and folder.lies_in(Folder(source.argument)):
            raise UserError(f"--out {out}: lies in {source.argument}, which is read; choose a folder beside it")
    logger.info("reading %s", ", ".join(public_url(source.argument) for source in found))
    tokens = tokenizer_fingerprint(loaded)
    named = {"name": public_url(data_name)} if data_name else {}
    spec = {
        "command": "import",
        "source_format": source_format,
        **kind.settings,
        "teacher": public_url(teacher),
        "vocabulary": tokens["vocabulary_sha256"][:16],
        "vocab_size": vocabulary,
        "top_k": top_k,
        "precision": precision,
        "loss_mask": reader.mask,
        "keep": list(keep),
        "skip_bad": skip_bad,
        "shard_positions": shard_positions,
        "from": [{**source.identity(), **named} for source in found],
    }

    def prepare(folder: Folder) -> None:
        for name in TAIL_FILES:
            folder.remove(name)
        save_tokenizer(folder, loaded)

    work = Work(
        kind=ImportPlan,
        spec=spec,
        label="importing",
        cut=lambda folder: cut(folder, spec, job.files, reader, tokens),
        prepare=prepare,
        layout=lambda plan: plan.cache_layout,
        open_rows=job.rows,
        finish=lambda plan, shards: finish_import(replace(plan, tokenizer=tokens), shards),
    )
    return make_cache(work, folder, placement, overwrite)


@dataclass(frozen=True)
class _Job:
    """Knows how rows are read, and what is stored of them; it travels to other hosts."""

    kind: SourceFormat
    files: Sequence[SourceFile]
    reader: SequenceReader
    vocab_size: int
    top_k: int | None
    precision: str
    skip_bad: bool

    def rows(self, plan: Plan) -> RowsOf:
        """Returns what yields the rows of a shard."""
        return _Rows(self, plan).of

    def read(self, row: SourceRow, types: Mapping[str, str], written: Written) -> StoredRow | None:
        """Returns what a shard stores of a row; None if the row is left out, which `written` counts."""
        try:
            tokens = self.reader.read(row)
            if reason := no_positions(tokens):
                written.skipped[reason] += 1
                return None
            positions = tokens.positions
            ids, logprobs, tail = self.kind.read(row, positions, len(tokens.input_ids))
            targets, num_scaled = finish_targets(
                ids,
                logprobs,
                tail,
                positions,
                vocab_size=self.vocab_size,
                top_k=self.top_k,
                precision=self.precision,
                most_mass=self.kind.most_mass,
            )
            columns = stored_columns(types, tokens.columns)
        except (BadRow, TypeError) as error:
            if not self.skip_bad:
                raise bad_row(row, error) from error
            written.skipped["bad"] += 1
            written.first_bad = written.first_bad or f"{row.where}: {error}"
            return None
        written.num_scaled += num_scaled
        written.num_approximate += 0 if tail is not None else len(targets)
        written.most_entries = max(written.most_entries, targets.token_ids.shape[1])
        return replace(tokens, columns=columns), targets


class _Rows:
    """Yields the rows of shard after shard: where one follows the other, reading goes on."""

    def __init__(self, job: _Job, plan: Plan) -> None:
        self._job, self._plan = job, plan
        self._columns = [*job.reader.columns, *(name for name in job.kind.columns if name not in job.reader.columns)]
        self._stream: Iterator[tuple[int, int, SourceRow]] = iter(())
        self._after: tuple[int, int] | None = None

    def of(self, index: int) -> Iterator[StoredRow]:
        """Yields the stored rows of a shard; records its counts after the last of them."""
        written, row_ids = Written(), []
        for row in self._source_rows(self._plan.shards[index]):
            stored = self._job.read(row, self._plan.column_types, written)
            if stored is not None:
                row_ids.append(stored[0].row_id)
                yield stored
        written.record(self._plan.folder, index, row_ids)

    def _source_rows(self, shard: PlannedShard) -> Iterator[SourceRow]:
        if (shard.file, shard.row) != self._after:
            self._stream = rows_from(self._job.files, self._columns, (shard.file, shard.row))
        missing = shard.num_sequences
        for file, row, values in islice(self._stream, shard.num_sequences):
            self._after = (file, row + 1)
            missing -= 1
            yield values
        if missing:
            raise UserError("the sources were changed while they were read: import them again with --overwrite")


def finish_import(plan: ImportPlan, shards: Sequence[ShardInfo]) -> LogitCache:
    """Makes a cache of all shards. Raises UserError if none of them has a row, and for the plan of an earlier version."""
    if not plan.tokenizer:
        raise UserError(f"{plan.folder} was begun by an earlier version: run the same command again")
    folder, spec, layout = plan.folder, plan.spec, plan.cache_layout
    digest, total = hashlib.sha256(), Written()
    for index in range(len(plan.shards)):
        written, row_ids = Written.of(folder, index)
        digest.update(row_ids.encode())
        total.add(written)
    kept = tuple(shard for shard in shards if shard.num_sequences)
    if not kept:
        raise UserError(f"no row could be imported: {_counted(total.skipped)}; the first bad one: {total.first_bad}")
    step = history_step(spec, kept, scaled=total.num_scaled)
    fingerprint = {
        "teacher": {
            "name": spec["teacher"],
            "architecture": "unknown",
            "dtype": "unknown",
            "engine": spec["source_format"],
            "engine_version": "",
            "vocab_size": layout.vocab_size,
        },
        "tokenizer": plan.tokenizer,
        "corpus": {
            "sources": [{name: value for name, value in source.items() if name != "path"} for source in spec["from"]],
            "keep": spec["keep"],
            "skip_bad": spec["skip_bad"],
            "loss_mask": spec["loss_mask"],
            "sequences_sha256": digest.hexdigest(),
        },
        "source": {"format": spec["source_format"], "config": spec.get("config")},
        "capture": {
            "top_k": total.most_entries,
            "top_p": 1.0,
            "min_k": total.most_entries,
            **layout.tail_parts.to_json("option"),
            "precision": layout.precision,
            "shard_positions": spec["shard_positions"],
            **({"tail": APPROXIMATE} if total.num_approximate else {}),
        },
        "format": layout.stored_format,
    }
    files = trusted_files(folder)
    cache = finalize_cache(folder, Manifest(layout, fingerprint, kept, dict(total.skipped), CREATED_BY, files, (step,)))
    if total.num_scaled:
        logger.info("%s of %s positions held more than 1: scaled", f"{total.num_scaled:,}", f"{step['positions']:,}")
    if total.skipped:
        bad = f"; first bad: {total.first_bad}" if total.first_bad else ""
        logger.info("left out: %s%s", _counted(total.skipped), bad)
    return cache


def _counted(skipped: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in skipped.items()) or "nothing"


def _load_tokenizer(name: str) -> tuple[Any, int]:
    """Loads a tokenizer; returns it and the number of ids that it knows. Raises UserError if there is none."""
    try:
        from transformers import AutoTokenizer
    except ModuleNotFoundError as error:
        raise UserError(
            "transformers is not installed, which loads the tokenizer: pip install 'logitcache[exchange]'"
        ) from error
    path = Path(name).expanduser()
    if name.startswith((".", "/", "~")) and not path.is_dir():
        raise UserError(f"--tokenizer {name}: no such folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path.absolute()) if path.is_dir() else name)
    except Exception as error:  # of the hub client, of damaged files: any kind
        raise UserError(f"--tokenizer {name}: does not load ({one_line(error)})") from error
    return tokenizer, max(tokenizer.get_vocab().values(), default=-1) + 1
