"""What the tests of the losses share: slow, obvious float64 references, and the three ways to the same loss."""

import itertools
import os
from collections.abc import Sequence
from math import inf
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import trainer
from tests.helpers.matrix import matrix_unless
from trainer.losses import blocks
from trainer.losses.fused import Mixture, Projection, fused_distillation_terms
from trainer.losses.settings import LossSettings
from trainer.losses.targets import TeacherTargets

# Without a GPU the kernels run in Triton's interpreter, which must be chosen before anything imports Triton. It is slow, and
# kernels know nothing of divergences: three will do.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
OTHERS = [] if INTERPRETED else ["rkl", "jsd", "jeffreys", "sfkl", "srkl", "tvd", "ab"]
LOSSES = ["fkl", "akl", "todi", *OTHERS]
# AKL is a mixture with a weight of its own and α–β no f-divergence at its defaults: no bound holds for them.
F_DIVERGENCES = [loss for loss in LOSSES if loss not in ("akl", "ab")]
# The value of ToDi and AKL is not what their gradient is the derivative of, and that of TVD has kinks.
SMOOTH = [loss for loss in LOSSES if loss not in ("akl", "todi", "tvd")]
TREATMENTS = [  # (tail, temperature)
    ("groups", 1.0),
    *((tail, T) for tail in ("bucket", "cap", "samples", "ignore", "renormalise", "uniform") for T in (1.0, 2.0)),
]
TAILS = list(dict(TREATMENTS))
CUDA = torch.cuda.is_available()
PATHS = ["kernel"] if INTERPRETED else ["unfused", "fused", *(["kernel"] if CUDA else [])]


def every_loss_with_every_tail(*paths: str, tails: Sequence[str] = TAILS) -> pytest.MarkDecorator:
    """Parametrises a test by loss, tail and temperature, and by `path` where several are given.

    The normal run has each loss × tail once, each tail by every path at every temperature: losses see no tail, and tails no
    loss. Kernels see neither: in the interpreter each tail comes once a temperature, with the losses in turn. `-m matrix`
    has the rest of the product.
    """
    ways, names, cases = paths or ("",), ["loss", "tail", "temperature", *(["path"] if paths else [])], []
    for loss, (tail, temperature), way in itertools.product(LOSSES, TREATMENTS, ways):
        if tail not in tails:
            continue
        turn = LOSSES.index(loss) + TAILS.index(tail)
        hot = tail != "groups" and turn // len(ways) % 2
        normal = (way, temperature) == (ways[turn % len(ways)], 2.0 if hot else 1.0)
        if INTERPRETED:
            normal = LOSSES[TREATMENTS.index((tail, temperature)) % len(LOSSES)] == loss
        cases.append(pytest.param(*(loss, tail, temperature, way)[: len(names)], marks=matrix_unless(normal)))
    return pytest.mark.parametrize(names, cases, indirect=["path"] if paths else False)


def definition(loss: str, p: Tensor, q: Tensor, is_token: list[bool], **options: Any) -> Tensor:
    """The textbook formula on two distributions over the same outcomes [C]; only a token can be in AKL's head."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum()

    if loss == "fkl":
        return kl(p, q)
    if loss == "rkl":
        return kl(q, p)
    if loss == "jeffreys":
        return kl(p, q) + kl(q, p)
    if loss == "tvd":
        return 0.5 * (p - q).abs().sum()
    if loss == "jsd":
        beta: float = options.get("beta", 0.5)
        m = beta * p + (1 - beta) * q
        return beta * kl(p, m) + (1 - beta) * kl(q, m)
    if loss in ("sfkl", "srkl"):
        skew = options.get("skew", 0.1)
        return kl(p, skew * p + (1 - skew) * q) if loss == "sfkl" else kl(q, (1 - skew) * p + skew * q)
    if loss == "todi":
        weight = torch.sigmoid(options.get("beta", 1.0) * (p / q).log()).detach()
        return (weight * p * (p / q).log() + (1 - weight) * q * (q / p).log()).sum()
    if loss == "akl":
        head, cumulative = 0.0, 0.0
        for rank, i in enumerate(sorted((i for i in range(len(p)) if is_token[i]), key=lambda i: -p[i].item())):
            crossed = cumulative >= 0.5 if options.get("akl_split") == "todi" else cumulative + p[i].item() > 0.5
            cumulative += p[i].item()
            if rank == 0 or not crossed:
                head += abs(p[i].item() - q[i].item())
        gap = (p - q).abs().sum().item()
        head_weight = head / gap if gap else 0.0
        return head_weight * kl(p, q) + (1 - head_weight) * kl(q, p)
    a: float = options.get("alpha", 0.2)
    b: float = options.get("beta", 0.7)
    if a == 0 and b == 0:
        return 0.5 * ((p / q).log() ** 2).sum()
    if a == 0:
        return ((q**b * (q**b / p**b).log() - q**b + p**b) / b**2).sum()
    if b == 0:
        return ((p**a * (p**a / q**a).log() - p**a + q**a) / a**2).sum()
    if a + b == 0:
        return (((q**a / p**a).log() + p**a / q**a - 1) / a**2).sum()
    return -(p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)).sum() / (a * b)


def reference_full(loss: str, logits: Tensor, teacher: Tensor, temperature: float = 1.0, **options: Any) -> Tensor:
    """The full-vocabulary definition at every position, [N]."""
    every = [True] * logits.shape[1]
    rows = zip((teacher / temperature).softmax(1), (logits / temperature).softmax(1), strict=True)
    return torch.stack([definition(loss, p, q, every, **options) for p, q in rows])


def reference_sparse(
    loss: str,
    logits: Tensor,
    teacher: Tensor,
    kept: list[list[int]],
    tail: str,
    groups: Tensor,
    temperature: float,
    draws: Tensor | None = None,
) -> Tensor:
    """The loss on entries and what a treatment makes of the tail, by brute force from the whole teacher, [N]."""
    values = []
    for row, entries in enumerate(kept):
        p, q = (teacher[row] / temperature).softmax(0), (logits[row] / temperature).softmax(0)
        rest = [j for j in range(len(p)) if j not in entries]
        if tail == "samples":
            assert draws is not None
            drawn = [j for j in draws[row].tolist() if j >= 0]
            if loss == "fkl":
                untempered = teacher[row].softmax(0)
                weights = [p[j] / untempered[j] * untempered[rest].sum() / len(drawn) for j in drawn]
                value = (p[entries] * (p[entries] / q[entries]).log()).sum()
                values.append(value + sum(w * (p[j] / q[j]).log() for w, j in zip(weights, drawn, strict=True)))
                continue
            entries = [*entries, *sorted(set(drawn))]
            rest = [j for j in rest if j not in drawn]
        completed = p.clone()
        if tail == "cap" and rest:
            level = p[entries].min() if entries else p.new_ones(())
            completed[rest] = water_filled(q[rest].detach(), level, p[rest].sum())
            capped = [j for j in rest if completed[j] >= level * (1 - 1e-12)]
            capped.sort(key=lambda j: -q[j].item())  # which of equals are in AKL's head
            entries, rest = [*entries, *capped], [j for j in rest if j not in capped]
        if tail == "uniform" and rest:
            completed[rest] = p[rest].mean()
            entries, rest = [*entries, *rest], []
        outcomes = [[j] for j in entries]
        if tail == "groups":
            outcomes += [part for g in range(int(groups.max()) + 1) if (part := [j for j in rest if groups[j] == g])]
        elif tail not in ("ignore", "renormalise") and rest:
            outcomes += [rest]
        coarse_p = torch.stack([completed[part].sum() for part in outcomes])
        coarse_q = torch.stack([q[part].sum() for part in outcomes])
        if tail == "renormalise":
            coarse_p = coarse_p / coarse_p.sum()
        is_token = [c < len(entries) for c in range(len(outcomes))]
        values.append(definition(loss, coarse_p, coarse_q, is_token))
    return torch.stack(values)


def water_filled(q: Tensor, level: Tensor, mass: Tensor) -> Tensor:
    """min(c·q, level) with the c at which it sums to `mass`, by bisection."""
    low, high = 0.0, 1.0
    while (high * q).clamp_max(level).sum() < mass * (1 - 1e-14) and high < 1e300:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (middle * q).clamp_max(level).sum() < mass else (low, middle)
    return (high * q).clamp_max(level)


# What a cache would hold of a teacher.


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_logits(rows: int, vocabulary: int, seed: int, scale: float = 1.5) -> Tensor:
    return scale * torch.randn(rows, vocabulary, dtype=torch.float64, generator=seeded(seed))


def top_entries(teacher: Tensor, sizes: list[int]) -> list[list[int]]:
    order = teacher.argsort(1, descending=True).tolist()
    return [ids[:size] for ids, size in zip(order, sizes, strict=True)]


def known(
    teacher: Tensor, kept: list[list[int]], groups: Tensor, temperature: float = 1.0, num_draws: int = 3, seed: int = 0
) -> dict[str, Any]:
    """What a loss is given of a teacher of whom `kept` was stored, padded to the longest row."""
    log_p = teacher.log_softmax(1)
    rows, k, num_groups = len(kept), max(map(len, kept), default=0), int(groups.max()) + 1
    token_ids = torch.full((rows, k), -1)
    logprobs = torch.full((rows, k), -inf, dtype=torch.float64)
    sample_ids = torch.full((rows, num_draws), -1)
    sample_logprobs = torch.full((rows, num_draws), -inf, dtype=torch.float64)
    rest = log_p.clone()
    for row, ids in enumerate(kept):
        token_ids[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
        logprobs[row, : len(ids)] = log_p[row, ids]
        rest[row, ids] = -inf
        if rest[row].max() > -inf:
            sample_ids[row] = torch.multinomial(rest[row].exp(), num_draws, True, generator=seeded(seed + row))
            sample_logprobs[row] = log_p[row, sample_ids[row]]
    shape = rest.log_softmax(1).exp()
    return {
        "token_ids": token_ids,
        "logprobs": logprobs,
        "tail_logprob": rest.logsumexp(1),
        "tempered_tail": (rest / temperature).logsumexp(1),
        "tail_groups": groups,
        "group_logprobs": torch.stack([rest[:, groups == g].logsumexp(1) for g in range(num_groups)], 1),
        "tail_entropy": (shape * log_p).sum(1),
        "sample_ids": sample_ids,
        "sample_logprobs": sample_logprobs,
    }


def bands(vocabulary: int, num_groups: int) -> Tensor:
    """Interleaved groups, so that none is a contiguous range."""
    return torch.arange(vocabulary) % num_groups


@st.composite
def ragged_problems(draw: st.DrawFn, least: int = 0) -> tuple[Tensor, Tensor, list[list[int]], Tensor]:
    """(student logits, teacher logits, entries of each row, groups), with k = 0, 1, V−1 and V among the sizes."""
    rows, vocabulary = draw(st.integers(1, 4)), draw(st.integers(2, 12))
    size = st.one_of(st.sampled_from([least, 1, vocabulary - 1, vocabulary]), st.integers(least, vocabulary))
    sizes = draw(st.lists(size, min_size=rows, max_size=rows))
    seed = draw(st.integers(0, 2**16))
    teacher = random_logits(rows, vocabulary, seed)
    groups = bands(vocabulary, draw(st.integers(1, vocabulary)))
    return random_logits(rows, vocabulary, seed + 1), teacher, top_entries(teacher, sizes), groups


# The three ways.


def take(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on the tails of blocks are worked on by the kernels (path "kernel") or by torch."""
    if path == "kernel" and INTERPRETED:
        from trainer.losses.tail_triton import TritonTail

        monkeypatch.setattr(blocks, "tail_backend", lambda device_type: TritonTail)


def value_and_gradient(path: str, logits: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    """Loss of each position [N], and the gradient of their sum in the logits [N, V].

    The fused way takes the logits as hidden states, and the identity as output projection.
    """
    device = "cuda" if path == "kernel" and not INTERPRETED else "cpu"
    logits = logits.detach().clone().to(device).requires_grad_()  # keeps the order of memory
    arguments = {name: a.to(device) if isinstance(a, Tensor) else a for name, a in arguments.items()}
    if path == "fused":
        held = {name: arguments.pop(name) for name in list(arguments) if name in TeacherTargets.__dataclass_fields__}
        names = [name for name in LossSettings.__dataclass_fields__ if name in arguments]
        settings = {name: arguments.pop(name) for name in names}
        further = {name: arguments.pop(name) for name in ("vocab_size", "validate") if name in arguments}
        total, terms = fused_distillation_terms(
            Projection([(logits, torch.eye(logits.shape[1], dtype=logits.dtype))]),
            TeacherTargets(**held),
            None,
            mixture=Mixture(kd_factor=1.0, ce_factor=0.0),
            settings=LossSettings(**settings, loss_args=arguments),
            **further,
        )
        (gradient,) = torch.autograd.grad(total, logits)
        return terms.kd, gradient
    value = trainer.sparse_divergence(logits, **arguments)
    weights = 2.0 ** (torch.arange(len(value), device=device) % 3)  # rows must not be mixed up, nor rounded
    (gradient,) = torch.autograd.grad((value * weights).sum(), logits)
    return value.detach().cpu(), (gradient / weights[:, None].to(gradient.dtype)).cpu()


def autograd_of(logits: Tensor, reference: Any) -> tuple[Tensor, Tensor]:
    """A reference's losses [N], and the gradient of their sum by autograd."""
    logits = logits.detach().clone().requires_grad_()
    value = reference(logits)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    return value.detach(), gradient
