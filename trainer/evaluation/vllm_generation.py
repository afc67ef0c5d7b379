"""The answers of a student on vLLM, through its public `vllm.LLM`; only the end of its processes goes deeper."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from logitcache import UserError
from logitcache.engines.vllm_process import SHUTDOWN_S, brief, ends_with_this_process, set_environment, whole_prompts
from trainer.evaluation.generation import Answer, answer_of
from trainer.evaluation.prompts import Prompt


class VllmGenerator:
    """A vLLM engine in processes of its own, which end with `close`, or else with this one, even if that is killed.

    longest: tokens of the longest prompt.  Otherwise as `TransformersGenerator`.
    """

    def __init__(
        self,
        name: str,
        config: PreTrainedConfig,
        tokenizer: PreTrainedTokenizerBase,
        ends: Sequence[int],
        *,
        temperature: float,
        max_new_tokens: int,
        longest: int,
    ) -> None:
        set_environment()
        import vllm
        from vllm.platforms import current_platform

        self.engine = f"vllm {vllm.__version__}"
        self._tokenizer, self._ends = tokenizer, ends
        self._temperature, self._max_new_tokens = temperature, max_new_tokens
        # As transformers loads it; vLLM's "auto" would halve a float32 model's precision.
        dtype = str(config.dtype).removeprefix("torch.") if config.dtype is not None else "auto"
        options: dict[str, Any] = {"dtype": dtype}
        if current_platform.is_cpu():
            options = {"dtype": "float32", "enforce_eager": True, **whole_prompts(longest + max_new_tokens)}
        try:
            with ends_with_this_process():
                self._llm = vllm.LLM(
                    model=name,
                    max_model_len=longest + max_new_tokens,
                    generation_config="vllm",
                    disable_log_stats=True,
                    use_tqdm_on_load=False,
                    **options,
                )
        except (ValueError, OSError, TypeError, RuntimeError) as error:
            raise UserError(
                f"vLLM does not start with {name}: {brief(error)} (--backend transformers does without)"
            ) from error
        self.dtype = str(self._llm.model_config.dtype).removeprefix("torch.")

    def close(self) -> None:
        """Ends the engine's processes and returns when their memory is free."""
        self._llm.llm_engine.engine_core.shutdown(timeout=SHUTDOWN_S)

    def answers(self, prompts: Sequence[Prompt], seed: int, label: str = "generating") -> list[Answer]:
        """Returns an answer to each prompt. label: of the progress bar. Raises UserError if vLLM gives up."""
        from vllm import SamplingParams

        def bar(*args: Any, **options: Any) -> Any:
            return tqdm(*args, **options | {"desc": label, "unit": "answer"})

        tokens: list[Any] = [{"prompt_token_ids": list(prompt.token_ids)} for prompt in prompts]
        params = [
            SamplingParams(
                temperature=self._temperature,
                max_tokens=self._max_new_tokens,
                seed=int(np.random.SeedSequence([seed, prompt.row]).generate_state(1, np.uint64)[0] >> 1),
                stop_token_ids=list(self._ends),
                detokenize=False,
            )
            for prompt in prompts
        ]
        use_tqdm = bar if sys.stderr.isatty() else False  # vLLM divides by a hidden bar's time, which is 0
        try:
            outputs = self._llm.generate(tokens, params, use_tqdm=use_tqdm)
        except Exception as error:  # of vLLM's own kinds, which change between releases
            raise UserError(
                f"vLLM gave up while it answered ({brief(error)}): what is finished is kept, the same command continues"
            ) from error
        return [answer_of(output.outputs[0].token_ids, self._ends, self._tokenizer) for output in outputs]
