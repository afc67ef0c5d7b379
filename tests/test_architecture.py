"""The README's architecture and format sections are true, and imports go downward only."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from logitcache.cli import main as logitcache_main
from logitcache.format.layout import FORMAT_VERSION, Layout
from logitcache.format.levels import PRESETS
from trainer.cli import main as trainer_main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODULES = sorted(
    path.relative_to(ROOT)
    for package in ("logitcache", "trainer")
    for path in (ROOT / package).rglob("*.py")
    if not path.stem.startswith("__")
)
COMMANDS = ("build", "view", "verify", "recode", "slice", "merge", "push", "pull", "import", "export")
# Ground floor last: a room imports from rooms below it only.
FLOORS = [
    ("logitcache.cli",),
    ("logitcache.arguments",),
    ("logitcache.capture",),
    ("logitcache.exchange",),
    ("logitcache.maintenance",),
    ("logitcache.sharing",),
    ("logitcache.report",),
    ("logitcache.cache",),
    ("logitcache.format",),
    ("logitcache.attention", "logitcache.documents"),
    ("logitcache.errors", "logitcache.progress", "logitcache.spans", "logitcache.table", "logitcache.version"),
    ("logitcache.urls",),
]
READER_SIDE = tuple(
    f"logitcache.{room}"
    for room in ("attention", "cache", "format", "documents", "errors", "progress", "spans", "table", "urls", "version")
)
TRAINER_FLOORS = [
    ("trainer.cli",),
    ("trainer.commands",),
    ("trainer.comparison",),
    ("trainer.fit", "trainer.arguments"),
    (
        "trainer.prepare",
        "trainer.description",
        "trainer.resume",
        "trainer.progress",
        "trainer.interrupt",
        "trainer.early_stopping",
        "trainer.output_folder",
    ),
    ("trainer.distill",),
    ("trainer.evaluation",),
    (
        "trainer.objective",
        "trainer.batching",
        "trainer.packing",
        "trainer.pace",
        "trainer.ranks",
        "trainer.schedules",
        "trainer.tail_choice",
    ),
    ("trainer.added_loss",),
    ("trainer.head", "trainer.tokenizers"),
    ("trainer.student", "trainer.adapters"),
    ("trainer.data",),
    ("trainer.config",),
    ("trainer.settings",),
    ("trainer.losses", "trainer.files", "trainer.marked_yaml", "trainer.memory", "trainer.records", "trainer.terminal"),
]


def imports(path: Path) -> set[str]:
    """Modules of the two packages that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return {name for name in found if name.split(".")[0] in ("logitcache", "trainer")}


def floor(module: str, floors: list[tuple[str, ...]] = FLOORS) -> int | None:
    for number, rooms in enumerate(floors):
        if any(module == room or module.startswith(room + ".") for room in rooms):
            return number
    return None


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_every_module_stands_in_the_readmes_architecture(path: Path) -> None:
    tree = README.split("## Architecture")[1].split("```")[1]
    assert re.search(rf"(?<![\w]){re.escape(path.name)}(?![\w])", tree), f"{path} is missing"


@pytest.mark.parametrize("path", [path for path in MODULES if path.parts[0] == "logitcache"], ids=str)
def test_logitcache_imports_downward_only_and_never_the_trainer(path: Path) -> None:
    module = ".".join(path.with_suffix("").parts)
    own = floor(module)
    assert own is not None, f"{module} is on no floor"
    for imported in imports(path):
        assert not imported.startswith("trainer")
        below = floor(imported)
        assert below is not None and below >= own, f"{module} imports {imported}"


@pytest.mark.parametrize("path", [path for path in MODULES if path.parts[0] == "trainer"], ids=str)
def test_the_trainer_imports_the_reader_side_of_logitcache_only(path: Path) -> None:
    for imported in imports(path):
        if imported.startswith("logitcache."):
            assert imported.startswith(READER_SIDE), f"{path} imports {imported}"


@pytest.mark.parametrize("path", [path for path in MODULES if path.parts[0] == "trainer"], ids=str)
def test_the_trainer_imports_downward_only(path: Path) -> None:
    module = ".".join(path.with_suffix("").parts)
    own = floor(module, TRAINER_FLOORS)
    assert own is not None, f"{module} is on no floor"
    for imported in imports(path):
        if imported.startswith("trainer."):
            below = floor(imported, TRAINER_FLOORS)
            assert below is not None and below >= own, f"{module} imports {imported}"


def test_losses_import_nothing_but_each_other_and_torch() -> None:
    for path in MODULES:
        if path.parts[:2] == ("trainer", "losses"):
            assert all(imported.startswith("trainer.losses") for imported in imports(path)), path


def test_the_readmes_format_section_names_every_column() -> None:
    section = README.split(f"## Format {FORMAT_VERSION}")[1].split("## Architecture")[0]
    for precision in PRESETS:
        layout = Layout(10, 2, (2.0,), tail_entropy=True, num_tail_samples=1, precision=precision)
        for column in layout.schema().names:
            assert f"`{column}`" in section, column


def test_the_commands_help_names_every_option_of_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    text = README.split("## Make a cache")[1].split("## Read it")[0]
    options = set(re.findall(r"`(--[a-z_-]+)", text)) - {"--bf16"}
    vllms = {
        "--tensor-parallel-size",
        "--gpu-memory-utilization",
        "--quantization",
        "--max-model-len",
        "--max-logprobs",
    }
    commands = [
        *((logitcache_main, name) for name in COMMANDS),
        *((trainer_main, name) for name in ("fit", "eval", "compare")),
    ]
    for main, name in commands:
        with pytest.raises(SystemExit):
            main([name, "--help"])
    helps = capsys.readouterr().out
    missing = {option for option in options - vllms if option not in helps}
    assert not missing
