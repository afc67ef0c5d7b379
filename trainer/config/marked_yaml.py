"""A YAML file of settings, and the line of each of its keys, so that messages can name it.

It holds text, numbers, booleans, lists, mappings and aliases of these. It is read within bounds, since a few aliases of
aliases stand for more than any memory holds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from logitcache import UserError
from logitcache.errors import one_line

MAX_BYTES = 1 << 18
MAX_VALUES = 1 << 14
"""Keys and values of a file; each alias counts as a copy."""
MAX_LEVELS = 32

Keys = tuple[Any, ...]

EXPECTED = "text, numbers, booleans, lists and mappings"
_PREFIX = "tag:yaml.org,2002:"
_KINDS = {_PREFIX + kind for kind in ("null", "bool", "int", "float", "str", "seq", "map")}
_MERGE = f"{_PREFIX}merge"
_NO_TEXT = re.compile("[\0\ud800-\udfff]")


@dataclass(frozen=True)
class MarkedYaml:
    """The content of a YAML file, and where its keys stand.

    Attributes:
        content: plain Python types.
        lines: the line of each key, by the keys from the top as they are in the file.
    """

    path: Path
    content: Any
    lines: dict[Keys, int]

    def where(self, *keys: Any) -> str:
        """Names the file and the line of a key, or of the nearest key above it that the file spells out."""
        for length in range(len(keys), 0, -1):
            if line := self.lines.get(tuple(map(str, keys[:length]))):
                return f"{self.path}, line {line}"
        return str(self.path)

    def error(self, message: str, *keys: Any) -> UserError:
        """Makes an error that names the line of a key."""
        return UserError(f"{self.where(*keys)}: {message}")


def read_yaml(path: Path) -> MarkedYaml:
    """Reads a file of settings.

    Raises UserError if it is missing, is not YAML, exceeds the bounds, holds a value of another kind, or a key twice.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise UserError(f"{path}: a file of settings has at most {MAX_BYTES:,} bytes")
        loader = _BoundedLoader(content.decode(), path)
        node = loader.get_single_node()
        lines: dict[Keys, int] = {}
        for keys, line in _keys(node):
            if keys in lines:
                raise UserError(f"{path}, line {line}: {keys[-1]} stands in line {lines[keys]} already")
            lines[keys] = line
        return MarkedYaml(path, None if node is None else loader.construct_document(node), lines)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}, line {line}: not YAML ({error.problem})") from error
    except UserError:
        raise
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: not YAML in UTF-8 ({one_line(error)})") from error


def suggestion(name: str, accepted: list[str]) -> str:
    """Asks for the nearest of the accepted names; empty if none is near."""
    close = get_close_matches(name, accepted, n=1)
    return f" (is {close[0]} meant?)" if close else ""


class _BoundedLoader(yaml.SafeLoader):
    """Refuses a file that exceeds the bounds, before any value is made of it, and values of other kinds."""

    def __init__(self, text: str, path: Path) -> None:
        super().__init__(text)
        self._path = path
        self._depth = self._count = 0
        self._measures: dict[yaml.Node, tuple[int, int]] = {}  # of each whole node: its values, its levels

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Composes and measures a node: an alias has the size of the node that it stands for."""
        event, before = self.peek_event(), self._count  # type: ignore[no-untyped-call]
        self._depth += 1
        self._count += 1
        self._check(event, levels=0)
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if node not in self._measures:
                raise self._error(event, f"*{event.anchor} stands for a value that contains it")
            values, levels = self._measures[node]
            self._count = before + values
            self._check(event, levels)
        elif node is not None:
            levels = 1 + max((self._measures[child][1] for child in _children(node)), default=0)
            self._measures[node] = self._count - before, levels
        return node

    def _check(self, event: yaml.Event, levels: int) -> None:
        """Raises UserError if a node with so many levels below it exceeds the bounds."""
        if self._count > MAX_VALUES:
            raise self._error(event, f"more than {MAX_VALUES:,} values, where each alias counts as a copy")
        if self._depth + levels > MAX_LEVELS:
            raise self._error(event, f"more than {MAX_LEVELS} levels of lists and mappings")

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Makes a node's value. Raises UserError if its kind is not expected, or its text is not of that kind."""
        if node.tag not in _KINDS:
            raise self._error(node, f"{node.tag.replace(_PREFIX, '!!')}: {EXPECTED} are expected")
        try:
            value = super().construct_object(node, deep)
        except UserError:
            raise
        except (ValueError, LookupError, ArithmeticError) as error:
            raise self._error(node, f"{node.value!r} is no {node.tag.removeprefix(_PREFIX)}") from error
        if isinstance(value, str) and _NO_TEXT.search(value):
            raise self._error(node, f"{value!r} holds a sign that no text can hold")
        return value

    def _error(self, at: yaml.Event | yaml.Node, message: str) -> UserError:
        line = at.start_mark.line + 1 if at.start_mark else 1
        return UserError(f"{self._path}, line {line}: {message}")


_BoundedLoader.yaml_constructors = {
    tag: make for tag, make in yaml.SafeLoader.yaml_constructors.items() if tag in _KINDS
}
_BoundedLoader.yaml_implicit_resolvers = {  # a date without a tag is text
    first: [(tag, pattern) for tag, pattern in resolvers if tag in _KINDS or tag == _MERGE]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        yield from node.value
    elif isinstance(node, yaml.MappingNode):
        for pair in node.value:
            yield from pair


def _keys(node: yaml.Node | None, above: Keys = ()) -> Iterator[tuple[Keys, int]]:
    entries = []
    if isinstance(node, yaml.MappingNode):
        entries = [(str(key.value), key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        entries = [(str(number), value, value) for number, value in enumerate(node.value)]
    for name, marked, value in entries:
        keys = (*above, name)
        yield keys, marked.start_mark.line + 1
        yield from _keys(value, keys)
