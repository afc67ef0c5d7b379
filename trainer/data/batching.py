"""How many batches a run has, and of what."""

from __future__ import annotations

import math

from trainer.config.config import DistillConfig
from trainer.data.sampler import Batching, EpochBatches
from trainer.data.training_data import TrainingData

PACKED_LENGTH = 2048


def batching_of(config: DistillConfig, data: TrainingData) -> Batching:
    """What a batch of a device holds."""
    return Batching(
        config.per_device_train_batch_size,
        config.tokens_per_batch,
        (config.packed_length or max(PACKED_LENGTH, data.longest)) if config.packing else None,
        config.train_sampling_strategy == "group_by_length",
    )


def is_shuffled(config: DistillConfig) -> bool:
    """Whether rows come in another order in every epoch."""
    return config.train_sampling_strategy != "sequential"


def data_seed(config: DistillConfig) -> int:
    """What the order of rows is drawn from."""
    return config.seed if config.data_seed is None else config.data_seed


def num_epochs(config: DistillConfig, data: TrainingData) -> int:
    """Passes over the data, the last one perhaps incomplete: as many as `Trainer` makes of --max_steps.

    With more epochs planned, one may have fewer batches under --dataloader_drop_last, and so there must be more.
    """
    if config.max_steps <= 0:
        return math.ceil(config.num_train_epochs)
    epochs, needed = 0, 1
    while needed > epochs:
        epochs = needed
        steps = math.ceil(_planned(config, data, epochs) / config.gradient_accumulation_steps)
        needed = math.ceil(config.max_steps / max(steps, 1))
    return epochs


def num_batches(config: DistillConfig, data: TrainingData) -> int:
    """Batches of a rank in an epoch, the same on every rank and in every epoch.

    Raises UserError for a sequence that fits into no batch.
    """
    return _planned(config, data, num_epochs(config, data))


def _planned(config: DistillConfig, data: TrainingData, epochs: int) -> int:
    return len(
        EpochBatches(
            data,
            batching_of(config, data),
            (config.process_index, config.world_size),
            config.dataloader_drop_last,
            shuffle=is_shuffled(config),
            seed=data_seed(config),
            num_epochs=epochs,
        )
    )
