"""The studies' own parts: definitions against the package's losses, judging, students of every kind, tables."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from logitcache import LogitCache
from logitcache.format.layout import Layout
from logitcache.format.tail_parts import TailParts
from tests.helpers.cachemaking import VOCAB, llama, random_sequences, write_cache
from tests.helpers.smallcaches import tail_basis
from trainer import sparse_divergence

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS / "studies"))

import cached_against_online  # noqa: E402
import epochs  # noqa: E402
import late  # noqa: E402
import tail_left_out  # noqa: E402
import task  # noqa: E402
import temperature  # noqa: E402
from common import finish  # noqa: E402
from definitions import LOSSES, divergence, least_of_head  # noqa: E402
from judging import Judge  # noqa: E402
from results import Results, cell, mean_and_interval  # noqa: E402
from students import HARD, ONLINE, Student, judged, trainer_of  # noqa: E402

SEEDS = (1, 2)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> LogitCache:
    """Everything that the studies' caches hold."""
    path = tmp_path_factory.mktemp("everything")
    groups = np.arange(VOCAB) % 5
    sequences = random_sequences(16, seed=1)
    basis = tail_basis(Layout(VOCAB, TailParts(rank=3)))
    more: dict[str, Any] = {"groups": groups, "tail_entropy": True, "num_tail_samples": 4, "tail_basis": basis}
    return write_cache(path, sequences, temperatures=(2.0,), **more)


@pytest.fixture(scope="module")
def entropy_cache(tmp_path_factory: pytest.TempPathFactory) -> LogitCache:
    """No temperature but 1, and the tail's entropy."""
    return write_cache(tmp_path_factory.mktemp("entropy"), random_sequences(16, seed=1), tail_entropy=True)


@pytest.fixture(scope="module")
def whole_cache(tmp_path_factory: pytest.TempPathFactory) -> LogitCache:
    """Every token is an entry."""
    path = tmp_path_factory.mktemp("whole")
    return write_cache(path, random_sequences(16, seed=1), k=VOCAB, temperatures=(2.0,))


def random_pair(temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Logits of a teacher and a student, float64 [20, VOCAB]."""
    torch.manual_seed(0)
    teacher, student = 2 * torch.randn(2, 20, VOCAB, dtype=torch.float64)
    return teacher / temperature, student / temperature


@pytest.mark.parametrize("loss", LOSSES)
def test_definitions_are_the_losses_of_a_cache_that_holds_every_token(loss: str) -> None:
    teacher, student = random_pair()
    log_p = teacher.log_softmax(1)
    in_plain_torch, from_entries = student.clone().requires_grad_(), student.clone().requires_grad_()
    expected = divergence(loss, log_p, in_plain_torch.log_softmax(1))
    ids = torch.arange(VOCAB).repeat(len(log_p), 1)
    found = sparse_divergence(from_entries, ids, log_p, torch.full((len(log_p),), -math.inf).double(), loss=loss)
    torch.testing.assert_close(found, expected)
    expected.sum().backward()
    found.sum().backward()
    torch.testing.assert_close(from_entries.grad, in_plain_torch.grad)


def test_the_head_takes_the_token_that_crosses_half_or_leaves_it() -> None:
    p = torch.tensor([[0.1, 0.3, 0.25, 0.35], [0.6, 0.2, 0.1, 0.1]])
    assert least_of_head(p, crossing=True).tolist() == pytest.approx([0.3, 0.6])
    assert least_of_head(p, crossing=False).tolist() == pytest.approx([0.35, 0.6])


def test_a_judge_finds_nothing_wrong_with_the_teacher_itself(cache: LogitCache) -> None:
    teacher = llama()
    found = Judge(teacher, cache, 10, (1.0, 2.0))(teacher)
    wrong = ("fkl", "rkl", "akl", "todi", "head_error", "tail_error")
    assert {name + at: found[name + at] for name in wrong for at in ("", "@2")} == pytest.approx(
        {name + at: 0.0 for name in wrong for at in ("", "@2")}, abs=1e-5
    )
    assert found["agreement"] == 1


def test_a_judge_measures_what_loops_over_rows_and_tokens_measure(cache: LogitCache) -> None:
    teacher, student = llama(), llama(seed=5, hidden_size=16)
    found = Judge(teacher, cache, 3)(student)
    sums = dict.fromkeys(found, 0.0)
    positions = 0
    for sequence in (cache[row] for row in range(3)):
        input_ids = torch.tensor(sequence.input_ids.tolist())
        logits = [model(input_ids[None]).logits[0].double().detach() for model in (teacher, student)]
        for position in sequence.positions.tolist():
            p, q = (one[position].softmax(0).tolist() for one in logits)
            in_order = sorted(range(VOCAB), key=lambda token: -p[token])
            head, mass = set(), 0.0
            for token in in_order:
                if mass < 0.5:
                    head.add(token)
                mass += p[token]
            gaps = [abs(a - b) for a, b in zip(p, q, strict=True)]
            sums["fkl"] += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
            sums["rkl"] += sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
            sums["head_error"] += sum(gaps[token] for token in head)
            sums["tail_error"] += sum(gaps[token] for token in range(VOCAB) if token not in head)
            sums["ce"] -= math.log(q[sequence.input_ids[position + 1]])
            sums["agreement"] += in_order[0] == max(range(VOCAB), key=lambda token: q[token])
            positions += 1
    for name in ("fkl", "rkl", "head_error", "tail_error", "ce", "agreement"):
        assert found[name] == pytest.approx(sums[name] / positions, rel=1e-4), name
    assert found["todi"] == pytest.approx(found["fkl"] + found["rkl"])


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "temperature"), [("fkl", 2.0), ("rkl", 1.0), ("akl", 1.0), ("todi", 2.0)])
def test_a_cache_of_every_token_makes_the_student_that_online_training_makes(
    loss: str, temperature: float, whole_cache: LogitCache
) -> None:
    common: dict[str, Any] = {"temperature": temperature, "steps": 4, "warmup_steps": 0, "learning_rate": 1e-2}
    judges = {"heldout": Judge(llama(), whole_cache, 4)}
    online, cached = (
        judged(Student(source, 1, loss, **common), new_student, whole_cache, llama(), judges)["judged"][0]["heldout"]
        for source in (ONLINE, "whole")
    )
    untrained = judges["heldout"](new_student())
    assert cached == pytest.approx(online, rel=1e-3)
    assert abs(online["fkl"] - untrained["fkl"]) > 0.05


def new_student() -> Any:
    """Small, and the same every time."""
    return llama(seed=3, hidden_size=16)


def all_students() -> Iterator[Student]:
    """Of every study."""
    yield from cached_against_online.students([1])
    yield from tail_left_out.students([1])
    yield from (temperature.student(way, loss, 1) for way in temperature.WAYS for loss in temperature.LOSSES)
    yield from (epochs.student(loss, 1, 4, source) for loss in LOSSES for source in ("k64", ONLINE))
    yield from (late.student(source, 1, "rkl", tail, weight) for source, tail, weight in late.WAYS)


@pytest.mark.slow
def test_every_kind_of_student_trains(cache: LogitCache, entropy_cache: LogitCache) -> None:
    judges = {"heldout": Judge(llama(), cache, 2, (1.0, 2.0))}
    kinds = {  # one of each way of training
        (one.source if one.source in (ONLINE, HARD) or "entropy" in one.source else "cache")
        + f"{one.tail} {one.temperature} {one.power_tail} {one.residual_weight} {bool(one.judged_at)}": one
        for one in all_students()
    }
    assert len(kinds) == 18
    for one in kinds.values():
        kind = replace(one, steps=2, judged_at=(0, 1) if one.judged_at else ())
        held = entropy_cache if "entropy" in kind.source else cache
        found = judged(kind, new_student, held, llama(), judges)["judged"]
        assert [record["step"] for record in found] == list(kind.judged_at or (2,)), kind
        assert all(math.isfinite(value) for record in found for value in record["heldout"].values()), kind


def test_rows_come_as_the_seed_draws_them_whatever_a_cache_holds(cache: LogitCache, entropy_cache: LogitCache) -> None:
    def drawn(held: LogitCache, seed: int, source: str = "k8") -> list[list[int]]:
        student = Student(source, seed, steps=5, batch_size=5)
        loader = trainer_of(student, new_student(), held, llama()).get_train_dataloader()
        return [batch.input_ids.flatten().tolist() for batch in loader]

    assert drawn(cache, 1) == drawn(entropy_cache, 1) == drawn(entropy_cache, 1, ONLINE) != drawn(cache, 2)
    assert len(drawn(cache, 1)) == 5  # more rows than there are: some come again


def test_a_residual_weight_that_is_given_is_that_of_every_step(cache: LogitCache) -> None:
    student = replace(late.student("k8", 1, "rkl", "low_rank", 0.5), steps=2)
    trainer = trainer_of(student, new_student(), cache, llama())
    seen = []
    original = trainer._distil

    def watched(model: Any, batch: Any, settings: Any, *others: Any, **options: Any) -> Any:
        seen.append(settings.residual_weight)
        return original(model, batch, settings, *others, **options)

    trainer._distil = watched  # type: ignore[method-assign]
    trainer.train()
    assert seen == [0.5, 0.5]


def test_a_damaged_teacher_is_its_teacher_with_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task, "teacher", llama)
    damaged, teacher = task.student(task.DAMAGED), llama()
    moved, weights = (torch.cat([one.detach().flatten() for one in model.parameters()]) for model in (damaged, teacher))
    assert 0.01 < float((moved - weights).norm() / weights.norm()) < 0.5
    assert all(one.requires_grad for one in damaged.parameters())


def test_the_wrong_tail_is_the_power_of_its_mass(cache: LogitCache) -> None:
    student = Student("k8", 1, "fkl", temperature=2.0, power_tail=True)
    model = new_student()
    trainer = trainer_of(student, model, cache, llama())
    inputs = next(iter(trainer.get_train_dataloader()))
    logits = model(inputs.input_ids).logits[:, inputs.logits_to_keep].flatten(0, 1)[inputs.logit_indices]
    powers = torch.cat([inputs.targets.logprobs, inputs.targets.tail_logprob[:, None]], 1).exp() ** 0.5
    p = powers / powers.sum(1, keepdim=True)
    q = (logits / 2).softmax(1)
    q_entries = q.gather(1, inputs.targets.token_ids.long())
    q_all = torch.cat([q_entries, 1 - q_entries.sum(1, keepdim=True)], 1)
    expected = 4 * (p * (p / q_all).log()).sum() / len(p)  # times T²
    torch.testing.assert_close(trainer.compute_loss(model, inputs), expected, rtol=1e-4, atol=1e-5)


def test_intervals_are_those_of_students_t() -> None:
    mean, half = mean_and_interval([1.0, 2.0, 3.0])
    assert (mean, half) == pytest.approx((2.0, 2.484), abs=1e-3)  # 4.303 · 1 / √3
    assert cell([0.5]) == "0.500"
    assert cell([0.1, 0.2, 0.3], 0, 100) == "20 ± 25"


def test_results_are_found_again_and_a_line_cut_off_is_done_again(tmp_path: Path) -> None:
    path = tmp_path / "students.jsonl"
    first, second = epochs.student("fkl", 1, 2, "k64"), Student(ONLINE, 1, "rkl")
    record = {"training_s": 1.0, "judged": [{"step": 1, "heldout": {"fkl": 0.5}}]}
    Results(path).add(first, record)
    with path.open("a") as file:
        file.write("\n" + json.dumps({"student": asdict(second)} | record)[:-5])
    results = Results(path)
    assert first in results and second not in results
    results.add(second, record)
    assert Results(path).final(second) == {"fkl": 0.5}


@pytest.fixture
def made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Student], float]], Results]:
    """Results of all studies for SEEDS, all metrics of a student the same number; caches of made-up sizes."""
    monkeypatch.setattr(task, "bytes_per_position", lambda name: 100.0 + len(name))
    monkeypatch.setattr(task, "entries_per_position", lambda name: 12.5)

    def fill(value: Callable[[Student], float]) -> Results:
        results = Results(tmp_path / "students.jsonl")
        names = [*cached_against_online.METRICS, *tail_left_out.METRICS, *temperature.METRICS, *epochs.METRICS]
        for one in (replace(one, seed=seed) for one in all_students() for seed in SEEDS):
            metrics = dict.fromkeys([*names, *LOSSES], value(one))
            record = [{"step": step} | dict.fromkeys(epochs.JUDGES, metrics) for step in one.judged_at or (one.steps,)]
            results.add(one, {"training_s": 1.0, "judged": record})
        return results

    return fill


@pytest.mark.slow
def test_the_share_of_the_gain_is_that_between_hard_labels_and_online(made_up: Any, tmp_path: Path) -> None:
    results = made_up(
        lambda one: {HARD: 3.0, ONLINE: 1.0}.get(one.source, 2.5 if one.source == "k8" else 0.9) + one.seed
    )
    gains = cached_against_online.Gains(results, SEEDS)
    assert gains.shares("rkl", "k8", "bucket") == pytest.approx([0.25, 0.25])
    lines = {line.split("  ")[0]: line for line in cached_against_online.share_table(gains, None).splitlines()}
    assert "25 ± 0" in lines["k = 8, bucket"] and "105 ± 0" in lines["k = 16, 32 groups"]
    assert "105 ± 0" in lines["mass 0.8, k ≥ 8, bucket"]
    cached_against_online.draw(gains, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"
    assert "ToDi, k = 16, 16 samples" in cached_against_online.metric_table(results, SEEDS)
    assert "ToDi, ignore       105 ± 0" in tail_left_out.table(results, SEEDS)


def test_no_share_is_given_where_online_gains_nothing(made_up: Any) -> None:
    results = made_up(lambda one: {HARD: 3.0, ONLINE: 2.9 + one.seed / 10}.get(one.source, 2.5))
    assert cached_against_online.Gains(results, SEEDS).cell("rkl", "k8", "bucket") == cached_against_online.NO_GAIN


@pytest.mark.slow
def test_tables_over_temperatures_and_epochs_name_every_way_and_loss(made_up: Any, tmp_path: Path) -> None:
    results = made_up(lambda one: 1.0 + LOSSES.index(one.loss) + one.power_tail / 2)
    lines = {line.split("  ")[0]: line for line in temperature.table(results, SEEDS).splitlines()}
    assert "2.000 ± 0.000" in lines["RKL, exact tail"] and "2.500 ± 0.000" in lines["RKL, t^(1/T)"]
    of_loss = {loss: [epochs.student(loss, seed, 4, "k64") for seed in SEEDS] for loss in LOSSES}
    curves = epochs.Curves(results, of_loss)
    assert curves.epochs == [0, 1, 2, 4]
    first, *rows = epochs.table(curves, "subset").splitlines()
    assert first.split() == ["epoch", "1", "epoch", "2", "epoch", "4"]
    assert sum(row.startswith("  AKL") for row in rows) == len(epochs.METRICS)
    epochs.draw({"k64": curves, ONLINE: curves}, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"


def test_a_finished_study_trains_nothing(made_up: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up(lambda one: 1.0)
    monkeypatch.setattr("common.STUDENTS", tmp_path / "students.jsonl")
    monkeypatch.setattr(task, "prepare", lambda rows, names: None)
    monkeypatch.setattr("common.ProcessPoolExecutor", None)
    assert Student(HARD, 1) in finish(cached_against_online.students(SEEDS), jobs=1)


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((TOOLS / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_hold_what_trainer_fit_and_eval_take(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.comparison.recipe import read_recipe

    monkeypatch.chdir(tmp_path)
    text = path.read_text()
    for name in re.findall(r"[\w-]+\.jsonl(?=[,\]])", text):
        Path(name).write_text('{"prompt": "a", "completion": "b"}\n')
    copy = tmp_path / path.name
    copy.write_text(text.replace("bf16: true", "bf16: false"))  # refused where there is no such GPU
    recipe = read_recipe(copy)
    assert len(recipe.runs) >= 4
    if path.stem.startswith(("akl", "todi")):
        of_todi = path.stem.startswith("todi")
        configs = {run.row: run.config for run in recipe.runs}
        assert {row: (config.loss, config.kd_weight) for row, config in configs.items() if row != "hard labels"} == {
            "FKL": ("fkl", 0.5),
            "RKL": ("rkl", 0.5),
            "AKL": ("akl", 0.5),
            **({"ToDi": ("todi", 0.5)} if of_todi else {}),
        }
        for config in configs.values():
            assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 32
            assert config.seed == 10
            assert not of_todi or (config.temperature, config.t_squared) == (2.0, False)
        assert configs["AKL"].loss_args == ({"akl_split": "todi"} if of_todi else {})
