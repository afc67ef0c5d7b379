"""A YAML file, and the line of each of its keys, so that messages can name it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from logitcache import UserError
from logitcache.errors import one_line

Keys = tuple[Any, ...]


@dataclass(frozen=True)
class MarkedYaml:
    """content: in plain Python types.  lines: keys from the top, as they are in the file → line."""

    path: Path
    content: Any
    lines: dict[Keys, int]

    def where(self, *keys: Any) -> str:
        """The file and the line of a key, or of the nearest one above it that the file spells out."""
        for length in range(len(keys), 0, -1):
            if line := self.lines.get(tuple(map(str, keys[:length]))):
                return f"{self.path}, line {line}"
        return str(self.path)

    def error(self, message: str, *keys: Any) -> UserError:
        """An error at a key."""
        return UserError(f"{self.where(*keys)}: {message}")


def read_yaml(path: Path) -> MarkedYaml:
    """Raises UserError for a file that is missing or not YAML, and for a key that stands twice in one mapping."""
    try:
        text = path.read_text(encoding="utf-8")
        lines: dict[Keys, int] = {}
        for keys, line in _keys(yaml.compose(text, Loader=yaml.SafeLoader)):
            if keys in lines:
                raise UserError(f"{path}, line {line}: {keys[-1]} stands in line {lines[keys]} already")
            lines[keys] = line
        return MarkedYaml(path, yaml.safe_load(text), lines)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}, line {line}: not YAML ({error.problem})") from error
    except UserError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not YAML in UTF-8 ({one_line(error)})") from error


def suggestion(name: str, accepted: list[str]) -> str:
    """The nearest of the accepted names, as a question."""
    close = get_close_matches(name, accepted, n=1)
    return f" (is {close[0]} meant?)" if close else ""


def _keys(node: yaml.Node | None, above: Keys = ()) -> Iterator[tuple[Keys, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            keys = (*above, str(key.value))
            yield keys, key.start_mark.line + 1
            yield from _keys(value, keys)
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            keys = (*above, str(number))
            yield keys, value.start_mark.line + 1
            yield from _keys(value, keys)
