"""Logits in the directions of a tail basis, on their device: coefficients, residuals, and the product a basis is made by."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from logitcache.format.targets import tensor

BLOCK_LOGITS = 1 << 26
"""Logits of a block of rows, 256 MiB in float32: few enough for memory, and so many that the basis is read seldom."""
LEAST_LOGIT = -1e4
"""The least logit of a token, banned ones too, so that differences stay finite."""


class DeviceBasis:
    """A tail basis, prepared once for a device. Logits are those of the softmax, after a scale or a cap.

    directions: float32 [V, R].  offset, weights: float32 [V].
    """

    def __init__(
        self, directions: np.ndarray, offset: np.ndarray, weights: np.ndarray, device: torch.device | str
    ) -> None:
        self._directions, self._offset = tensor(directions, device), tensor(offset, device)
        self._projection = _projection(self._directions, tensor(weights, device))
        self._of_offset = self._offset @ self._projection

    def describe(self, logits: Tensor, probe_ids: Tensor | None) -> dict[str, Tensor]:
        """Returns coefficients z, float32 [N, R], and what they leave of the logits of probe tokens, float32 [N, P].

        logits: [N, V], any float dtype.  probe_ids: int64 [N, P]; None for no residuals. With l the logits, m the offset, U
        the directions, w the weights: z = Uᵀ diag(w) (l − m), and l_v − m_v − U_v·z − w·(l − m) is left of token v.
        """
        rows = max(1, BLOCK_LOGITS // logits.shape[1])
        projected = torch.cat([self._project(block) for block in logits.split(rows)]) - self._of_offset
        coefficients, mean = projected[:, :-1].contiguous(), projected[:, -1:]
        described = {"tail_coefficients": coefficients}
        if probe_ids is not None:
            left = logits.gather(1, probe_ids).float().clamp_(min=LEAST_LOGIT) - self._offset[probe_ids] - mean
            left -= (self._directions[probe_ids] @ coefficients[:, :, None])[:, :, 0]
            described["probe_residuals"] = left
        return described

    def _project(self, logits: Tensor) -> Tensor:
        projected = logits.float() @ self._projection
        if not projected.isfinite().all():  # banned tokens have −∞
            projected = logits.float().clamp(min=LEAST_LOGIT) @ self._projection
        return projected


class CovarianceProduct:
    """The product of the logits' covariance and a block of directions, summed up over positions as they come.

    block: float32 [V, B], centred under the weights.  offset, weights: float32 [V].
    """

    def __init__(self, block: np.ndarray, offset: np.ndarray, weights: np.ndarray, device: torch.device | str) -> None:
        self._offset = tensor(offset, device)
        self._projection = _projection(tensor(block, device), tensor(weights, device))
        self._sums = torch.zeros_like(self._projection)
        self._count = 0

    def add(self, logits: Tensor) -> None:
        """Takes positions into account, but for those whose logits are not numbers.  logits: [N, V], any float dtype."""
        for block in logits.split(max(1, BLOCK_LOGITS // logits.shape[1])):
            differences = block.float().clamp(min=LEAST_LOGIT).sub_(self._offset)
            projected = differences @ self._projection
            known = projected.isfinite().all(dim=1)
            if not known.all():
                differences, projected = differences[known], projected[known]
            differences -= projected[:, -1:]
            projected[:, -1] = 1
            self._sums.addmm_(differences.T, projected)
            self._count += len(projected)

    def result(self) -> Tensor:
        """Returns what `LogitTeacher.covariance_product` does."""
        count = self._sums.new_full((1, self._sums.shape[1]), self._count)
        return torch.cat([self._sums, count])


def summed_probabilities(logits: Tensor) -> Tensor:
    """Returns the sum of the distributions of those positions [N, V] whose logits are numbers: float64 [V]."""
    return logits.float().softmax(dim=1).nan_to_num_(nan=0.0).sum(dim=0).double()


def _projection(directions: Tensor, weights: Tensor) -> Tensor:
    """Returns the matrix that takes logits to their products with weighted directions, and to their weighted mean: [V, R + 1]."""
    return torch.cat([directions, torch.ones_like(weights)[:, None]], dim=1) * weights[:, None]
