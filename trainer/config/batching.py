"""Which rows of which caches make a batch."""

from dataclasses import dataclass

from logitcache import UserError
from trainer.config.fields import DecidesRun, setting

SAMPLING_STRATEGIES = ("random", "sequential", "group_by_length")


@dataclass
class BatchingSettings:
    """Mixture of caches, packing, batches by tokens."""

    cache: list[str] | None = setting(
        None,
        "The cache to learn from: a folder or URL that `logitcache build` made. Several are mixed: CACHE:WEIGHT is a "
        "cache's share of the rows of an epoch; without weights every row comes once.",
        decides_run=DecidesRun.COMPARED,
    )
    average_with: list[str] | None = setting(
        None,
        "Caches of other teachers on the same rows (found by row id): targets are the mean of all teachers' "
        "probabilities.",
        decides_run=DecidesRun.COMPARED,
    )
    packing: bool = setting(
        False,
        "Fill rows of --packed_length tokens with whole sequences, which see nothing of each other, instead of padding "
        "each. A batch has --per_device_train_batch_size such rows.",
    )
    packed_length: int | None = setting(
        None, "Tokens of a packed row. Default: 2048, or the longest sequence where that is longer."
    )
    tokens_per_batch: int | None = setting(
        None,
        "As many sequences to a batch of one device as fit into so many tokens, padding counted, in place of "
        "--per_device_train_batch_size.",
    )

    def check_batching(self, sampling_strategy: str) -> None:
        """Raises UserError for settings that contradict each other."""
        if isinstance(self.cache, str):
            self.cache = [self.cache]
        if isinstance(self.average_with, str):
            self.average_with = [self.average_with]
        if sampling_strategy not in SAMPLING_STRATEGIES:
            raise UserError(
                f"--train_sampling_strategy {sampling_strategy}: accepted are {', '.join(SAMPLING_STRATEGIES)}"
            )
        for name in ("packed_length", "tokens_per_batch"):
            value = getattr(self, name)
            if value is not None and value < 2:
                raise UserError(f"--{name} {value}: a sequence has at least 2 tokens")
        if self.packed_length and not self.packing:
            raise UserError("--packed_length without --packing: add --packing, or leave it out")
        if self.packing and self.tokens_per_batch:
            raise UserError(
                "--packing --tokens_per_batch: a packed batch has --per_device_train_batch_size rows of "
                "--packed_length tokens. Leave --tokens_per_batch out"
            )
        if self.packing and getattr(self, "use_cache", False):  # a field of TrainingArguments
            raise UserError(
                "--packing --use_cache true: with a cache of keys and values transformers does not look for packed "
                "sequences, and they would see each other. Leave --use_cache out: training has no use for it"
            )
        if self.packing and sampling_strategy == "group_by_length":
            raise UserError(
                "--packing --train_sampling_strategy group_by_length: packed rows have no padding to save. Take one"
            )
