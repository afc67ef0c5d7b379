"""The loss of a batch: inside the model's own forward, so that its logits never exist, or from its logits.

Either way a call gives (1) the objective summed over the batch's positions and (2) the terms of each position. Terms
that the model's own forward adds to its loss are added to (1) where that is asked for.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from logitcache import UserError
from trainer.data.collator import Batch
from trainer.losses.fused import Mixture, fused_distillation_terms
from trainer.losses.sparse import distillation_terms
from trainer.losses.targets import TeacherTargets
from trainer.losses.terms import DistillationTerms
from trainer.model.added_loss import AddedLoss, find_added_loss
from trainer.model.head import Head, NoProjectionError, find_head, project, replaced_attribute
from trainer.model.student import takes_logits_to_keep

logger = logging.getLogger(__name__)


class Objective(ABC):
    """Calls a model, as it is or wrapped, on a batch.

    Attributes:
        description: how the loss is computed, in words.
        added_loss: the terms that the model's own forward added to its loss in the last call, a mean over the batch as
            the model takes it; None if it adds nothing or was not asked.
    """

    description: str

    def __init__(self, keeps_logits: bool, added: AddedLoss | None) -> None:
        self._keeps_logits, self._added = keeps_logits, added
        self.added_loss: Tensor | None = None

    def __call__(
        self,
        model: nn.Module,
        batch: Batch,
        targets: TeacherTargets,
        *,
        mixture: Mixture,
        with_added_loss: bool = False,
        **options: Any,
    ) -> tuple[Tensor, DistillationTerms]:
        """Compute the objective, summed over the positions, and the terms of each position.

        Args:
            model: the model, as it is or wrapped.
            batch: sequences, on the model's device.
            targets: the batch's targets at the loss's temperature, see `Batch.targets_at`.
            mixture: the weights of divergence and cross-entropy.
            with_added_loss: include the added loss, once for every position.
            **options: settings, vocab_size and validate of `fused_distillation_terms`.

        Raises:
            UserError: the targets are none that a teacher can give.
        """
        added = self._added if with_added_loss else None
        inputs = batch.model_inputs(keep_logits=self._keeps_logits) | ({} if added is None else added.inputs(batch))
        with nullcontext() if added is None else added.alone(batch):
            return self._compute(model, inputs, batch, added is not None, mixture, {"targets": targets, **options})

    @abstractmethod
    def _compute(
        self, model: nn.Module, inputs: Any, batch: Batch, is_added: bool, mixture: Mixture, options: dict[str, Any]
    ) -> tuple[Tensor, DistillationTerms]:
        """Call the model. is_added: its output has the added loss.  options: the losses' targets and further arguments."""

    @abstractmethod
    def what_is_not_finite(self) -> str:
        """Say where the NaN or infinity of the last call came from; it waits for the device."""


def objective_of(
    model: PreTrainedModel, agree: Callable[[bool], bool] = bool, *, with_added_loss: bool = False
) -> Objective:
    """Choose the fused objective or, if the model's head does not allow it, the objective from logits, with a warning.

    Args:
        model: before anything wraps it.
        agree: tells whether a statement holds on every rank.
        with_added_loss: whether calls may ask for the terms that the model's own forward adds to its loss.

    Raises:
        UserError: the model puts tokens of its own before each sequence.
    """
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise UserError("PEFT's prompt learning puts tokens before each sequence and misplaces its positions: use LoRA")
    added = find_added_loss(model) if with_added_loss else None
    head, reason = None, "another rank found no output projection"
    try:
        if added is not None and added.of_logits:
            raise NoProjectionError("its own forward adds a function of all its logits to its loss")
        head = find_head(model)
    except NoProjectionError as error:
        reason = str(error)
    if agree(head is not None) and head is not None:
        return FusedObjective(model, head, added)
    logger.warning(
        "%s: the loss is computed from the logits, which takes memory for all of them at once: %s",
        type(model).__name__,
        reason,
    )
    return LogitsObjective(model, added)


class FusedObjective(Objective):
    """Has the head compute the loss in place of logits for the time of a call, and the model return it.

    So the loss uses the parameters as the head has them in its forward (unsharded, in autocast's dtype), and its
    gradient leaves through the outputs of both, where FSDP and DDP wait for it. The batch does not pass through the
    model, which may round what it is given.
    """

    description = "fused with the output projection; the logits of a batch never exist"

    def __init__(self, model: PreTrainedModel, head: Head, added: AddedLoss | None = None) -> None:
        super().__init__(head.keeps, added)
        self._model, self._head = model, head
        self._loss: Callable[[Tensor], tuple[Tensor, DistillationTerms]] | None = None
        self._original_forward: Callable[..., Any] = model.forward
        self._total: Tensor | None = None
        self._added_weight: int | None = None
        self._terms: DistillationTerms | None = None
        self._hidden_sum = self._confidence_sum = torch.zeros(())
        self._forwards = self._model_forward, self._head_forward  # the same objects in every call, for torch.compile

    def _compute(
        self, model: nn.Module, inputs: Any, batch: Batch, is_added: bool, mixture: Mixture, options: dict[str, Any]
    ) -> tuple[Tensor, DistillationTerms]:
        def loss(hidden: Tensor) -> tuple[Tensor, DistillationTerms]:
            stored = batch.at_stored_positions(hidden, kept_logits=self._head.keeps)
            self._hidden_sum = stored.detach().sum(dtype=torch.float32)
            projection = project(self._head.module, stored, self._head.transform)
            try:
                return fused_distillation_terms(projection, labels=batch.labels, mixture=mixture, **options)
            except ValueError as error:
                raise _unlearnable(error) from error

        model_forward, head_forward = self._forwards
        self._loss, self._original_forward = loss, self._model.forward
        self._added_weight = batch.num_positions if is_added else None
        try:
            with (
                replaced_attribute(self._model, "forward", model_forward),
                replaced_attribute(self._head.module, "forward", head_forward),
            ):
                total = model(**inputs)
            assert self._terms is not None
            self._confidence_sum = self._terms.confidence.sum()
            return total, self._terms
        finally:
            self._loss = self._total = self._terms = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _head_forward(self, hidden: Tensor) -> Tensor:
        """Return, in place of logits, a zero with the total's gradient: scale and cap change it by their slope only."""
        assert self._loss is not None
        total, self._terms = self._loss(hidden)
        self._total = total.detach()
        return total.reshape(1, 1, 1) - self._total

    def _model_forward(self, *args: Any, **kwargs: Any) -> Tensor:
        output = self._original_forward(*args, **kwargs)
        assert self._total is not None
        total: Tensor = self._total + output.logits.to(self._total).sum() / self._head.transform.scale
        if self._added_weight is None:
            self.added_loss = None
        else:
            self.added_loss = output.loss.detach()
            total = total + self._added_weight * output.loss.to(total)
        return total

    def what_is_not_finite(self) -> str:
        """See Objective."""
        found = []
        if not self._hidden_sum.isfinite():
            found.append("the hidden states that reach the output projection")
        if not _all_finite(self._head.module):
            found.append("the output projection's weight")
        if found:
            return " and ".join(found)
        if not self._confidence_sum.isfinite():
            return "the logits, whose hidden states and output projection are finite"
        return "the divergence, though the logits are finite: a stored token has probability 0 for the student"


class LogitsObjective(Objective):
    """Computes the loss from the logits [N, V'] of the stored positions, which the model computes as ever."""

    description = "from the logits, which exist for a whole batch"

    def __init__(self, model: PreTrainedModel, added: AddedLoss | None = None) -> None:
        super().__init__(takes_logits_to_keep(model) and not (added is not None and added.of_logits), added)
        self._head = model.get_output_embeddings()

    def _compute(
        self, model: nn.Module, inputs: Any, batch: Batch, is_added: bool, mixture: Mixture, options: dict[str, Any]
    ) -> tuple[Tensor, DistillationTerms]:
        output = model(**inputs)
        logits = batch.at_stored_positions(output.logits, kept_logits=self._keeps_logits)  # [N, V']
        try:
            terms = distillation_terms(logits, labels=batch.labels, **options)
        except ValueError as error:
            raise _unlearnable(error) from error
        assert terms.cross_entropy is not None
        weighted = ((mixture.ce_factor, terms.cross_entropy), (mixture.kd_factor, terms.kd))
        # A term of weight 0 costs no backward pass.
        total = torch.stack([factor * term.sum() for factor, term in weighted if factor > 0]).sum()
        self.added_loss = output.loss.detach() if is_added else None
        return (total + batch.num_positions * output.loss.to(total) if is_added else total), terms

    def what_is_not_finite(self) -> str:
        """See Objective."""
        if self._head is not None and not _all_finite(self._head):
            return "the output projection's weight"
        return "the logits or the divergence"


def _unlearnable(error: ValueError) -> UserError:
    return UserError(f"the cache holds a batch that no teacher gives: {error}")


def _all_finite(module: nn.Module) -> bool:
    """Tell whether this rank's parameters of a module are all finite."""
    local = [parameter.to_local() if hasattr(parameter, "to_local") else parameter for parameter in module.parameters()]
    return all(bool(tensor.isfinite().all()) for tensor in local)
