"""logitcache build: the corpus is planned, its shards are scored or copied, and the cache is finished."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack, overload

from logitcache.assembly.placement import Placement, wait_for
from logitcache.assembly.plan import PLAN_NAME, SHARD_POSITIONS
from logitcache.assembly.resume import begun_plan, finished_cache, made_with
from logitcache.assembly.workspace import lock_range, workspace
from logitcache.assembly.write import complete_shards
from logitcache.capture.executors import capture_here, capture_on_ray
from logitcache.capture.finish import finish_plan
from logitcache.capture.generation.completions import complete_prompts
from logitcache.capture.inputs import Inputs, resolve_inputs
from logitcache.capture.options import InputOptions, passes_on_to
from logitcache.capture.plan import BuildPlan, cache_layout, calibration_files, make_plan
from logitcache.capture.reuse import ReusedCaches
from logitcache.capture.worker import Job, write_scored
from logitcache.errors import UserError
from logitcache.format.manifest import MANIFEST_NAME
from logitcache.format.tokenizer import save_tokenizer
from logitcache.progress import Progress
from logitcache.ranges import one_or_more
from logitcache.reading.cache import LogitCache
from logitcache.storage.atomic import space_needed
from logitcache.storage.folder import Folder, refuse_overlap

logger = logging.getLogger("logitcache")


class BuildOptions(InputOptions, total=False):
    """The options of `build`, but for its shard range."""

    shard_positions: int
    executor: str
    ray_address: str | None
    engines: int | None
    overwrite: bool
    reuse: str | Path | Sequence[str | Path]
    generate: bool
    sampling_params: Mapping[str, Any] | None


@overload
def build(
    teacher: str | None,
    data: str | Sequence[str],
    out: str | Path,
    *,
    shard_range: None = None,
    **options: Unpack[BuildOptions],
) -> LogitCache: ...
@overload
def build(
    teacher: str | None,
    data: str | Sequence[str],
    out: str | Path,
    *,
    shard_range: tuple[int, int],
    **options: Unpack[BuildOptions],
) -> None: ...
@passes_on_to(resolve_inputs)
def build(
    teacher: str | None,
    data: str | Sequence[str],
    out: str | Path,
    *,
    shard_positions: int = SHARD_POSITIONS,
    executor: str = "local",
    ray_address: str | None = None,
    engines: int | None = None,
    shard_range: tuple[int, int] | None = None,
    overwrite: bool = False,
    reuse: str | Path | Sequence[str | Path] = (),
    generate: bool = False,
    sampling_params: Mapping[str, Any] | None = None,
    **options: Unpack[InputOptions],
) -> LogitCache | None:
    """Runs a teacher once over a corpus and writes its sparse targets to a cache.

    The same call continues an interrupted build. Options from `top_k` to `precision` that are None have the values of the build
    that is continued, or else those of the first cache of `reuse`, or else their defaults. vLLM runs in a process of its own:
    call this under `if __name__ == "__main__":`.

    Args:
        teacher: Model name or folder. With backend "openai" it is where the tokenizer is found, by default where the server
            says that it found it.
        data: Files (.jsonl, .jsonl.gz, .jsonl.zst, .parquet, .txt), folders, patterns, or the name of a dataset.
        out: The new cache: a folder, or a URL that fsspec writes.
        shard_positions: Stored positions of a shard, the most that an interruption loses.
        executor: "local", one engine in this process; "ray", several in a cluster.
        ray_address: HOST:PORT of a running Ray cluster. None: one is started on this machine.
        engines: Engines on Ray. None: as many as its GPUs hold.
        shard_range: (i, n): this call scores the i-th of n parts of a build that n processes share; then call `finish`.
        overwrite: Replaces what `out` holds, once the new corpus is read.
        reuse: Finished caches of this teacher and these settings. Their rows are copied, only the others are scored. A call
            that continues a build may name others or none.
        generate: The documents are prompts, which the teacher answers first; then its answers are scored.
        sampling_params: Fields of vLLM's SamplingParams under their own names, with `generate`.
        top_k: Entries of a position. None: 16 with a rank, 64 without one or with a `top_p` below 1, or the whole of a smaller
            vocabulary.
        top_p: Only as many entries are stored as hold this probability mass. None: 1.0, always `top_k`.
        min_k: Entries that `top_p` leaves at least. None: 32, or `top_k`.
        tail_groups: Number of groups of the vocabulary in which the tail's mass is stored. None: 0.
        tail_rank: Coefficients from which the logits of the whole tail are rebuilt. None: 64 where the engine shows the logits
            and there are no tail groups, or fewer if the teacher is narrow; 0 otherwise, and if the corpus is too short for it.
        tail_probes: Random tokens of a position of which is stored what the coefficients leave. None: 2 with a rank.
        temperatures: Temperatures that training may use; the tail's normaliser is stored for each. None: 1 alone.
        tail_entropy: Stores the tail's entropy. None: not.
        tail_samples: Ids drawn from the tail of each position. None: 0.
        precision: "exact", "balanced" or "compact": how finely all that is stored. None: "balanced".
        backend: "vllm", "transformers", "openai" (a running vLLM server), or "auto": vLLM if it is installed.
        capture_route: Of vLLM: "pooling" sees the logits, "flat" gets top-k only, "auto": pooling if it is possible.
        base_url: Address of the server, with backend "openai".
        model: Name by which the server serves the teacher.
        revision: Branch, tag or commit of the model.
        dtype: "float32", "bfloat16", "float16", or "auto": the checkpoint's own.
        trust_remote_code: Runs code that comes with the model.
        attn_implementation: Of transformers. None: an implementation that computes all that the model's configuration says.
        layout: "input_ids", "messages", "prompt-completion" or "text". None: found by the columns.
        chat_template: File with a Jinja template for `messages`, which the cache stores. None: the tokenizer's own.
        turns: Trained answers of a chat: "all", "last", or "each" in a sequence of its own.
        columns: Our name of a column → its name in the source.
        max_length: Longest sequence in tokens, prompt and answer together. None: what the teacher can score, at most 4096.
        long: What happens to longer documents: "split", "truncate" or "skip". None: text is split, others are refused.
        keep: Columns of the source that the cache stores.
        skip_bad: Leaves out, and counts, bad documents and rows for which the teacher gives NaN.
        data_split: Split of a dataset.
        data_config: Configuration of a dataset.
        **engine_options: Options of vLLM under their own names.

    Returns:
        The finished cache; None with a `shard_range`.

    Raises:
        UserError: Bad input, options that contradict each other, or an `out` that holds something else.
    """
    if sampling_params and not generate:
        raise UserError("--sampling-params needs --generate")
    placement = Placement(executor, ray_address, engines, shard_range, "--engines", overwrite)
    if shard_positions < 1:
        raise UserError(f"--shard-positions {shard_positions}: at least 1 is needed")
    folder = Folder(out)
    reused = _reused(one_or_more(reuse), folder)
    inputs = resolve_inputs(teacher, data, (sampling_params or {}) if generate else None, **options)
    with workspace(folder, shared=shard_range is not None), space_needed(out):
        if not placement.is_first and not folder.exists(MANIFEST_NAME):
            wait_for(folder, PLAN_NAME, "has the answers" if inputs.generation else "reads the corpus")
        inputs = _following(inputs, folder, reused, overwrite)
        spec = inputs.spec(shard_positions)
        if not overwrite and (finished := finished_cache(folder, spec)):
            return finished
        if reused:
            reused.check(spec, cache_layout(inputs.settings, inputs.model.vocab_size, {}))
        with lock_range(folder, shard_range):
            plan = begun_plan(BuildPlan, folder, spec, overwrite)
            if plan is None:
                logger.info("reading %s", ", ".join(source.name for source in inputs.sources))
                corpus = complete_prompts(folder, spec, inputs) if inputs.generation else inputs.corpus()
                # The basis of a reused cache is there already.
                fit = None if reused else partial(_fitted, inputs=inputs)
                plan = make_plan(folder, spec, corpus, shard_positions, fit)
            if placement.is_first:
                save_tokenizer(folder, inputs.model.tokenizer)
            job = Job(str(folder.local or out), inputs.model, inputs.engine, plan.settings, reused)
            _announce(plan, job)
            _capture(plan, job, placement)
        if shard_range is None:
            return finish_plan(plan)
    placement.tell_complete(folder)
    return None


def _reused(paths: Sequence[str | Path], out: Folder) -> ReusedCaches | None:
    folders = [Folder(path) for path in paths]
    for folder in folders:
        refuse_overlap(f"--out {out}", out, folder, "the cache of --reuse")
    return ReusedCaches([str(folder.local or folder.path) for folder in folders]) if folders else None


def _following(inputs: Inputs, folder: Folder, reused: ReusedCaches | None, overwrite: bool) -> Inputs:
    """Returns the inputs with what was not given as the cache has it that is continued, or else the one that is reused."""
    begun = made_with(folder, overwrite)
    if begun is not None:
        continued = inputs.following(begun.get("capture", {}), str(folder), defaults_only=overwrite)
        if continued is not inputs or not overwrite:
            return continued
    if reused:
        return inputs.following(reused.capture, f"--reuse {reused.paths[0]}")
    return inputs


def _fitted(plan: BuildPlan, inputs: Inputs) -> BuildPlan:
    if not inputs.settings.tail_parts.rank:
        return plan
    fitted = inputs.fitted(plan.calibration_sequences())
    return replace(plan, spec=fitted.spec(plan.spec["capture"]["shard_positions"]))


def _announce(plan: BuildPlan, job: Job) -> None:
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
    settings = job.settings
    logger.info(
        "teacher: %s on %s, %s, vocabulary %s; up to %d entries per position%s%s, %s",
        job.model.name,
        job.engine,
        job.model.dtype,
        f"{job.model.vocab_size:,}",
        settings.top_k,
        f" and the tail in {settings.tail_parts.groups} groups" if settings.tail_parts.groups else "",
        f" and {settings.tail_parts.rank} coefficients" if settings.tail_parts.rank else "",
        settings.precision,
    )


def _capture(plan: BuildPlan, job: Job, placement: Placement) -> None:
    """Scores, or copies, every shard of this process that is not there yet."""
    mine = placement.shards(len(plan.shards))
    complete = complete_shards(plan, mine)
    missing = [index for index in mine if index not in complete]
    if not missing:
        return
    if placement.shard_range is None:
        plan.folder.remove_leftovers("data")
    if not placement.is_first:
        for name in calibration_files(job.settings.tail_parts):
            wait_for(plan.folder, name, f"has made {name}")
    to_score = {index: plan.shards[index].num_tokens for index in missing}
    if job.reused:
        to_score = _copy(plan, job.reused, missing)
    if not to_score:
        return
    done = sum(plan.shards[index].num_tokens for index in mine if index not in to_score)
    progress = Progress("scoring", done + sum(to_score.values()), done, "tokens")
    try:
        if placement.executor == "ray":
            capture_on_ray(job, plan, to_score, progress, placement.ray_address, placement.workers)
        else:
            capture_here(job, to_score, progress)
    finally:
        progress.close()


def _copy(plan: BuildPlan, reused: ReusedCaches, shards: Sequence[int]) -> dict[int, int]:
    """Writes the shards without a row to score. Returns the other shards, each with its number of tokens to score."""
    reused.take_calibration(plan.folder, plan.settings.tail_parts)
    to_score = reused.match(plan, shards)
    whole = [index for index in shards if not to_score[index]]
    if not whole:
        return to_score
    progress = Progress("copying", sum(plan.shards[index].num_tokens for index in whole), 0, "tokens")
    try:
        for index in whole:
            write_scored(plan, index, iter(()), reused)
            progress.advance(plan.shards[index].num_tokens)
    finally:
        progress.close()
    return {index: tokens for index, tokens in to_score.items() if tokens}
