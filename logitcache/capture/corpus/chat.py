"""The tokenisation of chats through the tokenizer's chat template: messages → token ids and loss mask.

The text that the template renders for an answer is trained. Renderings of parts of the chat show it: an answer is the text
that its turn adds to the rendering of the turns before it with the generation prompt. `{% generation %}` marks of a template
may choose a part of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from logitcache.capture.corpus.rendering import Answer, Rendering
from logitcache.capture.corpus.tokens import Tokenization, Tokens, tokens
from logitcache.documents.document import BadDocument
from logitcache.documents.messages import ASSISTANT, read_chat

TURNS = ("all", "last", "each")

Span = tuple[int, int]


def tokenize_messages(document: Mapping[str, Any], by: Tokenization) -> list[Tokens]:
    """Returns the tokens of `messages` and the optional `tools`: one sequence, or as many as the chat has answers.

    `by.turns` chooses the answers. "all": the chat is one sequence, with all its answers trained. "last": the chat up to its
    last answer, which is trained. "each": for every answer, the chat up to it, with this answer trained; each is rendered as at
    inference, so that any template will do. Raises BadDocument if the columns contain no chat, the template fails, or it does
    not show where an answer lies.
    """
    chat = read_chat(document)
    by.notes.update(chat.notes)
    if not chat.messages:
        return [tokens([], [])]
    rendering = Rendering(by.tokenizer, chat.messages, chat.tools)
    answers = [turn for turn, message in enumerate(chat.messages) if message["role"] == ASSISTANT]
    if by.turns == "last":
        answers = answers[-1:]
    trained = [turn for turn in answers if chat.trained[turn]]
    if by.turns == "all" or not trained:
        text = rendering.upto(len(chat.messages))
        return [_masked(text, _answers_of_all(rendering, trained, text, by) if trained else [], by)]
    return [_masked(*_answer_as_generated(rendering, turn, by), by) for turn in trained]


def _answers_of_all(rendering: Rendering, trained: Sequence[int], text: str, by: Tokenization) -> list[Answer]:
    """Returns the trained answers of a whole chat, whose rendering is `text`."""
    marks = rendering.marks(len(rendering.messages))
    if marks is None:
        by.notes["chats lose the template's {% generation %} marks; trained is the text that each turn adds"] += 1
        marks = []
    found: list[Answer] = []
    for turn in trained:
        after = rendering.upto(turn + 1)
        answer = rendering.answer(turn) if text.startswith(after) else None
        if answer is not None:
            found += _marked_parts(answer, marks, rendering, by)
            continue
        mark = _mark_of_turn(rendering, turn, marks, text)
        if mark is None:
            raise BadDocument(
                f"message {turn}: this chat template renders earlier turns differently once later ones follow, so that the "
                "text of this answer cannot be told; choose --turns each (a sequence per answer, rendered as at inference) or "
                "--turns last"
            )
        found.append(Answer(mark[0], mark[0], mark[1]))
    return found


def _answer_as_generated(rendering: Rendering, turn: int, by: Tokenization) -> tuple[str, list[Answer]]:
    """Returns the chat up to one answer as text, and this answer's place in it."""
    if whole := rendering.thought(turn):
        return whole[0], [whole[1]]
    if answer := rendering.answer(turn):
        marks = rendering.marks(turn + 1) or []
        return rendering.upto(turn + 1), list(_marked_parts(answer, marks, rendering, by))
    if whole := rendering.after_prompt(turn):
        return whole[0], [whole[1]]
    raise BadDocument(
        f"message {turn}: this chat template does not show where the answer begins, as its rendering does not go on from the "
        "generation prompt; give a template that does with --chat-template"
    )


def _marked_parts(answer: Answer, marks: Sequence[Span], rendering: Rendering, by: Tokenization) -> Iterator[Answer]:
    """Yields the parts of an answer that the template marks, or all of it if they leave out words of the message."""
    if answer.unrendered:
        by.notes[
            f"answers are rendered without {answer.unrendered!r}, with which the template's generation prompt ends "
            "(--turns each keeps the thought of those that have one)"
        ] += 1
    text = rendering.upto(answer.turn + 1)
    rendered = text[answer.start : answer.end]
    if any(name not in rendered for name in rendering.called(answer.turn)):
        by.notes["answers call tools that the chat template does not render; the call is not trained"] += 1
    inside = [(max(start, answer.start), min(end, answer.end)) for start, end in marks]
    inside = [(start, end) for start, end in inside if start < end]
    if not marks:
        yield answer
    elif not inside or not _contain(inside, text, rendering.says(answer.turn), rendered):
        by.notes[
            "answers are not whole within the template's {% generation %} marks; trained is all of their turn"
        ] += 1
        yield answer
    else:
        if any(start < answer.start < end or start < answer.end < end for start, end in marks):
            by.notes["answers have a {% generation %} mark that goes beyond them; trained is the answer only"] += 1
        yield from (replace(answer, start=start, end=end) for start, end in inside)


def _mark_of_turn(rendering: Rendering, turn: int, marks: Sequence[Span], text: str) -> Span | None:
    """Returns the mark of a turn, if every answer has one and this one contains the words of the message."""
    answers = [number for number, message in enumerate(rendering.messages) if message["role"] == ASSISTANT]
    marks = [mark for mark in marks if mark[0] < mark[1]]
    if len(answers) != len(marks):
        return None
    mark = marks[answers.index(turn)]
    return mark if _contain([mark], text, rendering.says(turn), text) else None


def _contain(spans: Sequence[Span], text: str, said: Sequence[str], rendered: str) -> bool:
    """Returns whether spans of a text contain the words of a message, as far as it is rendered at all."""
    inside = "\n".join(text[start:end] for start, end in spans)
    return all(words in inside for words in said if words in rendered)


def _masked(text: str, answers: Sequence[Answer], by: Tokenization) -> Tokens:
    """Returns the tokens of a rendered chat; those that lie in an answer are trained.

    A token that begins in the generation prompt and reaches into the answer is trained: the prompt's last space belongs to
    the answer's first word for many tokenizers. A token that begins in an earlier turn is not.
    """
    edges = [edge for answer in answers for edge in (answer.start, answer.end)]
    ids, starts, ends = by.with_offsets(text, edges)
    mask = np.zeros(len(ids), dtype=bool)
    for answer in answers:
        mask |= (starts >= answer.start) & (starts < answer.end)
        across = (starts < answer.start) & (ends > answer.start)
        if (across & (starts >= answer.prompt_start)).any():
            mask |= across
        elif across.any():
            by.notes["answers share their first token with the turn before them; it is not trained"] += 1
    return tokens(ids, mask)
