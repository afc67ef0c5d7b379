"""YAML of settings: plain values within bounds, whatever a file claims to hold."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from logitcache import UserError
from trainer.comparison.recipe import read_recipe
from trainer.config.arguments import parse
from trainer.config.config import DistillConfig
from trainer.config.marked_yaml import MAX_BYTES, MAX_LEVELS, MAX_VALUES, read_yaml
from trainer.evaluation.generation_settings import GenerationSettings

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc-_", min_size=1), inner, max_size=4),
    max_leaves=20,
)
OF_OTHER_KINDS = (
    *("!!timestamp x", "!!timestamp 2001-01-01", "!!int x", "!!bool x", "!!float ''", "!!binary aGk=", "!!set {a}"),
    *("!!omap [a: 1]", "!!python/object/apply:os.getcwd []", '"\\0"', '"\\ud800"', "&a [*a]", "*a", "1:1:1", "[[1]]"),
    *("1e400", ".inf", "-.inf", ".nan", "-1", "0", "0.5", "99999999999999999999999", "x", '""', "[]", "[1, x]", "{}"),
    *("{a: 1}", "{1: 2}", "{a: {b: [1]}}", "true", "no", "2001-01-01", '"--output_dir"'),
)


def written(folder: Path, text: str) -> Path:
    path = folder / "settings.yaml"
    path.write_text(text)
    return path


@pytest.mark.slow
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(content=PLAIN)
def test_plain_values_are_what_pyyaml_reads(tmp_path: Path, content: Any) -> None:
    text = yaml.safe_dump(content, allow_unicode=True)
    try:
        read = read_yaml(written(tmp_path, text)).content
    except UserError as refusal:
        assert "\\0" in text, refusal
        return
    assert json.dumps(read) == json.dumps(yaml.safe_load(text))


def test_anchors_and_merge_keys_stand_for_copies(tmp_path: Path) -> None:
    text = "common: &c {loss: fkl, list: &l [1, 2]}\na: {<<: *c, loss: rkl}\nb: *l\nc: {<<: [*c, {x: 1}]}\n"
    file = read_yaml(written(tmp_path, text))
    assert file.content == yaml.safe_load(text)
    assert file.where("b") == f"{tmp_path / 'settings.yaml'}, line 3"


def test_a_date_is_text(tmp_path: Path) -> None:
    assert read_yaml(written(tmp_path, "run_name: 2026-11-30\n")).content == {"run_name": "2026-11-30"}


@pytest.mark.parametrize("use", ["[{0}]", "{{<<: [{0}]}}"], ids=["lists", "merged mappings"])
def test_aliases_of_aliases_are_counted_and_not_made(tmp_path: Path, use: str) -> None:
    names = [f"a{level}" for level in range(9)]
    lines = ["a0: &a0 {x: 1}"]
    lines += [
        f"{name}: &{name} {use.format(', '.join([f'*{above}'] * 10))}" for above, name in itertools.pairwise(names)
    ]
    path = written(tmp_path, "\n".join(lines))
    tracemalloc.start()
    with pytest.raises(UserError, match=rf"settings\.yaml, line 5: more than {MAX_VALUES:,} values"):
        read_yaml(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 23
    for read in (lambda: parse(["--config", str(path)]), lambda: read_recipe(path)):
        with pytest.raises(UserError, match="where each alias counts as a copy"):
            read()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: " + "[" * 100_000, f"line 1: more than {MAX_LEVELS} levels"),
        ("- " * 100_000, f"line 1: more than {MAX_LEVELS} levels"),
        ("{a: " * 60_000, f"line 1: more than {MAX_LEVELS} levels"),
        ("a0: &a0 1\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 40)), f"line {MAX_LEVELS}: more than"),
        ("[" + "1," * MAX_VALUES + "1]", f"line 1: more than {MAX_VALUES:,} values"),
        ("#" * (MAX_BYTES + 1), f"at most {MAX_BYTES:,} bytes"),
        ("a: 1\nb: &b {c: [*b]}", r"line 2: \*b stands for a value that contains it"),
        ("a: 1\nloss: !!timestamp x", r"line 2: !!timestamp: text, numbers, booleans, lists and mappings are expected"),
        ("a: 1\n? !!set {x}\n: 1", "line 2: !!set: "),
        ("a: [1, !!int x]", "line 1: 'x' is no int"),
        ("a: !!float ''", "line 1: '' is no float"),
        ("a: !!float " + "1:" * 400 + "1", "is no float"),
        ("a: !!bool x", "line 1: 'x' is no bool"),
        ('a: "\\0"', "line 1: .* a sign that no text can hold"),
        ('a: "\\ud800"', "line 1: .* a sign that no text can hold"),
        ("a: 1\nb: 2\na: 3", "line 3: a stands in line 1 already"),
    ],
    ids=range(16),
)
def test_what_is_no_plain_value_within_the_bounds_is_refused_by_its_line(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        read_yaml(written(tmp_path, text))


def test_a_file_of_settings_names_the_line_of_what_it_cannot_mean(tmp_path: Path) -> None:
    for text, message in (
        ("loss: fkl\nlos: rkl\n", r"line 2: unknown setting los \(is loss meant\?\)"),
        ("loss: fkl\nloss: rkl\n", "line 2: loss stands in line 1 already"),
        ("loss: fkl\ncache: [[a]]\n", "line 2: cache: a list of plain values is expected"),
    ):
        with pytest.raises(UserError, match=message):
            parse(["--config", str(written(tmp_path, text))])


@pytest.mark.slow
def test_a_setting_of_another_kind_is_refused_whichever_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = [field.name for field in dataclasses.fields(DistillConfig) if field.init]
    cases = [(name, value) for name in names for value in OF_OTHER_KINDS]
    named = [("accelerator_config", "x"), ("save_steps", "1e400"), ("deepspeed", "x"), ("loss", "!!timestamp x")]
    for name, value in [*named, *random.Random(15).sample(cases, 300)]:
        path = written(tmp_path, f"output_dir: out\nuse_cpu: true\n{name}: {value}\n")
        try:
            parse(["--config", str(path)])
        except UserError as refusal:
            assert "\n" not in str(refusal)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("accelerator_config: x", "--accelerator_config x: .*No such file or directory"),
        ("accelerator_config: {1: 2}", "--accelerator_config {'1': 2}: .*unexpected keyword argument '1'"),
        ("save_steps: 1e400", "--save_steps inf: a finite number is expected"),
        ("learning_rate: .nan", "--learning_rate nan: a finite number is expected"),
        ("run_name: x\nlogging_steps: .inf", "--logging_steps inf: a finite number"),
    ],
)
def test_a_refusal_of_transformers_names_the_setting(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(["--use_cpu", "--output_dir", str(tmp_path), "--config", str(written(tmp_path, text))])


@pytest.mark.slow
def test_an_option_of_answers_of_another_kind_is_refused_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").touch()
    recipe = {
        "output_dir": "runs",
        "seeds": [1],
        "common": {"cache": "a", "eval_cache": "b", "student": "s", "use_cpu": True},
        "runs": {"KD": {"kd_weight": 0.5}},
    }
    values: list[Any] = [[[1]], {"a": {}}, -1, 0.5, "x", "", [], {}, [[]], True, float("nan"), [float("inf")]]
    for field in dataclasses.fields(GenerationSettings):
        for value in values:
            options = {"data": [str(tmp_path / "data.jsonl")]} | {field.name: value}
            with suppress(UserError):
                read_recipe(written(tmp_path, yaml.safe_dump(recipe | {"generate": options})))


def test_gradients_may_be_left_as_long_as_they_are(tmp_path: Path) -> None:
    assert parse(["--use_cpu", "--output_dir", str(tmp_path), "--max_grad_norm", "inf"]).max_grad_norm == float("inf")
