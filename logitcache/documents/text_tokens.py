"""Text → token ids, the tokenizer's own special tokens each once and where it belongs."""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from typing import Any

from logitcache.documents.document import BadDocument

ANCHORS = ("\n", ".", "]", "0")
"""Texts that another one is tokenised behind, for tokenizers that put a space before whatever they are given."""


class TextTokens:
    """Tokenises texts, prompts and their completions.

    tokenizer: transformers'.  notes: facts that the user is told once, as words that follow a number, with that number.
    """

    def __init__(self, tokenizer: Any, notes: Counter[str]) -> None:
        self._tokenizer = tokenizer
        self._notes = notes

    def of_text(self, text: Any) -> list[int]:
        """Tokenises a whole text: with the tokens that the tokenizer adds before and after it, and its end-of-text token."""
        return self._ended(self._begun(self.of_written(text)))

    def of_prompt(self, text: Any) -> list[int]:
        """Tokenises a text that goes on: with the tokens that the tokenizer adds before it."""
        return self._begun(self.of_written(text))

    def of_completion(self, prompt: str, text: Any) -> list[int]:
        """Tokenises what follows a prompt, apart from it: the tokens that end a text are added, none of an empty one."""
        ids = self._continued(text) if prompt else self.of_written(text)
        before, _ = self._added
        if self._is_begun(ids) and self._tokenizer.eos_token_id not in before:
            self._notes[f"completions begin with {self._tokenizer.decode(before)}: it is left out of them"] += 1
            ids = ids[len(before) :]
        return self._ended(ids) if ids else ids

    def of_written(self, text: Any) -> list[int]:
        """Tokenises a text with all its special tokens in it already."""
        return self._encode(text, add_special_tokens=False)

    def _encode(self, text: Any, add_special_tokens: bool) -> list[int]:
        if not isinstance(text, str):
            raise BadDocument(f"text is wanted, found {type(text).__name__}")
        ids: list[int] = self._tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        return ids

    @cached_property
    def _added(self) -> tuple[list[int], list[int]]:
        """Ids that the tokenizer adds before and after a text."""
        plain, full = self.of_written("a"), self._encode("a", add_special_tokens=True)
        for start in range(len(full) - len(plain) + 1):
            if full[start : start + len(plain)] == plain:
                return full[:start], full[start + len(plain) :]
        return [], []

    def _begun(self, ids: list[int]) -> list[int]:
        before, _ = self._added
        if not self._is_begun(ids):
            return before + ids
        token = self._tokenizer.decode(before)
        self._notes[f"documents begin with {token}, which the tokenizer adds as well: it is there once"] += 1
        return ids

    def _is_begun(self, ids: list[int]) -> bool:
        before, _ = self._added
        return bool(before) and ids[: len(before)] == before

    def _ended(self, ids: list[int]) -> list[int]:
        _, after = self._added
        if after and ids[-len(after) :] != after:
            ids = ids + after
        end = self._tokenizer.eos_token_id
        return ids if end is None or ids[-1:] == [end] else [*ids, end]

    def _continued(self, text: Any) -> list[int]:
        """Tokenises a text that does not begin where the tokenizer's input begins."""
        plain = self.of_written(text)
        if not self._puts_space_before or not plain:
            return plain
        for anchor in ANCHORS:
            before, both = self.of_written(anchor), self.of_written(anchor + text)
            if before and both[: len(before)] == before and self._decode(before).endswith(anchor):
                return both[len(before) :]
        return plain

    @cached_property
    def _puts_space_before(self) -> bool:
        """Whether two texts that are tokenised apart are another text than both."""
        return self._decode(self.of_written("a") + self.of_written("b")) != "ab"

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return text
