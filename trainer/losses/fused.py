"""Hidden states and output projection → loss, in chunks of rows: the logits of a whole batch never exist.

A chunk of logits is a matrix product, becomes its own gradient in place (terms.py), and is multiplied into ∂h and ∂W at
once; backward only scales them. Hence memory C·V for a chunk of C rows instead of N·V, and three matrix products, as
in any training step.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.losses.blocks import row_blocks
from trainer.losses.low_rank import LOW_RANK, student_moments
from trainer.losses.settings import LossSettings
from trainer.losses.targets import TailBasis, TeacherTargets
from trainer.losses.terms import DistillationTerms, TermBuffers, distillation_block
from trainer.losses.transform import LogitTransform
from trainer.losses.validation import check_settings, check_targets, check_temperature

# A chunk of logits has as many elements as the hidden states, but at least these: smaller ones would read and write ∂W
# too often (on a CPU, 128 MB in float32), or leave an accelerator waiting for launches (256 MB in bfloat16).
MIN_CHUNK_ELEMENTS = 2**25
MIN_CHUNK_ELEMENTS_ACCELERATOR = 2**27
# ∂W of a chunk, where it cannot be accumulated in place, is formed in slices that stay in an accelerator's cache.
SLICE_ELEMENTS = 2**22
IGNORED_LABEL = -100


@dataclass(frozen=True)
class Projection:
    """An output projection as a sum of linear maps, raw logits = Σ h_i W_iᵀ + b, and what follows before the softmax.

    One map for a plain head; LoRA adds the pair (scaled A·h, B).
    """

    maps: Sequence[tuple[Tensor, Tensor]]  # hidden [N, D_i], weight [V, D_i]
    bias: Tensor | None = None  # [V]
    transform: LogitTransform = field(default_factory=LogitTransform)


@dataclass(frozen=True)
class Mixture:
    """The objective: kd_factor·Σ kd + ce_factor·Σ cross-entropy over the positions."""

    kd_factor: float
    ce_factor: float


def fused_linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor | None = None,
    logprobs: Tensor | None = None,
    tail_logprob: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    targets: TeacherTargets | None = None,
    loss: str = "todi",
    kd_weight: float | None = None,
    tail: str = "bucket",
    temperature: float = 1.0,
    t_squared: bool = True,
    tempered_tail: Tensor | None = None,
    tail_entropy: Tensor | None = None,
    approximate_temperature: bool = False,
    tail_groups: Tensor | None = None,
    group_logprobs: Tensor | None = None,
    sample_ids: Tensor | None = None,
    sample_logprobs: Tensor | None = None,
    tail_coefficients: Tensor | None = None,
    tail_basis: TailBasis | None = None,
    probe_ids: Tensor | None = None,
    probe_residuals: Tensor | None = None,
    residual_weight: float = 0.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    num_items: int | Tensor | None = None,
    vocab_size: int | None = None,
    validate: bool = True,
    **loss_args: Any,
) -> Tensor:
    """Compute (1−λ)·cross-entropy + λ·T²·divergence of the student `hidden @ weight.T + bias` without its logits [N, V].

    Differentiable once, in hidden, weight and bias. Memory beyond them and their gradients is a chunk of logits, see
    MIN_CHUNK_ELEMENTS. Under autocast the products run in its dtype; reductions and ∂W are float32 (float64 for float64).

    Args:
        hidden: [N, D] floating, the last hidden state of each position.
        weight: [V, D], the output projection; V may exceed the teacher's vocabulary, see `vocab_size`.
        bias: [V] or None.
        labels: [N] integer, the next token of each position; −100 leaves a position out of both terms, whatever its
            targets hold. Looking for it waits for an accelerator.
        kd_weight: λ; by default 0.5 with labels and 1 without.
        t_squared: multiply the divergence by T², so that its gradient keeps its size as T grows.
        logit_scale, logit_softcap: z = softcap·tanh(scale·raw / softcap), as Cohere and Gemma models have them.
        num_items: positions of the whole global batch, by which the sum over these is divided; default: these, without
            those left out.

    The other arguments, and what is raised, are those of `sparse_divergence`.

    Returns:
        scalar, float32 (float64 for float64 hidden states); 0 without positions.
    """
    targets = TeacherTargets.of_call(targets, locals())
    if labels is None and kd_weight not in (None, 1):
        raise ValueError(
            f"kd_weight is {kd_weight:g} but there are no labels for the rest; give labels, or kd_weight 1"
        )
    if kd_weight is None:
        kd_weight = 1.0 if labels is None else 0.5
    if not 0 <= kd_weight <= 1:
        raise ValueError(f"kd_weight is {kd_weight:g}; it must lie between 0 and 1")
    check_temperature(temperature)
    if not 0 < logit_scale < inf:
        raise ValueError(f"logit_scale is {logit_scale:g}; it must be a positive number")
    if not isinstance(num_items, Tensor | None) and not num_items > 0:
        raise ValueError(f"num_items is {num_items}; it must be the positive number of positions of the global batch")
    if logit_softcap is not None and not 0 < logit_softcap < inf:
        raise ValueError(f"logit_softcap is {logit_softcap:g}; it must be a positive number, or None")
    total, terms = fused_distillation_terms(
        Projection([(hidden, weight)], bias, LogitTransform(logit_scale, logit_softcap)),
        targets,
        labels,
        mixture=Mixture(kd_weight * (temperature**2 if t_squared else 1.0), 1 - kd_weight),
        settings=LossSettings(loss, tail, temperature, approximate_temperature, loss_args, residual_weight),
        vocab_size=vocab_size,
        validate=validate,
        counted=None if labels is None else labels != IGNORED_LABEL,
    )
    return total / (max(len(terms.kd), 1) if num_items is None else num_items)


def fused_distillation_terms(
    projection: Projection,
    targets: TeacherTargets,
    labels: Tensor | None,
    *,
    mixture: Mixture,
    settings: LossSettings,
    vocab_size: int | None = None,
    validate: bool = True,
    counted: Tensor | None = None,
) -> tuple[Tensor, DistillationTerms]:
    """Compute the objective summed over the positions, differentiable once, and the terms of each position, which are not.

    Args:
        projection: hidden states [N, D_i] and output projection.
        targets: the teacher at the N positions.
        labels: [N] integer, the next token of each position.
        mixture: the weights of divergence and cross-entropy.
        settings: the loss.
        vocab_size: as for `sparse_divergence`, likewise validate and the errors.
        counted: [N] bool, the positions that count; None for all, without a look that waits for an accelerator.

    Returns:
        scalar, and the terms of each position that counts.
    """
    if labels is None and mixture.ce_factor:
        raise ValueError("the mixture has cross-entropy, which needs labels")
    check_settings(settings)
    _check_projection(projection)
    hidden, weight = projection.maps[0]
    vocabulary = check_targets(
        targets, labels, settings, hidden, len(weight), vocab_size=vocab_size, validate=validate, counted=counted
    )
    maps = projection.maps
    if counted is not None and not bool(counted.all()):
        rows = counted.nonzero()[:, 0]
        targets, labels = targets[rows], None if labels is None else labels[rows]
        maps = [(hidden[rows], weight) for hidden, weight in maps]
    call = _Call(projection.transform, targets, labels, mixture, settings, vocabulary, torch.is_grad_enabled())
    tensors = [tensor for pair in maps for tensor in pair]
    total, *terms = _FusedTerms.apply(call, projection.bias, *tensors)  # type: ignore[no-untyped-call]
    return total, DistillationTerms(*terms)


def rows_per_chunk(hidden: Tensor, vocabulary: int) -> int:
    """Positions whose logits exist at once, for hidden states [N, D]."""
    least = MIN_CHUNK_ELEMENTS if hidden.device.type == "cpu" else MIN_CHUNK_ELEMENTS_ACCELERATOR
    return max(1, max(least, hidden.numel()) // vocabulary)


@dataclass(frozen=True)
class _Call:
    transform: LogitTransform
    targets: TeacherTargets
    labels: Tensor | None
    mixture: Mixture
    settings: LossSettings
    vocabulary: int
    with_gradient: bool


class _FusedTerms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, bias: Tensor | None, *tensors: Tensor) -> tuple[Tensor | None, ...]:
        dtype = _product_dtype(*tensors[:2])
        hiddens = [hidden.to(dtype) for hidden in tensors[0::2]]
        weights = [weight[: call.vocabulary].to(dtype) for weight in tensors[1::2]]
        bias_row = None if bias is None else bias[: call.vocabulary].to(dtype)
        sums = torch.promote_types(dtype, torch.float32)
        needs_grad = [call.with_gradient and needed for needed in ctx.needs_input_grad[1:]]
        grads = _Gradients(tensors, bias, needs_grad, sums, call.vocabulary)

        num_positions = len(hiddens[0])
        targets = call.targets.for_arithmetic(sums)
        labels = None if call.labels is None else call.labels.long()
        buffers = TermBuffers(targets, labels is not None)
        factors = (call.mixture.kd_factor, call.mixture.ce_factor)
        weights_of_terms = [hiddens[0].new_full((), factor, dtype=sums) if factor else None for factor in factors]
        chunk_rows = rows_per_chunk(hiddens[0], call.vocabulary)
        memory = hiddens[0].new_empty(min(chunk_rows, num_positions), call.vocabulary)
        moments = student_moments(hiddens, weights, bias_row, targets, call.settings, call.transform)
        teacher_memory = None
        if (
            call.settings.tail == LOW_RANK and num_positions and memory.device.type == "cpu"
        ):  # others keep what is freed
            teacher_memory = torch.empty_like(memory[row_blocks(memory, LOW_RANK)[0]], dtype=sums)
        for start in range(0, num_positions, chunk_rows):
            rows = slice(start, min(start + chunk_rows, num_positions))
            logits = memory[: rows.stop - start]
            torch.mm(hiddens[0][rows], weights[0].t(), out=logits)
            for hidden, weight in zip(hiddens[1:], weights[1:], strict=True):
                logits.addmm_(hidden[rows], weight.t())
            if bias_row is not None:
                logits.add_(bias_row)
            for block_rows in row_blocks(logits, call.settings.tail):
                raw, positions = logits[block_rows], slice(start + block_rows.start, start + block_rows.stop)
                block_labels = None if labels is None else labels[positions]
                kd_weights, ce_weights = (None if w is None else w.expand(len(raw)) for w in weights_of_terms)
                wanted = (kd_weights, ce_weights) if any(needs_grad) else None
                block = distillation_block(
                    *(raw, targets[positions], block_labels, call.settings, call.transform, wanted),
                    moments=None if moments is None else moments[positions],
                    memory=None if teacher_memory is None else teacher_memory[: len(raw)],
                )
                buffers.write(positions, block)
            grads.add(logits, rows, hiddens, weights)

        ctx.grads, terms = grads, buffers.terms()
        weighted = zip(factors, (terms.kd, terms.cross_entropy), strict=True)
        total = sum(
            (factor * term.sum() for factor, term in weighted if factor and term is not None),
            hiddens[0].new_zeros((), dtype=sums),
        )
        ctx.mark_non_differentiable(*(term for term in terms if term is not None))
        return total, *terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError(
                "backward of the fused loss a second time: its gradient was used up by the first; give that one "
                "retain_graph=True"
            )
        keep = _graph_is_kept()
        grads = ctx.grads.scaled(grad_total, in_place=not keep)
        if not keep:
            ctx.grads = None
        return None, *grads


class _Gradients:
    """Sums of ∂L/∂(bias, hidden, weight, …), each only if it is needed."""

    def __init__(
        self, tensors: Sequence[Tensor], bias: Tensor | None, needed: Sequence[bool], sums: torch.dtype, vocabulary: int
    ) -> None:
        """Allocate the sums. needed: of the bias and then of each tensor.  sums: their dtype over all positions."""
        self._like = [bias, *tensors]
        self._vocabulary = vocabulary
        # Rows of a weight beyond the vocabulary have gradient 0. Rows of a hidden state are written once.
        dtypes = [sums, *(sums if index % 2 else tensor.dtype for index, tensor in enumerate(tensors))]
        self._grads = [
            torch.zeros(tensor.shape, dtype=dtype, device=tensor.device) if need and tensor is not None else None
            for tensor, need, dtype in zip(self._like, needed, dtypes, strict=True)
        ]

    def add(self, logits_grad: Tensor, rows: slice, hiddens: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
        """Add the gradients of a chunk, from that of its logits [C, V]."""
        bias_grad, *others = self._grads
        if bias_grad is not None:
            bias_grad[: self._vocabulary] += logits_grad.sum(0, dtype=bias_grad.dtype)
        for hidden, weight, hidden_grad, weight_grad in zip(hiddens, weights, others[0::2], others[1::2], strict=True):
            if hidden_grad is not None:
                hidden_grad[rows] = logits_grad @ weight
            if weight_grad is not None:
                accumulate_product(weight_grad[: self._vocabulary], logits_grad, hidden[rows])

    def scaled(self, factor: Tensor, in_place: bool) -> list[Tensor | None]:
        """Return the gradients times a scalar, in the dtypes of their tensors; in place they are used up."""
        return [
            None if grad is None or like is None else (grad.mul_(factor) if in_place else grad * factor).to(like.dtype)
            for grad, like in zip(self._grads, self._like, strict=True)
        ]


def _graph_is_kept() -> bool:
    """Tell whether this backward runs with retain_graph=True; taken to be so if torch does not say."""
    tell = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return tell is None or tell()


def accumulate_product(total: Tensor, logits_grad: Tensor, hidden: Tensor) -> None:
    """Add logits_grad [C, V]ᵀ @ hidden [C, D] to total [V, D]; products of half-precision numbers are summed in float32."""
    if total.dtype == logits_grad.dtype:
        total.addmm_(logits_grad.t(), hidden)
        return
    step = max(1, SLICE_ELEMENTS // total.shape[1])
    for start in range(0, len(total), step):
        columns = logits_grad[:, start : start + step].t()
        if total.is_cuda:
            total[start : start + step] += torch.mm(columns, hidden, out_dtype=total.dtype)
        else:
            total[start : start + step].addmm_(columns.to(total.dtype), hidden.to(total.dtype))


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Choose the dtype of the matrix products: autocast's, or else one that holds both tensors without loss."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return torch.promote_types(hidden.dtype, weight.dtype)


def _check_projection(projection: Projection) -> None:
    """Raise ValueError if hidden states, weights and bias do not fit together; no data is read."""
    first_hidden, first_weight = projection.maps[0]
    for hidden, weight in projection.maps:
        for name, tensor in (("hidden", hidden), ("weight", weight)):
            if tensor.ndim != 2 or not tensor.is_floating_point():
                raise ValueError(
                    f"{name} must be floating point with 2 dimensions, got {tensor.dtype} {list(tensor.shape)}"
                )
        if hidden.shape[1] != weight.shape[1]:
            raise ValueError(
                f"hidden [N, D] and weight [V, D] must agree in D, got {list(hidden.shape)} and {list(weight.shape)}"
            )
        if len(hidden) != len(first_hidden) or len(weight) != len(first_weight):
            raise ValueError("every map of a projection must have the same N and V")
    if projection.bias is not None and list(projection.bias.shape) != [len(first_weight)]:
        raise ValueError(f"bias must have shape {[len(first_weight)]}, got {list(projection.bias.shape)}")
