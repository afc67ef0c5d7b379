"""The tiny teacher, its tokenizer and the corpora that all tests share."""

from __future__ import annotations

import gc
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.register_at_fork(before=gc.collect)  # what other tests left dies with its threads, and not in a child without them

VOCAB_SIZE = 512
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|end|>{% endgeneration %}{% else %}{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXT = [
    "The quick brown fox jumps over the lazy dog while the teacher writes log-probabilities to a cache.",
    "A student reads them again and again; nothing of the teacher stays in memory.",
    "Distillation needs the whole distribution, so what is not stored is kept as one number: the tail.",
    "Numbers such as 3.14159, 2.71828 and 42 appear, as do (brackets), [lists] and {sets}.",
]


@pytest.fixture(scope="module", autouse=True)
def _modules_are_no_garbage() -> None:
    """Each run of a trainer collects garbage, which takes a second where all that is imported is looked through."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _no_power_failure() -> Iterator[None]:
    """Does not wait for the disk: files of tests need not outlive the machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


def pytest_unconfigure() -> None:
    gc.unfreeze()  # for what libraries count at the end


@pytest.fixture(autouse=True)
def _no_copies_of_other_tests(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where shards of remote caches are copied to; made when it is needed."""
    monkeypatch.setenv("LOGITCACHE_HOME", str(tmp_path_factory.getbasetemp() / f"home-{uuid.uuid4().hex}"))


@pytest.fixture(scope="session")
def forked_vllm() -> None:
    """Makes vLLM's processes forks, see `tests.helpers.vllm_forks`."""
    from logitcache.engines.vllm_process import set_environment
    from tests.helpers import processes, vllm_forks

    set_environment()
    pytest.importorskip("vllm")
    processes.FORKED.set_forkserver_preload([*processes.PRELOADED, *vllm_forks.PRELOADED])
    vllm_forks.fork_processes(vllm_forks.ServedForks)


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """Two cores of this machine."""
    ray = pytest.importorskip("ray")
    ray.init(address="local", num_cpus=2, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Forty documents of different lengths."""
    return [" ".join(TEXT[(i + j) % len(TEXT)] for j in range(1 + i % 3)) + f" Document {i}." for i in range(40)]


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """A Llama of 2 layers with random weights and a byte-level BPE tokenizer of 512 tokens with a chat template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("teacher")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|eos|>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    letters = ["".join(chr(97 + (i * j) % 26) for j in range(1, 9)) for i in range(200)]
    backend.train_from_iterator(
        [*texts, " ".join(letters)],
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    assert backend.get_vocab_size() == VOCAB_SIZE
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|eos|>", chat_template=CHAT_TEMPLATE)
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.15,
        eos_token_id=0,
        bos_token_id=None,
        dtype="float32",
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def teacher_tokenizer(teacher: Path) -> Any:
    """The tiny teacher's tokenizer; its chat template marks generations."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(teacher)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """The documents as `text` rows of a .jsonl file."""
    path = tmp_path_factory.mktemp("corpus") / "train.jsonl"
    path.write_text("".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts)))
    return path
