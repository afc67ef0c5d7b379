"""The files of a run's output folder: names, and its JSON files read with care, since a folder may hold anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from logitcache import UserError
from logitcache.documents.json_text import parse_json
from logitcache.errors import one_line
from logitcache.format.manifest import check_shape

RUN_NAME = "run.json"  # settings, cache, student
EVALUATION_NAME = "eval.json"  # metrics on the held-out cache
STATE_NAME = "trainer_state.json"  # transformers' log history
ANSWERS_NAME = "generate"  # folder of the answers that `trainer eval --generate` scored
MODEL_FILES = ("model*.safetensors*", "pytorch_model*", "adapter_config.json", "adapter_model.*")  # the model itself


class NotARecord(UserError):
    """A file was not written by `trainer`, though it has such a name."""


def read_record(path: Path, **shapes: Any) -> dict[str, Any] | None:
    """Reads a JSON file of a run; None if it does not exist. shapes: of the values that it must have, see `check_shape`.

    Raises NotARecord for other content, UserError if it cannot be read.
    """
    try:
        record = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise NotARecord(f"{path} is not JSON ({one_line(error)})") from error
    except ValueError as error:
        raise NotARecord(f"{path} is {one_line(error)}") from error
    if not isinstance(record, dict):
        raise NotARecord(f"{path} was not written by `trainer`: it holds no names and values")
    try:
        check_shape(record, shapes, path.name)
    except KeyError as error:
        raise NotARecord(f"{path} was not written by `trainer`: it has no {error.args[0]}") from error
    except TypeError as error:
        raise NotARecord(f"{path} was not written by `trainer`: {error}") from error
    return record
