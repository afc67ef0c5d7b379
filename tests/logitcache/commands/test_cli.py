"""The `logitcache` command: exit statuses and messages."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

import logitcache
from logitcache.cli import main
from logitcache.errors import UserError


def arguments(teacher: Path, corpus: Path, out: Path, *more: str) -> list[str]:
    return ["build", "--teacher", str(teacher), "--data", str(corpus), "--out", str(out), *more]


def test_build_prints_what_it_made(
    teacher: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cache"
    assert (
        main(arguments(teacher, corpus, out, "--backend", "transformers", "--top-k", "4", "--columns", "text=text"))
        == 0
    )
    printed = capsys.readouterr()
    assert "positions  1,780" in printed.out
    assert "plan: 1,780 positions in 40 sequences" in printed.err
    assert len(logitcache.open(out)) == 40


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--data", "nowhere.jsonl"], "--data nowhere.jsonl: no such file"),
        (["--teacher", "./nowhere"], "--teacher ./nowhere: no such folder"),
        (["--top-k", "0"], "--top-k 0"),
        (["--top-k", "many"], "argument --top-k: invalid int value: 'many'"),
        (["--temperatures", "1,b"], "'1,b': write numbers with commas between them"),
        pytest.param(
            ["--tail-groups", "4", "--backend", "vllm", "--capture-route", "flat"],
            "--tail-groups needs the teacher's logits",
            marks=pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
        ),
        (["--shard-range", "1-4"], "'1-4': write I/N"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    teacher: Path, corpus: Path, tmp_path: Path, change: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments(teacher, corpus, tmp_path / "c"), *change]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1
    assert errors[0].startswith("logitcache: error: ")
    assert message in errors[0]
    assert not (tmp_path / "c").exists()


def test_a_message_that_quotes_several_lines_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As those of pyarrow and of SQL do."""

    def refuse(cache: str) -> str:
        raise UserError(f"{cache} was altered: invalid\n  data\r\n")

    monkeypatch.setattr("logitcache.maintenance.info.info", refuse)
    assert main(["info", "cache"]) == 2
    assert capsys.readouterr().err == "logitcache: error: cache was altered: invalid data\n"


def test_an_empty_corpus_is_refused(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    assert main(arguments(teacher, empty, tmp_path / "c", "--backend", "transformers")) == 2
    assert "no sequence to train on: 0 documents" in capsys.readouterr().err


def test_ctrl_c_says_how_to_continue(
    teacher: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("logitcache.capture.worker.ShardWorker.capture", interrupted)
    assert main(arguments(teacher, corpus, tmp_path / "c", "--backend", "transformers")) == 130
    assert "the same command continues" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["info", "verify"])
def test_ctrl_c_promises_nothing_where_nothing_continues(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("logitcache.capture.verify.verify", interrupted)
    monkeypatch.setattr("logitcache.maintenance.info.info", interrupted)
    assert main([command, str(tmp_path)]) == 130
    assert capsys.readouterr().err == "logitcache: stopped\n"
