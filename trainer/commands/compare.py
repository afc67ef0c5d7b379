"""`trainer compare`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from logitcache.errors import Parser
from trainer.commands.shared import check_writable


def run(argv: Sequence[str]) -> int:
    """Compares runs; returns the exit status."""
    parser = Parser(prog="trainer compare", description="Finished runs side by side; seeds of one run make one row.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output folders of `trainer fit`")
    parser.add_argument(
        "--out", type=Path, default=Path("compare.png"), metavar="FILE", help="picture (default: compare.png)"
    )
    args = parser.parse_args(argv)
    check_writable(args.out)
    from trainer.comparison.finished import compare

    print(compare(args.runs, args.out))
    print(f"curves: {args.out}")
    return 0
