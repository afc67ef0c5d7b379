"""A student must read the cache's ids as the teacher wrote them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cachemaking import VOCAB, random_sequences, tokenizer, write_cache
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import logitcache
from logitcache import LogitCache, UserError
from logitcache.format.storage import Folder
from logitcache.format.tokenizer import tokenizer_fingerprint
from trainer.tokenizers import cache_tokenizer, check_tokenizer, student_tokenizer

WORDS = ["<eos>", *(f"word{i}" for i in range(1, VOCAB))]


def bpe(merges: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    tokens = ["<eos>", "a", "b", "c", "ab", "bc", "abc"]
    vocabulary = {token: i for i, token in enumerate([*tokens, *(f"t{i}" for i in range(len(tokens), VOCAB))])}
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def test_the_same_tokenizer_passes_without_a_word(heldout: LogitCache) -> None:
    assert check_tokenizer(tokenizer(), heldout, "student") == []


def test_a_mismatch_names_how_many_ids_differ_and_the_first_of_them(heldout: LogitCache) -> None:
    words = WORDS.copy()
    words[5], words[9] = words[9], words[5]
    with pytest.raises(UserError) as refusal:
        check_tokenizer(tokenizer(words), heldout, "my-student")
    message = str(refusal.value)
    assert message.startswith("my-student: ")
    assert "2 ids differ" in message
    assert "id 5 is 'word5' in the cache, 'word9' in the student" in message
    assert "id 9 is 'word9' in the cache, 'word5' in the student" in message


def test_ids_that_the_student_does_not_have_are_named(heldout: LogitCache) -> None:
    with pytest.raises(
        UserError, match=r"4 ids differ: id 60 is 'word60' in the cache, unused in the student.* 1 more"
    ):
        check_tokenizer(tokenizer(WORDS[:60]), heldout, "student")


def test_ids_that_only_the_student_has_are_no_difference(heldout: LogitCache) -> None:
    check_tokenizer(tokenizer([*WORDS, "extra1", "extra2"]), heldout, "student")


def test_other_merges_are_refused(tmp_path: Path) -> None:
    merges = [("a", "b"), ("b", "c"), ("ab", "c")]
    cache = write_cache(tmp_path, random_sequences(2, seed=0), teacher_tokenizer=bpe(merges))
    check_tokenizer(bpe(merges), cache, "student")
    with pytest.raises(UserError, match="other merges"):
        check_tokenizer(bpe([("b", "c"), ("a", "b"), ("ab", "c")]), cache, "student")


def test_special_tokens_and_chat_template_only_warn(heldout: LogitCache) -> None:
    other = tokenizer()
    other.pad_token = "word3"
    other.chat_template = "{{ messages }}"
    warnings = check_tokenizer(other, heldout, "student")
    assert len(warnings) == 2
    assert "special tokens" in warnings[0]
    assert "chat template" in warnings[1]


def test_a_cache_without_its_tokenizer_is_compared_by_hash(tmp_path: Path) -> None:
    cache = write_cache(tmp_path, random_sequences(2, seed=0))
    shutil.rmtree(tmp_path / "tokenizer")
    assert cache_tokenizer(cache) is None
    assert check_tokenizer(tokenizer(), cache, "student") == []
    with pytest.raises(UserError, match=r"another vocabulary \(60 tokens\)"):
        check_tokenizer(tokenizer(WORDS[:60]), cache, "student")


def test_an_altered_tokenizer_folder_does_not_pass_for_the_teachers(tmp_path: Path) -> None:
    cache = write_cache(tmp_path, random_sequences(2, seed=0))
    other = tokenizer(["<eos>", *(f"other{i}" for i in range(1, VOCAB))])
    other.save_pretrained(cache.tokenizer_path)
    with pytest.raises(UserError, match=r"another vocabulary .*tokenizer was altered"):
        check_tokenizer(other, cache, "student")
    assert check_tokenizer(tokenizer(), cache, "student") == []


def test_a_cache_that_does_not_name_its_tokenizer_gives_a_warning(tmp_path: Path) -> None:
    cache = write_cache(tmp_path, random_sequences(2, seed=0))
    replace(cache.manifest, fingerprint={"teacher": {"name": "random"}}).write(Folder(tmp_path))
    [warning] = check_tokenizer(tokenizer(WORDS[:60]), logitcache.open(tmp_path), "student")
    assert "could not be checked" in warning


def test_a_folder_without_tokenizer_files_has_no_tokenizer(student_folder: str) -> None:
    assert student_tokenizer(student_folder) is None


class ToyTokenizer:
    """No more than what a fingerprint needs."""

    def __init__(self, merges: list[Any]) -> None:
        self.special_tokens_map = {"eos_token": "<eos>"}
        self.backend_tokenizer = self
        self._merges = merges

    def get_vocab(self) -> dict[str, int]:
        return {"a": 0, "b": 1}

    def to_str(self) -> str:
        return json.dumps({"model": {"type": "BPE", "merges": self._merges}})


def test_merges_are_the_same_however_their_file_writes_them() -> None:
    one_string = tokenizer_fingerprint(ToyTokenizer(["a b"]))
    assert one_string == tokenizer_fingerprint(ToyTokenizer([["a", "b"]]))
    assert one_string != tokenizer_fingerprint(ToyTokenizer([["b", "a"]]))
