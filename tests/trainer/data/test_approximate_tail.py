"""A cache that was imported without a tail says so before a student learns from it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from logitcache import LogitCache
from logitcache.storage.folder import Folder
from trainer.config.config import DistillConfig
from trainer.run.prepare import prepare


@pytest.mark.slow
def test_a_run_warns_once_of_each_cache_whose_tail_is_approximate(
    tmp_path: Path, cache: LogitCache, student_folder: str
) -> None:
    imported = tmp_path / "imported"
    shutil.copytree(cache.path, imported)
    capture = {"capture": {"tail": "approximate (1 − Σp)"}}
    replace(cache.manifest, fingerprint={**cache.manifest.fingerprint, **capture}).write(Folder(imported))
    config = DistillConfig(
        output_dir=str(tmp_path / "run"), cache=[str(imported)], student=student_folder, use_cpu=True
    )
    warnings = [one for one in prepare(config).warnings if "tail" in one]
    assert warnings == [
        f"{imported}: the mass of its tail is approximate (1 − Σp); losses that weigh the tail, RKL above all, learn from that"
    ]
    config.cache = [cache.path]
    assert not [one for one in prepare(config).warnings if "tail" in one]
