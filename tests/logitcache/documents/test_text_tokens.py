"""Texts, prompts and completions → tokens, for tokenizers of every kind: each special token once, no text but the document's."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from logitcache.capture.corpus.document_types import DOCUMENT_TYPES
from logitcache.capture.corpus.prompts import PROMPT_TYPES
from logitcache.capture.corpus.tokenize import Corpus, CorpusSettings
from logitcache.capture.corpus.tokens import Tokenization
from logitcache.documents.text_tokens import TextTokens
from tests.helpers.smallcaches import small
from trainer.evaluation.prompts import read_prompts

BOS, EOS = "<|bos|>", "<|eos|>"
LEARNED = ["the quick brown fox jumps over the lazy dog. two and two is four.\nfour is [four]"] * 4
SPECIAL = [BOS, EOS, "<|user|>"]


def byte_level(add_prefix_space: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(LEARNED, trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet))
    return tokenizer


def metaspace(scheme: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    alphabet = [chr(code) for code in range(33, 127)] + ["\n"]
    tokenizer.train_from_iterator(
        LEARNED, trainers.BpeTrainer(vocab_size=200, initial_alphabet=alphabet, special_tokens=["<unk>"])
    )
    return tokenizer


def llama_2() -> Tokenizer:
    """Its way: the normalizer puts ▁ before the text and in place of spaces, unknown characters are bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # for training only: tokens within words
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer.train_from_iterator(LEARNED, trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", *byte_tokens]))
    # The bytes are no special tokens: decoding would leave them out, and their text would be taken for them.
    model = json.loads(tokenizer.to_str())
    model["added_tokens"] = model["added_tokens"][:1]
    model["pre_tokenizer"] = None
    return Tokenizer.from_str(json.dumps(model))


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": byte_level,
    "byte level with a space before": lambda: byte_level(add_prefix_space=True),
    "metaspace, first": lambda: metaspace("first"),
    "metaspace, always": lambda: metaspace("always"),
    "Llama 2": llama_2,
}


def adding(tokenizer: Tokenizer, before: str = "", after: str = "", bos: str = BOS) -> Any:
    """The tokenizer in transformers' class, with special tokens that its post-processor adds."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=EOS, extra_special_tokens=SPECIAL[2:]
    )
    backend = wrapped.backend_tokenizer
    pattern = " ".join([*([before] if before else []), "$A", *([after] if after else [])])
    ids = [(token, backend.token_to_id(token)) for token in {before, after} - {""}]
    steps = [
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(single=pattern, special_tokens=ids),
    ]
    backend.post_processor = processors.Sequence(steps)
    return wrapped


ADDED = {"nothing": {}, "BOS": {"before": BOS}, "EOS": {"after": EOS}, "both": {"before": BOS, "after": EOS}}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> Tokenizer:
    return KINDS[request.param]()


@pytest.fixture(params=ADDED)
def added(request: pytest.FixtureRequest) -> dict[str, str]:
    return ADDED[request.param]


def tokenize(layout: str, document: dict[str, str], tokenizer: Any) -> tuple[str, Counter[str]]:
    """The document's tokens as text, trained ones in brackets, and what is said of it."""
    by = Tokenization(tokenizer)
    [(ids, mask)] = DOCUMENT_TYPES[layout][1](document, by)
    first = int(mask.argmax()) if mask.any() else len(ids)
    assert mask[first:].all()
    return f"{tokenizer.decode(ids[:first])}[{tokenizer.decode(ids[first:])}]", by.notes


def test_an_end_that_the_tokenizer_adds_stands_at_the_end_only(kind: Tokenizer, added: dict[str, str]) -> None:
    tokenizer = adding(copy.deepcopy(kind), **added)
    by = Tokenization(tokenizer)
    [(ids, mask)] = DOCUMENT_TYPES["prompt-completion"][1]({"prompt": "2+2 is", "completion": " four"}, by)
    begin = [tokenizer.bos_token_id] if "before" in added else []
    # transformers' own: the whole text, whose answer begins at a word.
    whole = tokenizer("2+2 is four", add_special_tokens=False)["input_ids"]
    assert ids.tolist() == [*begin, *whole, tokenizer.eos_token_id]
    assert ids[~mask].tolist() == begin + tokenizer("2+2 is", add_special_tokens=False)["input_ids"]
    assert not by.notes


@pytest.mark.parametrize("begins", [BOS, EOS])
def test_a_beginning_that_the_document_has_already_is_there_once_and_said(kind: Tokenizer, begins: str) -> None:
    tokenizer = adding(copy.deepcopy(kind), before=begins, bos=begins)
    said = f"documents begin with {begins}, which the tokenizer adds as well: it is there once"
    documents: dict[str, dict[str, str]] = {
        "text": {"text": "the fox is four"},
        "prompt-completion": {"prompt": "the fox", "completion": " is four"},
    }
    for layout, bare in documents.items():
        written = bare | {name: begins + bare[name] for name in ("text", "prompt") if name in bare}
        once, notes = tokenize(layout, written, tokenizer)
        assert once.count(begins) == 1 + (begins == EOS)
        assert once.startswith(begins)
        assert notes == {said: 1}
        assert not tokenize(layout, bare, tokenizer)[1]


def test_a_text_that_is_there_with_all_its_special_tokens_gets_no_more(kind: Tokenizer, added: dict[str, str]) -> None:
    tokenizer = adding(copy.deepcopy(kind), **added)
    document = {"prompt": f"{BOS}<|user|>four?", "completion": f"four.{EOS}"}
    shown, _ = tokenize("prompt-completion", document, tokenizer)
    assert shown.replace(" ", "") == f"{BOS}<|user|>four?[four.{EOS}]"
    shown, _ = tokenize("text", {"text": "".join(document.values())}, tokenizer)
    assert shown.count(BOS) == shown.count(EOS) == 1


def test_a_completion_loses_a_beginning_of_its_own(kind: Tokenizer) -> None:
    tokenizer = adding(copy.deepcopy(kind), before=BOS)
    document = {"prompt": "the fox", "completion": f"{BOS}is four"}
    shown, notes = tokenize("prompt-completion", document, tokenizer)
    assert shown.count(BOS) == 1
    assert notes == {f"completions begin with {BOS}: it is left out of them": 1}


def test_prompts_to_be_answered_do_not_end(kind: Tokenizer, added: dict[str, str], tmp_path: Path) -> None:
    tokenizer = adding(copy.deepcopy(kind), **added)
    rows = [{"prompt": "2+2 is", "completion": " four"}, {"prompt": f"{BOS}2+2 is", "completion": " four"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said: list[str] = []
    students = [prompt.token_ids for prompt in read_prompts(str(tmp_path / "rows.jsonl"), tokenizer, say=said.append)]
    by = Tokenization(tokenizer)
    teachers = [PROMPT_TYPES["prompt"][1](row, by)[0][0].tolist() for row in rows]
    plain = tokenizer("2+2 is", add_special_tokens=False)["input_ids"]
    begin = [tokenizer.bos_token_id] if "before" in added else []
    assert students[0] == teachers[0] == begin + plain
    assert students[1] == teachers[1]
    assert teachers[1].count(tokenizer.bos_token_id) == 1
    assert len(said) == len(by.notes) == len(begin)
    [(ids, mask)] = DOCUMENT_TYPES["prompt-completion"][1](rows[0], Tokenization(tokenizer))
    assert ids[~mask].tolist() == students[0]


def test_long_text_begins_once_and_ends_once_however_it_is_split(kind: Tokenizer, added: dict[str, str]) -> None:
    tokenizer = adding(copy.deepcopy(kind), **added)
    text = "the quick brown fox jumps over the lazy dog. " * 3
    [whole] = Corpus(sources(text), tokenizer, 10_000, CorpusSettings(10_000))
    pieces = list(Corpus(sources(text), tokenizer, 10_000, CorpusSettings(8)))
    assert len(pieces) > 3
    joined = [pieces[0].input_ids[0], *(token for piece in pieces for token in piece.input_ids[1:])]
    assert joined == whole.input_ids.tolist()
    assert joined.count(tokenizer.bos_token_id) == ("before" in added)
    assert joined.count(tokenizer.eos_token_id) == 1


def sources(text: str) -> list[Any]:
    from logitcache.capture.corpus.documents import Source
    from logitcache.documents.document import Document

    return [Source("text", dict, lambda: iter([Document({"text": text}, "text")]))]


WORDS = st.text("ab four\n.]0", min_size=1, max_size=12)


@pytest.mark.slow
@given(prompt=WORDS, completion=WORDS)
@small
def test_prompt_and_completion_together_are_the_document(kind: Tokenizer, prompt: str, completion: str) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=kind, eos_token=EOS)
    texts = TextTokens(tokenizer, Counter())
    *ids, end = texts.of_prompt(prompt) + texts.of_completion(prompt, completion)
    assert end == tokenizer.eos_token_id
    assert str(tokenizer.decode(ids)).lstrip(" ") == (prompt + completion).lstrip(" ")


def test_the_teachers_text_and_completions_are_as_before(teacher_tokenizer: Any) -> None:
    texts = TextTokens(teacher_tokenizer, Counter())
    assert texts.of_completion("x", " apple") == [
        *teacher_tokenizer(" apple")["input_ids"],
        teacher_tokenizer.eos_token_id,
    ]
    assert texts.of_completion("x", "") == texts.of_prompt("") == []
