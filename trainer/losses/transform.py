"""The transform of the output projection's logits that some architectures have before the softmax."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogitTransform:
    """z = softcap·tanh(scale·raw / softcap); without a softcap z = scale·raw.

    Cohere and Granite models scale (their `logit_scale`, 1 / `logits_scaling`), Gemma 2 caps
    (`final_logit_softcapping`). scale and softcap are positive.
    """

    scale: float = 1.0
    softcap: float | None = None

    def apply(self, raw: Tensor) -> Tensor:
        """Compute the logits of the softmax, like `raw`; the same tensor if nothing changes."""
        logits = raw if self.scale == 1.0 else raw * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def slope(self, logits: Tensor) -> Tensor | float:
        """Return ∂z/∂raw, given the transformed logits."""
        if self.softcap is None:
            return self.scale
        return (1 - (logits / self.softcap) ** 2) * self.scale
