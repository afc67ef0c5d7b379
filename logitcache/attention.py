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
    """Names the part of a configuration that an attention implementation leaves out.

    Args:
        config: a configuration of transformers.
        attention: name of the implementation; None is the one that transformers chooses, SDPA.

    Returns:
        The setting and its value, or None where the implementation computes everything.
    """
    text = config.get_text_config()
    cap = getattr(text, "attn_logit_softcapping", None)
    if cap is not None and attention in (None, "sdpa"):
        return f"attn_logit_softcapping = {cap:g}"
    if attention is not None and "flash" in attention and "local" in (getattr(text, "attention_layers", None) or ()):
        return f"window_size = {text.window_size} of the local layers"
    return None


def choose_attention(config: Any, asked: str | None, option: str) -> str | None:
    """Chooses the attention implementation that a model is loaded with.

    Args:
        config: a configuration of transformers.
        asked: the name that the user gave, or None.
        option: how the user's option is called, for the message.

    Returns:
        A name for transformers' `attn_implementation`, or None, which leaves the choice to transformers.

    Raises:
        UserError: The one asked for leaves out a part of the configuration.
    """
    lost = left_out(config, asked)
    if lost is None:
        return asked
    if asked is None:
        return COMPLETE
    raise UserError(f"{option} {asked}: it leaves out {lost}, so its logits would be another model's. Take {COMPLETE}")
