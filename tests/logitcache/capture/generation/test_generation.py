"""`--generate`: what becomes a prompt, which sampling parameters are taken, and the teacher's answers as a cache."""

from __future__ import annotations

import argparse
import json
import signal
import time
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

import logitcache
from logitcache import UserError
from logitcache.assembly.plan import SHARD_POSITIONS
from logitcache.capture import plan, worker
from logitcache.capture.corpus.documents import find_sources
from logitcache.capture.corpus.prompts import Prompts, PromptSettings
from logitcache.capture.finish import finish
from logitcache.capture.generation import completions
from logitcache.capture.generation.sampling import GenerationSettings
from logitcache.capture.inputs import resolve_inputs
from logitcache.capture.teachers.hf import TransformersTeacher
from logitcache.capture.teachers.vllm.generate import Completion, VllmGenerator
from logitcache.cli import parser
from logitcache.format.sequences import TokenSequence
from logitcache.storage.folder import Folder
from tests.helpers.processes import run_command, started_command, vllm_core_here
from tests.helpers.references import assert_scores_agree, full_logprobs

needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
EOS = 0


def write(path: Path, documents: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return path


def read_prompts(tokenizer: Any, path: Path, room: int = 1, **settings: Any) -> Prompts:
    return Prompts(find_sources(str(path)), tokenizer, 512, PromptSettings(**{"max_length": 64, **settings}), room)


class TestPrompts:
    def test_a_prompt_is_tokenised_as_it_stands_and_nothing_of_it_is_trained(
        self, teacher_tokenizer: Any, tmp_path: Path
    ) -> None:
        path = write(tmp_path / "p.jsonl", [{"prompt": "A student", "completion": "reads.", "id": 7}])
        (prompt,) = read_prompts(teacher_tokenizer, path, keep=("id",))
        assert teacher_tokenizer.decode(prompt.input_ids) == "A student"
        assert not prompt.loss_mask.any()
        assert prompt.columns == {"id": 7}

    @pytest.mark.parametrize("answered", [True, False])
    def test_a_chat_is_asked_up_to_the_last_turn_of_the_assistant(
        self, teacher_tokenizer: Any, tmp_path: Path, answered: bool
    ) -> None:
        turns = [("user", "A"), ("assistant", "B"), ("user", "C"), *([("assistant", "D")] if answered else [])]
        messages = [{"role": role, "content": content} for role, content in turns]
        (prompt,) = read_prompts(teacher_tokenizer, write(tmp_path / "p.jsonl", [{"messages": messages}]))
        text = teacher_tokenizer.decode(prompt.input_ids)
        assert text == "<|user|>A<|end|><|assistant|>B<|end|><|user|>C<|end|><|assistant|>"

    def test_token_ids_are_taken_as_they_are(self, teacher_tokenizer: Any, tmp_path: Path) -> None:
        path = write(tmp_path / "p.jsonl", [{"input_ids": [9, 8, 7], "loss_mask": [0, 1, 1]}])
        (prompt,) = read_prompts(teacher_tokenizer, path)
        assert prompt.input_ids.tolist() == [9, 8, 7]
        assert not prompt.loss_mask.any()

    def test_a_renamed_column_is_the_prompt(self, teacher_tokenizer: Any, tmp_path: Path) -> None:
        path = write(tmp_path / "p.jsonl", [{"text": "A student", "messages": []}])
        (prompt,) = read_prompts(teacher_tokenizer, path, columns={"prompt": "text"})
        assert teacher_tokenizer.decode(prompt.input_ids) == "A student"

    def test_empty_and_bad_documents_are_counted(self, teacher_tokenizer: Any, tmp_path: Path) -> None:
        only_answers = [{"role": "assistant", "content": "B"}]
        path = write(tmp_path / "p.jsonl", [{"messages": []}, {"messages": only_answers}, {"messages": "hello"}])
        with pytest.raises(UserError, match=r"line 2: `messages` hold nothing to answer"):
            list(read_prompts(teacher_tokenizer, path))
        prompts = read_prompts(teacher_tokenizer, path, skip_bad=True)
        assert not list(prompts)
        assert prompts.skipped == {"empty": 1, "bad": 2}
        prompts = read_prompts(teacher_tokenizer, write(tmp_path / "q.jsonl", [{"prompt": ""}]))
        assert not list(prompts)
        assert prompts.skipped == {"empty": 1}

    def test_a_prompt_that_leaves_no_room_is_refused_or_skipped(self, teacher_tokenizer: Any, tmp_path: Path) -> None:
        path = write(tmp_path / "p.jsonl", [{"input_ids": [9] * 60}, {"input_ids": [9] * 61}])
        with pytest.raises(UserError, match="line 2: 61 tokens leave no room for an answer within --max-length 64"):
            list(read_prompts(teacher_tokenizer, path, room=4))
        prompts = read_prompts(teacher_tokenizer, path, room=4, long="skip")
        assert [len(prompt.input_ids) for prompt in prompts] == [60]
        assert prompts.skipped == {"too long": 1}

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"long": "split"}, "--long split: choose one of skip"),
            ({"layout": "text"}, "--layout text: choose one of input_ids, messages, prompt"),
            ({"keep": ("completion",)}, "--keep completion: --generate stores a column of that name"),
        ],
    )
    def test_what_makes_no_sense_for_prompts_is_refused(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError, match=message):
            PromptSettings(64, **settings)

    def test_documents_without_a_prompt_are_refused(self, teacher_tokenizer: Any, corpus: Path) -> None:
        with pytest.raises(UserError, match="the columns text, id fit no layout; one of input_ids; messages; prompt"):
            list(read_prompts(teacher_tokenizer, corpus))


class TestSamplingParams:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("n=4,temperature=0.8", {"n": 4, "temperature": 0.8}),
            ("temperature=.8,ignore_eos=true", {"temperature": ".8", "ignore_eos": True}),
            ('stop=["a,b","c"],n=2', {"stop": ["a,b", "c"], "n": 2}),
            ("stop=END,n=2", {"stop": "END", "n": 2}),
            ('logit_bias={"3": 1, "4": 2}', {"logit_bias": {"3": 1, "4": 2}}),
            ("stop=3 dots", {"stop": "3 dots"}),
        ],
    )
    def test_values_are_json_or_text(self, text: str, expected: dict[str, Any]) -> None:
        options = parser().parse_args(["build", "--data", "d", "--out", "o", "--generate", "--sampling-params", text])
        assert options.sampling_params == expected

    @pytest.mark.parametrize("text", ["n", "n=1,,seed=2", "n=1,n=2", "=3"])
    def test_what_is_no_assignment_is_refused(self, text: str) -> None:
        with pytest.raises((UserError, argparse.ArgumentTypeError), match="--sampling-params"):
            parser().parse_args(["build", "--data", "d", "--out", "o", "--sampling-params", text])

    @pytest.mark.slow
    @needs_vllm
    def test_they_are_the_same_however_they_are_written(self) -> None:
        written = GenerationSettings.check({"temperature": ".80", "stop": "END", "logit_bias": {5: 1}}, 100)
        assert written == GenerationSettings.check({"stop": ["END"], "logit_bias": {"5": 1.0}, "temperature": 0.8}, 100)
        assert GenerationSettings.check(json.loads(json.dumps(written.params)), 100) == written

    @needs_vllm
    @pytest.mark.parametrize(
        ("params", "message"),
        [
            ({"temprature": 1}, "temprature: vLLM's SamplingParams have no such field; did you mean temperature?"),
            ({"temperature": "hot"}, "temperature=hot: Input should be a valid number"),
            ({"temperature": 3}, r"temperature must be in \[0, 2\], got 3"),
            ({"top_p": 0}, "top_p must be in"),
            ({"n": 1.5}, "n=1.5: Input should be a valid integer"),
            ({"n": 2, "temperature": 0}, "n must be 1 when using greedy sampling"),
            ({"seed": None}, "seed=None: a number from 0"),
            ({"logprobs": 5}, "logprobs: what is stored of each distribution is for --top-k"),
            ({"detokenize": False}, "detokenize: completions are stored as token ids"),
            ({"output_kind": 2}, "output_kind: a build sets it itself"),
            ({"max_tokens": 100}, "max_tokens=100: prompt and answer share --max-length 100"),
        ],
    )
    def test_bad_ones_are_refused_by_name(self, params: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError, match=f"--sampling-params:? ?{message}"):
            GenerationSettings.check(params, 100)

    @needs_vllm
    def test_every_answer_has_a_seed_of_its_own_and_keeps_it(self) -> None:
        settings = GenerationSettings.check({"n": 2, "seed": 5}, 100)
        seeds = [settings.seed(row, sample) for row in ("a", "b") for sample in (0, 1)]
        assert len(set(seeds)) == 4
        assert seeds == [settings.seed(row, sample) for row in ("a", "b") for sample in (0, 1)]
        assert GenerationSettings.check({"n": 3, "seed": 5}, 100).seed("b", 1) == seeds[3]
        assert GenerationSettings.check({"n": 2, "seed": 6}, 100).seed("b", 1) != seeds[3]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """Three hundred different prompts: at two answers each, three batches."""
    documents = [{"prompt": f"{i} {texts[i % 40][:20]}", "id": i} for i in range(300)]
    return write(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", documents)


class Echo:
    """An engine that answers a prompt with its own tokens, the last prompt first; what is asked of it is counted."""

    asked = 0
    interrupted_after = 10**9
    """Prompts whose answers come before Ctrl-C does."""

    def __init__(self, *_: Any) -> None: ...

    def generate(
        self, prompts: Iterable[TokenSequence], settings: GenerationSettings
    ) -> Iterator[tuple[int, list[Completion]]]:
        for count, (number, prompt) in enumerate(reversed(list(enumerate(prompts)))):
            if count == self.interrupted_after:
                raise KeyboardInterrupt
            type(self).asked += 1
            length = 0 if prompt.columns["id"] == 3 else 4
            answer = [
                Completion(prompt.input_ids[:length], "length"),
                Completion(prompt.input_ids[:length][::-1], "stop"),
            ]
            yield number, answer[: settings.num_samples]

    def close(self) -> None: ...


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch) -> type[Echo]:
    """Builds without vLLM's engines: `Echo` answers, transformers scores."""
    monkeypatch.setattr(completions, "VllmGenerator", Echo)
    monkeypatch.setattr(worker, "start_teacher", lambda model, *_: TransformersTeacher(model))
    monkeypatch.setattr(Echo, "asked", 0)
    monkeypatch.setattr(Echo, "interrupted_after", 10**9)
    return Echo


def build(teacher: Path, data: Path, out: Path | str, **settings: Any) -> logitcache.LogitCache:
    defaults: dict[str, Any] = {"backend": "vllm", "capture_route": "flat", "generate": True, "keep": ("id",)}
    sampling = {"sampling_params": {"n": 2}} if settings.get("generate", True) else {}
    asked = {**defaults, **sampling, "top_k": 4, **settings}
    cache: logitcache.LogitCache = logitcache.build(str(teacher), str(data), out, **asked)
    return cache


def rows(sequences: Iterable[Any]) -> list[tuple[Any, ...]]:
    return [(s.row_id, s.input_ids.tolist(), s.loss_mask.tolist(), dict(s.columns)) for s in sequences]


@needs_vllm
class TestBuild:
    @pytest.mark.slow
    def test_answers_stand_behind_their_prompts_in_the_prompts_order(
        self, teacher: Path, prompts: Path, tmp_path: Path, echo: type[Echo], teacher_tokenizer: Any
    ) -> None:
        cache = build(teacher, prompts, tmp_path / "c")
        assert [s.columns["id"] for s in cache] == [i for i in range(300) if i != 3 for _ in range(2)]
        assert [s.columns["sample"] for s in cache] == [0, 1] * 299
        for sequence in list(cache)[:10]:
            prompt = teacher_tokenizer(json.loads(prompts.read_text().splitlines()[sequence.columns["id"]])["prompt"])
            length = len(prompt["input_ids"])
            assert sequence.input_ids[:length].tolist() == prompt["input_ids"]
            assert sequence.loss_mask.tolist() == [False] * length + [True] * 4
            assert sequence.columns["completion"] == teacher_tokenizer.decode(sequence.input_ids[length:])
        assert cache.manifest.skipped == {"empty answers": 2}
        assert cache.manifest.fingerprint["generation"]["n"] == 2
        assert not (tmp_path / "c/.build").exists()

    @pytest.mark.slow
    def test_an_interruption_costs_the_batches_in_flight(
        self, teacher: Path, prompts: Path, tmp_path: Path, echo: type[Echo], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = build(teacher, prompts, tmp_path / "whole")
        echo.asked = 0
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(echo, "interrupted_after", 200)
            build(teacher, prompts, tmp_path / "cut")
        kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "cut/.build/answers/answered").iterdir()}
        assert sorted(p.name for p in kept) == ["00001.parquet", "00002.parquet"]
        echo.asked = 0
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):  # all is answered, nothing planned
            patched.setattr(plan, "TokensWriter", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
            build(teacher, prompts, tmp_path / "cut")
        assert echo.asked == 128
        assert {p: p.stat().st_mtime_ns for p in kept} == kept
        assert rows(build(teacher, prompts, tmp_path / "cut")) == rows(whole)
        assert echo.asked == 128

    @pytest.mark.slow
    def test_answers_are_not_mixed_with_those_of_other_settings(
        self, teacher: Path, prompts: Path, tmp_path: Path, echo: type[Echo], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "c"
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(echo, "interrupted_after", 200)
            build(teacher, prompts, out)
        with pytest.raises(
            UserError, match=r"an unfinished cache made otherwise: generation\.temperature was 1\.0, now"
        ):
            build(teacher, prompts, out, sampling_params={"n": 2, "temperature": 0.7})
        with pytest.raises(UserError, match=r"generation was .*, now None"):
            build(teacher, prompts, out, generate=False)
        with pytest.raises(UserError, match="unfinished build"):
            logitcache.open(out)
        assert len(list((out / ".build/answers/answered").iterdir())) == 2
        cache = build(teacher, prompts, out, sampling_params={"n": 1, "temperature": 0.7}, overwrite=True)
        assert len(cache) == 299
        with pytest.raises(UserError, match=r"a finished cache made otherwise: generation\.n was 1, now 2"):
            build(teacher, prompts, out)

    def test_answers_serve_whatever_is_captured_of_them(
        self, teacher: Path, tmp_path: Path, echo: type[Echo], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        prompts = write(tmp_path / "p.jsonl", [{"prompt": "A student", "id": 1}])
        monkeypatch.setattr("logitcache.capture.teachers.vllm.pooling.why_not_pooling", lambda *_: None)
        options: dict[str, Any] = {"capture_route": "pooling", "top_k": None}
        with pytest.raises(UserError, match=r"--tail-rank 60: .* choose at most 2"):
            build(teacher, prompts, tmp_path / "c", tail_rank=60, **options)
        cache = build(teacher, prompts, tmp_path / "c", tail_rank=2, **options)
        assert (len(cache), echo.asked, cache.manifest.layout.tail_parts.rank) == (2, 1, 2)

    @pytest.mark.slow
    def test_overwriting_keeps_the_old_cache_until_everything_is_answered(
        self, teacher: Path, prompts: Path, tmp_path: Path, echo: type[Echo], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "c"
        build(teacher, prompts, out)
        changed: dict[str, Any] = {"sampling_params": {"n": 2, "seed": 1}, "overwrite": True}
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(echo, "interrupted_after", 200)
            build(teacher, prompts, out, **changed)
        assert len(logitcache.open(out)) == 598
        echo.asked = 0
        assert build(teacher, prompts, out, **changed).manifest.fingerprint["generation"]["seed"] == 1
        assert echo.asked == 128

    @pytest.mark.slow
    def test_the_first_of_several_shard_ranges_answers_for_all(
        self, teacher: Path, prompts: Path, tmp_path: Path, echo: type[Echo]
    ) -> None:
        out = tmp_path / "c"
        for index in (0, 1):
            build(teacher, prompts, out, shard_range=(index, 2), shard_positions=500)
            assert echo.asked == 300
        assert rows(finish(out)) == rows(build(teacher, prompts, tmp_path / "whole", shard_positions=500))

    @pytest.mark.slow
    def test_the_output_may_be_a_url(self, teacher: Path, prompts: Path, echo: type[Echo]) -> None:
        url = "memory://generated"
        with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(echo, "interrupted_after", 200)
            build(teacher, prompts, url)
        echo.asked = 0
        assert len(build(teacher, prompts, url)) == 598
        assert echo.asked == 128

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"backend": "transformers", "capture_route": "auto"}, "--generate needs vLLM's own engine"),
            ({"backend": "openai", "base_url": "http://localhost:1/v1"}, "--generate needs vLLM's own engine"),
            ({"generate": False, "sampling_params": {"n": 2}}, "--sampling-params needs --generate"),
            ({"sampling_params": {"max_tokens": 300}}, "max_tokens=300: prompt and answer share --max-length 255"),
            ({"keep": ("nothing",)}, "--keep nothing: no document has this column"),
            ({"long": "truncate"}, "--long truncate: choose one of skip"),
        ],
    )
    def test_contradictions_are_refused_before_an_engine_starts(
        self, teacher: Path, prompts: Path, tmp_path: Path, settings: dict[str, Any], message: str, echo: type[Echo]
    ) -> None:
        with pytest.raises(UserError, match=message):
            build(teacher, prompts, tmp_path / "c", **settings)
        assert not (tmp_path / "c").exists()
        assert echo.asked == 0

    def test_a_corpus_without_prompts_and_a_bad_one_leave_nothing(
        self, teacher: Path, tmp_path: Path, echo: type[Echo]
    ) -> None:
        empty = write(tmp_path / "empty.jsonl", [{"prompt": ""}])
        with pytest.raises(UserError, match=r"holds no prompt to answer: 1 documents \(1 empty\)"):
            build(teacher, empty, tmp_path / "c")
        bad = write(tmp_path / "bad.jsonl", [{"prompt": "A"}, {"prompt": 5}])
        with pytest.raises(UserError, match=r"bad\.jsonl, line 2: text is wanted, found int"):
            build(teacher, bad, tmp_path / "c")
        assert not (tmp_path / "c").exists()


LIMITS: dict[str, Any] = {"max_length": 64, "max_num_seqs": 32}
SAMPLING = {"n": 2, "temperature": 0.9, "max_tokens": 12, "logit_bias": {"0": 3}}


def command(teacher: Path, prompts: Path, out: Path) -> list[str]:
    sampling = ",".join(f"{name}={json.dumps(value)}" for name, value in SAMPLING.items())
    return [
        *("logitcache", "build", "--generate", "--sampling-params", sampling, "--keep", "id"),
        *("--teacher", str(teacher), "--data", str(prompts), "--out", str(out), "--backend", "vllm"),
        *("--top-k", "16", "--tail-rank", "8", "--max-length", "64", "--max-num-seqs", "32"),
    ]


def settled(teacher: Path, prompts: Path) -> Any:
    """What `command` asks for."""
    settings: dict[str, Any] = {"backend": "vllm", "keep": ["id"], "top_k": 16, "tail_rank": 8, **LIMITS}
    return resolve_inputs(str(teacher), str(prompts), SAMPLING, **settings)


@pytest.mark.engine
@pytest.mark.usefixtures("forked_vllm")
class TestVllm:
    @pytest.fixture(scope="class")
    def cache(
        self, teacher: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> Iterator[logitcache.LogitCache]:
        """Built by the command, in one go, with the engine's core in a process of its own."""
        out = tmp_path_factory.mktemp("generated") / "cache"
        run = run_command(*command(teacher, prompts, out))
        assert run.returncode == 0, run.stderr
        assert "answering 300 prompts" in run.stderr
        assert "cut off for length" in run.stderr
        assert "INFO" not in run.stderr
        yield logitcache.open(out)

    @pytest.fixture(scope="class")
    def generator(self, teacher: Path, prompts: Path) -> Iterator[VllmGenerator]:
        """The engine of such a build, in this process."""
        inputs = settled(teacher, prompts)
        with vllm_core_here() as placed:
            generator = VllmGenerator(inputs.model, 64, inputs.engine.options | placed)
        yield generator
        generator.close()

    def test_rows_are_prompts_with_trained_answers(
        self, cache: logitcache.LogitCache, prompts: Path, teacher_tokenizer: Any
    ) -> None:
        documents = [json.loads(line) for line in prompts.read_text().splitlines()]
        assert [(s.columns["id"], s.columns["sample"]) for s in cache] == [(i, j) for i in range(300) for j in (0, 1)]
        reasons = set()
        for sequence in cache:
            prompt = teacher_tokenizer(documents[sequence.columns["id"]]["prompt"])["input_ids"]
            answer = sequence.input_ids[len(prompt) :].tolist()
            assert sequence.input_ids[: len(prompt)].tolist() == prompt
            assert sequence.loss_mask.tolist() == [False] * len(prompt) + [True] * len(answer)
            assert sequence.columns["completion"] == teacher_tokenizer.decode(answer, skip_special_tokens=True)
            assert EOS not in answer[:-1]
            assert sequence.columns["finish_reason"] == ("stop" if answer[-1] == EOS else "length")
            assert len(answer) == 12 or answer[-1] == EOS
            reasons.add(sequence.columns["finish_reason"])
        assert reasons == {"stop", "length"}

    def test_the_answers_to_a_prompt_differ(self, cache: logitcache.LogitCache) -> None:
        sequences = list(cache)
        same = [a.row_id == b.row_id for a, b in zip(sequences[::2], sequences[1::2], strict=True)]
        assert np.mean(same) < 0.05

    def test_scores_are_those_of_transformers_in_float32(self, cache: logitcache.LogitCache, teacher: Path) -> None:
        assert_scores_agree(cache, teacher, list(range(0, 600, 40)))

    def test_answers_are_drawn_from_the_teachers_distribution(
        self, cache: logitcache.LogitCache, teacher: Path
    ) -> None:
        """The mean log-probability of first answer tokens is the mean of its expectation, within four standard errors."""
        seen, expected, variance = 0.0, 0.0, 0.0
        for index in range(0, 600, 6):
            sequence = cache[index]
            position = int(sequence.positions[0])
            logits = full_logprobs(teacher, sequence.input_ids)[position]
            logits[EOS] += 3
            drawn = (logits / 0.9).log_softmax(dim=-1)
            mean = float((drawn.exp() * drawn).sum())
            seen += float(drawn[int(sequence.input_ids[position + 1])])
            expected += mean
            variance += float((drawn.exp() * drawn.square()).sum()) - mean**2
        assert abs(seen - expected) < 4 * variance**0.5

    def test_a_killed_build_continues_to_the_same_answers(
        self,
        cache: logitcache.LogitCache,
        generator: VllmGenerator,
        teacher: Path,
        prompts: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        out = tmp_path / "killed"
        with started_command(*command(teacher, prompts, out)) as run:
            while run.is_alive() and not list(out.glob(".build/answers/answered/*.parquet")):
                time.sleep(0.001)
            engine = psutil.Process(run.pid).children(recursive=True)
            run.kill()
        assert run.exitcode == -signal.SIGKILL, run.said
        assert not psutil.wait_procs(engine, timeout=60)[1], "the engine outlived the build"
        kept = {p: p.stat().st_mtime_ns for p in out.glob(".build/answers/answered/*.parquet")}
        assert 0 < len(kept) < 3
        with pytest.raises(UserError, match=r"generation\.max_tokens was 12, now 13"):
            build(
                teacher,
                prompts,
                out,
                top_k=16,
                capture_route="auto",
                **LIMITS,
                sampling_params={**SAMPLING, "max_tokens": 13},
            )
        inputs = settled(teacher, prompts)
        folder = Folder(out)
        monkeypatch.setattr(completions, "VllmGenerator", lambda *_: generator)
        monkeypatch.setattr(generator, "close", lambda: None)
        continued = completions.complete_prompts(folder, inputs.spec(SHARD_POSITIONS), inputs)
        for ours, theirs in zip_longest(rows(continued), rows(cache)):
            assert ours == theirs
        assert {p: p.stat().st_mtime_ns for p in kept} == kept

    def test_at_temperature_0_every_token_is_the_most_probable_one(
        self, generator: VllmGenerator, teacher: Path, prompts: Path
    ) -> None:
        inputs = settled(teacher, prompts)
        some = list(inputs.prompts())[:5]
        settings = GenerationSettings.check({"temperature": 0, "max_tokens": 8}, 64)
        given = dict(generator.generate(some, settings))
        assert sorted(given) == [0, 1, 2, 3, 4]
        for number, (answer,) in given.items():
            ids = np.concatenate([some[number].input_ids, answer.token_ids])
            best = full_logprobs(teacher, ids).max(dim=-1).values
            chosen = full_logprobs(teacher, ids)[:-1].gather(1, torch.from_numpy(ids[1:].astype(np.int64))[:, None])[
                :, 0
            ]
            first = len(some[number].input_ids) - 1
            assert torch.allclose(chosen[first:], best[:-1][first:], atol=1e-4)

    def test_an_answer_ends_where_prompt_and_answer_fill_the_length(self, generator: VllmGenerator) -> None:
        prompt = TokenSequence(np.arange(6, 56, dtype=np.int32), np.zeros(50, dtype=bool))
        settings = GenerationSettings.check({"ignore_eos": True, "stop_token_ids": [7]}, 64)
        ((_, (answer,)),) = generator.generate([prompt], settings)
        assert len(answer.token_ids) == 14 or answer.token_ids[-1] == 7
