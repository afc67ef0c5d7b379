"""NVIDIA's compiler, for the tests of kernels."""

from pathlib import Path

import pytest


@pytest.fixture
def _compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Skip without NVIDIA's compiler; keep its cache away from the user's."""
    from triton.backends import backends

    if "nvidia" not in backends:
        pytest.skip("this Triton has no NVIDIA backend")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
