"""logitcache.build with the transformers teacher: what it writes, what it refuses, how it continues."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import logitcache
from logitcache import UserError
from logitcache.capture import build as build_module
from logitcache.capture import worker
from logitcache.capture.finish import finish
from logitcache.format.quantization import PRESETS
from logitcache.format.shards import ShardWriter
from logitcache.format.tail_basis import rebuilt
from logitcache.storage.folder import Folder
from tests.helpers.references import assert_scores_agree, full_logprobs


def build(teacher: Path, corpus: Path, out: Path, **settings: Any) -> logitcache.LogitCache:
    defaults: dict[str, Any] = {"backend": "transformers", "top_k": 16, "tail_rank": 0, "shard_positions": 400}
    cache: logitcache.LogitCache = logitcache.build(str(teacher), str(corpus), out, **{**defaults, **settings})
    return cache


def stop_at_shard(monkeypatch: pytest.MonkeyPatch, number: int) -> list[str]:
    """Ctrl-C when the `number`-th shard (from 0) of a build is begun. Returns the list that names begun shards."""
    begun: list[str] = []

    def writer(folder: Any, name: str, layout: Any) -> ShardWriter:
        if len(begun) == number:
            raise KeyboardInterrupt
        begun.append(name)
        return ShardWriter(folder, name, layout)

    monkeypatch.setattr("logitcache.assembly.write.ShardWriter", writer)
    return begun


def rows(cache: logitcache.LogitCache) -> list[tuple[Any, ...]]:
    return [
        (
            s.row_id,
            s.input_ids.tolist(),
            s.loss_mask.tolist(),
            s.targets.token_ids.tolist(),
            s.targets.logprobs.tolist(),
        )
        for s in cache
    ]


@pytest.mark.slow
@pytest.mark.gpu
def test_a_build_agrees_with_the_full_distribution(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    cache = build(teacher, corpus, tmp_path / "cache")
    assert len(cache) == 40
    assert len(cache.manifest.shards) > 2
    assert cache.num_positions == sum(len(s.input_ids) - 1 for s in cache)
    assert_scores_agree(cache, teacher, [0, 7, 39])


@pytest.mark.slow
@pytest.mark.gpu
def test_groups_tempered_tails_entropy_and_samples_are_those_of_the_full_distribution(
    teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    extras: dict[str, Any] = {"tail_groups": 8, "temperatures": (1, 2), "tail_entropy": True, "tail_samples": 3}
    extras |= {"tail_rank": 64}  # the width of the teacher's hidden states
    sequence = (cache := build(teacher, corpus, tmp_path / "c", precision="exact", **extras))[5]
    full = full_logprobs(teacher, sequence.input_ids)[sequence.positions.astype(np.int64)]
    targets = sequence.targets
    tail = full.scatter(1, torch.from_numpy(targets.token_ids.astype(np.int64)), float("-inf"))
    groups = torch.tensor(cache.tail_groups)
    assert targets.group_logprobs is not None and targets.tail_entropy is not None
    for g in range(8):
        expected = tail[:, groups == g].logsumexp(dim=-1).numpy()
        assert np.allclose(targets.group_logprobs[:, g], expected, atol=1e-4)
    assert np.allclose(targets.tempered_tail[2.0], (tail / 2).logsumexp(dim=-1).numpy(), atol=1e-4)
    weighted = torch.where(tail.isinf(), 0.0, tail.exp() * tail).sum(dim=-1) / tail.exp().sum(dim=-1)
    assert np.allclose(targets.tail_entropy, weighted.numpy(), atol=1e-3)
    assert targets.sample_ids is not None and targets.sample_logprobs is not None
    drawn = tail.gather(1, torch.from_numpy(targets.sample_ids.astype(np.int64))).numpy()
    assert np.allclose(targets.sample_logprobs, drawn, atol=1e-4)
    assert cache.tail_basis is not None and targets.tail_coefficients is not None
    rebuilt = torch.from_numpy(cache.tail_basis.offset + targets.tail_coefficients @ cache.tail_basis.directions.T)
    rebuilt = rebuilt.double().masked_fill(tail.isneginf(), -torch.inf).log_softmax(dim=-1)
    rebuilt += tail.logsumexp(dim=-1, keepdim=True)
    divergence = torch.where(tail.isneginf(), 0.0, tail.exp() * (tail - rebuilt)).sum(dim=-1)
    assert divergence.max() <= 1e-5
    assert targets.probe_residuals is not None and targets.probe_residuals.shape == (len(targets), 2)
    assert np.abs(targets.probe_residuals).max() <= 0.01


def test_a_teacher_that_bans_tokens_gives_finite_coefficients(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, PhiConfig, PhiForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = PhiForCausalLM(PhiConfig(vocab_size=512, initializer_range=0.3, bos_token_id=None, eos_token_id=0, **sizes))
    banned = [7, 8, 300]
    with torch.no_grad():
        model.lm_head.bias[banned] = -torch.inf
    model.save_pretrained(tmp_path / "teacher")
    AutoTokenizer.from_pretrained(teacher).save_pretrained(tmp_path / "teacher")
    cache = build(tmp_path / "teacher", corpus, tmp_path / "c", tail_rank=8, tail_probes=4)
    assert cache.tail_basis is not None and not logitcache.verify(cache)
    probed = 0
    for sequence in cache:
        targets = sequence.targets
        assert targets.tail_coefficients is not None and targets.probe_residuals is not None
        assert targets.probe_ids is not None
        assert np.isfinite(targets.tail_coefficients).all() and np.abs(targets.tail_coefficients).max() < 100
        assert np.isfinite(targets.probe_residuals).all()
        probed += int(np.isin(targets.probe_ids, banned).sum())
        assert (rebuilt(targets, cache.tail_basis)[:, banned] < -1000).all()
    assert probed > 10


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRESETS)
def test_every_precision_is_as_near_as_it_declares(teacher: Path, corpus: Path, tmp_path: Path, precision: str) -> None:
    cache = build(teacher, corpus, tmp_path / "c", precision=precision)
    assert cache.manifest.layout.precision == cache.manifest.fingerprint["capture"]["precision"] == precision
    assert_scores_agree(cache, teacher, [0, 7, 39])


@pytest.mark.slow
def test_padding_columns_are_no_part_of_the_distribution(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, LlamaForCausalLM

    padded = tmp_path / "padded"
    model = LlamaForCausalLM.from_pretrained(teacher)
    model.resize_token_embeddings(576, mean_resizing=False)
    model.save_pretrained(padded)
    AutoTokenizer.from_pretrained(teacher).save_pretrained(padded)
    cache = build(padded, corpus, tmp_path / "cache")
    assert cache.vocab_size == 512
    assert_scores_agree(cache, teacher, [3])


def test_a_corpus_that_is_too_short_for_a_basis_is_refused_before_the_weights_load(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "start_teacher", lambda *_: pytest.fail("weights were loaded"))
    data = tmp_path / "rows.jsonl"
    data.write_text('{"input_ids": [1, 2, 3, 4, 5, 6]}')
    with pytest.raises(
        UserError, match=r"--tail-rank 3: .* at least 6 different positions, .* are 5: choose at most 2"
    ):
        build(teacher, data, tmp_path / "c", tail_rank=3)
    assert not (tmp_path / "c").exists()


def test_top_p_gives_ragged_entries_with_a_floor(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    cache = build(teacher, corpus, tmp_path / "cache", top_k=64, top_p=0.3, min_k=4)
    counts = np.concatenate([s.targets.num_entries for s in cache])
    assert counts.min() >= 4
    assert counts.max() <= 64
    assert len(np.unique(counts)) > 3


@pytest.mark.slow
def test_an_interrupted_build_continues_to_the_same_cache(
    teacher: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"tail_groups": 4, "tail_samples": 2, "tail_rank": 4}
    whole = build(teacher, corpus, tmp_path / "whole", **settings)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        stop_at_shard(patched, 2)
        build(teacher, corpus, tmp_path / "cut", **settings)
    with pytest.raises(UserError, match="unfinished build: run the same"):
        logitcache.open(tmp_path / "cut")
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cut/data").iterdir()}
    assert len(kept) == 2
    continued = build(teacher, corpus, tmp_path / "cut", **settings)
    assert rows(continued) == rows(whole)
    for a, b in zip(continued, whole, strict=True):
        assert a.targets.sample_ids is not None and b.targets.sample_ids is not None
        assert np.array_equal(a.targets.sample_ids, b.targets.sample_ids)
    assert {name: (tmp_path / "cut/data" / name).stat().st_mtime_ns for name in kept} == kept
    assert not (tmp_path / "cut/.build").exists()


def test_a_finished_build_is_left_as_it_is(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    build(teacher, corpus, tmp_path / "c")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "c").rglob("*") if p.is_file()}
    build(teacher, corpus, tmp_path / "c")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "c").rglob("*") if p.is_file()} == before


@pytest.mark.slow
@pytest.mark.parametrize("finished", [True, False])
def test_a_changed_setting_is_refused_by_name_and_overwrite_starts_anew(
    teacher: Path, corpus: Path, tmp_path: Path, finished: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if finished:
        build(teacher, corpus, tmp_path / "c")
    else:
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            stop_at_shard(patched, 0)
            build(teacher, corpus, tmp_path / "c")
    with pytest.raises(UserError, match=r"capture\.top_k was 16, now 8"):
        build(teacher, corpus, tmp_path / "c", top_k=8)
    assert build(teacher, corpus, tmp_path / "c", top_k=8, overwrite=True)[0].targets.token_ids.shape[1] == 8


def test_a_setting_that_is_left_out_on_resume_is_a_change(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    build(teacher, corpus, tmp_path / "c", columns={"text": "text"})
    with pytest.raises(UserError, match=r"corpus\.columns\.text was text, now None"):
        build(teacher, corpus, tmp_path / "c")


def test_overwriting_keeps_the_old_cache_until_the_new_corpus_is_read(
    teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    build(teacher, corpus, tmp_path / "c")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "A b."}\n{oops\n')
    with pytest.raises(UserError, match="line 2"):
        build(teacher, broken, tmp_path / "c", overwrite=True)
    assert len(logitcache.open(tmp_path / "c")) == 40


@pytest.mark.slow
def test_an_interrupted_overwrite_is_continued_by_the_same_command(
    teacher: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(teacher, corpus, tmp_path / "c")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        before = stop_at_shard(patched, 2)
        build(teacher, corpus, tmp_path / "c", top_k=8, shard_positions=300, overwrite=True)
    after = stop_at_shard(monkeypatch, -1)
    cache = build(teacher, corpus, tmp_path / "c", top_k=8, shard_positions=300, overwrite=True)
    assert before + after == [shard.name for shard in cache.manifest.shards]
    assert {p.name for p in (tmp_path / "c/data").iterdir()} == {Path(s.name).name for s in cache.manifest.shards}


@pytest.mark.slow
def test_a_changed_corpus_and_a_changed_teacher_are_refused(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "train.jsonl"
    shutil.copy(corpus, copy)
    build(teacher, copy, tmp_path / "c")
    copy.write_text(copy.read_text() + '{"text": "One more."}\n')
    with pytest.raises(UserError, match=r"corpus\.sources\[0\]\.num_bytes"):
        build(teacher, copy, tmp_path / "c")
    other = tmp_path / "teacher"
    shutil.copytree(teacher, other)
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(UserError, match=r"teacher\.content_sha256"):
        build(other, corpus, tmp_path / "c")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "fine"}, "--precision fine: choose one of exact, balanced, compact"),
        ({"top_k": 513}, "--top-k 513: the teacher's vocabulary has 512"),
        ({"top_p": 0.0}, "--top-p 0.0"),
        ({"top_k": 8, "min_k": 9}, "--min-k 9"),
        ({"temperatures": (1, -2)}, "--temperatures"),
        ({"backend": "vllm", "capture_route": "flat", "tail_groups": 4}, "--tail-groups needs the teacher's logits"),
        ({"backend": "vllm", "capture_route": "flat", "tail_rank": 4}, "--tail-rank needs the teacher's logits"),
        (
            {"backend": "openai", "base_url": "http://127.0.0.1:1/v1", "tail_rank": 4},
            "--tail-rank needs the teacher's logits, a server gives its top-k only",
        ),
        ({"tail_rank": 65}, "--tail-rank 65: choose 0…64, the width"),
        ({"tail_rank": 0, "tail_probes": 2}, "--tail-probes 2 needs --tail-rank"),
        ({"capture_route": "flat"}, "--capture-route flat is a route of vLLM"),
        ({"backend": "vllm", "capture_route": "straight"}, "--capture-route straight: choose auto"),
        ({"base_url": "http://x/v1"}, "--base-url needs --backend openai"),
        ({"model": "other"}, "--model needs --backend openai"),
        ({"backend": "openai"}, "--backend openai needs --base-url"),
        ({"engines": 2}, "--engines needs --executor ray"),
        ({"executor": "slurm"}, "--executor slurm: choose local or ray"),
        ({"executor": "ray", "engines": 0}, "--engines 0"),
        ({"shard_range": (3, 3)}, "--shard-range 3/3"),
        ({"shard_range": (0, 3), "overwrite": True}, "--overwrite contradicts --shard-range"),
        ({"backend": "jax"}, "--backend jax: choose auto"),
        ({"max_length": 300}, "--max-length 300: with a context of 256"),
        ({"max_length": 1}, "--max-length 1"),
        ({"long": "wrap"}, "--long wrap: choose one of split"),
        ({"keep": ("token_ids",)}, "--keep token_ids"),
        ({"layout": "chat"}, "--layout chat"),
        ({"tensor_parallel_size": 2}, "--tensor-parallel-size is an option of vLLM"),
        ({"backend": "vllm", "runner": "draft"}, "--runner: a build sets this option of vLLM itself"),
        ({"dtype": "bf16"}, "--dtype bf16: choose one of auto"),
        ({"max_length": 0}, "--max-length 0"),
        ({"shard_positions": 0}, "--shard-positions 0: at least 1"),
    ],
)
def test_contradictions_are_refused_before_the_weights_load(
    teacher: Path, corpus: Path, tmp_path: Path, settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "start_teacher", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(UserError, match=message):
        build(teacher, corpus, tmp_path / "c", **settings)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tokenizer.json", {"added_tokens": 7}),  # which the library in Rust refuses by an Exception
        ("tokenizer.json", {"model": 7}),
        ("tokenizer_config.json", {"tokenizer_class": 7}),
        ("tokenizer_config.json", {"model_max_length": [1]}),  # loads, and fails at the first text
        ("config.json", {"model_type": 7}),
    ],
)
def test_a_teacher_whose_files_are_of_another_kind_is_one_line(
    teacher: Path, corpus: Path, tmp_path: Path, name: str, change: dict[str, Any]
) -> None:
    copy = tmp_path / "teacher"
    shutil.copytree(teacher, copy)
    (copy / name).write_text(json.dumps(json.loads((copy / name).read_text()) | change))
    with pytest.raises(UserError, match="teacher: its configuration or tokenizer does not load"):
        build(copy, corpus, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_kept_columns_and_counts_of_what_was_left_out(teacher: Path, tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    lines = [{"text": "A first one.", "id": 1}, {"text": ""}, "{broken", {"text": "A last one.", "id": 4, "url": "u"}]
    source.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    with pytest.raises(UserError, match=r"rows\.jsonl, line 3: not JSON"):
        build(teacher, source, tmp_path / "c")
    assert not (tmp_path / "c").exists()
    cache = build(teacher, source, tmp_path / "c", keep=("id", "url"), skip_bad=True)
    assert [dict(s.columns) for s in cache] == [{"id": 1, "url": None}, {"id": 4, "url": "u"}]
    assert cache.manifest.skipped == {"empty": 1, "bad": 1}


def test_a_tokenizer_with_several_chat_templates_is_saved_with_all_of_them(
    teacher: Path, teacher_tokenizer: Any, corpus: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    shutil.copytree(teacher, tmp_path / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(tmp_path / "teacher")
    cache = build(tmp_path / "teacher", corpus, tmp_path / "c")
    assert AutoTokenizer.from_pretrained(cache.tokenizer_path).chat_template == tokenizer.chat_template
    assert "tokenizer/additional_chat_templates/tool_use.jinja" in cache.manifest.files


@pytest.mark.slow
def test_nothing_is_left_of_the_tokenizer_of_a_cache_whose_removal_was_cut_off(
    teacher: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(teacher, corpus, tmp_path / "c", tail_groups=4)
    (tmp_path / "c/tokenizer/chat_template_of_another.jinja").write_text("{{ messages }}")

    def cut_off(folder: Folder) -> None:
        folder.remove("logitcache.json")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("logitcache.assembly.plan.remove_former", cut_off)
        build(teacher, corpus, tmp_path / "c", top_k=8, overwrite=True)
    cache = build(teacher, corpus, tmp_path / "c", top_k=8, overwrite=True)
    assert "tokenizer/chat_template_of_another.jinja" not in cache.manifest.files
    assert not (tmp_path / "c/tokenizer/chat_template_of_another.jinja").exists()
    assert not (tmp_path / "c/tail_groups.parquet").exists()


@pytest.mark.slow
def test_a_cache_that_was_finished_meanwhile_is_not_removed(
    teacher: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(teacher, corpus, tmp_path / "c", shard_range=(0, 1))
    shutil.copytree(tmp_path / "c/.build", tmp_path / "plan")
    cache = finish(tmp_path / "c")
    shutil.copytree(tmp_path / "plan", tmp_path / "c/.build")
    monkeypatch.setattr(build_module, "finished_cache", lambda folder, spec: None)  # as it was a moment ago
    build(teacher, corpus, tmp_path / "c", shard_range=(0, 1))
    assert rows(logitcache.open(tmp_path / "c")) == rows(cache)


def test_a_document_longer_than_the_teacher_scores_is_refused(teacher: Path, tmp_path: Path) -> None:
    source = tmp_path / "long.jsonl"
    source.write_text(json.dumps({"input_ids": [5] * 300}) + "\n")
    with pytest.raises(
        UserError, match=r"long\.jsonl, line 1: 300 tokens, longer than --max-length 255; choose --long"
    ):
        build(teacher, source, tmp_path / "c")
    assert len(build(teacher, source, tmp_path / "c", long="split")) == 2


def test_an_id_outside_the_vocabulary_is_refused(teacher: Path, tmp_path: Path) -> None:
    source = tmp_path / "ids.jsonl"
    source.write_text(json.dumps({"input_ids": [5, 512]}) + "\n")
    with pytest.raises(UserError, match=r"ids\.jsonl, line 1: token id 512 is outside the teacher's vocabulary of 512"):
        build(teacher, source, tmp_path / "c")
