"""One thread, and the caches that the trainer's tests share."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from logitcache import LogitCache
from tests.helpers.cachemaking import VOCAB, llama, random_sequences, write_cache


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> LogitCache:
    """Eight entries of 64, five tail groups, the tail at T = 2."""
    sequences = random_sequences(23, seed=1)
    return write_cache(tmp_path_factory.mktemp("train"), sequences, groups=np.arange(VOCAB) % 5, temperatures=(2.0,))


@pytest.fixture(scope="session")
def heldout(tmp_path_factory: pytest.TempPathFactory) -> LogitCache:
    """Eight entries of 64 and nothing else."""
    return write_cache(tmp_path_factory.mktemp("heldout"), random_sequences(16, seed=2))


@pytest.fixture(scope="session")
def rich_cache(tmp_path_factory: pytest.TempPathFactory) -> LogitCache:
    """Eight entries of 64, the tail's entropy, four samples from it, and its total at no temperature but 1."""
    sequences = random_sequences(12, seed=4)
    return write_cache(tmp_path_factory.mktemp("rich"), sequences, tail_entropy=True, num_tail_samples=4)


@pytest.fixture(scope="session")
def full_cache(tmp_path_factory: pytest.TempPathFactory) -> LogitCache:
    """Every token is an entry."""
    return write_cache(tmp_path_factory.mktemp("full"), random_sequences(6, seed=3), k=VOCAB)


@pytest.fixture(scope="session")
def student_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model folder without a tokenizer."""
    path = tmp_path_factory.mktemp("student")
    llama(seed=7, hidden_size=16).save_pretrained(path)
    return str(path)
