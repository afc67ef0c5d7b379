"""Early stopping that goes on counting where a checkpoint left off."""

from __future__ import annotations

from typing import Any

from transformers import EarlyStoppingCallback


class EarlyStopping(EarlyStoppingCallback):
    """transformers' callback, whose count an interrupted run takes from its checkpoint."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Asks the trainer to stop at once where the checkpoint is of the step at which the run had stopped."""
        super().on_train_begin(args, state, control, **kwargs)
        saved = state.stateful_callbacks
        count = saved.get(EarlyStoppingCallback.__name__, self.state())  # the name in checkpoints of earlier versions
        count = saved.setdefault(type(self).__name__, count)["attributes"]["early_stopping_patience_counter"]
        self.early_stopping_patience_counter = count
        control.should_training_stop = count >= self.early_stopping_patience
