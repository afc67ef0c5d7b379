"""Training adapters in place of all weights."""

from dataclasses import dataclass

from logitcache import UserError
from trainer.config.fields import setting


@dataclass
class AdapterSettings:
    """LoRA and DoRA, through PEFT."""

    lora_r: int | None = setting(
        None, "Train LoRA adapters of this rank and leave the student's own weights as they are."
    )
    lora_alpha: int | None = setting(
        None,
        "The adapters' product is multiplied by lora_alpha / lora_r. Default: 2·lora_r, so that another rank needs no "
        "other learning rate.",
    )
    lora_dropout: float = setting(0.0, "Dropout on what enters an adapter.")
    lora_target_modules: list[str] | None = setting(
        None,
        "The linear layers that get an adapter, by the ends of their names, such as q_proj v_proj. Default: all but the "
        "output projection and those that an adapter would not change.",
    )
    use_dora: bool = setting(False, "DoRA: adapters of a weight's direction, and its length trained beside them.")

    def check_adapters(self) -> None:
        """Raises UserError for values that cannot be meant, and for settings of adapters without --lora_r."""
        if self.lora_r is None:
            for name in ("lora_alpha", "lora_dropout", "lora_target_modules", "use_dora"):
                if getattr(self, name):
                    raise UserError(f"--{name} without --lora_r: add the rank of the adapters, such as --lora_r 16")
            return
        for name in ("lora_r", "lora_alpha"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} {value}: it must be at least 1")
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"--lora_dropout {self.lora_dropout:g}: it must be at least 0 and below 1")
