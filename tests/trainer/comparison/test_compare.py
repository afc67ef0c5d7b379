"""Runs side by side: seeds of one run make one row, what differs makes its name; table, picture and page."""

from __future__ import annotations

import errno
import html
import itertools
import json
import math
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from transformers import PreTrainedConfig

from logitcache import LogitCache, UserError
from trainer.cli import main
from trainer.comparison.finished import read_run, read_runs
from trainer.comparison.page import page_html
from trainer.comparison.picture import draw, look
from trainer.comparison.run_groups import Row, rows_of
from trainer.comparison.statistics import estimate, paired_difference, t_quantile
from trainer.comparison.table import table
from trainer.evaluation.identity import identities, model_identity

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
METRICS = {"ce": 2.0, "perplexity": 7.4, "fkl": 0.5, "rkl": 0.6, "agreement": 0.7, "ece": 0.1, "positions": 100}


def finished_run(folder: Path, name: str, *, fkl: float = 0.5, heldout: str = "heldout", **settings: Any) -> Path:
    run = folder / name
    run.mkdir()
    defaults = {"loss": "todi", "kd_weight": 0.5, "seed": 0, "output_dir": str(run), "learning_rate": 1e-3}
    evaluation = {"cache": heldout, "cache_sha256": f"digest of {heldout}", "metrics": METRICS | {"fkl": fkl}}
    history = [{"step": step, "eval_fkl": fkl + 1 / step, "eval_ce": 3 / step} for step in (1, 2, 3)]
    (run / "run.json").write_text(json.dumps({"settings": defaults | settings, "tail": "bucket"}))
    (run / "eval.json").write_text(json.dumps(evaluation))
    (run / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": 1, "loss": 3.0}, *history]}))
    return run


def answered(run: Path, rouge_l: float, **settings: Any) -> Path:
    """Puts a model and scores of its answers into a run's folder; returns the file of scores."""
    (run / "config.json").write_text('{"model_type": "llama"}')
    (run / "model.safetensors").write_text(str(run))
    scores = {"model": str(run), "model_identity": model_identity(str(run), PreTrainedConfig()), "rouge_l": rouge_l}
    made = {"data_sha256": "of dolly", "settings": {"temperature": 1.0} | settings}
    (run / "generate").mkdir(exist_ok=True)
    file = run / "generate" / "dolly.json"
    file.write_text(json.dumps(scores | made | {"seeds": {}}))
    return file


def compared(paths: Sequence[Path]) -> list[str]:
    """The table's lines."""
    return table(rows_of(read_runs(paths))).splitlines()


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 9, 10, 29, 30, 200])
def test_students_t_encloses_95_percent(degrees: int) -> None:
    t = np.linspace(0, t_quantile(degrees), 200_001)
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)
    density = scale * (1 + t**2 / degrees) ** (-(degrees + 1) / 2)
    assert 2 * np.trapezoid(density, t) == pytest.approx(0.95, abs=1e-7)


def test_the_interval_covers_the_true_mean_as_often_as_it_says() -> None:
    samples = np.random.default_rng(0).normal(3.0, 2.0, (4000, 4))
    covered = [abs(found.mean - 3.0) <= (found.half_width or 0) for found in map(estimate, samples.tolist())]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.012)


def test_differences_are_taken_seed_by_seed() -> None:
    found = paired_difference({1: 5.0, 2: 6.5, 3: 9.0}, {2: 6.0, 3: 8.0, 4: 0.0})
    assert found is not None
    assert (found.mean, found.count) == (0.75, 2)
    assert found.half_width == pytest.approx(12.7062 * 0.25, rel=1e-4)
    assert paired_difference({1: 5.0}, {2: 5.0}) is None


def test_runs_that_differ_in_their_seed_are_one_row_with_its_interval(tmp_path: Path) -> None:
    runs = [finished_run(tmp_path, f"r{seed}", seed=seed, fkl=0.4 + 0.1 * seed) for seed in range(3)]
    header, row, footer = compared(runs)
    assert header.split() == ["seeds", "CE", "perplexity", "FKL", "RKL", "top-1", "agreement", "ECE"]
    assert row.split()[:2] == ["ToDi", "3"]
    assert "0.50 ± 0.25" in row  # 4.303 · 0.1 / √3
    assert "95 % confidence interval" in footer


def test_one_seed_has_no_interval(tmp_path: Path) -> None:
    assert "±" not in "".join(compared([finished_run(tmp_path, "a"), finished_run(tmp_path, "b", loss="fkl")]))


def test_rows_are_measured_against_hard_labels_of_the_same_seed(tmp_path: Path) -> None:
    runs = [finished_run(tmp_path, f"todi{seed}", seed=seed, fkl=0.4 + 0.1 * seed) for seed in (1, 2)]
    runs += [finished_run(tmp_path, f"hard{seed}", seed=seed, kd_weight=0.0, fkl=0.6 + 0.1 * seed) for seed in (1, 2)]
    lines = compared(runs)
    below = lines[lines.index(next(line for line in lines if line.startswith("less hard labels"))) :]
    assert below[1].startswith("ToDi")
    assert "-0.2" in below[1]
    assert len(below) == 2


def test_answers_and_pace_become_columns_where_they_are_known(tmp_path: Path) -> None:
    runs = [finished_run(tmp_path, "a"), finished_run(tmp_path, "b", loss="fkl")]
    answered(runs[0], 24.5)
    pace = [{"step": s, "tokens_per_second": 100.0 * s, "data_wait": 0.01} for s in (1, 2, 9)]
    (runs[1] / "trainer_state.json").write_text(
        json.dumps({"log_history": [*pace, {"step": 9, "train_runtime": 90.0}]})
    )
    lines = compared(runs)
    assert lines[0].endswith("ROUGE-L dolly")
    assert lines[1].endswith("24.5")
    assert lines[2].endswith("–")
    assert lines[-3].split() == ["tokens/s", "data", "wait", "minutes"]
    assert lines[-1].split() == ["FKL", "200", "0.01", "1.5"]


def test_a_row_is_named_after_its_loss_and_what_differs(tmp_path: Path) -> None:
    runs = [
        finished_run(tmp_path, "a", kd_weight=0.0),
        finished_run(tmp_path, "b", loss="fkl"),
        finished_run(tmp_path, "c", loss="rkl", temperature=2.0),
        finished_run(tmp_path, "d", loss="rkl", temperature=1.0),
    ]
    names = [line.split("  ")[0] for line in compared(runs)[1:5]]
    assert names[0] == "hard labels"
    assert names[1].startswith("FKL")
    assert names[2:] == ["RKL temperature=2.0", "RKL temperature=1.0"]


def test_the_loss_and_its_settings_do_not_tell_hard_labels_apart(tmp_path: Path) -> None:
    hard = [
        finished_run(tmp_path, "a", kd_weight=0.0, loss="fkl", temperature=2.0, seed=0),
        finished_run(tmp_path, "b", kd_weight=0.0, loss="todi", temperature=1.0, seed=1),
        finished_run(tmp_path, "c", kd_weight=0.0, loss="todi", learning_rate=1e-4),
    ]
    rows = [line.split("  ")[0:2] for line in compared([*hard, finished_run(tmp_path, "d")])[1:4]]
    assert [row[0] for row in rows] == ["hard labels learning_rate=0.001", "hard labels learning_rate=0.0001", "ToDi"]


def test_a_weight_that_falls_to_0_is_no_run_of_hard_labels(tmp_path: Path) -> None:
    runs = [
        finished_run(tmp_path, loss, loss=loss, kd_weight=0.0, kd_weight_schedule="0.9@0,0@1")
        for loss in ("fkl", "rkl")
    ]
    hard = finished_run(tmp_path, "hard", kd_weight=0.0, kd_weight_schedule="0@0,0@1", loss_schedule="fkl@0,rkl@0.5")
    rows = rows_of(read_runs([*runs, hard, finished_run(tmp_path, "plain", kd_weight=0.0, seed=1)]))
    assert [(row.name, len(row.runs)) for row in rows] == [("FKL", 1), ("RKL", 1), ("hard labels", 2)]


def test_a_run_of_an_earlier_version_is_a_seed_of_a_new_one(tmp_path: Path) -> None:
    former = finished_run(tmp_path, "former", cache="train", loss_args=None)
    new: dict[str, Any] = {"cache": ["train"], "loss_args": {}, "packing": False, "lora_r": None, "average_with": None}
    rows = rows_of(read_runs([former, finished_run(tmp_path, "new", seed=1, **new)]))
    assert [(row.name, len(row.runs)) for row in rows] == [("ToDi", 2)]
    other = finished_run(tmp_path, "packed", **new | {"packing": True})
    assert len(rows_of(read_runs([former, other]))) == 2


def test_seeds_of_the_order_count_as_seeds(tmp_path: Path) -> None:
    runs = [finished_run(tmp_path, f"r{seed}", data_seed=seed, fkl=float(seed)) for seed in (1, 3)]
    [row] = rows_of(read_runs(runs))
    found = row.estimate("fkl")
    assert found is not None
    assert (found.mean, found.count) == (2.0, 2)


def test_a_run_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    run = finished_run(tmp_path, "a")
    with pytest.raises(UserError, match="is named twice"):
        read_runs([run, tmp_path / "a" / ".." / "a"])
    shutil.copytree(run, tmp_path / "copy")
    with pytest.raises(UserError, match=r"copy and .*a are one run with the same seed \(0\), twice"):
        rows_of(read_runs([run, tmp_path / "copy"]))


@pytest.mark.slow
def test_answers_of_a_former_model_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished_run(tmp_path, "a")
    scores = answered(run, 24.5)
    command = ["compare", str(run), "--out", str(tmp_path / "x.png")]
    assert main(command) == 0
    assert "ROUGE-L dolly" in capsys.readouterr().out
    (run / "model.safetensors").write_text("trained anew")
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "ROUGE-L" not in out
    assert f"note: {scores} is of another model than the one that lies there now: left out" in out


def test_answers_that_were_made_differently_are_left_out(tmp_path: Path) -> None:
    runs = [finished_run(tmp_path, f"r{seed}", seed=seed) for seed in (1, 2, 3)]
    for run, temperature in zip(runs, (1.0, 0.0, 1.0), strict=True):
        answered(run, 20.0, temperature=temperature)
    read = read_runs(runs)
    assert ["rouge_l:dolly" in run.metrics for run in read] == [True, False, True]
    assert [list(run.notes) for run in read] == [
        [],
        [f"{runs[1]}: its answers to dolly were made with another temperature than those of {runs[0]}: left out"],
        [],
    ]


@pytest.mark.parametrize("content", ["{}", "[]", '{"model": 1, "settings": {}, "seeds": {}}', "not JSON"])
def test_a_file_of_someone_else_among_the_answers_is_left_out(tmp_path: Path, content: str) -> None:
    run = finished_run(tmp_path, "a")
    answered(run, 24.5)
    (run / "generate" / "other.json").write_text(content)
    read = read_run(run)
    assert [name for name in read.metrics if name.startswith("rouge")] == ["rouge_l:dolly"]
    assert read.notes == [f"{run / 'generate' / 'other.json'} holds no scores of this model's answers: left out"]


@pytest.mark.parametrize("name", ["run.json", "eval.json", "trainer_state.json"])
@pytest.mark.parametrize("content", ["{}", "[1]", "", '{"settings": 1, "metrics": 1, "log_history": 1}'])
def test_a_record_that_is_none_is_refused(
    tmp_path: Path, name: str, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished_run(tmp_path, "a")
    (run / name).write_text(content)
    assert main(["compare", str(run)]) == 2
    assert f"trainer: error: {run / name} " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("trainer_state.json", {"log_history": ["x"]}),
        ("trainer_state.json", {"log_history": [{"eval_fkl": 1.0}]}),
        ("trainer_state.json", {"log_history": [{"step": [], "eval_fkl": 1.0}]}),
        ("trainer_state.json", {"log_history": [{"step": 1, "eval_fkl": []}]}),
        ("trainer_state.json", {"log_history": [{"step": 1, "tokens_per_second": "x"}]}),
        ("eval.json", {"cache": "c", "cache_sha256": "s", "metrics": {"fkl": [1]}}),
        ("run.json", {"tail": "bucket", "settings": {"seed": "x"}}),
        ("run.json", {"tail": "bucket", "settings": {"loss": []}}),
        ("run.json", {"tail": "bucket", "settings": {"kd_weight": {}}}),
        ("run.json", {"tail": "bucket", "settings": {"kd_weight_schedule": 7}}),
    ],
)
def test_values_of_another_kind_in_a_record_are_refused(
    tmp_path: Path, name: str, content: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished_run(tmp_path, "a")
    (run / name).write_text(json.dumps(content))
    assert main(["compare", str(run), "--out", str(tmp_path / "x.png")]) == 2
    assert f"trainer: error: {run / name} was not written by `trainer`: " in capsys.readouterr().err


def test_half_a_surrogate_pair_in_a_record_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It would be the name of a row, which no picture and no page can show."""
    runs = [finished_run(tmp_path, name, optim=optim) for name, optim in (("a", "sgd"), ("b", "\ud800"))]
    assert main(["compare", *map(str, runs), "--out", str(tmp_path / "x.png")]) == 2
    assert f"trainer: error: {runs[1] / 'run.json'} is not JSON (" in capsys.readouterr().err


def test_what_diverged_is_never_best_and_has_no_difference(tmp_path: Path) -> None:
    runs = [finished_run(tmp_path, loss, loss=loss, fkl=fkl) for loss, fkl in (("rkl", math.nan), ("fkl", 0.5))]
    runs += [finished_run(tmp_path, "akl", loss="akl", fkl=math.inf)]
    rows = rows_of(read_runs(runs))
    below = [line for line in table(rows).splitlines() if line.startswith(("FKL", "AKL"))][2:]
    assert [line.split()[3] for line in below] == ["–", "–"]
    page = page_html(rows, "diverged")
    best = re.findall(r'<td class="best"[^>]*>([^<]*)</td>', page)
    assert "0.5" in best
    assert not {"nan", "inf"} & {*best}
    assert not re.search(r'data-value="(nan|-?inf)"', page)


def test_one_run_is_not_called_runs(tmp_path: Path) -> None:
    assert "1 run in 1 row, measured on heldout" in page_html(rows_of([read_run(finished_run(tmp_path, "a"))]), "one")


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
def test_any_name_stands_in_the_pictures_legend_as_it_is(tmp_path: Path) -> None:
    names = ["_hidden", "$x_{$", "a", *(f"number {number}" for number in range(37))]
    run = read_run(finished_run(tmp_path, "a"))
    draw([Row(name, [run]) for name in names], ["ce", "fkl"], tmp_path / "x.svg")
    shown = re.findall(r"<!-- (.*?) -->", (tmp_path / "x.svg").read_text())
    assert [name for name in shown if name in names] == names


@pytest.mark.filterwarnings("error")
def test_a_run_without_curves_is_drawn_without_a_word(tmp_path: Path) -> None:
    run = finished_run(tmp_path, "a")
    (run / "trainer_state.json").write_text('{"log_history": []}')
    draw(rows_of([read_run(run)]), ["ce"], tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_many_rows_look_different() -> None:
    assert len({look(number) for number in range(49)}) == 49
    assert len({look(number)[1] for number in range(7)}) == 7  # for those who see no colours


def test_an_out_that_cannot_be_written_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(finished_run(tmp_path, "a"))
    (tmp_path / "folder.png").mkdir()
    for out in (tmp_path / "missing" / "x.png", tmp_path / "folder.png"):
        assert main(["compare", run, "--out", str(out)]) == 2
        assert f"--out {out}: " in capsys.readouterr().err
    for name in ("x.html", "x.xyz", "x"):
        assert main(["compare", run, "--out", str(tmp_path / name)]) == 2
        assert f"{name}: a picture is expected, .png, .pdf, .svg" in capsys.readouterr().err
    assert main(["compare", run, "--out", str(tmp_path / "x.png"), "--page", str(tmp_path / "x.png")]) == 2
    assert "that is the picture" in capsys.readouterr().err


def test_a_disk_that_fills_up_leaves_no_half_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(figure: Figure, path: Path, **options: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    run = finished_run(tmp_path, "a")
    assert main(["compare", str(run), "--out", str(tmp_path / "x.png")]) == 2
    assert capsys.readouterr().err == (
        f"trainer: error: no space left for {tmp_path / 'x.png'}: free some and run the same command again to continue\n"
    )
    assert list(tmp_path.iterdir()) == [run]


def test_the_command_prints_the_table_and_draws_the_curves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(finished_run(tmp_path, f"{loss}{s}", loss=loss, seed=s)) for loss in ("fkl", "akl") for s in (0, 1)]
    picture = tmp_path / "curves.png"
    assert main(["compare", *runs, "--out", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 10_000
    out = capsys.readouterr().out
    assert "FKL" in out
    assert "AKL" in out
    assert str(picture) in out
    assert str(picture.with_suffix(".html")) in out


@pytest.mark.slow
def test_the_picture_shows_what_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(finished_run(tmp_path, "a"))
    out, page = tmp_path / "x.png", tmp_path / "y.html"
    assert main(["compare", run, "--out", str(out), "--page", str(page), "--curves", "ce"]) == 0
    narrow = out.stat().st_size
    assert page.exists()
    assert main(["compare", run, "--out", str(out), "--page", str(page), "--curves", "ce,fkl,ece"]) == 0
    assert out.stat().st_size > narrow
    assert main(["compare", run, "--curves", "ce,speed"]) == 2
    assert "--curves: speed: choose from ce, perplexity" in capsys.readouterr().err


def test_the_page_holds_every_number_and_asks_no_network(tmp_path: Path) -> None:
    runs = [
        finished_run(tmp_path, f"{loss}{s}", loss=loss, seed=s, fkl=s + 0.25) for loss in ("fkl", "akl") for s in (0, 1)
    ]
    page = page_html(rows_of([read_run(run) for run in runs]), "a <title> & more")
    markup = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert "<title>a &lt;title&gt; &amp; more</title>" in markup
    assert not re.search(r"(src|href)=|<a |<link|@import|url\(", markup)
    assert "default-src &#x27;none&#x27;" in markup or "default-src 'none'" in markup
    for run in runs:
        assert html.escape(str(run)) in markup
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, flags=re.DOTALL)[1])  # type: ignore[index]
    assert data["rows"] == ["FKL", "AKL"]
    curve = next(curve for curve in data["curves"] if curve["title"].startswith("FKL"))["series"][0]
    assert curve == {"row": 0, "steps": [1, 2, 3], "mean": [1.75, 1.25, pytest.approx(1.0833, abs=1e-4)]} | {
        "low": [1.25, 0.75, pytest.approx(0.5833, abs=1e-4)],
        "high": [2.25, 1.75, pytest.approx(1.5833, abs=1e-4)],
    }


def test_names_on_the_page_are_escaped(tmp_path: Path) -> None:
    hostile = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    runs = [finished_run(tmp_path, "a", student=hostile), finished_run(tmp_path, "b", student="plain")]
    page = page_html(rows_of([read_run(run) for run in runs]), hostile)
    assert "<script>alert" not in page
    assert "<img" not in re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)


def test_a_run_without_an_evaluation_is_refused(tmp_path: Path) -> None:
    run = finished_run(tmp_path, "a")
    (run / "eval.json").unlink()
    with pytest.raises(UserError, match=r"has no eval\.json"):
        read_run(run)


def test_an_evaluation_of_a_former_version_is_of_the_same_cache(
    tmp_path: Path, cache: LogitCache, heldout: LogitCache
) -> None:
    runs = [finished_run(tmp_path, name, heldout=cache.path) for name in "ab"]
    for run, identity in zip(runs, identities(cache), strict=True):
        path = run / "eval.json"
        path.write_text(path.read_text().replace(f"digest of {cache.path}", identity))
    assert [run.eval_cache_sha256 for run in read_runs(runs)] == [*identities(cache)]
    for other in runs:  # where one of them was, another cache is by now
        other_path, text = other / "eval.json", (other / "eval.json").read_text()
        other_path.write_text(text.replace(json.dumps(cache.path), json.dumps(heldout.path)))
        assert len(read_runs(runs)) == 2
        other_path.write_text(text)
    path.write_text(path.read_text().replace(identities(cache)[1], identities(cache)[1][::-1]))
    with pytest.raises(UserError, match="was evaluated on the cache"):
        read_runs(runs)


def test_runs_evaluated_on_different_data_are_refused(tmp_path: Path) -> None:
    runs = [finished_run(tmp_path, "a"), finished_run(tmp_path, "b", heldout="other")]
    with pytest.raises(UserError, match=r"/b was evaluated on the cache other, .*/a on another one, heldout:"):
        compared(runs)


@pytest.mark.programs
@pytest.mark.skipif(CHROMIUM is None, reason="neither chromium nor google-chrome is installed")
def test_the_page_in_a_browser_sorts_hides_and_shows_names_as_text(tmp_path: Path) -> None:
    from tests.helpers.browser import opened, running_browser

    hostile = "<img src=x onerror=alert(1)>"
    settings = [{"student": hostile, "fkl": 0.9}, {"student": "b", "fkl": 0.2}, {"student": "c", "fkl": 0.5}]
    runs = [finished_run(tmp_path, f"r{number}", **of_one) for number, of_one in enumerate(settings)]  # type: ignore[arg-type]
    file = tmp_path / "page.html"
    file.write_text(page_html(rows_of([read_run(run) for run in runs]), "three"))
    with running_browser() as browser:
        for width, scheme in itertools.product((1400, 360), ("light", "dark")):
            with opened(browser, file, width, color_scheme=scheme) as page:
                check_page(page, width, hostile)


def check_page(page: Any, width: int, hostile: str) -> None:
    page.locator(".plot .main-svg").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    names = page.locator("table").first.locator("tbody th")
    assert names.all_inner_texts() == [f"ToDi student={student}" for student in (hostile, "b", "c")]
    heading = page.get_by_role("button", name="FKL", exact=True).first
    heading.click()
    assert [text[-1] for text in names.all_inner_texts()] == ["b", "c", ">"]
    heading.click()
    assert [text[-1] for text in names.all_inner_texts()] == [">", "c", "b"]
    lines = page.locator(".plot").first.locator(".scatterlayer .trace .lines")
    shown = lines.count()
    page.get_by_role("button", name="ToDi student=b").click()
    page.wait_for_timeout(300)
    assert lines.count() < shown
