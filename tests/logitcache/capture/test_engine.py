"""Which engine and route are chosen, and what is said where the best one is impossible."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from logitcache import UserError
from logitcache.capture import engine as engine_module
from logitcache.capture import options as options_module
from logitcache.capture.engine import Engine, EngineChoice, TransformersEngine, VllmEngine, choose_engine
from logitcache.capture.teachers.base import TeacherModel
from logitcache.capture.teachers.vllm import engine as vllm_engine
from logitcache.capture.teachers.vllm import pooling as vllm_pooling


@pytest.fixture(scope="module")
def model(teacher: Path) -> TeacherModel:
    return TeacherModel.load(str(teacher), None, "auto", False)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM is there, takes every architecture and wraps it."""
    monkeypatch.setattr(engine_module, "why_not_vllm", lambda: None)
    monkeypatch.setattr(vllm_engine, "why_not_engine", lambda *_: None)
    monkeypatch.setattr(vllm_pooling, "why_not_pooling", lambda *_: None)


@pytest.fixture
def unwrappable(vllm: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_pooling, "why_not_pooling", lambda *_: "XLM has no logits")


def choose(model: TeacherModel, backend: str = "auto", route: str = "auto", **more: Any) -> Engine:
    options = EngineChoice(backend, route, vllm=more.get("options", {}), attn_implementation=more.get("attention"))
    return choose_engine(options, model, more.get("beyond", []))


def test_pooling_is_what_auto_takes(model: TeacherModel, vllm: None) -> None:
    assert choose(model, options={"tensor_parallel_size": 2}) == VllmEngine({"tensor_parallel_size": 2}, "pooling")
    assert choose(model).sees_logits


def test_either_route_can_be_forced(model: TeacherModel, vllm: None) -> None:
    assert choose(model, route="flat") == VllmEngine(route="flat")
    assert choose(model, route="pooling") == VllmEngine(route="pooling")
    assert not choose(model, route="flat").sees_logits


def test_an_architecture_that_cannot_be_wrapped_takes_the_flat_route_with_one_warning(
    model: TeacherModel, unwrappable: None, caplog: pytest.LogCaptureFixture
) -> None:
    assert choose(model, backend="vllm") == VllmEngine(route="flat")
    [warning] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "XLM has no logits" in warning
    assert "Lost: tail groups and rank, other temperatures, tail entropy and samples" in warning


def test_what_the_flat_route_would_lose_is_refused_where_it_was_asked_for(
    model: TeacherModel, unwrappable: None
) -> None:
    with pytest.raises(UserError, match=r"--tail-groups needs the teacher's logits.*XLM has no logits"):
        choose(model, beyond=["--tail-groups"])
    with pytest.raises(UserError, match=r"--capture-route pooling: XLM has no logits; use --capture-route flat"):
        choose(model, route="pooling")


@pytest.mark.parametrize("backend", ["auto", "vllm"])
@pytest.mark.parametrize("route", ["auto", "pooling", "flat"])
def test_a_teacher_that_vllm_does_not_know_is_told_of_transformers(
    model: TeacherModel, unwrappable: None, monkeypatch: pytest.MonkeyPatch, backend: str, route: str
) -> None:
    monkeypatch.setattr(vllm_engine, "why_not_engine", lambda *_: "XLM is unknown")
    with pytest.raises(UserError, match=r"does not take this teacher \(XLM is unknown\); --backend transformers does"):
        choose(model, backend, route)


def test_the_attention_is_an_option_of_transformers_only(model: TeacherModel, vllm: None) -> None:
    with pytest.raises(
        UserError, match=r"--attn-implementation eager is an option of transformers.*--attention-backend"
    ):
        choose(model, attention="eager")
    assert choose(model, "transformers", attention="eager") == TransformersEngine(attention="eager")


def test_an_option_of_a_vllm_that_does_not_import_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options_module, "why_not_vllm", lambda: "vLLM does not import (no such module)")
    with pytest.raises(UserError, match=r"--speculative-config is an option of vLLM, and the backend is transformers"):
        EngineChoice("transformers", vllm={"speculative_config": {}})
    with pytest.raises(UserError, match="unknown argument --speculative-config"):
        options_module.parse_engine_options(["--speculative-config", "{}"])


def test_without_vllm_auto_takes_transformers_and_says_why(
    model: TeacherModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "logitcache")
    monkeypatch.setattr(engine_module, "why_not_vllm", lambda: "vLLM does not import (no such module)")
    assert choose(model) == TransformersEngine()
    assert "backend: transformers, since vLLM does not import" in caplog.text
    with pytest.raises(UserError, match=r"--backend vllm: vLLM does not import"):
        choose(model, backend="vllm")


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_the_fingerprint_tells_routes_and_decisive_options_apart(vllm: None) -> None:
    def identity(route: str, **options: Any) -> dict[str, Any]:
        return VllmEngine(options, route).identity()

    assert identity("pooling") != identity("flat")
    assert identity("flat", quantization="fp8") != identity("flat")
    assert identity("flat", tensor_parallel_size=4) == identity("flat")
