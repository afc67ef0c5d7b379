"""logitcache verify --rescore: a cache beside what its teacher gives now."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import logitcache
from logitcache import CachedSequence, SparseTargets, UserError
from logitcache.capture import rescore
from logitcache.capture.rescore import Rescored, prepare_rescoring
from logitcache.cli import main
from logitcache.format.layout import Layout
from logitcache.format.manifest import Manifest
from logitcache.format.sequences import TokenSequence
from logitcache.format.shards import ShardWriter, shard_name
from logitcache.maintenance.verify.verification import Verification
from logitcache.storage.folder import Folder
from tests.helpers.references import full_logprobs


@pytest.fixture(scope="module")
def built(teacher: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 rows of the tiny teacher, stored exactly."""
    out = tmp_path_factory.mktemp("built") / "cache"
    stored: dict[str, Any] = {"top_k": 24, "tail_rank": 0, "precision": "exact"}
    logitcache.build(str(teacher), str(corpus), out, backend="transformers", shard_positions=500, **stored)
    return out


def rescored(path: Path, teacher: Path, num_rows: int = 6, **settings: Any) -> Rescored:
    return prepare_rescoring(path, num_rows, teacher=str(teacher), backend="transformers", **settings).run()


def rewritten(
    source: Path, out: Path, change: Callable[[CachedSequence], SparseTargets], layout: Layout | None = None
) -> Path:
    """The rows of a cache with other targets, in a cache that says nothing of it."""
    cache = logitcache.open(source)
    layout = layout or cache.manifest.layout
    with ShardWriter(Folder(out), shard_name(0, 1), layout) as writer:
        for row in cache:
            writer.write(TokenSequence(row.input_ids, row.loss_mask), change(row))
    Manifest(layout, cache.manifest.fingerprint, (writer.info,), {}, "tests").write(Folder(out))
    return out


def shifted(offset: int) -> Callable[[CachedSequence], SparseTargets]:
    """Targets of the positions beside; the ends wrap around."""
    return lambda row: row.targets[(np.arange(len(row.targets)) + offset) % len(row.targets)]


def test_the_teacher_gives_again_what_it_gave(built: Path, teacher: Path) -> None:
    result = rescored(built, teacher)
    assert list(result.findings()) == []
    assert len(result.rows) == 6
    assert max(row.mean_nats for row in result.rows) < 1e-4
    assert max(row.tail_differences.max() for row in result.rows) < 1e-5
    assert all(row.same_best.all() for row in result.rows)
    assert result.distances[0] < 1e-4 < 0.2 < min(result.distances[-1], result.distances[1])


@pytest.mark.slow
def test_coefficients_are_compared_and_the_tail_that_they_rebuild(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    cache = logitcache.build(
        str(teacher), str(corpus), tmp_path / "c", backend="transformers", top_k=24, precision="compact", tail_rank=20
    )
    result = rescored(tmp_path / "c", teacher)
    assert list(result.findings()) == []
    basis = cache.tail_basis
    assert basis is not None
    for one in result.rows:
        assert one.coefficient_differences.shape == (len(one.tail_divergences), 20)
        assert one.coefficient_differences.max() <= basis.step + 1e-3  # half of a compact cache's
    expected = []
    for row in cache:
        if row.row_id in {one.row_id for one in result.rows}:
            logprobs = full_logprobs(teacher, row.input_ids)[row.positions.astype(np.int64)].double()
            best = logprobs.topk(24).indices
            tail = logprobs.scatter(1, best, -torch.inf).log_softmax(dim=1)
            assert row.targets.tail_coefficients is not None
            rebuilt = torch.tensor(basis.offset + row.targets.tail_coefficients @ basis.directions.T).double()
            rebuilt = rebuilt.scatter(1, best, -torch.inf).log_softmax(dim=1)
            expected.append(torch.where(tail.isneginf(), 0.0, tail.exp() * (tail - rebuilt)).sum(dim=1).numpy())
    found = np.concatenate([row.tail_divergences for row in result.rows])
    assert found.mean() == pytest.approx(np.concatenate(expected).mean(), rel=0.1)
    assert f"{found.mean():.4f} nats" in result.table().split("KL of the rebuilt tail")[1]

    vars(cache)["tail_basis"] = replace(basis, directions=-basis.directions)
    assert "mean |Δ coefficient|" in next(iter(rescored(cache, teacher).findings())).what  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["balanced", "compact"])
def test_rounding_is_no_finding(built: Path, teacher: Path, tmp_path: Path, precision: str) -> None:
    layout = replace(logitcache.open(built).manifest.layout, precision=precision, quantization=None)
    result = rescored(rewritten(built, tmp_path, lambda row: row.targets, layout), teacher, 40)
    assert list(result.findings()) == []
    assert 1e-5 < max(row.mean_nats for row in result.rows) < result.tolerance_nats


def test_ragged_entries_are_compared_with_as_many_of_the_teachers(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"top_k": 64, "top_p": 0.3, "min_k": 2, "precision": "exact"}
    logitcache.build(str(teacher), str(corpus), tmp_path / "c", backend="transformers", **settings)
    result = rescored(tmp_path / "c", teacher)
    assert list(result.findings()) == []
    assert max(row.tail_differences.max() for row in result.rows) < 1e-5


def test_differences_are_those_of_the_full_distributions(built: Path, teacher: Path, tmp_path: Path) -> None:
    """Against a cache whose log-probabilities are off by known amounts."""

    def change(row: CachedSequence) -> SparseTargets:
        off = row.targets.logprobs - np.float32(0.3)
        lost = np.exp(row.targets.logprobs).sum(axis=1) - np.exp(off).sum(axis=1)
        return replace(row.targets, logprobs=off, tail_logprob=np.log(np.exp(row.targets.tail_logprob) + lost))

    path = rewritten(built, tmp_path, change)
    (row,) = rescored(path, teacher, 1, seed=3).rows
    stored = next(one for one in logitcache.open(path) if one.row_id == row.row_id)
    full = full_logprobs(teacher, stored.input_ids)[stored.positions.astype(np.int64)]
    now = full.gather(1, torch.from_numpy(stored.targets.token_ids.astype(np.int64))).numpy()
    judged = now > np.log(1e-3)
    assert row.differences_nats.mean() == pytest.approx(0.3, abs=1e-4)
    assert len(row.differences_nats) == judged.sum()
    tail = 1 - np.exp(now).sum(axis=1)
    assert row.tail_differences == pytest.approx(np.abs(np.exp(stored.targets.tail_logprob) - tail), abs=1e-5)
    assert row.distances[0] == pytest.approx(
        np.abs(np.exp(stored.targets.logprobs) - np.exp(now)).sum(1).mean(), abs=1e-4
    )


@pytest.mark.parametrize("offset", [-1, 1])
def test_targets_of_the_positions_beside_are_found_with_the_offset(
    built: Path, teacher: Path, tmp_path: Path, offset: int
) -> None:
    path = rewritten(built, tmp_path, shifted(offset))
    assert list(Verification(path)) == [], "nothing but the teacher can tell"
    findings = list(rescored(path, teacher).findings())
    (shift,) = [finding for finding in findings if "shift check fails" in finding.what]
    assert f"at {offset:+d}" in shift.what
    assert len(findings) == 1 + 6


def test_one_row_of_other_targets_is_found_among_the_others(built: Path, teacher: Path, tmp_path: Path) -> None:
    wrong = logitcache.open(built)[17]

    def change(row: CachedSequence) -> SparseTargets:
        return shifted(7)(row) if row.row_id == wrong.row_id else row.targets

    (finding,) = rescored(rewritten(built, tmp_path, change), teacher, 40).findings()
    assert (finding.kind, finding.file, finding.row, finding.row_id) == ("teacher", shard_name(0, 1), 17, wrong.row_id)


def test_a_row_is_named_by_its_place_in_its_file(built: Path, teacher: Path) -> None:
    cache = logitcache.open(built)
    result = rescored(built, teacher, 40)
    infos = {info.name: index for index, info in enumerate(cache.manifest.shards)}
    firsts = np.cumsum([0] + [info.num_sequences for info in cache.manifest.shards])
    numbers = [int(firsts[infos[file]]) + row for file, row in result.places]
    assert numbers == list(range(40))
    assert [row.row_id for row in result.rows] == [row.row_id for row in cache]


def test_the_seed_decides_which_rows(built: Path, teacher: Path) -> None:
    drawn = [[row.row_id for row in rescored(built, teacher, 5, seed=seed).rows] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 5


def test_gaps_in_the_loss_mask_do_not_shift_anything(teacher: Path, tmp_path: Path) -> None:
    source = tmp_path / "pairs.jsonl"
    pairs = [{"prompt": f"Numbers such as {i}", "completion": f" appear as do {i} {i + 1} dogs."} for i in range(8)]
    source.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    logitcache.build(str(teacher), str(source), tmp_path / "c", backend="transformers", top_k=16, precision="exact")
    assert any(row.positions[0] > 0 for row in logitcache.open(tmp_path / "c"))
    result = rescored(tmp_path / "c", teacher, 8)
    assert list(result.findings()) == []
    assert result.distances[0] < 1e-4


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rescore, "start_teacher", lambda *_: pytest.fail("weights were loaded"))


@pytest.mark.usefixtures("no_weights")
def test_a_teacher_with_another_vocabulary_is_refused(built: Path, teacher: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(teacher, tmp_path / "other"))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, two = sorted(vocabulary)[-2:]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match=r"its tokenizer is not the cache's \(vocabulary_sha256 is"):
        rescored(built, other)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher": None}, "--teacher is missing: the cache's was a folder named"),
        ({"num_rows": 0}, "--rescore 0: at least 1"),
        ({"teacher": "./nowhere"}, "--teacher ./nowhere: no such folder"),
        ({"base_url": "http://x/v1"}, "--base-url needs --backend openai"),
        ({"tensor_parallel_size": 2}, "--tensor-parallel-size is an option of vLLM"),
    ],
)
def test_contradictions_are_refused_before_the_weights_load(
    built: Path, teacher: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        prepare_rescoring(built, **{"num_rows": 3, "teacher": str(teacher), "backend": "transformers", **settings})


def test_the_teacher_of_the_fingerprint_is_the_default(built: Path, teacher: Path, tmp_path: Path) -> None:
    """As of a hub: a name, and no hash of a folder."""
    root = Path(shutil.copytree(built, tmp_path / "c"))
    manifest = logitcache.open(root).manifest
    recorded = {name: part for name, part in manifest.fingerprint["teacher"].items() if name != "content_sha256"}
    named = {**manifest.fingerprint, "teacher": {**recorded, "name": str(teacher)}}
    replace(manifest, fingerprint=named).write(Folder(root))
    assert list(prepare_rescoring(root, 2, backend="transformers").run().findings()) == []


def test_the_command_prints_the_comparison(built: Path, teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--teacher", str(teacher), "--backend", "transformers", "--seed", "2"]
    assert main(["verify", str(built), "--rescore", "4", *options]) == 0
    printed = capsys.readouterr().out
    assert "4 rows" in printed
    assert "Σ|Δp| at offset +1" in printed
    assert "not those that the fingerprint records" not in printed
    assert printed.splitlines()[-1].startswith("0 findings: 40 rows")


def test_a_mistyped_teacher_is_refused_before_the_rows_are_read(
    built: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "logitcache.maintenance.verify.verification.Verification.__next__", lambda _: pytest.fail("rows were read")
    )
    options = ["--teacher", "./nowhere", "--backend", "transformers"]
    assert main(["verify", str(built), "--rescore", "4", *options]) == 2
    assert "--teacher ./nowhere: no such folder" in capsys.readouterr().err


def test_the_command_fails_for_another_teacher(
    built: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import LlamaForCausalLM

    other = Path(shutil.copytree(teacher, tmp_path / "other"))
    model = LlamaForCausalLM.from_pretrained(other)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.roll(1, dims=0))
    model.save_pretrained(other)
    options = ["--teacher", str(other), "--backend", "transformers"]
    assert main(["verify", str(built), "--rescore", "4", *options]) == 1
    printed = capsys.readouterr().out
    assert "not those that the fingerprint records" in printed
    assert "rows that the teacher scores otherwise (" in printed
    assert "mean |Δ log p|" in printed
