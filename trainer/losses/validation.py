"""Refuse arguments that cannot be meant, naming the tensor and the first position that is wrong."""

from dataclasses import fields, replace
from math import isfinite

import torch
from torch import Tensor

from trainer.losses.low_rank import LOW_RANK
from trainer.losses.registry import check_divergence
from trainer.losses.settings import LossSettings
from trainer.losses.tail import TAILS, check_tail
from trainer.losses.targets import OF_THE_CACHE, TeacherTargets

# By how much Σp may exceed 1 and a log-probability 0: the rounding of arithmetic, in half precision (bfloat16 moves the
# mass by up to 3e-3) and in any other. A cache rounds by more to save bytes, within a tolerance of its format; a trainer
# scales the masses of a position until they add up again, and only then compares them with this one.
HALF_MASS_TOLERANCE = 5e-3
MASS_TOLERANCE = 1e-4

INDICES = ("token_ids", "tail_groups", "sample_ids", "probe_ids", "labels")
TAIL_NAMES = (*TAILS, LOW_RANK)


def check_settings(settings: LossSettings) -> None:
    """Raise ValueError for a name that is not offered, or a number out of range."""
    check_divergence(settings.loss, settings.loss_args)
    if settings.tail not in TAIL_NAMES:
        raise ValueError(f"tail is {settings.tail!r}; accepted are {', '.join(TAIL_NAMES)}")
    check_temperature(settings.temperature)
    if not 0 <= settings.residual_weight <= 1:
        raise ValueError(f"residual_weight is {settings.residual_weight!r}; it must lie between 0 and 1")


def check_temperature(temperature: float) -> None:
    """Raise ValueError if a temperature is no positive number."""
    number = isinstance(temperature, int | float) and not isinstance(temperature, bool)
    if not (number and isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature is {temperature!r}; it must be a positive number")


def check_targets(
    targets: TeacherTargets,
    labels: Tensor | None,
    settings: LossSettings,
    student: Tensor,
    columns: int,
    *,
    vocab_size: int | None,
    validate: bool,
    counted: Tensor | None = None,
) -> int:
    """Return the size of the teacher's vocabulary. Raise ValueError for targets that do not fit student or settings.

    student: [N, …], logits or hidden states.  columns: logits of a position; the teacher's vocabulary is the first
    `vocab_size` of them, or all.  validate: look at values too, which waits for an accelerator.  counted: [N] bool, the
    positions whose values are looked at; None for all.
    """
    if vocab_size is not None and not 0 < vocab_size <= columns:
        raise ValueError(
            f"vocab_size is {vocab_size} but the student has {columns} columns; it needs one for every token of the "
            "teacher's vocabulary"
        )
    vocabulary = vocab_size or columns
    _check_shapes(targets, labels, student, vocabulary)
    approximate = settings.approximate_temperature and targets.tail_entropy is not None
    check_tail(targets, settings.tail, settings.temperature, approximate)
    if validate:
        if counted is not None:
            targets, labels = _blanked(targets, labels, ~counted)
        _check_values(targets, labels, vocabulary)
    return vocabulary


def _blanked(targets: TeacherTargets, labels: Tensor | None, rows: Tensor) -> tuple[TeacherTargets, Tensor | None]:
    """Blank some rows, bool [N], so that nothing is wrong in them; the others stay in their places."""
    blanked = {}
    for field in fields(targets):
        tensor = getattr(targets, field.name)
        if tensor is not None and field.name not in OF_THE_CACHE:
            mask = rows.reshape(-1, *[1] * (tensor.ndim - 1))
            blanked[field.name] = tensor.masked_fill(mask, -torch.inf if tensor.is_floating_point() else -1)
    return replace(targets, **blanked), None if labels is None else labels.masked_fill(rows, 0)


def _check_shapes(targets: TeacherTargets, labels: Tensor | None, student: Tensor, vocabulary: int) -> None:
    n = len(student)
    if targets.token_ids.ndim != 2:
        raise ValueError(f"token_ids must be [N, k], got {list(targets.token_ids.shape)}")
    k, num_groups, num_samples, rank, num_probes = (
        tensor.shape[1] if tensor is not None and tensor.ndim == 2 else 0
        for tensor in (
            *(targets.token_ids, targets.group_logprobs, targets.sample_ids),
            *(targets.tail_coefficients, targets.probe_ids),
        )
    )
    basis = targets.tail_basis
    expected = {
        "token_ids": (targets.token_ids, [n, k]),
        "logprobs": (targets.logprobs, [n, k]),
        "tail_logprob": (targets.tail_logprob, [n]),
        "tempered_tail": (targets.tempered_tail, [n]),
        "tail_entropy": (targets.tail_entropy, [n]),
        "tail_groups": (targets.tail_groups, [vocabulary]),
        "group_logprobs": (targets.group_logprobs, [n, num_groups]),
        "sample_ids": (targets.sample_ids, [n, num_samples]),
        "sample_logprobs": (targets.sample_logprobs, [n, num_samples]),
        "tail_coefficients": (targets.tail_coefficients, [n, rank]),
        "tail_basis.offset": (basis.offset if basis else None, [vocabulary]),
        "tail_basis.directions": (basis.directions if basis else None, [vocabulary, rank]),
        "tail_basis.weights": (basis.weights if basis else None, [vocabulary]),
        "probe_ids": (targets.probe_ids, [n, num_probes]),
        "probe_residuals": (targets.probe_residuals, [n, num_probes]),
        "labels": (labels, [n]),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if list(tensor.shape) != shape:
            raise ValueError(
                f"{name} must have shape {shape} beside {n} positions and {vocabulary} tokens, got {list(tensor.shape)}"
            )
        if (name in INDICES) == (tensor.is_floating_point() or tensor.dtype == torch.bool):
            kind = "integer" if name in INDICES else "floating point"
            raise ValueError(f"{name} must be {kind}, got {tensor.dtype}")
        if tensor.device != student.device:
            raise ValueError(f"{name} is on {tensor.device}, the student on {student.device}; move it there")


def _check_values(targets: TeacherTargets, labels: Tensor | None, vocabulary: int) -> None:
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
        ("sample_logprobs", targets.sample_logprobs),
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
    if targets.tail_entropy is not None:
        entropy = targets.tail_entropy
        known = targets.tail_logprob > -torch.inf
        _refuse(entropy, known & ~entropy.isfinite(), "tail_entropy", "it must be a number")
    if targets.sample_ids is not None:
        _check_samples(targets, vocabulary)
    if targets.probe_ids is not None:
        wrong = (targets.probe_ids < -1) | (targets.probe_ids >= vocabulary)
        _refuse(targets.probe_ids, wrong, "probe_ids", f"{accepted_ids}, and −1 for padding")
    for name in ("tail_coefficients", "probe_residuals"):
        values = getattr(targets, name)
        if values is not None:
            _refuse(values, ~values.isfinite(), name, "it must be a number")
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


def _check_samples(targets: TeacherTargets, vocabulary: int) -> None:
    sample_ids, token_ids, logprobs = targets.sample_ids, targets.token_ids, targets.sample_logprobs
    assert sample_ids is not None
    wrong = (sample_ids < -1) | (sample_ids >= vocabulary)
    _refuse(sample_ids, wrong, "sample_ids", f"accepted are 0 … {vocabulary - 1}, and −1 for padding")
    entries = token_ids.long().sort(dim=1).values
    if entries.shape[1]:
        place = torch.searchsorted(entries, sample_ids.long()).clamp_max(entries.shape[1] - 1)
        stored = (entries.gather(1, place) == sample_ids) & (sample_ids >= 0)
        _refuse(sample_ids, stored, "sample_ids", "it is an entry already; samples come from the tail")
    if logprobs is None:
        return
    impossible = (sample_ids >= 0) & (logprobs == -torch.inf)
    _refuse(logprobs, impossible, "sample_logprobs", "a token of probability 0 cannot have been drawn")
    in_order, order = sample_ids.sort(dim=1)
    counts_once = in_order >= 0
    counts_once[:, 1:] &= in_order[:, 1:] != in_order[:, :-1]
    mass = (logprobs.gather(1, order).double().exp() * counts_once).sum(1)
    excess = mass > targets.tail_logprob.double().exp() + _tolerance(logprobs)
    _refuse(targets.tail_logprob, excess, "tail_logprob", "it is less than what the samples of this row hold")


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
