"""The options of `trainer eval --generate`: the prompts' files, and how a model answers them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from logitcache import UserError
from logitcache.documents.chat_template import read_chat_template
from trainer.evaluation.prompts import check_columns, check_templates, data_stem
from trainer.evaluation.rouge import check_rouge_installed

BACKENDS = ("auto", "transformers", "vllm")
PUBLISHED_SEEDS = (10, 20, 30, 40, 50)
"""Of ToDi's evaluation (Jung et al. 2025, arXiv 2505.16297)."""


@dataclass(frozen=True)
class GenerationSettings:
    """The settings of generated answers; by default the papers' protocol, five samples at temperature 1.

    data: files of prompts and references, see `prompts.read_prompts`.  columns: ours → theirs.  prompt_template: texts with
    {column} fields, in which a backslash and an n become a new line.  chat_template: a file with the Jinja template for
    `messages`, in place of the tokenizer's own.  temperature: 0 takes the most probable token, once, whatever the seeds.
    max_prompt_length: in tokens; longer prompts are left out and counted, and without it a prompt that does not fit the
    model is refused.  batch_size: answers at a time, of transformers.

    Raises UserError for settings that cannot work, and if rouge-score is not installed.
    """

    data: Sequence[str]
    columns: Mapping[str, str] = field(default_factory=dict)
    prompt_template: Sequence[str] = ()
    chat_template: str | None = None
    seeds: Sequence[int] = PUBLISHED_SEEDS
    temperature: float = 1.0
    max_new_tokens: int = 256
    max_prompt_length: int | None = None
    backend: str = "auto"
    batch_size: int = 32

    def __post_init__(self) -> None:
        for name in ("data", "prompt_template"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, (getattr(self, name),))
            given = getattr(self, name)
            if not isinstance(given, Sequence) or not all(isinstance(text, str) for text in given):
                raise UserError(f"--{name} {given}: a text or a list of texts is expected")
        object.__setattr__(self, "prompt_template", tuple(text.replace(r"\n", "\n") for text in self.prompt_template))
        if not isinstance(self.columns, Mapping) or not all(isinstance(name, str) for name in self.columns.values()):
            raise UserError(f"--columns {self.columns}: names of columns are expected, for example prompt=question")
        if not isinstance(self.chat_template, str | None):
            raise UserError(f"--chat-template {self.chat_template}: the name of a file is expected")
        self._check_numbers()
        if self.backend not in BACKENDS:
            raise UserError(f"--backend {self.backend}: choose {', '.join(BACKENDS)}")
        self._check_data()
        check_columns(self.columns)
        check_templates(self.prompt_template)
        self.read_template()
        check_rouge_installed()

    @property
    def runs(self) -> dict[str, int]:
        """The seed of each run over the data, by the run's name."""
        return {"greedy": 0} if self.temperature == 0 else {str(seed): seed for seed in self.seeds}

    def read_template(self) -> str | None:
        """Returns the Jinja template of `chat_template`, or None if the tokenizer's own is used."""
        return None if self.chat_template is None else read_chat_template(self.chat_template)

    def decisive(self, backend: str) -> dict[str, Any]:
        """Returns the settings that answers depend on, as plain JSON types. backend: the chosen one."""
        template = self.read_template()
        return {
            "temperature": float(self.temperature),
            "max_new_tokens": self.max_new_tokens,
            "max_prompt_length": self.max_prompt_length,
            "columns": dict(self.columns),
            "prompt_template": list(self.prompt_template),
            "backend": backend,
            **({} if template is None else {"chat_template_sha256": hashlib.sha256(template.encode()).hexdigest()}),
        }

    def _check_numbers(self) -> None:
        for name in ("max_new_tokens", "max_prompt_length", "batch_size"):
            value = getattr(self, name)
            if value is None and name == "max_prompt_length":
                continue
            if type(value) is not int or value < 1:
                raise UserError(f"--{name} {value}: a whole number of at least 1 is expected")
        if type(self.temperature) not in (int, float) or not 0 <= self.temperature < float("inf"):
            raise UserError(f"--temperature {self.temperature}: a number from 0 (greedy) is expected")
        if not isinstance(self.seeds, Sequence) or isinstance(self.seeds, str) or not self.seeds:
            raise UserError(f"--seeds {self.seeds}: one or more whole numbers are expected")
        for seed in self.seeds:
            if type(seed) is not int or seed < 0:
                raise UserError(f"--seeds {seed}: whole numbers from 0 are expected")
        for seed, count in Counter(self.seeds).items():
            if count > 1:
                raise UserError(f"--seeds names {seed} twice: the same answers would count double")

    def _check_data(self) -> None:
        if not self.data:
            raise UserError("--generate needs --data: a .jsonl or .parquet file of prompts and references")
        paths: dict[str, str] = {}
        for path in self.data:
            stem = data_stem(path)
            if not Path(path).is_file():
                raise UserError(f"--data {path}: no such file")
            if stem in paths:
                raise UserError(
                    f"--data {path} and {paths[stem]}: both scores would be named {stem}; rename one of the files"
                )
            paths[stem] = path
