"""Instruction pairs from the running Python's standard library: signature in its class → docstring.

    python tools/demo/extract_pairs.py --out pairs/

writes `train.jsonl` and `heldout.jsonl` with the columns prompt, completion and id. A module is wholly in one
split, so a student is judged on modules that neither it nor the demo's teacher has read.
"""

import argparse
import ast
import hashlib
import inspect
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# Tests, other programs, and files that are tables rather than code.
SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "site-packages", "turtledemo", "encodings", "pydoc_data"}
HELDOUT_SHARE = 0.1
MAX_PROMPT_CHARS = 600
MIN_COMPLETION_CHARS, MAX_COMPLETION_CHARS = 16, 400
INDENT = "    "

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class Pair(NamedTuple):
    """One row of the files."""

    prompt: str
    completion: str
    id: str  # module.qualname


def modules() -> dict[str, str]:
    """Dotted name → source text of every module of the standard library that is used, in order of name."""
    root = Path(sysconfig.get_path("stdlib"))
    sources = {}
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        parts = [*relative.parent.parts, *([] if path.stem == "__init__" else [path.stem])]
        if not SKIPPED_FOLDERS & set(parts) and all(part.isidentifier() for part in parts):
            sources[".".join(parts)] = path.read_text(encoding="utf-8")
    return dict(sorted(sources.items()))


def is_heldout(module: str) -> bool:
    """Whether a module belongs to the held-out split; depends on nothing but its name."""
    return _hash(module) < HELDOUT_SHARE * 2**64


def extract(module: str, source: str) -> list[Pair]:
    """Pairs of one module: its classes, functions and methods (nothing inside functions) that have prose."""
    pairs: dict[str, Pair] = {}
    for scope, node in _definitions(ast.parse(source)):
        prompt = _prompt(module, scope, node)
        completion = _prose(ast.get_docstring(node, clean=False) or "")
        if completion and len(prompt) <= MAX_PROMPT_CHARS:
            name = ".".join([module, *(parent.name for parent in scope), node.name])
            pairs.setdefault(name, Pair(prompt, completion + '"""', name))  # the first of several definitions
    return list(pairs.values())


def split_pairs() -> tuple[list[Pair], list[Pair]]:
    """The training and the held-out pairs, each in an order that makes any first n rows a fair sample.

    A held-out pair whose docstring also occurs in training is dropped, as is a pair that differs from an
    earlier one in its module and name only.
    """
    train: dict[tuple[str, str], Pair] = {}
    heldout: dict[tuple[str, str], Pair] = {}
    for module, source in modules().items():
        split = heldout if is_heldout(module) else train
        for pair in extract(module, source):
            without_module = pair.prompt.split("\n", 1)[1]
            split.setdefault((without_module, pair.completion), pair)
    trained = {pair.completion for pair in train.values()}
    unseen = [pair for pair in heldout.values() if pair.completion not in trained]
    return sorted(train.values(), key=_by_hash), sorted(unseen, key=_by_hash)


def _definitions(
    body: ast.Module | ast.ClassDef, scope: tuple[ast.ClassDef, ...] = ()
) -> Iterator[tuple[tuple[ast.ClassDef, ...], Definition]]:
    """Every definition with the classes around it; looks into `if` and `try`, not into functions."""
    pending: list[ast.AST] = list(body.body)
    while pending:
        node = pending.pop(0)
        if isinstance(node, Definition):
            yield scope, node
            if isinstance(node, ast.ClassDef):
                yield from _definitions(node, (*scope, node))
        elif isinstance(node, ast.If | ast.Try):
            pending = list(ast.iter_child_nodes(node)) + pending


def _prompt(module: str, scope: tuple[ast.ClassDef, ...], node: Definition) -> str:
    lines = [f"# {module}"]
    for depth, parent in enumerate(scope):
        lines.append(INDENT * depth + _header(parent))
    indent = INDENT * len(scope)
    lines += [f"{indent}@{ast.unparse(decorator)}" for decorator in node.decorator_list]
    lines += [indent + _header(node), indent + INDENT + '"""']
    return "\n".join(lines)


def _header(node: Definition) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in [*node.bases, *node.keywords])
        return f"class {node.name}({bases}):" if bases else f"class {node.name}:"
    keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{keyword} {node.name}({ast.unparse(node.args)}){returns}:"


def _prose(docstring: str) -> str:
    """The leading paragraphs of running text, one line each, as far as they fit; '' where there are none."""
    kept = ""
    for paragraph in inspect.cleandoc(docstring).split("\n\n"):
        is_prose = not any(line.startswith((" ", ">>>", "-", "*", "|")) for line in paragraph.splitlines())
        longer = "\n\n".join(filter(None, [kept, " ".join(paragraph.split())]))
        if not is_prose or len(longer) > MAX_COMPLETION_CHARS:
            break
        kept = longer
    return kept if len(kept) >= MIN_COMPLETION_CHARS and '"""' not in kept else ""


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode()).digest()[:8], "big")


def _by_hash(pair: Pair) -> int:
    return _hash(pair.id)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for train.jsonl and heldout.jsonl")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    print(f"{'file':<16}{'modules':>8}{'pairs':>8}{'prompt chars':>14}{'completion chars':>18}")
    for name, pairs in zip(("train.jsonl", "heldout.jsonl"), split_pairs(), strict=True):
        rows = "".join(json.dumps(pair._asdict(), ensure_ascii=False) + "\n" for pair in pairs)
        (out / name).write_text(rows, encoding="utf-8")
        used = {pair.prompt.split("\n", 1)[0] for pair in pairs}
        prompt_chars, completion_chars = (sum(len(pair[column]) for pair in pairs) for column in (0, 1))
        print(f"{name:<16}{len(used):>8}{len(pairs):>8}{prompt_chars:>14}{completion_chars:>18}")


if __name__ == "__main__":
    main()
