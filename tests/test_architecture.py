"""The README's architecture and format sections are true, and imports go downward only."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from logitcache.cli import COMMANDS
from logitcache.cli import main as logitcache_main
from logitcache.format.layout import FORMAT_VERSION, Layout
from logitcache.format.quantization import PRESETS
from logitcache.format.tail_parts import TailParts
from trainer.cli import main as trainer_main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Ground floor last: a room imports from rooms below it only.
FLOORS = [
    ("logitcache.cli",),
    ("logitcache.commands",),
    ("logitcache.capture",),
    ("logitcache.exchange",),
    ("logitcache.sharing",),
    ("logitcache.maintenance",),
    ("logitcache.assembly",),
    ("logitcache.report",),
    ("logitcache.reading",),
    ("logitcache.format",),
    ("logitcache.storage",),
    ("logitcache.attention", "logitcache.documents", "logitcache.engines"),
    ("logitcache.html_page", "logitcache.progress", "logitcache.ranges", "logitcache.table"),
    ("logitcache.errors",),
    ("logitcache.urls", "logitcache.version", "logitcache.trainer_script"),
]
READER_SIDE = tuple(room for floor in FLOORS[FLOORS.index(("logitcache.reading",)) :] for room in floor)
TRAINER_FLOORS = [
    ("trainer.cli",),
    ("trainer.commands",),
    ("trainer.comparison",),
    ("trainer.run",),
    ("trainer.evaluation",),
    ("trainer.model",),
    ("trainer.data",),
    ("trainer.config",),
    ("trainer.losses",),
    ("trainer.terminal",),
]


def parsed_modules() -> dict[str, set[str]]:
    """Modules of the two packages, and what each imports of them, wherever in it."""
    paths = [path for package in ("logitcache", "trainer") for path in (ROOT / package).rglob("*.py")]
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}
    found: dict[str, set[str]] = {}
    for module, path in modules.items():
        imported = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                imported |= {f"{node.module}.{name.name}" for name in node.names} | {str(node.module)}
            elif isinstance(node, ast.Import):
                imported |= {name.name for name in node.names}
        if not path.stem.startswith("__"):
            found[module] = imported & modules.keys()
    return found


MODULES = parsed_modules()


def floor(module: str) -> int | None:
    floors = FLOORS if module.startswith("logitcache") else TRAINER_FLOORS
    for number, rooms in enumerate(floors):
        if any(module == room or module.startswith(room + ".") for room in rooms):
            return number
    return None


def test_every_module_stands_in_the_readmes_architecture() -> None:
    tree = README.split("## Architecture")[1].split("```")[1]
    names = {module.split(".")[-1] + ".py" for module in MODULES}
    assert not {name for name in names if not re.search(rf"(?<![\w]){re.escape(name)}(?![\w])", tree)}
    walk = README.split("### One row, from document to gradient")[1].split("## Studies")[0]
    assert set(re.findall(r"\w+\.py", walk)) <= names


def test_every_file_that_the_documents_name_is_there() -> None:
    for document in (README, (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")):
        named = re.findall(r"\b((?:tests|tools|logitcache|trainer)/[\w/]+\.\w+)", document)
        assert named and not [name for name in named if not (ROOT / name).exists()]


def test_every_module_has_a_floor_and_imports_downward_only() -> None:
    assert not [module for module in MODULES if floor(module) is None]
    upward = [
        f"{module} imports {below}"
        for module, imported in MODULES.items()
        for below in imported
        if module.split(".")[0] == below.split(".")[0] and (floor(below) or 0) < (floor(module) or 0)
    ]
    assert not upward


def test_no_circle_of_imports_exists() -> None:
    checked: set[str] = set()

    def check(module: str, importers: tuple[str, ...]) -> None:
        assert module not in importers, " imports ".join([*importers, module])
        if module not in checked:
            for below in sorted(MODULES.get(module, ())):
                check(below, (*importers, module))
            checked.add(module)

    for module in sorted(MODULES):
        check(module, ())


def test_logitcache_never_imports_the_trainer_which_imports_its_reader_side_only() -> None:
    walls = [
        f"{module} imports {other}"
        for module, imported in MODULES.items()
        for other in imported
        if module.split(".")[0] != other.split(".")[0]
        and (module.startswith("logitcache") or not other.startswith(READER_SIDE))
    ]
    assert not walls


def test_a_module_of_a_few_lines_has_several_users() -> None:
    """A paragraph with one importer belongs to its file; commands have a file each."""
    few = 40
    for module in sorted(MODULES):
        users = [other for other, imported in MODULES.items() if module in imported]
        num_lines = len((ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8").splitlines())
        assert num_lines >= few or len(users) > 1 or ".commands." in module, f"{module} has one user: {users}"


def test_losses_import_nothing_but_each_other_and_torch() -> None:
    for module, imported in MODULES.items():
        if module.startswith("trainer.losses."):
            assert all(other.startswith("trainer.losses.") for other in imported), module


def test_the_readmes_format_section_names_every_column() -> None:
    section = README.split(f"## Format {FORMAT_VERSION}")[1].split("## Architecture")[0]
    for precision in PRESETS:
        parts = TailParts(groups=2, temperatures=(2.0,), entropy=True, samples=1, rank=2, probes=1)
        layout = Layout(10, parts, precision=precision)
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
