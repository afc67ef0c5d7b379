"""Is the student's tokenizer the one whose ids the cache holds?"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import cached_file

from logitcache import LogitCache, UserError
from logitcache.errors import one_line
from logitcache.format.tokenizer import tokenizer_fingerprint

TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
NAMED_DIFFERENCES = 3
REMEDY = (
    "take a student whose tokenizer is the teacher's, or build the cache with a teacher whose tokenizer is this one"
)


def student_tokenizer(name: str) -> PreTrainedTokenizerBase | None:
    """Tokenizer of a model folder or name, or None where it has none."""
    if not any(_has_file(name, file) for file in TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: its tokenizer does not load: {one_line(error)}") from error


def cache_tokenizer(cache: LogitCache) -> PreTrainedTokenizerBase | None:
    """The teacher's tokenizer as it lies in the cache, or None where the cache has none."""
    filesystem, root = fsspec.url_to_fs(cache.tokenizer_path)
    if not filesystem.exists(root):
        return None
    with tempfile.TemporaryDirectory() as folder:
        filesystem.get(f"{root}/", folder, recursive=True)
        try:
            return AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise UserError(f"{root}: the tokenizer does not load: {one_line(error)}") from error


def check_tokenizer(student: PreTrainedTokenizerBase, cache: LogitCache, name: str) -> list[str]:
    """Compares the student's tokenizer with the teacher's as the manifest records it; returns warnings.

    Raises UserError where an id of the teacher's stands for another token, and where merges differ. Ids that only the
    student has are no difference. Special tokens and chat template change what is made of text, not what the stored
    ids mean: they give warnings. name: of the student, for messages.
    """
    expected = cache.manifest.fingerprint.get("tokenizer")
    if not expected:
        return [f"the tokenizer could not be checked: {cache.path} does not say which tokenizer its ids are of"]
    found = tokenizer_fingerprint(student)
    if found["vocabulary_sha256"] != expected["vocabulary_sha256"]:
        _check_vocabulary(student, expected, name, cache)
    if None not in (found["merges_sha256"], expected["merges_sha256"]) and (
        found["merges_sha256"] != expected["merges_sha256"]
    ):
        raise UserError(
            f"{name}: its tokenizer has the tokens of the cache {cache.path} but other merges, so it gives "
            f"the same text other ids: {REMEDY}"
        )
    warnings = []
    if found["special_tokens"] != expected["special_tokens"]:
        warnings.append(
            f"the student's special tokens are {found['special_tokens']}, the cache's {expected['special_tokens']}"
        )
    if found["chat_template_sha256"] != expected["chat_template_sha256"]:
        warnings.append("the student's chat template is not the one that the cache was built with")
    return warnings


def _check_vocabulary(
    student: PreTrainedTokenizerBase, expected: Mapping[str, Any], name: str, cache: LogitCache
) -> None:
    """Names the ids that differ. The cache's own files count only where they are what the manifest records."""
    teacher = cache_tokenizer(cache)
    if teacher is None or tokenizer_fingerprint(teacher)["vocabulary_sha256"] != expected["vocabulary_sha256"]:
        altered = f" ({cache.tokenizer_path} was altered and does not show which ids differ)" if teacher else ""
        raise UserError(
            f"{name}: its tokenizer has another vocabulary ({len(student.get_vocab())} tokens) than that of the cache "
            f"{cache.path} ({expected['vocab_size']} tokens){altered}: {REMEDY}"
        )
    tokens = {number: token for token, number in student.get_vocab().items()}
    pairs = ((number, token, tokens.get(number)) for token, number in teacher.get_vocab().items())
    differing = sorted(pair for pair in pairs if pair[1] != pair[2])
    if not differing:
        return
    named = "; ".join(
        f"id {number} is {expected!r} in the cache, {'unused' if found is None else repr(found)} in the student"
        for number, expected, found in differing[:NAMED_DIFFERENCES]
    )
    more = f" and {len(differing) - NAMED_DIFFERENCES} more" if len(differing) > NAMED_DIFFERENCES else ""
    raise UserError(
        f"{name}: its tokenizer is not that of the cache {cache.path}. {len(differing)} ids differ: "
        f"{named}{more}. Token ids must mean the same to both: {REMEDY}"
    )


def _has_file(name: str, file: str) -> bool:
    if Path(name).is_dir():
        return (Path(name) / file).is_file()
    try:
        return cached_file(name, file) is not None
    except OSError:
        return False
