"""Finds the checkpoint that a run continues from, and checks that it is of the same run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from logitcache import UserError
from logitcache.errors import is_out_of_memory, one_line
from logitcache.format.manifest import check_shape
from trainer.config.config import DistillConfig, decides_run
from trainer.config.fields import DecidesRun
from trainer.data.training_data import TrainingData
from trainer.run.files import RUN_NAME, STATE_NAME, read_record

PLANNED = ("packing", "tokens_per_batch")  # and grouping by length: the number of batches depends on all epochs
NUMBER = int | float | None
STATE_SHAPE = {
    "global_step": int,
    "log_history": [{...: object}],
    "stateful_callbacks": ({...: dict | list},),
    "best_metric": (NUMBER,),
    "best_global_step": (int | None,),
    "best_model_checkpoint": (str | None,),
    "train_batch_size": (int | None,),
    "epoch": (NUMBER,),
    "num_input_tokens_seen": (int,),
    "total_flos": (NUMBER,),
}
SCHEDULE_SHAPE = {"last_epoch": int, "rates": [float]}
RECORD_SHAPE = {
    "settings": dict,
    "tail": str,
    "run_id": (str,),
    "world_size": (int,),
    "cache": {"path": str, "num_positions": int, "caches": ([{"path": str, "fingerprint": dict}],)},
}


class RunMark(TrainerCallback, ExportableState):
    """Writes the id of the run into the state of each checkpoint. Checkpoints hold it under the name of this class."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id

    def state(self) -> dict[str, Any]:
        """Returns the id as the state of a checkpoint holds it."""
        return {"args": {"run_id": self._run_id}, "attributes": {}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Makes a place for the id in the state of a checkpoint of an earlier version."""
        state.stateful_callbacks[type(self).__name__] = self.state()


def run_id(checkpoint: str | None) -> str:
    """Return the id of the run to which a checkpoint belongs, or a new id."""
    known = _mark(checkpoint) or _former(checkpoint).get("run_id") if checkpoint else None
    return known or uuid4().hex


def checkpoint_state(checkpoint: str | Path) -> dict[str, Any] | None:
    """Read transformers' state of a checkpoint; None if it is not whole, since the state is written last."""
    try:
        return read_record(Path(checkpoint) / STATE_NAME)
    except UserError:
        return None


def step_of(checkpoint: str | None) -> int:
    """Return the step of a checkpoint, after which a run continues; 0 without one."""
    state = checkpoint_state(checkpoint) if checkpoint else None
    return state["global_step"] if state else 0


def last_checkpoint(folder: Path) -> str | None:
    """Find the latest whole checkpoint of the run that the folder's run.json describes, not one of a former run."""
    steps = {path.name.rpartition("-")[2]: str(path) for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")}
    for step in sorted(filter(str.isdecimal, steps), key=int, reverse=True):
        if checkpoint_state(steps[step]) is not None and not _of_former_run(steps[step]):
            return steps[step]
    return None


def find_checkpoint(config: DistillConfig) -> str | None:
    """Find the checkpoint that --resume_from_checkpoint means. Raises UserError if there is none."""
    wanted = config.resume_from_checkpoint
    if wanted is None:
        return None
    if wanted.lower() == "true":
        last = last_checkpoint(Path(str(config.output_dir)))
        if last is None:
            raise UserError(
                f"--resume_from_checkpoint true: {config.output_dir} holds no checkpoint to continue from (those of "
                f"former runs do not count, only of the one in its {RUN_NAME}). Leave it out to begin"
            )
        wanted = last
    if (state := checkpoint_state(wanted)) is None:
        raise UserError(f"--resume_from_checkpoint {wanted}: not a checkpoint of a run (it has no whole {STATE_NAME})")
    with checkpoint_read(wanted, f"its {STATE_NAME}"):
        check_shape(state, STATE_SHAPE, STATE_NAME)
        TrainerState(**state)
    return wanted


@contextmanager
def checkpoint_read(checkpoint: str | None, what: str) -> Iterator[None]:
    """Turn any error of reading a file of a checkpoint into a UserError that names `what`, while the block runs."""
    try:
        yield
    except Exception as error:
        if checkpoint is None or is_out_of_memory(error):
            raise
        raise UserError(
            f"--resume_from_checkpoint {checkpoint}: {what} cannot be read ({type(error).__name__}: {one_line(error)}). Continue "
            "from another checkpoint, or leave it out to begin anew"
        ) from error


def check_scheduler(scheduler: Any) -> None:
    """Raises TypeError if the loaded file was no schedule of a learning rate."""
    check_shape({"last_epoch": scheduler.last_epoch, "rates": scheduler.get_last_lr()}, SCHEDULE_SHAPE, "scheduler.pt")


def data_record(data: TrainingData) -> dict[str, Any]:
    """Describe for run.json the caches that a run learns from. weight: a cache's share of the rows, None without weights."""
    weights = data.weights or []
    shares: list[float | None] = [round(weight / sum(weights), 9) for weight in weights]
    shares = shares or [None] * len(data.caches)
    mixed = [(cache, share, False) for cache, share in zip(data.caches, shares, strict=True)]
    caches = [
        {"path": cache.path, "identity": cache.identity, "fingerprint": dict(cache.manifest.fingerprint)}
        | {"weight": share, "averaged": averaged}
        for cache, share, averaged in [*mixed, *((cache, None, True) for cache in data.averaged_with)]
    ]
    return {"path": data.path, "num_positions": data.num_positions, "caches": caches}


def check_same_run(checkpoint: str, config: DistillConfig, data: TrainingData, tail: str) -> list[str]:
    """Compares a run with the run.json beside the checkpoint it continues from; returns warnings.

    Raises UserError that names what differs, and for a checkpoint that a former run left in the folder.
    """
    path = Path(checkpoint).parent / RUN_NAME
    former = read_record(path, **RECORD_SHAPE)
    if former is None:
        return [f"{path.parent} has no {RUN_NAME}: nothing checks that {checkpoint} is of a run with these settings"]
    if _of_former_run(checkpoint):
        raise UserError(
            f"--resume_from_checkpoint {checkpoint}: a former run left it, and {path} is of the one that began in this "
            f"folder after it. Name a checkpoint of that; --student {checkpoint} begins a run with the weights of this one"
        )
    was, now = former["settings"], config.recorded()
    planned = config.train_sampling_strategy == "group_by_length" or any(getattr(config, name) for name in PLANNED)
    judged = was.get("load_best_model_at_end") or config.load_best_model_at_end
    decisive = {DecidesRun.ALWAYS: True, DecidesRun.IF_PLANNED: planned, DecidesRun.IF_JUDGED: judged}
    pairs = [(name, was.get(name, now[name]), now[name]) for name in now if decisive.get(decides_run(name))]
    pairs.append(("tail", former["tail"], tail))
    differing = [f"--{name} was {before}, is {after}" for name, before, after in pairs if before != after]
    ranks = former.get("world_size", config.world_size)
    if ranks != config.world_size:
        differing.append(
            f"the number of ranks was {ranks}, is {config.world_size}, and with it differ the rows that each reads and "
            f"how many a step takes (--per_device_train_batch_size × ranks): start {ranks}"
        )
    differing += _differing_data(former["cache"], data_record(data))
    if differing:
        raise UserError(
            f"--resume_from_checkpoint {checkpoint}: {path} is of another run: {'; '.join(differing)}. Continue with "
            "the former settings, or start a run of its own without --resume_from_checkpoint, in another --output_dir"
        )
    return []


def _differing_data(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Compares caches, which may have moved or been recoded. Earlier versions recorded one cache, or no weights."""

    def of_all(record: dict[str, Any], name: str) -> list[Any]:
        return [cache.get(name) for cache in record.get("caches", [record])]

    another = [f"the cache was {was['path']}, and {now['path']} is another one"]
    if of_all(was, "fingerprint") != of_all(now, "fingerprint"):
        return another
    if None not in of_all(was, "averaged"):
        if of_all(was, "averaged") != of_all(now, "averaged"):
            return [f"--average_with was {_averaged(was)}, is {_averaged(now)}"]
        if (before := of_all(was, "weight")) != (after := of_all(now, "weight")):
            return [f"the shares of the caches' rows were {before}, are {after} (None: each row once)"]
    return another if was["num_positions"] != now["num_positions"] else []


def _averaged(record: dict[str, Any]) -> list[str]:
    return [cache["path"] for cache in record["caches"] if cache["averaged"]]


def _of_former_run(checkpoint: str) -> bool:
    """Tells whether checkpoint and run.json name different runs. Earlier versions named none."""
    mark, current = _mark(checkpoint), _former(checkpoint).get("run_id")
    return None not in (mark, current) and mark != current


def _mark(checkpoint: str) -> str | None:
    found: Any = checkpoint_state(checkpoint)
    for name in ("stateful_callbacks", RunMark.__name__, "args", "run_id"):
        found = found.get(name) if isinstance(found, dict) else None
    return found if isinstance(found, str) else None


def _former(checkpoint: str) -> dict[str, Any]:
    return read_record(Path(checkpoint).parent / RUN_NAME) or {}
