"""Every command is a function of `logitcache`, with a parameter for each option that it has."""

from __future__ import annotations

import argparse
import builtins
import inspect
from pathlib import Path
from typing import Any

import pytest

import logitcache
from logitcache import UserError
from logitcache.capture.inputs import resolve_inputs
from logitcache.capture.options import EngineOptions, InputOptions
from logitcache.cli import COMMANDS

BESIDE_THE_OPTIONS = {"slice": {"against"}}


def parameters(function: object) -> set[str]:
    named = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
    return {parameter.name for parameter in named if parameter.kind is not parameter.VAR_KEYWORD}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_a_function_with_a_parameter_for_each_option(name: str) -> None:
    parser = argparse.ArgumentParser(add_help=False)
    COMMANDS[name].add_options(parser)
    function = getattr(logitcache, "import_logits" if name == "import" else name)
    options = {action.dest for action in parser._actions}
    assert parameters(function) == options | BESIDE_THE_OPTIONS.get(name, set())
    if name != "plan":  # which names those of build
        described = inspect.getdoc(function).split("\nArgs:\n")[1].split("\nReturns:\n")[0]  # type: ignore[union-attr]
        assert not [option for option in parameters(function) if f"\n    {option}: " not in f"\n{described}"]


def test_types_and_defaults_of_a_build_name_the_same_options() -> None:
    assert InputOptions.__annotations__.keys() - EngineOptions.__annotations__.keys() == parameters(resolve_inputs) - {
        "teacher",
        "data",
        "sampling_params",
    }


def test_a_wrong_keyword_is_refused_by_name(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--top-kk"):
        logitcache.build(str(teacher), str(corpus), tmp_path / "c", backend="transformers", top_kk=3)  # type: ignore[call-overload]
    with pytest.raises(UserError, match=r"^--top-kk"):
        logitcache.plan(str(teacher), str(corpus), backend="transformers", top_kk=3)  # type: ignore[call-arg]
    with pytest.raises(UserError, match="--sampling-params needs --generate"):
        logitcache.plan(str(teacher), str(corpus), sampling_params={"n": 2})  # type: ignore[call-arg]
    with pytest.raises(UserError, match="--generate: a plan cannot know"):
        logitcache.plan(str(teacher), str(corpus), generate=True)  # type: ignore[call-arg]
    with pytest.raises(UserError, match=r"^--top-k "):
        logitcache.plan(str(teacher), str(corpus), generate=False, backend="transformers", top_k=0)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="top_kk"):
        logitcache.recode("c", tmp_path / "c", top_kk=3)  # type: ignore[call-overload]
    with pytest.raises(UserError, match="--seed needs --rescore"):
        logitcache.verify("c", seed=3)
    assert not list(tmp_path.iterdir())


def test_a_cache_may_stand_for_its_path_and_a_text_for_a_list_of_one(
    teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"backend": "transformers", "top_k": 8, "keep": "id"}
    cache = logitcache.build(str(teacher), str(corpus), tmp_path / "cache", **options)
    assert set(cache.manifest.layout.columns) == {"id"}
    assert not logitcache.verify(cache, against=cache.identity)
    part = logitcache.slice(cache, tmp_path / "part", rows="0:2", against=cache.identity)
    assert logitcache.view(part, tmp_path / "page.html", rows="0:1").num_rows == 1
    assert not logitcache.recode(part, tmp_path / "less", drop="id").manifest.layout.columns
    assert len(logitcache.merge([part, cache], tmp_path / "all")) == len(cache)
    assert logitcache.push(part, tmp_path / "pushed").identity == part.identity
    with pytest.raises(UserError, match="at least two"):
        logitcache.merge(str(tmp_path / "cache"), tmp_path / "m")


def test_dir_shows_every_public_name_and_a_star_import_hides_nothing_of_python() -> None:
    functions = {"import_logits" if name == "import" else name for name in COMMANDS}
    assert functions | {"open", *logitcache.__all__} == set(dir(logitcache))
    assert functions - {"slice"} <= set(logitcache.__all__)
    assert not set(logitcache.__all__) & set(dir(builtins))
    for name in [*dir(logitcache), *logitcache.__all__]:
        getattr(logitcache, name)


def typed() -> None:
    """Lines for `mypy`, which accepts the first and, as unused ignores are errors, must refuse the marked ones."""
    cache = logitcache.build("teacher", "data", "out", top_k=8, tensor_parallel_size=2)
    rows: int = len(cache)
    text: str = logitcache.info(cache)
    print(rows, text, logitcache.slice(cache.path, "part", rows="0:8").num_positions)
    logitcache.build("teacher", "data", "out", top_kk=8)  # type: ignore[call-overload]
    len(logitcache.recode(cache, "out", top_k=8, shard_range=(0, 2)))  # type: ignore[arg-type]
    logitcache.verify(cache.path, top_k=8)  # type: ignore[call-arg]
