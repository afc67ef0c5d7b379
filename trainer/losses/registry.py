"""Divergences by name: the built-in ones, and the user's own."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from math import inf
from typing import Any, TypeVar

import torch
from torch import Tensor

from trainer.losses.coarse import Coarse, EveryToken
from trainer.losses.divergences import DIVERGENCES
from trainer.losses.settings import LossSettings
from trainer.losses.targets import TeacherTargets

UserDivergence = Callable[..., Tensor | tuple[Tensor, Tensor]]
F = TypeVar("F", bound=UserDivergence)

# The names of the losses' own arguments, by which no option could be given. They take no argument `loss_args`.
RESERVED = {field.name for arguments in (TeacherTargets, LossSettings) for field in fields(arguments)} - {
    "loss_args"
} | {
    *("logits", "hidden", "weight", "bias", "logit_scale", "logit_softcap", "targets", "labels"),
    *("kd_weight", "t_squared", "num_items", "vocab_size", "validate"),
}

_registered: dict[str, UserDivergence] = {}


def register_divergence(name: str) -> Callable[[F], F]:
    """Offer the decorated function as loss `name`; registering one's own name again replaces it.

        @register_divergence("chi2")
        def chi2(coarse, *, strength=1.0):
            return strength * (coarse.q * coarse.log_ratio.expm1()).sum(1)

    The function gets a Coarse and its options, each with a default. It returns value [N], whose slope is then found by
    autograd on the [N, C] numbers, or (value [N], slope [N, C] = ∂ value / ∂ log q). It must be a function of the
    arguments alone, on any device: it is also called once on two positions on the CPU, in float64, to be checked.

    Raises:
        ValueError: the name is no identifier or that of a built-in divergence, or an option has no default or is called
            like an argument of the losses.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"the name of a divergence is {name!r}; it must be letters, digits and underscores, as 'chi2'")
    if name in DIVERGENCES:
        raise ValueError(f"divergence {name!r} is built in and cannot be replaced; choose another name")

    def register(function: F) -> F:
        without_default = [
            option for option, default in _options(function).items() if default is inspect.Parameter.empty
        ]
        if without_default:
            raise ValueError(
                f"divergence {name!r} has options without a default: {', '.join(without_default)}; give each a default"
            )
        reserved = [option for option in _options(function) if option in RESERVED]
        if reserved:
            raise ValueError(
                f"divergence {name!r} has an option {reserved[0]!r}, which is an argument of the losses themselves; "
                "call it otherwise"
            )
        _registered[name] = function
        return function

    return register


def divergence_names() -> list[str]:
    """List the names of all divergences, the built-in ones first."""
    return [*DIVERGENCES, *_registered]


def options_of(name: str) -> dict[str, Any]:
    """Return the options of divergence `name` with their defaults."""
    return _options(_function(name))


def check_divergence(name: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError for an unknown name or option, an option out of range, or a function that returns wrong things.

    The function is evaluated once, on two positions with an entry, a padded entry and a tail.
    """
    accepted = options_of(name)
    unknown = [option for option in options if option not in accepted]
    if unknown:
        takes = ", ".join(accepted) or "no options"
        raise ValueError(f"loss {name!r} takes {takes}; got {', '.join(unknown)}")

    log_p = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.0, 0.4]], dtype=torch.float64).log()
    log_q = torch.tensor([[0.3, 0.3, 0.4], [0.8, 0.0, 0.2]], dtype=torch.float64).log()
    value, slope = evaluate_divergence(name, Coarse(log_p, log_q, log_p > -inf, num_entries=2), options)
    for what, numbers in (("value", value), ("slope", slope)):
        if not numbers.isfinite().all():
            raise ValueError(
                f"loss {name!r} gives a {what} that is not finite: {numbers.tolist()}; mind that p, q and log_ratio are "
                "0 where an outcome does not count, so write q/p as log_ratio.exp()"
            )


def evaluate_divergence(name: str, coarse: Coarse, options: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Compute value [N] and slope [N, C] of divergence `name`, without a graph; the slope is exactly 0 if not counted.

    Raises ValueError for an unknown name, or a function that returns anything else than value or (value, slope).
    """
    function = _function(name)
    if name in DIVERGENCES:
        with torch.no_grad():
            value, slope = function(coarse, **options)
        return value, slope if isinstance(coarse, EveryToken) else slope.masked_fill(~coarse.counted, 0.0)

    with torch.inference_mode(False), torch.enable_grad():
        if coarse.log_q.is_inference():  # autograd takes no tensor of inference mode
            coarse = Coarse(coarse.log_p.clone(), coarse.log_q.clone(), coarse.counted.clone(), coarse.num_entries)
        log_q = coarse.log_q.detach().requires_grad_()
        result = function(
            Coarse(coarse.log_p, log_q, coarse.counted, coarse.num_entries, coarse.estimated_p), **options
        )
    value, slope = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    _check_shape(name, "value", value, [coarse.log_q.shape[0]])
    if slope is None:
        if not value.requires_grad:
            raise ValueError(
                f"loss {name!r} gives a value that is not differentiable in log q; compute it from the coarse "
                "distributions with torch and without detach, or return (value, slope)"
            )
        with torch.inference_mode(False):
            (slope,) = torch.autograd.grad(value, log_q, torch.ones_like(value))
    _check_shape(name, "slope", slope, list(coarse.log_q.shape))
    return value.detach(), slope.detach().masked_fill(~coarse.counted, 0.0)


def _function(name: str) -> UserDivergence:
    if name not in divergence_names():
        raise ValueError(f"loss is {name!r}; accepted are {', '.join(divergence_names())}")
    return DIVERGENCES[name] if name in DIVERGENCES else _registered[name]


def _options(function: UserDivergence) -> dict[str, Any]:
    """List the parameters after the first, each with its default or inspect.Parameter.empty."""
    parameters = list(inspect.signature(function).parameters.values())
    return {parameter.name: parameter.default for parameter in parameters[1:]}


def _check_shape(name: str, what: str, received: Any, shape: list[int]) -> None:
    if not isinstance(received, Tensor) or list(received.shape) != shape:
        got = list(received.shape) if isinstance(received, Tensor) else type(received).__name__
        raise ValueError(
            f"loss {name!r} must return value [N] or (value [N], slope [N, C]); its {what} must have shape {shape}, "
            f"got {got}"
        )
