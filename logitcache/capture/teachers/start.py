"""The engine that was chosen, with the teacher's weights loaded."""

from __future__ import annotations

import logging
import time

from logitcache.capture.engine import Engine
from logitcache.capture.teachers.base import Teacher, TeacherModel
from logitcache.progress import duration

logger = logging.getLogger("logitcache")


def start_teacher(model: TeacherModel, engine: Engine, longest: int, most_entries: int) -> Teacher:
    """Loads the teacher.

    longest: tokens of the longest sequence that it will score.  most_entries: largest `top_k` that it will be asked for.
    Raises UserError where it does not load. `LogitTeacher` if `engine.sees_logits`.
    """
    began = time.monotonic()
    teacher = _start(model, engine, longest, most_entries)
    logger.info("teacher ready in %s", duration(time.monotonic() - began))
    return teacher


def _start(model: TeacherModel, engine: Engine, longest: int, most_entries: int) -> Teacher:
    if engine.backend == "transformers":
        from logitcache.capture.teachers.hf import TransformersTeacher

        return TransformersTeacher(model, engine.attention)
    if engine.backend == "openai":
        from logitcache.capture.teachers.server import ServerTeacher

        return ServerTeacher(engine.base_url, engine.served_model, model.vocab_size, most_entries)
    logger.info("starting vLLM (tens of seconds)")
    if engine.route == "flat":
        from logitcache.capture.teachers.vllm.flat import VllmFlatTeacher

        return VllmFlatTeacher(model, longest, most_entries, engine.options)
    from logitcache.capture.teachers.vllm.pooling import VllmPoolingTeacher

    return VllmPoolingTeacher(model, longest, engine.options)
