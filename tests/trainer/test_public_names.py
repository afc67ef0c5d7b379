"""The public names of trainer: there is one list of them, and a type checker knows them."""

from __future__ import annotations

from pathlib import Path

import pytest

import trainer
from logitcache import UserError


def test_dir_shows_every_public_name() -> None:
    assert set(trainer.__all__) == set(trainer._EXPORTS) <= set(dir(trainer))
    for name in trainer.__all__:
        assert getattr(trainer, name).__name__ == name


def test_a_comparison_refuses_what_belongs_to_a_recipe(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--jobs belongs to a recipe"):
        trainer.compare(tmp_path, jobs=2)
    with pytest.raises(UserError, match="name it alone"):
        trainer.compare([tmp_path / "recipe.yaml", tmp_path])


def test_a_comparison_of_nothing_says_so(tmp_path: Path) -> None:
    nothing = trainer.compare([])
    for show in (
        nothing.table,
        lambda: nothing.draw(tmp_path / "c.png"),
        lambda: nothing.write_page(tmp_path / "c.html"),
    ):
        with pytest.raises(UserError, match="nothing to compare: no run is named"):
            show()
    assert not list(tmp_path.iterdir())


def typed() -> None:
    """Lines for `mypy`, which accepts the first and, as unused ignores are errors, must refuse the marked ones."""
    found: dict[str, float] = trainer.evaluate("student", "cache", batch_size=4)
    text: str = trainer.compare(["one", "other"]).table()
    trainer.evaluate("student", "cache", batchsize=4)  # type: ignore[call-arg]
    trainer.compare("recipe.yaml", job=2)  # type: ignore[call-arg]
    print(found, text, trainer.LossSettings("fkl").no_such_setting)  # type: ignore[attr-defined]
