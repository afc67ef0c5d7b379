"""Compares the student's tokenizer with the one whose ids the cache holds."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from logitcache import LogitCache, UserError
from logitcache.format.tokenizer import tokenizer_fingerprint
from trainer.model.student import NO_CODE, why_not_loaded

TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
NAMED_DIFFERENCES = 3
REMEDY = (
    "take a student whose tokenizer is the teacher's, or build the cache with a teacher whose tokenizer is this one"
)


def student_tokenizer(name: str) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer of a model, given by folder or Hub name; None if the model has none."""
    if not any(_has_file(name, file) for file in TOKENIZER_FILES):
        return None
    return _loaded(name, f"{name}: its tokenizer")


def cache_tokenizer(cache: LogitCache) -> PreTrainedTokenizerBase | None:
    """Loads the teacher's tokenizer from the files that the cache's manifest vouches for; None if it has none.

    Raises:
        UserError: a file is not as the manifest says, or the tokenizer cannot be loaded and saved again.
    """
    files = cache.tokenizer_files()
    if files is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return _loaded(folder, f"{cache.tokenizer_path}: the tokenizer", saved_to=f"{folder}/saved")


def _loaded(folder: str, what: str, saved_to: str | None = None) -> PreTrainedTokenizerBase:
    """Loads a tokenizer without code of its own, which it does not hand on either. saved_to: to prove that it saves."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **NO_CODE)
        tokenizer.init_kwargs.pop("auto_map", None)
        tokenizer("")  # a setting of the wrong kind is found here, or when prompts are read
        if saved_to is not None:
            tokenizer.save_pretrained(saved_to)
    except Exception as error:  # of whatever kind the files lead to, those in Rust raise Exception itself
        raise UserError(f"{what} does not load: {why_not_loaded(error)}") from error
    return tokenizer


def check_tokenizer(student: PreTrainedTokenizerBase, cache: LogitCache, name: str) -> list[str]:
    """Compare the student's tokenizer with the teacher's, as the manifest records it, and return warnings.

    Raises UserError if an id of the teacher's stands for another token, or if merges differ. Ids that only the student
    has are no difference. Special tokens and chat template change the ids of a text, not the meaning of the stored ids:
    they give warnings. name: of the student, for messages.
    """
    expected = cache.manifest.fingerprint.get("tokenizer")
    if not expected:
        return [f"the tokenizer could not be checked: {cache.path} does not say which tokenizer its ids are of"]
    found = tokenizer_fingerprint(student)
    if found["vocabulary_sha256"] != expected["vocabulary_sha256"]:
        _check_vocabulary(student, expected, name, cache)
    merges = found["merges_sha256"], expected.get("merges_sha256")
    if None not in merges and merges[0] != merges[1]:
        raise UserError(
            f"{name}: its tokenizer has the tokens of the cache {cache.path} but other merges, so it gives "
            f"the same text other ids: {REMEDY}"
        )
    warnings = []
    if found["special_tokens"] != (special_tokens := expected.get("special_tokens")):
        warnings.append(f"the student's special tokens are {found['special_tokens']}, the cache's {special_tokens}")
    if found["chat_template_sha256"] != expected.get("chat_template_sha256"):
        warnings.append("the student's chat template is not the one that the cache was built with")
    return warnings


def _check_vocabulary(
    student: PreTrainedTokenizerBase, expected: Mapping[str, Any], name: str, cache: LogitCache
) -> None:
    """Raises UserError for another vocabulary, with the ids that differ if the cache holds the teacher's tokenizer."""
    why_not = ""
    try:
        teacher = cache_tokenizer(cache)
    except UserError as error:
        teacher, why_not = None, f"; which ids differ is unknown, as {error}"
    if teacher is None or tokenizer_fingerprint(teacher)["vocabulary_sha256"] != expected["vocabulary_sha256"]:
        raise UserError(
            f"{name}: its tokenizer has another vocabulary ({len(student.get_vocab())} tokens) than that of the cache "
            f"{cache.path} ({expected['vocab_size']} tokens){why_not}: {REMEDY}"
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
