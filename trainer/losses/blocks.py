"""A block of logits [n, V]: the student's log mass of every outcome, and a gradient of the masses → one of the logits.

The log mass of a token that is an outcome is its logit z_j, that of a part of the tail is the logsumexp a of the logits
in it, see TailBackend. With D = ∂L/∂(log masses)

    ∂L/∂z_j = D_j for a token that is an outcome,   D_a · exp(z_j − a) for one of the tail.

For a divergence with slope u over q = softmax(log masses), D = u − q·Σu.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from math import inf
from typing import Protocol

import torch
from torch import Tensor

from trainer.losses.tail import DENSE_TAILS
from trainer.losses.tail_torch import TorchTail
from trainer.losses.targets import mask_tokens_
from trainer.losses.transform import LogitTransform

# On a CPU 4 MB at a time, which stay in its cache; on an accelerator enough to make the launches' cost vanish.
BLOCK_ELEMENTS_CPU = 2**20
BLOCK_ELEMENTS_ACCELERATOR = 2**27
# A low-rank tail reads a basis of some 2^23 elements twice a block, and makes some five tensors of the size of a few rows.
BLOCK_ELEMENTS_CPU_LOW_RANK = 2**25
CACHED_ELEMENTS_CPU = 5 * 2**17
BLOCK_ELEMENTS_DENSE = 2**24  # on an accelerator, for tails that make several tensors of the block's size


# The weights [n] of each position's divergence and cross-entropy in a scalar; None stands for 0.
TermWeights = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True)
class BlockTerms:
    """What a block of logits [n, V] leaves behind.

    Attributes:
        kd: [n], the divergence in nats.
        log_masses: [n, k + 1], of the stored entries and of all other tokens together, at T = 1, up to the normaliser.
        largest: [n], the largest logit.
        label_logits: [n], or None without labels.
        own_terms: fields of DistillationTerms that the block knows better than the log masses tell, by name.
    """

    kd: Tensor
    log_masses: Tensor
    largest: Tensor
    label_logits: Tensor | None
    own_terms: dict[str, Tensor] = field(default_factory=dict)


class TailBackend(Protocol):
    """The tail of a block of logits: its log masses, and then its gradient in the block's own memory.

    Attributes:
        log_masses: of each temperature [n, G], the logsumexp of z/T over each part of the tail; −inf without a token.
        largest: [n], the largest z of the tail, −inf without a token.

    Both are float32, or float64 for float64 blocks.
    """

    log_masses: list[Tensor]
    largest: Tensor

    def write_gradient_(
        self, weights: Sequence[Tensor | None], labels: Tensor | None, label_weights: Tensor | None
    ) -> None:
        """Overwrite the block with Σ_T w_T·exp(z/T − a_T) − label weight at the label, times ∂z/∂raw; once only.

        weights: of each temperature, [n, G] or None for 0.  labels: [n] int64, −1 for a label that is not in the tail.
        """


# Takes a block [n, V] floating of raw logits that hold −inf where a token is an entry (it becomes scratch memory), the
# transform, the temperatures (1.0,) or (1.0, T), the group of each token [V] or None, and the number of groups (1).
TailFactory = Callable[[Tensor, LogitTransform, tuple[float, ...], Tensor | None, int], TailBackend]


def row_blocks(logits: Tensor, tail: str) -> list[slice]:
    """Cut the rows of logits [N, V] into blocks that are worked on at once, with a treatment of the tail."""
    if logits.device.type == "cpu":
        elements = BLOCK_ELEMENTS_CPU_LOW_RANK if tail == "low_rank" else BLOCK_ELEMENTS_CPU
    else:
        elements = BLOCK_ELEMENTS_DENSE if tail in DENSE_TAILS else BLOCK_ELEMENTS_ACCELERATOR
    return _slices(logits, elements)


def cached_rows(logits: Tensor) -> list[slice]:
    """Cut a block [n, V] into rows of which several tensors stay in a CPU's cache; on an accelerator not at all."""
    if logits.device.type != "cpu":
        return _slices(logits, logits.numel())
    # A row is a thread's work.
    return _slices(logits, CACHED_ELEMENTS_CPU, torch.get_num_threads())


def dense_rows(logits: Tensor) -> list[slice]:
    """Cut a block [n, V] into rows of which a few tensors may be made on an accelerator."""
    return _slices(logits, BLOCK_ELEMENTS_DENSE)


def _slices(logits: Tensor, elements: int, multiple: int = 1) -> list[slice]:
    rows = max(1, elements // max(1, logits.shape[1]) // multiple) * multiple
    return [slice(start, min(start + rows, len(logits))) for start in range(0, len(logits), rows)]


@cache
def tail_backend(device_type: str) -> TailFactory:
    """Return the class for the tail of blocks on a kind of device: the Triton kernels on CUDA, else plain torch."""
    if device_type == "cuda" and find_spec("triton"):
        from trainer.losses import tail_triton

        if tail_triton.SUPPORTED:
            return tail_triton.TritonTail
    return TorchTail


class LogitBlock:
    """Rows of raw logits, which are overwritten.

    Attributes:
        log_masses: of each temperature [n, K + G], up to the row's normaliser; −inf without a token.
        largest: [n], the largest logit.
        label_logits: [n], or None without labels.
    """

    def __init__(
        self,
        raw: Tensor,
        token_ids: Tensor,
        labels: Tensor | None,
        transform: LogitTransform,
        temperatures: tuple[float, ...],
        tail_groups: Tensor | None,
        num_groups: int,
    ) -> None:
        """Take the log masses of raw logits [n, V]. token_ids: [n, K] int64, −1 pads.  labels: [n] int64, or None.

        The other arguments are those of a TailFactory.
        """
        dtype = torch.promote_types(raw.dtype, torch.float32)
        self._raw, self._token_ids, self._labels, self._transform = raw, token_ids, labels, transform
        self._stored, self._columns = token_ids >= 0, token_ids.clamp_min(0)
        self._entries = transform.apply(raw.gather(1, self._columns).to(dtype)).masked_fill_(~self._stored, -inf)
        self.label_logits: Tensor | None = None
        if labels is not None:
            self.label_logits = transform.apply(raw.gather(1, labels[:, None])[:, 0].to(dtype))
        mask_tokens_(raw, token_ids)
        self._tail = tail_backend(raw.device.type)(raw, transform, temperatures, tail_groups, num_groups)
        self.log_masses = [
            torch.cat([self._entries if temperature == 1.0 else self._entries / temperature, tail], dim=1)
            for temperature, tail in zip(temperatures, self._tail.log_masses, strict=True)
        ]
        self.largest = torch.cat([self._entries, self._tail.largest[:, None]], dim=1).amax(1)

    def write_gradient_(self, outcome_grads: list[Tensor | None], label_weights: Tensor | None) -> None:
        """Overwrite the raw logits with Σ D·∂(log masses) − label_weights [n] at the labels; once only.

        outcome_grads: D of each temperature's log masses [n, K + G] times 1/T. None stands for 0.
        """
        num_tokens = self._token_ids.shape[1]
        given = [grad for grad in outcome_grads if grad is not None]
        entry_grad = (
            torch.stack([grad[:, :num_tokens] for grad in given]).sum(0) if given else torch.zeros_like(self._entries)
        )
        labels = None if label_weights is None else self._labels
        if labels is not None and label_weights is not None:
            is_label = self._token_ids == labels[:, None]
            entry_grad = entry_grad - is_label * label_weights[:, None]
            labels = labels.masked_fill(is_label.any(1), -1)
        entry_grad = (entry_grad * self._transform.slope(self._entries)).masked_fill(~self._stored, 0.0)
        tail_weights = [None if grad is None else grad[:, num_tokens:] for grad in outcome_grads]
        self._tail.write_gradient_(tail_weights, labels, label_weights)
        self._raw.scatter_add_(1, self._columns, entry_grad.to(self._raw.dtype))
