"""Identities of models and caches, whatever their folders are called and whenever they were written."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from transformers import PreTrainedConfig

from logitcache import LogitCache
from logitcache.storage.atomic import file_sha256
from trainer.model.adapters import base_model
from trainer.model.student import student_config

WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin")
SETTINGS = ("config.json", "generation_config.json", "adapter_config.json")
TOKENIZER = (
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
    "*.model",
)


def identities(cache: LogitCache) -> tuple[str, str]:
    """Return the identity of a cache, and the hash of its manifest that evaluations of former versions have in its place."""
    content = json.dumps(cache.manifest.to_json(), sort_keys=True, ensure_ascii=False)
    return cache.identity, hashlib.sha256(content.encode()).hexdigest()


def model_identity(name: str, config: PreTrainedConfig) -> str:
    """Hashes all of a model that its answers depend on: a folder's weights, settings and tokenizer, or name@commit.

    For an adapter, its own files and those of its base model.  config: of `student_config`.  Raises UserError for an
    adapter without a base model.
    """
    own, base = _own_identity(name, config), base_model(name)
    if base is None:
        return own
    return hashlib.sha256(f"{own} on {_own_identity(base, student_config(base))}".encode()).hexdigest()


def _own_identity(name: str, config: PreTrainedConfig) -> str:
    folder = Path(name)
    if not folder.is_dir():
        return f"{name}@{getattr(config, '_commit_hash', None)}"
    files = {path for pattern in (*WEIGHTS, *SETTINGS, *TOKENIZER) for path in folder.glob(pattern) if path.is_file()}
    listing = "".join(f"{path.name} {file_sha256(path)}\n" for path in sorted(files))
    return hashlib.sha256(listing.encode()).hexdigest()
