"""What a command left below a folder."""

from __future__ import annotations

from pathlib import Path


def written_to(folder: Path) -> bytes:
    """All that is below a folder, the names included."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return b"".join(str(path).encode() + path.read_bytes() for path in paths)
