"""What a build under way has done so far."""

from pathlib import Path


def num_finished_shards(out: Path) -> int:
    """Recorded shards; 0 where the build has not begun, or has ended and tidied up, perhaps just now."""
    try:
        return sum(path.suffix == ".json" for path in (out / ".build/shards").iterdir())
    except FileNotFoundError:
        return 0
