"""Terms that a model's own forward adds to its loss, such as the balance among a mixture's experts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from trainer.data.collator import Batch
from trainer.model.head import as_in_evaluation, replaced_attribute
from trainer.model.student import unwrapped


class AddedLoss:
    """Asks a model for its loss with 0 in place of the cross-entropy, which leaves the terms that it adds.

    of_logits: the terms are a function of the logits of all positions, as Bamba's z-loss is.
    """

    def __init__(self, model: PreTrainedModel, of_logits: bool) -> None:
        self.of_logits = of_logits
        self._model: Any = unwrapped(model)
        self._body: Any = self._model.base_model
        self._body_forward = self._body.forward
        self._without_mask = self._forward_without_mask  # one object in every call, for torch.compile

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Returns the model's further inputs: labels and, for a packed batch, the mask of its tokens."""
        inputs = {"labels": batch.input_ids}
        return inputs if batch.packed_mask is None else inputs | {"attention_mask": batch.packed_mask}

    @contextmanager
    def alone(self, batch: Batch) -> Iterator[None]:
        """Makes the added terms the loss of the model's output while the block runs.

        The mask of a packed batch reaches the terms only: the attention would no longer tell sequences apart.
        """
        with ExitStack() as stack:
            stack.enter_context(replaced_attribute(self._model, "_loss_function", _nothing))
            if batch.packed_mask is not None and self._body is not self._model:
                self._body_forward = self._body.forward
                stack.enter_context(replaced_attribute(self._body, "forward", self._without_mask))
            yield

    def _forward_without_mask(self, *args: Any, **kwargs: Any) -> Any:
        return self._body_forward(*args, **(kwargs | {"attention_mask": None}))


def find_added_loss(model: PreTrainedModel) -> AddedLoss | None:
    """Finds the terms that a model adds to its loss, by two forward passes over three tokens; None without any.

    model: before anything wraps it. Its modes, gradients and random numbers are as before.
    """
    if is_deepspeed_zero3_enabled():  # the weights lie in pieces, so the configuration has to tell
        config = model.config.get_text_config()
        of_logits = bool(getattr(config, "z_loss_coefficient", 0))
        adds = of_logits or getattr(config, "output_router_logits", False)
        return AddedLoss(model, of_logits) if adds else None
    head = model.get_output_embeddings()
    with as_in_evaluation(model), torch.no_grad():
        added = _probe(model)
        if not added:
            return None
        return AddedLoss(model, head is None or abs(_probe(model, head) - added) > 1e-3 * abs(added))


def _probe(model: PreTrainedModel, doubled: nn.Module | None = None) -> float:
    """Measures the terms that a model adds to its loss on three tokens. doubled: a module whose output is doubled."""
    tokens = torch.arange(3, device=model.device)[None]
    asked = []

    def cross_entropy(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        asked.append(True)
        return _nothing(logits)

    hook = doubled.register_forward_hook(lambda module, args, output: 2 * output) if doubled is not None else None
    try:
        with replaced_attribute(unwrapped(model), "_loss_function", cross_entropy):
            output: Any = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=tokens)
    except Exception:  # whatever an architecture does with labels: it has no loss of its own
        return 0.0
    finally:
        if hook is not None:
            hook.remove()
    return float(output.loss) if asked else 0.0


def _nothing(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return torch.zeros((), device=logits.device)
