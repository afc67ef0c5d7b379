"""The renderings of a chat and of its parts, which show where its answers lie."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from logitcache.documents.chat_template import render
from logitcache.documents.document import BadDocument

_MARK = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
_OPENING, _CLOSING = "\U000f0b00", "\U000f0b01"
"""Private characters, which show where a mark begins and ends."""
_QUESTION = {"role": "user", "content": "…"}
_OTHER_WORDS = "\U000f0a00"
"""A private character, which no generation prompt goes on with."""


@dataclass(frozen=True)
class Answer:
    """The characters start … end − 1 of a rendered chat, which an assistant's turn is trained on.

    prompt_start: the first character of the generation prompt before them.  turn: number of the message.  unrendered: the end
    of the generation prompt that the rendered turn does not have.
    """

    prompt_start: int
    start: int
    end: int
    turn: int = 0
    unrendered: str = ""


class Rendering:
    """A chat as its template renders it."""

    def __init__(self, tokenizer: Any, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None) -> None:
        self.messages = messages
        self.tokenizer = tokenizer
        self.tools = tools
        self._texts: dict[tuple[int, bool], str] = {}

    def upto(self, count: int, prompt: bool = False) -> str:
        """Returns the text of the first `count` messages; prompt: with the generation prompt. Raises BadDocument."""
        key = count, prompt
        if key not in self._texts:
            self._texts[key] = self._render(self.messages[:count], prompt)
        return self._texts[key]

    def answer(self, turn: int) -> Answer | None:
        """Returns the place of an answer in the text up to it, or None if the renderings do not show it."""
        after = self.upto(turn + 1)
        prompt = self._prompt(turn)
        if prompt is None:
            return self._after_no_prompt(turn)
        if after.startswith(prompt):
            before = self.upto(turn)
            return Answer(len(before) if prompt.startswith(before) else len(prompt), len(prompt), len(after), turn)
        if (shared := self._shared_prompt(turn)) is None:
            return None
        before, opened, left = shared
        return Answer(len(before), len(before) + len(opened), len(after), turn, left)

    def thought(self, turn: int) -> tuple[str, Answer] | None:
        """Returns an answer that goes on from a generation prompt which opens a thought, if the template drops thoughts.

        Templates of reasoning models end their generation prompt with, say, `<think>`, and show answers without their thought.
        If the message has it, the text is generation prompt, thought and answer, as the model wrote them.
        """
        content = self.messages[turn].get("content")
        prompt = self._prompt(turn)
        if not isinstance(content, str) or prompt is None or self.upto(turn + 1).startswith(prompt):
            return None
        if (shared := self._shared_prompt(turn)) is None:
            return None
        before, opened, left = shared
        tag = left.strip()
        if not re.fullmatch(r"<\w+>", tag):
            return None
        if content.lstrip().startswith(tag):
            content = content.lstrip().removeprefix(tag).removeprefix(left.partition(tag)[2])
        elif tag.replace("<", "</") not in content:
            return None
        other = self._with_other_words(turn)[len(before) + len(opened) :]
        if not other.startswith(_OTHER_WORDS):
            return None
        text = prompt + content + other.removeprefix(_OTHER_WORDS)
        return text, Answer(len(before), len(prompt), len(text), turn)

    def after_prompt(self, turn: int) -> tuple[str, Answer] | None:
        """Returns the generation prompt with an answer, as text, if the template renders the history differently with it.

        The answer is then the text that it is rendered as after a question alone, which must end the whole chat's too.
        """
        prompt, alone = self._prompt(turn), self._alone(turn)
        if prompt is None or alone is None or not self.upto(turn + 1).endswith(alone[1]):
            return None
        text = prompt + alone[1]
        return text, Answer(len(prompt), len(prompt), len(text), turn, alone[2])

    def marks(self, count: int) -> list[tuple[int, int]] | None:
        """Returns the characters that `{% generation %}` marks enclose in the text of the first `count` messages.

        A second rendering has a private character at either end of what a mark encloses. Without these characters the text
        must be the template's own; a filter around a mark can change it, and then no mark is believed: None.
        """
        template = self.tokenizer.get_chat_template(tools=self.tools)
        if not _MARK.search(template):
            return []
        text = self.upto(count)
        if _OPENING in text or _CLOSING in text:
            return None
        try:
            marked = self._render(self.messages[:count], chat_template=_MARK.sub(_with_sign, template))
        except BadDocument:  # what the template does with the marked text cannot be done with more signs in it
            return None
        spans: list[tuple[int, int]] = []
        begun: list[int] = []
        length = 0
        for piece in re.split(f"([{_OPENING}{_CLOSING}])", marked):
            if piece == _OPENING:
                begun.append(length)
            elif piece == _CLOSING and begun:
                start = begun.pop()
                if not begun:
                    spans.append((start, length))
            else:
                length += len(piece)
        return spans if marked.replace(_OPENING, "").replace(_CLOSING, "") == text else None

    def says(self, turn: int) -> list[str]:
        """Returns texts of a message that its rendering is known by: content without a thought, names of called functions."""
        message = self.messages[turn]
        content = message.get("content")
        parts = content if isinstance(content, list) else [{"text": content}]
        texts = [part.get("text") for part in parts if isinstance(part, Mapping)]
        said = [text.rpartition("</think>")[2].strip() for text in texts if isinstance(text, str)]
        return [words for words in said if words] + self.called(turn)

    def called(self, turn: int) -> list[str]:
        """Returns the names of the functions that a message calls."""
        calls = self.messages[turn].get("tool_calls")
        functions = [
            call.get("function", call)
            for call in (calls if isinstance(calls, list) else [])
            if isinstance(call, Mapping)
        ]
        names = [function.get("name") for function in functions if isinstance(function, Mapping)]
        return [name for name in names if isinstance(name, str)]

    def _render(self, messages: Sequence[Mapping[str, Any]], prompt: bool = False, **more: Any) -> str:
        return render(self.tokenizer, messages, self.tools, add_generation_prompt=prompt, **more)

    def _prompt(self, turn: int) -> str | None:
        """Returns the text that the model goes on from at a turn, or None if there is nothing before it to render."""
        if not turn:
            return None
        try:
            return self.upto(turn, prompt=True)
        except BadDocument:  # templates refuse, say, a chat of nothing but a system's turn
            return None

    def _shared_prompt(self, turn: int) -> tuple[str, str, str] | None:
        """Returns the text before a turn, and its generation prompt in two: the part in the turn's rendering, and the rest."""
        before, prompt, after = self.upto(turn), self.upto(turn, prompt=True), self.upto(turn + 1)
        other = self._with_other_words(turn)
        if not all(text.startswith(before) for text in (prompt, after, other)):
            return None
        opened = _common_start(prompt[len(before) :], other[len(before) :])
        if not opened or not after.startswith(before + opened):
            return None
        return before, opened, prompt[len(before) + len(opened) :]

    def _with_other_words(self, turn: int) -> str:
        other = {**self.messages[turn], "content": _OTHER_WORDS}
        return self._render([*self.messages[:turn], other])

    def _alone(self, turn: int) -> tuple[str, str, str] | None:
        """Returns the answer of a turn to a question alone: generation prompt and answer as rendered, and the prompt's rest."""
        if self.messages[0] is _QUESTION:
            return None
        alone = Rendering(self.tokenizer, [_QUESTION, self.messages[turn]], self.tools)
        try:
            answer = alone.answer(1)
        except BadDocument:
            return None
        if answer is None:
            return None
        text = alone.upto(2)
        return text[answer.prompt_start : answer.start], text[answer.start :], answer.unrendered

    def _after_no_prompt(self, turn: int) -> Answer | None:
        """Returns the place of an answer that has nothing before it, as the same answer to a question shows it."""
        after, alone = self.upto(turn + 1), self._alone(turn)
        if alone is None:
            return None
        prompt, answer, unrendered = alone
        if after.endswith(answer):
            start = len(after) - len(answer)
        elif prompt and after.count(prompt) == 1:
            start = after.index(prompt) + len(prompt)
        else:
            return None
        return Answer(start, start, len(after), turn, unrendered)


def _with_sign(tag: re.Match[str]) -> str:
    """Returns a tag of a mark with the private character inside the mark.

    An `if` parts the character from the text that the mark encloses: it takes over what the tag says of the white space there.
    """
    left, end, right = tag.groups()
    if end:
        return f"{{%{left} endif %}}{_CLOSING}{{% endgeneration {right}%}}"
    return f"{{%{left} generation %}}{_OPENING}{{% if true {right}%}}"


def _common_start(one: str, other: str) -> str:
    return "".join(sign for sign, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
