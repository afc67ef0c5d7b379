"""Error of the losses' gradients against float64, for bfloat16 and float32 hidden states and output projection.

    python tools/bench_precision.py

∂h and ∂W, of hidden states and output projection: relative L2 error, ‖g − g₆₄‖ / ‖g₆₄‖. Δ: largest error of a position's
loss, nats. The reference is given the same rounded inputs, so what is left is the error of the arithmetic, and of the
gradient's own rounding to the dtype of what it belongs to (1.7e-3 for bfloat16).

"logits" is a computation in float64 from logits as the matrix product in that dtype gives them: the error that no loss on
such logits avoids. "naive" runs in the dtype throughout: full logits, their log_softmax, a gather, log(1 − Σq) for the
tail, and autograd.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from measure import TrainingStep, machine, synthetic_step
from torch import Tensor

from logitcache.table import aligned
from trainer import sparse_divergence
from trainer.losses.coarse import Coarse
from trainer.losses.fused import Mixture, Projection, fused_distillation_terms
from trainer.losses.registry import divergence_names, evaluate_divergence
from trainer.losses.settings import LossSettings
from trainer.losses.targets import TeacherTargets

DTYPES = (torch.bfloat16, torch.float32)


class Result(NamedTuple):
    """What a training step gets from a loss."""

    hidden_grad: Tensor  # [N, D]
    weight_grad: Tensor  # [V, D]
    value: Tensor  # [N] nats


def fused(hidden: Tensor, weight: Tensor, given: dict[str, Any], loss: str, tail: str) -> Result:
    """Value and gradient of the mean over the positions, through the fused loss."""
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    total, terms = fused_distillation_terms(
        Projection([(hidden, weight)]),
        TeacherTargets(**given),
        None,
        mixture=Mixture(kd_factor=1 / len(hidden), ce_factor=0.0),
        settings=LossSettings(loss, tail),
    )
    hidden_grad, weight_grad = torch.autograd.grad(total, (hidden, weight))
    return Result(hidden_grad, weight_grad, terms.kd)


def naive(hidden: Tensor, weight: Tensor, given: dict[str, Any], loss: str, tail: str) -> Result:
    """The same in the dtype of the hidden states throughout, by autograd from a divergence's own slope onwards."""
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    log_q = F.linear(hidden, weight).log_softmax(1)
    token_ids = given["token_ids"]
    entries = log_q.gather(1, token_ids)
    if tail == "groups":
        q = log_q.exp().scatter(1, token_ids, 0.0)
        log_p_tail = given["group_logprobs"]
        tail_q = torch.zeros_like(log_p_tail, dtype=q.dtype).index_add(1, given["tail_groups"], q).log()
    else:
        below_one = 1 - torch.finfo(log_q.dtype).eps / 2
        tail_q = torch.log1p(-entries.exp().sum(1, keepdim=True).clamp(max=below_one))
        log_p_tail = given["tail_logprob"][:, None]
    log_p = torch.cat([given["logprobs"], log_p_tail], 1).to(log_q.dtype)
    coarse_log_q = torch.cat([entries, tail_q], 1)
    coarse = Coarse(log_p, coarse_log_q.detach(), torch.ones_like(log_p, dtype=torch.bool), entries.shape[1])
    value, slope = evaluate_divergence(loss, coarse, {})
    hidden_grad, weight_grad = torch.autograd.grad((slope * coarse_log_q).sum(1).mean(), (hidden, weight))
    return Result(hidden_grad, weight_grad, value)


def product_alone(hidden: Tensor, weight: Tensor, given: dict[str, Any], loss: str, tail: str) -> Result:
    """The same in float64, but for the logits, which are the matrix product in the dtype of the hidden states."""
    exact_hidden, exact_weight = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    logits = F.linear(exact_hidden, exact_weight)
    logits = logits + (F.linear(hidden, weight).double() - logits).detach()
    given_64: dict[str, Any] = {**_in_float64(given)}
    value = sparse_divergence(logits, **given_64, loss=loss, tail=tail)
    hidden_grad, weight_grad = torch.autograd.grad(value.mean(), (exact_hidden, exact_weight))
    return Result(hidden_grad, weight_grad, value.detach())


def _in_float64(given: dict[str, Tensor]) -> dict[str, Any]:
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in given.items()}


def errors(result: Result, reference: Result) -> list[str]:
    """∂hidden, ∂W and Δ as cells."""
    figures = [(got.double() - true).norm() / true.norm() for got, true in zip(result[:2], reference[:2], strict=True)]
    figures.append((result.value.double() - reference.value).abs().max())
    return [f"{figure:.1e}" for figure in figures]


def rows(step: TrainingStep, loss: str, tail: str, k: int) -> list[str]:
    """Cells of one loss: ours, what rounding in the logits alone does, and the naive way."""
    given = step.stored(k, *(("tail_groups", "group_logprobs") if tail == "groups" else ()))
    reference = fused(step.hidden.double(), step.weight.double(), _in_float64(given), loss, tail)
    ways = (fused, product_alone, naive)
    return [cell for way in ways for cell in errors(way(step.hidden, step.weight, given, loss, tail), reference)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--positions", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--groups", type=int, default=32)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    cells = [["", "inputs", "∂h", "∂W", "Δ", "logits: ∂h", "∂W", "Δ", "naive: ∂h", "∂W", "Δ"]]
    for dtype in DTYPES:
        step, entropy = synthetic_step(
            (options.vocab, options.positions, options.hidden),
            entries=[options.k],
            num_groups=options.groups,
            rank=1,
            temperature=1.0,
            dtype=dtype,
            device=options.device,
        )
        for loss, tail in [*((loss, "bucket") for loss in divergence_names()), ("todi", "groups")]:
            name = f"{loss}, groups G={options.groups}" if tail == "groups" else loss
            cells.append([name, str(dtype).removeprefix("torch."), *rows(step, loss, tail, options.k)])
    where = torch.cuda.get_device_name() if options.device == "cuda" else machine()
    print(
        f"V = {options.vocab:,}, N = {options.positions}, D = {options.hidden}, k = {options.k}, teacher of {entropy:.2f} nats; "
        f"torch {torch.__version__} ({where})"
    )
    print(aligned(cells))


if __name__ == "__main__":
    main()
