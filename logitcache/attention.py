"""Does an attention implementation of transformers compute what a model's configuration says?

transformers hands an implementation all that a layer wants of it, and an implementation leaves out what it does not know
without a word: the model runs, and its logits are another model's. What is known to be lost, by transformers 5.19: SDPA, which
is the default, knows no cap on attention scores (Gemma 2, VaultGemma: |Δ log p| of 1e-2 and more), and GPT-Neo with flash
attention sees all tokens in its local layers too. Attention sinks are not among it: their models refuse SDPA themselves.
"""

from __future__ import annotations

from typing import Any

from logitcache.errors import UserError

COMPLETE = "eager"
"""The implementation that every architecture defines for itself."""


def left_out(config: Any, attention: str | None) -> str | None:
    """Names the setting of a configuration, with its value, that an attention implementation leaves out; None if there is none.

    attention None is the implementation that transformers chooses itself, SDPA.
    """
    text = config.get_text_config()
    cap = getattr(text, "attn_logit_softcapping", None)
    if cap is not None and attention in (None, "sdpa"):
        return f"attn_logit_softcapping = {cap:g}"
    if attention is not None and "flash" in attention and "local" in (getattr(text, "attention_layers", None) or ()):
        return f"window_size = {text.window_size} of the local layers"
    return None


def choose_attention(config: Any, asked: str | None, option: str) -> str | None:
    """Returns the `attn_implementation` that a model is loaded with; None leaves the choice to transformers.

    Raises UserError if the implementation that `option` asks for leaves out a part of the configuration.
    """
    lost = left_out(config, asked)
    if lost is None:
        return asked
    if asked is None:
        return COMPLETE
    raise UserError(f"{option} {asked}: it leaves out {lost}, so its logits would be another model's. Take {COMPLETE}")
