"""Answers to prompts, batch by batch, with transformers; `vllm_generation` does the same with vLLM.

Every answer has random numbers of its own, made from the seed and its prompt's row, so that two students are compared on
the same draws, and so that an answer does not depend on what else is in its batch: in float32, and up to rounding in half
precision, where a batch's shape can change a logit enough to draw another token.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from logitcache import UserError
from trainer.evaluation.prompts import Prompt

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """An answer. num_tokens: without the end-of-text token.  ended: whether the model wrote it within the limit."""

    text: str
    num_tokens: int
    ended: bool


def end_ids(name: str, config: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Lists the ids that end an answer, by the model's generation settings, its configuration and its tokenizer."""
    try:
        named = GenerationConfig.from_pretrained(name).eos_token_id
    except OSError:
        named = None
    found = [named, config.get_text_config().eos_token_id, tokenizer.eos_token_id]
    ids = {id for ids in found if ids is not None for id in (ids if isinstance(ids, list) else [ids])}
    return sorted(ids)


def answer_of(token_ids: Sequence[int], ends: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Answer:
    """Makes an answer of its tokens up to the first that ends it."""
    length = next((index for index, id in enumerate(token_ids) if id in ends), len(token_ids))
    text = tokenizer.decode(list(token_ids[:length]), skip_special_tokens=True)
    return Answer(str(text), length, length < len(token_ids))


class TransformersGenerator:
    """A model in this process, on the device where it lies.

    ends: see `end_ids`.  temperature: 0 takes the most probable token.  batch_size: prompts at a time.
    """

    engine = f"transformers {transformers.__version__}"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        ends: Sequence[int],
        *,
        temperature: float = 1.0,
        max_new_tokens: int = 256,
        batch_size: int = 32,
    ) -> None:
        self._model, self._tokenizer, self._ends = model.eval(), tokenizer, ends
        self._temperature, self._max_new_tokens, self._batch_size = temperature, max_new_tokens, batch_size
        self.dtype = str(model.dtype).removeprefix("torch.")
        pad, known = tokenizer.pad_token_id, model.config.get_text_config().vocab_size
        self._pad = pad if isinstance(pad, int) and pad < known else 0  # any known token: it is masked
        # In place of the model's own: a published model's top_k or repetition penalty would change the protocol.
        model.generation_config = GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=list(ends) or None, pad_token_id=self._pad
        )
        if batch_size > 1 and not keeps_prompts_apart(model, self._pad):
            logger.warning(
                "%s answers one prompt at a time: in a batch, other prompts or padding change its logits",
                type(model).__name__,
            )
            self._batch_size = 1

    def answers(self, prompts: Sequence[Prompt], seed: int, label: str = "generating") -> list[Answer]:
        """Answers each prompt. label: of the progress bar. Raises UserError for logits that are not finite."""
        found: dict[int, Answer] = {}
        # The longest first, so that a batch too large for the memory fails at once.
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index].token_ids))
        with tqdm(total=len(prompts), desc=label, unit="answer", disable=None) as bar:
            for start in range(0, len(order), self._batch_size):
                indices = order[start : start + self._batch_size]
                written = self._generate([prompts[index] for index in indices], seed)
                for index, token_ids in zip(indices, written.tolist(), strict=True):
                    found[index] = answer_of(token_ids, self._ends, self._tokenizer)
                bar.update(len(indices))
        return [found[index] for index in range(len(prompts))]

    @torch.no_grad()
    def _generate(self, prompts: Sequence[Prompt], seed: int) -> Tensor:
        """Generates token ids [B, ≤ max_new_tokens], with padding after the first end."""
        longest = max(len(prompt.token_ids) for prompt in prompts)
        input_ids = torch.full((len(prompts), longest), self._pad)
        mask = torch.zeros_like(input_ids)
        for index, prompt in enumerate(prompts):
            begin = longest - len(prompt.token_ids)
            input_ids[index, begin:] = torch.tensor(prompt.token_ids)
            mask[index, begin:] = 1
        device = self._model.device
        draws = Draws([] if self._temperature == 0 else prompts, seed, self._temperature, self._max_new_tokens, longest)
        processors = LogitsProcessorList([draws] if self._temperature else [])
        generate: Any = self._model.generate
        whole = generate(input_ids=input_ids.to(device), attention_mask=mask.to(device), logits_processor=processors)
        draws.check()
        answers: Tensor = whole[:, longest:].cpu()
        return answers


@torch.no_grad()
def keeps_prompts_apart(model: PreTrainedModel, pad: int) -> bool:
    """Tells whether a prompt has the same logits alone and beside a longer one, behind padding, for two new tokens.

    The recurrent layers of some models see padding, and the states of others the wrong prompt.
    """
    short, long = torch.arange(1, 5, device=model.device), torch.arange(2, 10, device=model.device)
    padding = torch.full_like(short, pad)
    together = torch.stack([torch.cat([padding, short]), long])
    mask = torch.ones_like(together)
    mask[0, : len(padding)] = 0
    generate: Any = model.generate
    options = {"max_new_tokens": 2, "min_new_tokens": 2, "return_dict_in_generate": True, "output_logits": True}
    alone, batched = (
        torch.stack(generate(input_ids=ids, attention_mask=seen, **options).logits)[:, 0]
        for ids, seen in ((short[None], torch.ones_like(short)[None]), (together, mask))
    )
    tolerance = 0.1 if model.dtype in (torch.float16, torch.bfloat16) else 1e-4
    return bool((batched - alone).abs().max() <= tolerance * alone.abs().max())


class Draws(LogitsProcessor):
    """Draws one token for each prompt from softmax(logits / temperature), with random numbers of the prompt's own.

    The i-th token of an answer is the first whose cumulative probability exceeds the i-th number of the generator that is
    seeded with (seed, row of the prompt).  longest: length of the padded prompts.
    """

    def __init__(
        self, prompts: Sequence[Prompt], seed: int, temperature: float, max_new_tokens: int, longest: int
    ) -> None:
        numbers = [np.random.default_rng([seed, prompt.row]).random(max_new_tokens) for prompt in prompts]
        self._uniform = torch.from_numpy(np.array(numbers))  # float64 [B, max_new_tokens]
        self._temperature, self._longest = temperature, longest
        self._finite: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Returns scores [B, V]: 0 for the drawn token, −inf for the others."""
        self._uniform = self._uniform.to(scores.device)
        uniform = self._uniform[:, input_ids.shape[1] - self._longest, None]
        cumulative = (scores.double() / self._temperature).softmax(-1).cumsum(-1)
        total = cumulative[:, -1:]
        finite = total.isfinite().all()
        self._finite = finite if self._finite is None else self._finite & finite
        drawn = torch.searchsorted(cumulative, uniform * total, right=True).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)

    def check(self) -> None:
        """Raises UserError if logits were not finite."""
        if self._finite is not None and not self._finite:
            raise UserError(
                "the model's logits are not finite: nothing can be sampled from them. Did its training diverge?"
            )
