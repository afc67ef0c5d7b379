"""Refuse arguments that cannot be meant, naming the tensor and the first row that is wrong."""

from math import isfinite

import torch
from torch import Tensor

from trainer.losses.divergences import AKL_SPLITS, DIVERGENCES, DivergenceOptions
from trainer.losses.tail import TAILS, TeacherTargets

# By how much Σp may exceed 1 and a log-probability 0: the rounding of targets that were stored in half precision
# (bfloat16 moves the mass by up to 3e-3), and of any others.
HALF_MASS_TOLERANCE = 5e-3
MASS_TOLERANCE = 1e-4


def check_settings(loss: str, tail: str, temperature: float, options: DivergenceOptions) -> None:
    """Raise ValueError for a name that is not offered, or a number out of range."""
    for setting, received, accepted in (
        ("loss", loss, DIVERGENCES),
        ("tail", tail, TAILS),
        ("akl_split", options.akl_split, AKL_SPLITS),
    ):
        if received not in accepted:
            raise ValueError(f"{setting} is {received!r}; accepted are {', '.join(accepted)}")
    if not (isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature is {temperature}; it must be a positive number")
    if not isfinite(options.beta):
        raise ValueError(f"beta is {options.beta}; it must be a finite number")


def check_shapes(logits: Tensor, targets: TeacherTargets, labels: Tensor | None, vocab_size: int | None) -> None:
    """Raise ValueError where shapes or kinds of numbers do not agree; reads no data."""
    if logits.ndim != 2 or not logits.is_floating_point():
        raise ValueError(f"logits must be floating point [N, V], got {logits.dtype} {list(logits.shape)}")
    n, columns = logits.shape
    if vocab_size is not None and not 0 < vocab_size <= columns:
        raise ValueError(
            f"vocab_size is {vocab_size} but logits have {columns} columns; the student needs a column for every "
            "token of the teacher's vocabulary"
        )
    if targets.token_ids.ndim != 2:
        raise ValueError(f"token_ids must be [N, k], got {list(targets.token_ids.shape)}")
    k = targets.token_ids.shape[1]
    groups = targets.group_logprobs
    num_groups = groups.shape[-1] if groups is not None and groups.ndim else 0
    expected = {
        "token_ids": (targets.token_ids, [n, k]),
        "logprobs": (targets.logprobs, [n, k]),
        "tail_logprob": (targets.tail_logprob, [n]),
        "tempered_tail": (targets.tempered_tail, [n]),
        "tail_groups": (targets.tail_groups, [vocab_size or columns]),
        "group_logprobs": (groups, [n, num_groups]),
        "labels": (labels, [n]),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if list(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape} beside logits {[n, columns]}, got {list(tensor.shape)}")
        integer = name in ("token_ids", "tail_groups", "labels")
        if integer == (tensor.is_floating_point() or tensor.dtype == torch.bool):
            kind = "integer" if integer else "floating point"
            raise ValueError(f"{name} must be {kind}, got {tensor.dtype}")


def check_values(targets: TeacherTargets, labels: Tensor | None, vocabulary: int) -> None:
    """Raise ValueError for values that no teacher gives; reads the data, so it waits for an accelerator."""
    ids, logprobs = targets.token_ids, targets.logprobs
    accepted_ids = f"accepted are 0 … {vocabulary - 1}"
    _refuse(ids, (ids < -1) | (ids >= vocabulary), "token_ids", f"{accepted_ids}, and −1 for padding")
    in_order = ids.sort(dim=1).values
    repeated = (in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] >= 0)
    if bool(repeated.any()):
        row, place = repeated.nonzero()[0].tolist()
        raise ValueError(f"token_ids[{row}] holds token {in_order[row, place].item()} more than once")
    for name, values in (
        ("logprobs", logprobs),
        ("tail_logprob", targets.tail_logprob),
        ("group_logprobs", targets.group_logprobs),
    ):
        if values is not None:
            _refuse(values, ~(values <= _tolerance(values)), name, "a log-probability is at most 0")
    _refuse(
        logprobs, (ids < 0) & (logprobs > -torch.inf), "logprobs", "an entry without a token (id −1) must hold −inf"
    )

    mass = logprobs.double().exp().sum(1)
    tolerance = _tolerance(logprobs)
    _refuse_mass(mass + targets.tail_logprob.double().exp(), tolerance, "logprobs and tail_logprob")
    if targets.group_logprobs is not None:
        _refuse_mass(mass + targets.group_logprobs.double().exp().sum(1), tolerance, "logprobs and group_logprobs")
    if targets.tempered_tail is not None:
        tempered = targets.tempered_tail
        _refuse(tempered, ~(tempered < torch.inf), "tempered_tail", "it must be a number or −inf")
    if targets.tail_groups is not None and targets.group_logprobs is not None:
        num_groups, group_of = targets.group_logprobs.shape[1], targets.tail_groups
        _refuse(
            group_of,
            (group_of < 0) | (group_of >= num_groups),
            "tail_groups",
            f"accepted are 0 … {num_groups - 1}, the columns of group_logprobs",
        )
    if labels is not None:
        _refuse(labels, (labels < 0) | (labels >= vocabulary), "labels", accepted_ids)


def _refuse(values: Tensor, wrong: Tensor, name: str, why: str) -> None:
    """Name the first element of `values` where `wrong` holds."""
    if bool(wrong.any()):
        at = wrong.nonzero()[0].tolist()
        raise ValueError(f"{name}{at} is {values[tuple(at)].item():g}: {why}")


def _tolerance(values: Tensor) -> float:
    return HALF_MASS_TOLERANCE if values.dtype in (torch.float16, torch.bfloat16) else MASS_TOLERANCE


def _refuse_mass(mass: Tensor, tolerance: float, names: str) -> None:
    wrong = mass > 1 + tolerance
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(f"{names} in row {row} hold a probability of {mass[row].item():.6g}, more than 1")
