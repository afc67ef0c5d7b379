"""The public names of trainer: there is one list of them, and a type checker knows them."""

from __future__ import annotations

from pathlib import Path

import pytest
from mypy import api

import trainer
from logitcache import UserError

ROOT = Path(__file__).parents[2]


def test_dir_shows_every_public_name() -> None:
    assert set(trainer.__all__) == set(trainer._EXPORTS) <= set(dir(trainer))
    for name in trainer.__all__:
        assert getattr(trainer, name).__name__ == name


def test_a_comparison_refuses_what_belongs_to_a_recipe(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--jobs belongs to a recipe"):
        trainer.compare(tmp_path, jobs=2)
    with pytest.raises(UserError, match="name it alone"):
        trainer.compare([tmp_path / "recipe.yaml", tmp_path])


@pytest.mark.programs
def test_a_type_checker_knows_the_names(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        """\
import trainer
found: dict[str, float] = trainer.evaluate("student", "cache", batch_size=4)
text: str = trainer.compare(["one", "other"]).table()
trainer.evaluate("student", "cache", batchsize=4)
trainer.compare("recipe.yaml", job=2)
trainer.LossSettings("fkl").no_such_setting
"""
    )
    options = ["--no-error-summary", "--config-file", str(ROOT / "pyproject.toml")]
    printed, errors, status = api.run([*options, str(program)])
    assert (status, errors) == (1, "")
    assert [line.split(":")[1] for line in printed.splitlines() if ": error: " in line] == ["4", "5", "6"]
