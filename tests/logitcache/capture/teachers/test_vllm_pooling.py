"""vLLM's pooling route against transformers' full logits: real engines, in processes of their own, on toy models."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from logitcache.capture.calibration import POSITIONS_PER_DIRECTION, _some_positions, make_tail_basis
from logitcache.capture.engine import EngineChoice, choose_engine
from logitcache.capture.projection import DeviceBasis
from logitcache.capture.selection import draw_uniforms, select
from logitcache.capture.settings import CaptureSettings
from logitcache.capture.teachers.base import TeacherModel
from logitcache.capture.wire_format import position_width, unpack
from logitcache.errors import UserError
from logitcache.format.probes import probe_ids
from logitcache.format.sequences import TokenSequence
from logitcache.format.tail_basis import TailBasis
from logitcache.format.tail_parts import TailParts
from logitcache.format.targets import SparseTargets
from tests.helpers.processes import vllm_core_here

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("forked_vllm")]

from vllm import PoolingParams  # noqa: E402
from vllm.v1.pool.metadata import PoolingMetadata, PoolingStates  # noqa: E402

from logitcache.capture.teachers.vllm import model as vllm_model  # noqa: E402
from logitcache.capture.teachers.vllm import pooling as vllm_pooling  # noqa: E402
from logitcache.capture.teachers.vllm.pooling import VllmPoolingTeacher, why_not_pooling  # noqa: E402
from logitcache.capture.teachers.vllm.protocol import COVARIANCE, PROBABILITIES, SCORE_LOGITS, TAIL_BASIS, to_bytes  # noqa: E402
from logitcache.engines.vllm_process import OWNER_PID  # noqa: E402

VOCAB_SIZE = 512
PADDED_SIZE = 640
LONGEST = 200
GROUPS = (np.arange(VOCAB_SIZE) * 7 % 5).astype(np.int32)
EVERYTHING = CaptureSettings(
    top_k=16, tail_parts=TailParts(groups=5, temperatures=(2.0,), entropy=True, samples=3, rank=6, probes=2)
)
CHUNKED = {"max_num_batched_tokens": 64, "max_num_seqs": 8}
"""Fewer tokens a step than most sequences have."""


def make_model(path: Path, tokenizer: Any, name: str, **config: Any) -> Path:
    """A model of 2 layers with random weights, and more embeddings than the tokenizer has tokens."""
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    tokens = {"vocab_size": PADDED_SIZE, "eos_token_id": 0, "bos_token_id": None, "pad_token_id": None}
    common = {"max_position_embeddings": 256, "initializer_range": 0.15, "dtype": "float32"}
    made = getattr(transformers, f"{name}Config")(**(sizes | heads | tokens | common | config))
    model = getattr(transformers, f"{name}ForCausalLM")(made)
    model.to(getattr(torch, str(made.dtype).removeprefix("torch."))).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def make_sequences(count: int, seed: int = 0) -> list[TokenSequence]:
    random = np.random.default_rng(seed)
    lengths = random.integers(2, LONGEST + 1, count)
    masks = [np.concatenate([[False, True], random.random(length - 2) < 0.6]) for length in lengths]
    return [TokenSequence(random.integers(0, VOCAB_SIZE, len(mask), dtype=np.int32), mask) for mask in masks]


SEQUENCES = make_sequences(12)


@cache
def reference(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


def full_logprobs(path: Path, sequence: TokenSequence) -> torch.Tensor:
    """From transformers in float32, normalised in float64 over the tokenizer's vocabulary: [M, V]."""
    with torch.no_grad():
        logits: torch.Tensor = reference(path)(torch.tensor(sequence.input_ids).long()[None]).logits[
            0, torch.tensor(sequence.positions).long()
        ]
    return logits[:, :VOCAB_SIZE].double().log_softmax(dim=-1)


def assert_agrees(
    path: Path,
    sequences: list[TokenSequence],
    scored: list[SparseTargets],
    basis: TailBasis,
    tolerance: float = 1e-4,
    tail_tolerance: float = 1e-6,
) -> None:
    """Every captured quantity is the one that the full distribution gives for the entries chosen.

    basis: of the engine.  tolerance: of logarithms, and of coefficients in steps.  tail_tolerance: of the tail mass itself.
    """
    centred = basis.directions.astype(np.float64)
    centred -= basis.weights @ centred
    for sequence, targets in zip(sequences, scored, strict=True):
        full = full_logprobs(path, sequence)
        ids = torch.from_numpy(targets.token_ids).long()
        assert ids.shape == (len(sequence.positions), EVERYTHING.top_k)
        close(targets.logprobs, full.gather(1, ids), tolerance)
        best = full.topk(EVERYTHING.top_k).values
        assert (best - full.gather(1, ids)).abs().max() <= 2 * tolerance, "other entries than the largest, beyond ties"
        tail = full.scatter(1, ids, -torch.inf)
        close(np.exp(targets.tail_logprob), tail.exp().sum(dim=1), tail_tolerance)
        close(targets.tempered_tail[2.0], (tail / 2).logsumexp(dim=1), tolerance)
        assert targets.group_logprobs is not None and targets.tail_entropy is not None
        for group in range(EVERYTHING.tail_parts.groups):
            close(
                targets.group_logprobs[:, group], tail[:, torch.from_numpy(group == GROUPS)].logsumexp(dim=1), tolerance
            )
        share = tail.softmax(dim=1)
        close(targets.tail_entropy, torch.where(share > 0, share * tail, 0).sum(dim=1), tolerance)
        assert targets.sample_ids is not None and targets.sample_logprobs is not None
        samples = torch.from_numpy(targets.sample_ids).long()
        close(targets.sample_logprobs, full.gather(1, samples), tolerance)
        assert not (samples[:, :, None] == ids[:, None, :]).any(), "a tail sample is an entry"
        differences = full.numpy() - basis.offset
        differences -= (differences @ basis.weights)[:, None]
        coefficients = differences @ (basis.weights[:, None] * centred)
        assert targets.tail_coefficients is not None and targets.probe_residuals is not None
        close(targets.tail_coefficients, torch.from_numpy(coefficients), tolerance * basis.step)
        probes = probe_ids(sequence.row_id, sequence.positions, 2, VOCAB_SIZE)
        left = np.take_along_axis(differences - coefficients @ centred.T, probes.astype(np.int64), axis=1)
        close(targets.probe_residuals, torch.from_numpy(left), tolerance)


def assert_leading(path: Path, basis: TailBasis) -> None:
    """The basis holds as much variance as the leading eigenvectors of the covariance under its weights, which are ours."""
    positions = _some_positions(SEQUENCES, EVERYTHING.tail_parts.rank * POSITIONS_PER_DIRECTION)
    full = torch.cat([full_logprobs(path, sequence) for sequence in positions]).numpy()
    weights = np.sqrt(np.exp(full).mean(axis=0))
    weights /= weights.sum()
    assert np.abs(basis.weights - weights).max() <= 1e-6
    centred = full - (full @ weights)[:, None]
    mean = centred.mean(axis=0)
    assert np.ptp(basis.offset - mean) <= 1e-4
    wanted = np.linalg.svd((centred - mean) * np.sqrt(weights), compute_uv=False)[: basis.rank] ** 2 / len(full)
    held = ((centred - mean) @ (weights[:, None] * basis.directions)).var(axis=0)
    assert np.allclose(basis.variances, wanted, rtol=1e-3)
    assert np.allclose(held, wanted, rtol=1e-3)


def close(captured: np.ndarray, expected: torch.Tensor, tolerance: float) -> None:
    assert np.abs(captured.astype(np.float64) - expected.numpy()).max() <= tolerance


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, teacher_tokenizer: Any) -> Path:
    """Untied head."""
    return make_model(tmp_path_factory.mktemp("llama"), teacher_tokenizer, "Llama")


@pytest.fixture(scope="module")
def llama_model(llama: Path) -> TeacherModel:
    return TeacherModel.load(str(llama), None, "float32", False)


@pytest.fixture(scope="module")
def engine(llama_model: TeacherModel) -> Iterator[VllmPoolingTeacher]:
    assert why_not_pooling(llama_model, CHUNKED) is None
    started = VllmPoolingTeacher(llama_model, LONGEST, CHUNKED)
    started.set_tail_groups(GROUPS)
    yield started
    started.close()


@pytest.fixture(scope="module")
def basis(engine: VllmPoolingTeacher) -> TailBasis:
    """The engine's own."""
    made = make_tail_basis(engine, SEQUENCES, EVERYTHING.tail_parts.rank)
    engine.set_tail_basis(made)
    return made


def test_everything_captured_is_that_of_transformers(engine: VllmPoolingTeacher, llama: Path, basis: TailBasis) -> None:
    assert max(len(sequence.input_ids) for sequence in SEQUENCES) > CHUNKED["max_num_batched_tokens"]
    assert_agrees(llama, SEQUENCES, list(engine.score(SEQUENCES, EVERYTHING)), basis)
    assert_leading(llama, basis)


def test_the_mean_probability_is_that_of_transformers(engine: VllmPoolingTeacher, llama: Path) -> None:
    expected = torch.cat([full_logprobs(llama, sequence) for sequence in SEQUENCES]).exp().mean(dim=0)
    mean = engine.mean_probability(SEQUENCES)
    assert mean.dtype == np.float64
    close(mean, expected, 1e-7)


def test_the_order_of_sequences_changes_nothing(engine: VllmPoolingTeacher, basis: TailBasis) -> None:
    once = list(engine.score(SEQUENCES, EVERYTHING))
    again = list(engine.score(SEQUENCES[::-1], EVERYTHING))[::-1]
    for one, other in zip(once, again, strict=True):
        assert np.array_equal(one.token_ids, other.token_ids)
        assert one.sample_ids is not None and other.sample_ids is not None
        assert np.array_equal(one.sample_ids, other.sample_ids)
        assert one.sample_logprobs is not None and other.sample_logprobs is not None
        assert np.allclose(one.logprobs, other.logprobs, atol=1e-5)
        assert np.allclose(one.sample_logprobs, other.sample_logprobs, atol=1e-5)


def test_settings_may_change_between_calls(engine: VllmPoolingTeacher, llama: Path) -> None:
    nucleus = CaptureSettings(top_k=64, top_p=0.5, min_k=4)
    for sequence, targets in zip(SEQUENCES, engine.score(SEQUENCES, nucleus), strict=True):
        mass = full_logprobs(llama, sequence).sort(dim=1, descending=True).values.exp().cumsum(dim=1)
        needed = (mass < 0.5).sum(dim=1).add(1).clamp(4, 64)
        assert np.abs(targets.num_entries - needed.numpy()).max() <= 1  # where the mass is .5 but for rounding
        assert targets.group_logprobs is None


def test_tail_samples_are_drawn_as_often_as_the_tail_says(engine: VllmPoolingTeacher, llama: Path) -> None:
    sequence = SEQUENCES[0]
    draws = 5000
    (targets,) = engine.score([sequence], CaptureSettings(top_k=4, tail_parts=TailParts(samples=draws)))
    tail = full_logprobs(llama, sequence).scatter(1, torch.from_numpy(targets.token_ids).long(), -torch.inf)
    assert targets.sample_ids is not None
    for position, expected in enumerate(draws * tail.softmax(dim=1).numpy()):
        counts = np.bincount(targets.sample_ids[position], minlength=VOCAB_SIZE)
        enough = expected >= 5
        observed, wanted = [
            np.append(values[enough], values[~enough].sum()) for values in (counts.astype(np.float64), expected)
        ]
        freedom = enough.sum()
        statistic = ((observed - wanted) ** 2 / np.maximum(wanted, 1e-9)).sum()
        # Chi-square has mean `freedom` and variance 2 · freedom; six deviations leave no room for luck.
        assert abs(statistic - freedom) <= 6 * np.sqrt(2 * freedom)


def test_only_the_stored_positions_leave_the_engine(
    engine: VllmPoolingTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    travelled: list[int] = []
    step = engine._engine.step

    def counted() -> list[Any]:
        outputs: list[Any] = step()
        travelled.extend(output.outputs.data.nbytes for output in outputs)
        return outputs

    monkeypatch.setattr(engine._engine, "step", counted)
    sparse = []
    for sequence in SEQUENCES:
        every_ninth = np.arange(len(sequence.loss_mask)) % 9 == 1
        sparse.append(replace(sequence, loss_mask=sequence.loss_mask & every_ninth))
    scored = list(engine.score(sparse, EVERYTHING))
    positions = sum(map(len, scored))
    assert positions == sum(int(sequence.loss_mask.sum()) for sequence in sparse)
    assert sum(travelled) == positions * position_width(EVERYTHING) * 4


def test_a_sequence_without_stored_positions_gives_none(engine: VllmPoolingTeacher) -> None:
    nothing = TokenSequence(np.arange(100, dtype=np.int32), np.zeros(100, dtype=bool))
    before, targets, after = engine.score([SEQUENCES[0], nothing, SEQUENCES[1]], EVERYTHING)
    assert len(targets) == 0
    assert (len(before), len(after)) == (len(SEQUENCES[0].positions), len(SEQUENCES[1].positions))


def test_input_is_read_as_the_engine_needs_it_and_leaving_early_does_no_harm(
    engine: VllmPoolingTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_pooling, "TOKENS_IN_FLIGHT", 1000)
    taken: list[TokenSequence] = []

    def source() -> Iterator[TokenSequence]:
        for sequence in make_sequences(100, seed=1):
            taken.append(sequence)
            yield sequence

    scored: Any = engine.score(source(), EVERYTHING)
    for count, _ in zip(range(1, 20), scored, strict=False):
        in_flight = taken[count - 1 :]
        assert sum(len(sequence.input_ids) for sequence in in_flight) <= 1000 + 2 * LONGEST
    scored.close()
    assert len(taken) < 100
    assert [len(targets) for targets in engine.score(SEQUENCES, EVERYTHING)] == [len(s.positions) for s in SEQUENCES]


def test_sequences_may_be_scored_while_others_are(
    engine: VllmPoolingTeacher, llama: Path, basis: TailBasis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_pooling, "TOKENS_IN_FLIGHT", 500)
    first = engine.score(SEQUENCES, EVERYTHING)
    scored = [next(first)]
    engine.set_tail_groups(GROUPS)
    assert_agrees(llama, SEQUENCES[:3], list(engine.score(SEQUENCES[:3], EVERYTHING)), basis)
    abandoned: Any = engine.score(SEQUENCES, EVERYTHING)
    next(abandoned)
    scored += first
    abandoned.close()
    assert_agrees(llama, SEQUENCES, scored, basis)
    assert not engine._arrived


@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        (TokenSequence(np.zeros(LONGEST + 1, np.int32), np.ones(LONGEST + 1, bool)), f"{LONGEST + 1} tokens"),
        (TokenSequence(np.array([1, PADDED_SIZE], np.int32), np.array([False, True])), f"knows 0…{PADDED_SIZE - 1}"),
    ],
    ids=["too long", "unknown token"],
)
def test_a_sequence_that_would_end_the_engine_is_refused_by_name(
    engine: VllmPoolingTeacher, sequence: TokenSequence, message: str
) -> None:
    with pytest.raises(UserError, match=f"{sequence.row_id}: .*{message}"):
        list(engine.score([SEQUENCES[0], sequence], EVERYTHING))
    assert len(list(engine.score(SEQUENCES[:2], EVERYTHING))) == 2


def test_missing_rows_are_noticed(engine: VllmPoolingTeacher, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = engine._wait_for
    monkeypatch.setattr(engine, "_wait_for", lambda *request: whole(*request)[1:])
    with pytest.raises(UserError, match=SEQUENCES[0].row_id):
        list(engine.score(SEQUENCES, EVERYTHING))


def test_engines_of_other_programs_are_left_alone(engine: VllmPoolingTeacher) -> None:
    from vllm.model_executor.models import ModelRegistry

    assert not os.environ.keys() & {OWNER_PID, SCORE_LOGITS}
    assert not ModelRegistry.models["LlamaForCausalLM"].inspect_model_cls().is_pooling_model


class Steps:
    """A pooler without an engine: sequences as random hidden states, of which each step sees what is named."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(vllm_model, "get_tensor_model_parallel_rank", lambda: 0)
        torch.manual_seed(0)
        self.head = torch.randn(PADDED_SIZE, 16)
        self.hidden = [torch.randn(len(sequence.input_ids), 16) for sequence in SEQUENCES]
        self.states = [PoolingStates() for _ in SEQUENCES]
        self.pooler = vllm_model.PositionPooler(lambda hidden: hidden @ self.head.T, PADDED_SIZE)

    def __call__(self, *scheduled: tuple[int, dict[str, Any], int, int]) -> list[torch.Tensor | None]:
        """scheduled: (sequence, what is wanted of it, first and last + 1 of its tokens)."""
        params = [PoolingParams(task="token_embed", extra_kwargs=wanted) for _, wanted, _, _ in scheduled]
        lengths = torch.tensor([len(SEQUENCES[i].input_ids) for i, *_ in scheduled])
        metadata = PoolingMetadata(lengths, None, None, params, [self.states[i] for i, *_ in scheduled])
        counts = np.array([end - start for *_, start, end in scheduled])
        metadata.build_pooling_cursor(counts, torch.tensor([end for *_, end in scheduled]), torch.device("cpu"))
        hidden = torch.cat([self.hidden[i][start:end] for i, _, start, end in scheduled])
        packed: list[torch.Tensor | None] = self.pooler(hidden, metadata)
        return packed

    def wanted(self, i: int, settings: CaptureSettings | str) -> dict[str, Any]:
        return {
            "settings": settings if isinstance(settings, str) else json.dumps(settings.to_json()),
            "vocab_size": VOCAB_SIZE,
            "stored": np.packbits(SEQUENCES[i].loss_mask[1:]).tobytes(),
            "row_id": SEQUENCES[i].row_id,
        }

    def logits(self, i: int) -> torch.Tensor:
        return (self.hidden[i][torch.from_numpy(SEQUENCES[i].positions).long()] @ self.head.T)[:, :VOCAB_SIZE]


def test_chunks_preemption_and_mixed_requests_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_model, "POSITIONS_PER_CHUNK", 7)
    steps = Steps(monkeypatch)
    random = np.random.default_rng(0)
    arrays = random.standard_normal((VOCAB_SIZE, 3)), random.standard_normal(VOCAB_SIZE), random.random(VOCAB_SIZE)
    block, offset, weights = (array.astype(np.float32) for array in arrays)
    weights /= weights.sum()
    block -= weights @ block
    settings = (
        CaptureSettings(top_k=5, tail_parts=TailParts(temperatures=(2.0,), samples=2, rank=3, probes=1)),
        CaptureSettings(top_k=3),
    )
    long, short, summed, added = np.argsort([-len(sequence.input_ids) for sequence in SEQUENCES])[:4]
    wants = [
        steps.wanted(long, settings[0]),
        steps.wanted(short, settings[1]),
        steps.wanted(summed, PROBABILITIES),
        steps.wanted(added, COVARIANCE),
    ]
    ends = [len(SEQUENCES[i].input_ids) for i in (long, short, summed, added)]

    prepared = steps(
        (long, {TAIL_BASIS: to_bytes(block, offset, weights)}, 0, ends[0]),
        (added, {COVARIANCE: to_bytes(block, offset, weights)}, 0, ends[3]),
    )
    assert [answer is not None and answer.numel() for answer in prepared] == [0, 0]
    assert steps((long, wants[0], 0, 30), (short, wants[1], 0, 50), (added, wants[3], 0, 35)) == [None, None, None]
    assert steps((summed, wants[2], 0, 40), (long, wants[0], 30, 61)) == [None, None]
    # All three are preempted.
    assert steps((long, wants[0], 0, 45), (summed, wants[2], 0, 20), (added, wants[3], 0, 15)) == [None, None, None]
    first = steps((long, wants[0], 45, ends[0]), (short, wants[1], 50, ends[1]), (summed, wants[2], 20, 33))
    last = steps((summed, wants[2], 33, ends[2]), (added, wants[3], 15, ends[3]))
    (sums,) = steps((added, {COVARIANCE: []}, 0, ends[3]))

    assert first[2] is None
    for i, packed, asked in ((long, first[0], settings[0]), (short, first[1], settings[1])):
        assert packed is not None
        drawn = draw_uniforms(SEQUENCES[i].row_id, len(SEQUENCES[i].positions), asked.tail_parts.samples)
        probes = probe_ids(SEQUENCES[i].row_id, SEQUENCES[i].positions, asked.tail_parts.probes, VOCAB_SIZE)
        tensors = torch.from_numpy(drawn), DeviceBasis(block, offset, weights, "cpu"), torch.from_numpy(probes).long()
        expected = unpack(select(steps.logits(i), asked, None, *tensors).numpy(), asked)
        found = unpack(packed.numpy(), asked)
        assert np.array_equal(found.token_ids, expected.token_ids)
        assert np.allclose(found.logprobs, expected.logprobs, atol=1e-5)
        assert np.allclose(found.tail_logprob, expected.tail_logprob, atol=1e-5)
        if asked.tail_parts.samples:
            assert found.sample_ids is not None and expected.sample_ids is not None
            assert np.array_equal(found.sample_ids, expected.sample_ids)
            assert found.tail_coefficients is not None and expected.tail_coefficients is not None
            assert np.allclose(found.tail_coefficients, expected.tail_coefficients, atol=1e-5)
            assert found.probe_residuals is not None and expected.probe_residuals is not None
            assert np.allclose(found.probe_residuals, expected.probe_residuals, atol=1e-4)
    assert last[0] is not None and sums is not None
    close(last[0].numpy(), steps.logits(summed).double().softmax(dim=1).sum(dim=0), 1e-5)
    differences = steps.logits(added).double().numpy() - offset
    differences -= (differences @ weights)[:, None]
    assert np.allclose(sums[:-1, :3], differences.T @ (differences @ (weights[:, None] * block)), rtol=1e-4, atol=1e-3)
    assert np.allclose(sums[:-1, 3], differences.sum(axis=0), rtol=1e-4, atol=1e-3)
    assert (sums[-1] == len(SEQUENCES[added].positions)).all()


def assert_route_agrees(path: Path, options: dict[str, Any]) -> None:
    with vllm_core_here() as placed:
        engine = VllmPoolingTeacher(TeacherModel.load(str(path), None, "float32", False), LONGEST, options | placed)
    engine.set_tail_groups(GROUPS)
    basis = make_tail_basis(engine, SEQUENCES, EVERYTHING.tail_parts.rank)
    engine.set_tail_basis(basis)
    scored = list(engine.score(SEQUENCES, EVERYTHING))
    engine.close()
    assert_agrees(path, SEQUENCES, scored, basis)
    assert_leading(path, basis)


def test_tied_heads_and_tensor_parallelism_change_nothing(tmp_path: Path, teacher_tokenizer: Any) -> None:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("needs two cores")
    path = make_model(tmp_path, teacher_tokenizer, "Qwen3", tie_word_embeddings=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[1]}")
        assert_route_agrees(path, CHUNKED | {"tensor_parallel_size": 2})


def test_soft_caps_are_applied(tmp_path: Path, teacher_tokenizer: Any) -> None:
    sizes = {"tie_word_embeddings": True, "query_pre_attn_scalar": 32, "sliding_window": 64}
    caps: dict[str, Any] = {"final_logit_softcapping": 5.0, "attn_logit_softcapping": 3.0}
    path = make_model(tmp_path, teacher_tokenizer, "Gemma2", **sizes, **caps)
    assert_route_agrees(path, CHUNKED)


def test_bfloat16_through_the_transformers_backend_and_an_engine_that_dies(
    tmp_path: Path, teacher_tokenizer: Any
) -> None:
    path = make_model(tmp_path, teacher_tokenizer, "Llama", dtype="bfloat16")
    model = TeacherModel.load(str(path), None, "auto", False)
    assert model.dtype == "bfloat16"
    before = set(psutil.Process().children(recursive=True))
    engine = VllmPoolingTeacher(model, LONGEST, CHUNKED | {"model_impl": "transformers"})
    engine.set_tail_groups(GROUPS)
    basis = make_tail_basis(engine, SEQUENCES, EVERYTHING.tail_parts.rank)
    engine.set_tail_basis(basis)
    assert_agrees(path, SEQUENCES, list(engine.score(SEQUENCES, EVERYTHING)), basis, 0.3, 0.02)
    started = set(psutil.Process().children(recursive=True)) - before
    # The process that computes has no children: on a CPU a worker, on a GPU the engine's core.
    for process in [process for process in started if not process.children()]:
        process.send_signal(signal.SIGILL)
    with pytest.raises(UserError, match=r"engine ended while it was working \(SIGILL: an instruction that"):
        list(engine.score(SEQUENCES, EVERYTHING))
    engine.close()


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"architectures": ["BertModel"]}, "BertModel has no logits"),
        ({"architectures": ["NoSuchForCausalLM"]}, "does not take this architecture"),
        ({"is_causal": False}, "is not a decoder"),
    ],
    ids=["no logits", "unknown", "not causal"],
)
def test_an_architecture_that_cannot_be_wrapped_is_told_before_anything_loads(
    config: dict[str, Any], reason: str, llama_model: TeacherModel, tmp_path: Path
) -> None:
    from transformers import BertConfig, LlamaConfig

    made = BertConfig() if "BertModel" in config.get("architectures", []) else LlamaConfig(hidden_size=64)
    made.update({"architectures": ["LlamaForCausalLM"]} | config)
    made.save_pretrained(tmp_path)
    told = why_not_pooling(replace(llama_model, name=str(tmp_path), config=made), {})
    assert told is not None and reason in told
    assert len(told) < 500
    if reason.startswith("does not take"):
        with pytest.raises(
            UserError, match=r"\['NoSuchForCausalLM'\] are not supported.*; --backend transformers does"
        ):
            choose_engine(EngineChoice(), replace(llama_model, name=str(tmp_path), config=made), [])


def test_the_route_needs_its_plugin(llama_model: TeacherModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    assert "VLLM_PLUGINS" in (why_not_pooling(llama_model, {}) or "")
    monkeypatch.setattr(vllm_pooling, "entry_points", lambda group: [])
    assert "not installed" in (why_not_pooling(llama_model, {}) or "")


def test_speculative_decoding_has_no_pooling_route(llama_model: TeacherModel) -> None:
    assert "speculative" in (why_not_pooling(llama_model, {"speculative_config": {"model": "draft"}}) or "")
