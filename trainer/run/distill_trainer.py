"""DistillTrainer: transformers.Trainer whose loss is (1−λ)·CE + λ·T²·KD against a cache."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import EvalLoopOutput

from logitcache import LogitCache, UserError
from logitcache.format.tail_parts import TailParts
from trainer.config.config import DistillConfig
from trainer.data.collator import Batch, Collator, basis_tensors
from trainer.data.loader import BatchDataset, BatchLoader
from trainer.data.sampler import Batching, batching_of, data_seed, is_shuffled, num_epochs
from trainer.data.tail_choice import PARTS_OF_TAIL, approximates_tail, evaluation_tail, resolve_tail
from trainer.data.training_data import TrainingData
from trainer.evaluation.metrics import Sums, evaluation_metrics, evaluation_sums, position_means, position_sums
from trainer.losses.fused import Mixture
from trainer.losses.low_rank import LOW_RANK
from trainer.losses.settings import LossSettings
from trainer.losses.targets import TailBasis
from trainer.losses.terms import DistillationTerms
from trainer.model.objective import Objective, objective_of
from trainer.model.packing_check import check_packing
from trainer.model.student import check_student, warn_of_rotation
from trainer.run.callbacks import ResidualWeight, ThroughputCallback
from trainer.run.ranks import check_ranks

logger = logging.getLogger(__name__)


class DistillTrainer(Trainer):
    """Trains `model` on a cache.

    The loss is a sum over stored positions divided by their number in the whole global batch: all accumulation steps
    and ranks. A term that the student's own forward adds to its loss, such as the balance among a mixture's experts,
    is a mean over one batch of one rank; in the loss it has the share of the positions of its batch. Every rank reads
    its own share of the rows. Beside the loss it logs what `metrics.position_means` names, and the added term.
    `compute_loss` and the other methods of Trainer that take a batch get a `trainer.data.collator.Batch`, not a dict.
    """

    args: DistillConfig
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel,
        cache: LogitCache | TrainingData,
        args: DistillConfig,
        *,
        eval_cache: LogitCache | None = None,
        **options: Any,
    ) -> None:
        """Check the caches against the settings and the model, and set transformers.Trainer up.

        Args:
            model: the student.
            cache: to learn from, or several as `open_training_data` puts them together.
            args: the settings.
            eval_cache: the held-out cache, if the run is evaluated.
            **options: of transformers.Trainer, such as processing_class, callbacks and optimizers.

        Raises:
            UserError: a cache does not hold what the settings need or does not suit the model, or the settings do not
                suit the ranks.
        """
        data = TrainingData.of(cache)
        self.tail = resolve_tail(args, data)
        self._approximated = {T for T in args.temperatures if approximates_tail(self.tail, data, T)}
        for temperature in self._approximated:
            logger.info("the teacher's tail at T = %g is estimated from its mass and entropy at T = 1", temperature)
        for opened in (*data.caches, eval_cache):
            if opened is not None:
                check_student(model.config, opened, args.student or type(model).__name__)
        if args.n_gpu > 1:
            logger.warning(
                "%d GPUs are visible and one process uses one: torchrun --no-python --nproc-per-node %d trainer fit … uses all",
                args.n_gpu,
                args.n_gpu,
            )
            args._n_gpu = 1
        check_ranks(args)
        super().__init__(model=model, args=args, train_dataset=data, eval_dataset=eval_cache, **options)
        if self.get_tp_size() * self.get_cp_size() * self.get_sp_size() > 1:
            raise UserError("tensor, context and sequence parallelism are not supported: use data parallelism or FSDP")
        if args.fsdp and not self.is_fsdp_enabled:
            raise UserError("--fsdp: accelerate shards a model over GPUs, and these ranks are CPUs. Leave --fsdp out")
        with self.accelerator.autocast():
            self.objective: Objective = objective_of(model, self._on_every_rank, with_added_loss=True)
            self._flat = args.packing and "flash" in str(model.config._attn_implementation)
            if args.packing:
                row_length = batching_of(args, data).packed_length or 0
                check_packing(
                    model,
                    self._flat,
                    row_length=row_length * (self._train_batch_size if self._flat else 1),
                    longest=data.longest,
                    device=args.device,
                )
        if args.train_batch_size > 1 or args.tokens_per_batch:
            warn_of_rotation(model, data.longest, "trained", "--per_device_train_batch_size 1")
        self._data = data
        groups = data.tail_groups if self.tail == "groups" else None
        self._tail_groups = None if groups is None else torch.tensor(groups, dtype=torch.long, device=args.device)
        self._tail_basis = self._basis_of(data) if self.tail == LOW_RANK else None
        self._residuals = ResidualWeight(self._over_ranks) if self.tail == LOW_RANK else None
        if self._residuals is not None:
            self.add_callback(self._residuals)
            if not data.tail_parts.probes:
                logger.warning("%s holds no probes of its low-rank tail: residual_weight stays 0", data.path)
        self._window = Sums()
        self._throughput = ThroughputCallback()
        self.add_callback(self._throughput)

    def get_train_dataloader(self) -> BatchLoader:
        """Return this rank's batches. accelerate must not shard them again, so they do not pass through it."""
        args = self.args
        batching = batching_of(args, self._data)
        return self._loader(
            self._data,
            replace(batching, batch_size=self._train_batch_size),  # --auto_find_batch_size lowers it
            Collator(self._needed_tail_parts(), self._flat),
            shuffle=is_shuffled(args),
            seed=data_seed(args),
            drop_last=args.dataloader_drop_last,
            num_epochs=num_epochs(args, self._data),
            num_workers=args.dataloader_num_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            persistent_workers=args.dataloader_persistent_workers,
            multiprocessing_context=args.dataloader_multiprocessing_context,
        )

    def _needed_tail_parts(self) -> TailParts:
        """Return the parts of the tail that the loss asks for, at all temperatures of the run."""
        held = self._data.tail_parts
        names = {*PARTS_OF_TAIL.get(self.tail, ()), "entropy" if self._approximated else ""}
        needed = {part.name: value for part, value in held.stored() if part.name in names}
        return TailParts(**needed, temperatures=tuple(T for T in self.args.temperatures if T in held.temperatures))

    def get_eval_dataloader(self, eval_dataset: Any = None) -> BatchLoader:
        """Return this rank's batches of a held-out cache, in the cache's order."""
        cache: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        collator = Collator(TailParts(rank=TrainingData.of(cache).tail_parts.rank))
        return self._loader(cache, Batching(self.args.per_device_eval_batch_size), collator)

    def _basis_of(self, data: TrainingData) -> TailBasis | None:
        return None if data.tail_basis is None else basis_tensors(data.tail_basis, self.args.device)

    def _loader(
        self, data: LogitCache | TrainingData, batching: Batching, collator: Collator, **options: Any
    ) -> BatchLoader:
        return BatchLoader(
            data,
            batching,
            collator,
            shard=(self.args.process_index, self.args.world_size),
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
            **options,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor]:
        """Return the batches of one optimizer step, and the number of their stored positions over all ranks."""
        self._throughput.wait_begins()
        batches = list(islice(epoch_iterator, num_batches))
        self._throughput.wait_ends(
            sum(batch.num_tokens for batch in batches), sum(batch.input_ids.numel() for batch in batches)
        )
        positions = torch.tensor(sum(batch.num_positions for batch in batches), device=device)
        return batches, self._over_ranks(positions)

    def _prepare_inputs(self, inputs: Batch) -> Batch:  # type: ignore[override]  # transformers says dict
        # Trainer's own would round the teacher's log-probabilities to the model's dtype under DeepSpeed.
        return inputs.to(self.args.device, non_blocking=True)

    def floating_point_ops(self, inputs: Batch) -> int:  # type: ignore[override]
        """Count as Trainer does, which asks a batch by name."""
        return super().floating_point_ops(inputs.model_inputs())

    def _track_num_input_tokens(self, inputs: Batch) -> None:
        super()._track_num_input_tokens(inputs.model_inputs())  # type: ignore[no-untyped-call]

    def compute_loss(  # type: ignore[override]
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute this rank's share of the loss, scaled such that the mean over the ranks of its gradients is the gradient."""
        progress = self.state.global_step / self.state.max_steps if self.state.max_steps > 0 else 1.0
        settings, mixture = self.args.settings_at(progress, tail=self.tail, approximated=self._approximated)
        if self._residuals is not None:
            settings = replace(settings, residual_weight=self._residuals.weight)
        total, terms = self._distil(model, inputs, settings, mixture, self._tail_basis, with_added_loss=True)
        if self._residuals is not None:
            self._residuals.add(terms.residual_products)
        sums, added = position_sums(terms, inputs.targets), self.objective.added_loss
        self._window.add(sums if added is None else sums | {"aux_loss": added * inputs.num_positions})
        positions = inputs.num_positions if num_items_in_batch is None else num_items_in_batch
        loss = total / torch.as_tensor(positions).clamp_min(1) * self.accelerator.num_processes
        return (loss, terms) if return_outputs else loss

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None
    ) -> torch.Tensor:
        """Do Trainer's step. Raises UserError before the optimizer sees a loss that is no number."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise UserError(
                f"step {self.state.global_step + 1}: the loss is {loss.item()}: NaN or infinity is in "
                f"{self.objective.what_is_not_finite()}. Lower --learning_rate, add --warmup_steps, or train with "
                "--bf16 in place of --fp16, from the last checkpoint before this step"
            )
        return loss

    def _distil(
        self,
        model: nn.Module,
        batch: Batch,
        settings: LossSettings,
        mixture: Mixture,
        basis: TailBasis | None,
        *,
        with_added_loss: bool = False,
    ) -> tuple[Tensor, DistillationTerms]:
        """Compute the objective, summed over the positions of a batch, and its terms."""
        return self.objective(
            model,
            batch,
            batch.targets_at(settings.temperature, self._tail_groups if settings.tail == "groups" else None, basis),
            mixture=mixture,
            with_added_loss=with_added_loss,
            settings=settings,
            vocab_size=self._data.vocab_size,
            validate=False,  # the cache's reader did; it would wait for the device
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as Trainer does, with the means over the positions since the last log.

        aux_loss: the terms that the student's own forward adds to its loss, as they are contained in `loss`.
        residual_weight: ρ of the low-rank tail.
        """
        if "loss" in logs:
            logs |= position_means(self._window.totals(self._over_ranks)) | self._throughput_logs()
            if self._residuals is not None:
                logs["residual_weight"] = self._residuals.weight
            self._window = Sums()
        super().log(logs, start_time)

    def _throughput_logs(self) -> dict[str, float]:
        """Compute since the last log, over the ranks: tokens_per_second, and the shares of padding and of data_wait."""
        meter = self._throughput
        counts = torch.tensor([meter.tokens, meter.padded_tokens, meter.seconds, meter.waited_s], dtype=torch.float64)
        tokens, padded_tokens, seconds, waited_s = self._over_ranks(counts).tolist()
        meter.reset()
        return {
            "tokens_per_second": tokens / seconds * self.args.world_size,
            "padding": 1 - tokens / padded_tokens,
            "data_wait": waited_s / seconds,
        }

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Compute `metrics.evaluation_metrics` of a cache, each with the prefix.

        And `loss`: the mixture that the run ends with, at T = 1 and with `evaluation_tail`, so that runs with other tails
        and temperatures compare.
        """
        args = self.args
        assert isinstance(dataloader.dataset, BatchDataset)
        data = dataloader.dataset.data
        basis, final = self._basis_of(data), args.settings_at(1.0, tail=evaluation_tail(data), temperature=1.0)
        model = self.model_wrapped if self.is_in_train else self.model
        assert model is not None
        if not self.is_in_train and (args.bf16_full_eval or args.fp16_full_eval):
            model.to(device=args.device, dtype=torch.bfloat16 if args.bf16_full_eval else torch.float16)
        model.eval()
        self.callback_handler.eval_dataloader = dataloader
        sums = Sums()
        for batch in dataloader:
            batch = self._prepare_inputs(batch)
            with torch.no_grad(), self.accelerator.autocast():
                total, terms = self._distil(model, batch, *final, basis)
            sums.add(evaluation_sums(terms, batch.targets) | {"objective": total})
            self.control = self.callback_handler.on_prediction_step(args, self.state, self.control)
        metrics = evaluation_metrics(sums.totals(self._over_ranks))
        metrics["loss"] = metrics.pop("objective")
        prefixed = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(np.empty(0), None, prefixed, num_samples=self.num_examples(dataloader))

    def num_examples(self, dataloader: DataLoader[Any]) -> int:
        """Count the rows of the cache behind a loader."""
        assert isinstance(dataloader.dataset, BatchDataset)
        return len(dataloader.dataset)

    def _on_every_rank(self, holds: bool) -> bool:
        return bool(self._over_ranks(torch.tensor(int(holds))) == self.args.world_size)

    def _over_ranks(self, values: Tensor) -> Tensor:
        if self.args.world_size == 1:
            return values
        reduced: Tensor = self.accelerator.reduce(values.to(self.args.device), "sum")
        return reduced
