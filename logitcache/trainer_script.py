"""The command `trainer` is trainer.cli, unless a package that is not ours has its name, which it says in one line."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path

OURS = Path(__file__).parents[1] / "trainer" / "__init__.py"


def main() -> int:
    """Runs the command; returns its exit status."""
    reason = in_the_way()
    if reason is not None:
        print(f"trainer: error: {reason}", file=sys.stderr)
        return 2
    status: int = import_module("trainer.cli").main()
    return status


def in_the_way() -> str | None:
    """Returns why `import trainer` does not give our package, None if it does."""
    spec = find_spec("trainer")
    if spec is None or spec.origin is None or Path(spec.origin).resolve() != OURS.resolve():
        found = "there is none" if spec is None else f"`import trainer` finds {spec.origin or spec.name}"
        return f"{found} in place of {OURS.parent}: rename it, or take its folder out of PYTHONPATH"
    try:
        ours = "DistillTrainer" in import_module("trainer").__all__
    except Exception:  # whatever the other package raises
        ours = False
    if ours:
        return None
    others = [name for name in packages_distributions().get("trainer", ()) if name != "logitcache"]
    named = f" ({', '.join(others)}?)" if others else ""
    return (
        f"another package named trainer{named} has overwritten {OURS}: uninstall it and install logitcache again, "
        "or keep them in environments of their own"
    )
