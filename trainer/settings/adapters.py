"""Training adapters in place of all weights."""

from dataclasses import dataclass

from trainer.settings.fields import setting


@dataclass
class AdapterSettings:
    """LoRA and DoRA, through PEFT."""

    lora_r: int | None = setting(
        None, "Train LoRA adapters of this rank and leave the student's own weights as they are."
    )

    def check_adapters(self) -> None:
        """Raises UserError for settings that contradict each other."""
