"""Command line: parses and prints, decides nothing."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from logitcache.arguments import parser
from logitcache.errors import UserError, one_line, printable
from logitcache.reading.cache import LogitCache, open_cache

if TYPE_CHECKING:
    from logitcache.capture.rescore import Rescoring


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `logitcache …`. Returns the exit status: 0, 1 where `verify` finds something, 2 for bad input, 130 after Ctrl-C."""
    continued = False
    try:
        options, rest = parser().parse_known_args(arguments)
        continued = options.command in _CONTINUED
        with _log_lines():
            status = _COMMANDS[options.command](options, rest) or 0
        sys.stdout.flush()
        return status
    except UserError as error:
        print(f"logitcache: error: {printable(one_line(error))}", file=sys.stderr)
        return 2
    except MemoryError as error:
        print(f"logitcache: error: out of memory ({one_line(error) or 'no more is given'})", file=sys.stderr)
        return 2
    except BrokenPipeError:  # of `| head`: there is nobody left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print(f"logitcache: stopped{'; the same command continues where it was' * continued}", file=sys.stderr)
        return 130


@contextmanager
def _log_lines() -> Iterator[None]:
    """Shows what a command reports, as plain lines on stderr."""
    logger = logging.getLogger("logitcache")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Printable("logitcache: %(message)s"))
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


class _Printable(logging.Formatter):
    """A message may quote a store, or someone else's file."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _build(options: argparse.Namespace, rest: list[str]) -> None:
    with _engines_needed():
        from logitcache.capture.build import build
        from logitcache.capture.options import parse_engine_options

    cache = build(**_settings(options), **parse_engine_options(rest))
    if cache is not None:
        _print_cache(cache)


def _plan(options: argparse.Namespace, rest: list[str]) -> None:
    with _engines_needed():
        from logitcache.capture.estimate.estimate import plan
        from logitcache.capture.options import parse_engine_options

    print(plan(**_settings(options), **parse_engine_options(rest)).table())


def _finish(options: argparse.Namespace, rest: list[str]) -> None:
    _refuse(rest, "finish")
    with _engines_needed():
        from logitcache.capture.finish import finish

    _print_cache(finish(options.out))


def _recode(options: argparse.Namespace, rest: list[str]) -> None:
    from logitcache.maintenance.recode import recode

    _refuse(rest, "recode")
    _print_rewritten(recode(**_settings(options)))


def _slice(options: argparse.Namespace, rest: list[str]) -> None:
    from logitcache.maintenance.slice import slice_cache

    _refuse(rest, "slice")
    _print_rewritten(slice_cache(**_settings(options)))


def _merge(options: argparse.Namespace, rest: list[str]) -> None:
    from logitcache.maintenance.merge import merge

    _refuse(rest, "merge")
    _print_rewritten(merge(**_settings(options)))


def _push(options: argparse.Namespace, rest: list[str]) -> None:
    from logitcache.sharing.push import push

    _refuse(rest, "push")
    pushed = push(**_settings(options))
    print(f"url        {pushed.url}")
    print(f"identity   {pushed.identity}")
    print(f"sent       {pushed.num_sent:,} files ({pushed.sent_bytes:,} bytes)")
    print(f"kept       {pushed.num_kept:,} files")
    if pushed.revision is not None:
        print(f"revision   {pushed.revision}")


def _pull(options: argparse.Namespace, rest: list[str]) -> None:
    from logitcache.maintenance.pull_rows import pull_rows
    from logitcache.sharing.pull import pull

    _refuse(rest, "pull")
    settings = _settings(options)
    if "rows" in settings:
        _print_rewritten(pull_rows(**settings))
    elif "shards" in settings:
        _print_rewritten(pull(**settings))
    else:
        _print_cache(pull(**settings))


def _import(options: argparse.Namespace, rest: list[str]) -> None:
    _refuse(rest, "import")
    with _engines_needed():
        from logitcache.exchange.importing import import_logits

    _print_cache(import_logits(**_settings(options)))


def _export(options: argparse.Namespace, rest: list[str]) -> None:
    from logitcache.exchange.exporting import export

    _refuse(rest, "export")
    exported = export(**_settings(options))
    print(f"exported   {exported.path}")
    print(f"rows       {exported.num_rows:,}")
    print(f"positions  {exported.num_positions:,}")
    print(f"bytes      {exported.num_bytes:,}")


def _info(options: argparse.Namespace, rest: list[str]) -> None:
    from logitcache.maintenance.info import describe

    _refuse(rest, "info")
    print(printable(describe(options.path)))


def _view(options: argparse.Namespace, rest: list[str]) -> None:
    from logitcache.report.page import view

    _refuse(rest, "view")
    page = view(**_settings(options))
    shown = f"{page.num_rows:,} of {page.of_rows:,} rows, {page.num_tokens:,} tokens of them"
    print(f"page       {page.path} ({page.num_bytes:,} bytes), which shows {shown}")


def _verify(options: argparse.Namespace, rest: list[str]) -> int:
    from logitcache.maintenance.verify.findings import Report
    from logitcache.maintenance.verify.verify import verify

    settings = _settings(options)
    path, num_rows = settings.pop("path"), settings.pop("rescore", None)
    against = settings.pop("against", None)
    if num_rows is None:
        _refuse(rest, "verify")
        if settings:
            raise UserError(f"--{next(iter(settings)).replace('_', '-')} needs --rescore")
    verification, report = verify(path, against), Report()
    to_rescore = num_rows is not None and not verification.is_another
    rescoring = _rescoring(path, num_rows, settings, rest) if to_rescore else None
    for finding in verification:
        report.add(finding)
    if rescoring is not None and not report:
        rescored = rescoring.run()
        print(rescored.table(), end="\n\n")
        for finding in rescored.findings():
            report.add(finding)
    elif num_rows is not None:
        print("logitcache: no row is scored again before these are mended", file=sys.stderr)
    if report:
        print(printable(report.text()), end="\n\n")
    print(f"{len(report):,} finding{'s' * (len(report) != 1)}: {verification.summary()}")
    return 1 if report else 0


def _rescoring(path: str, num_rows: int, settings: dict[str, Any], rest: list[str]) -> Rescoring | None:
    """Settled before the long check, which a mistyped teacher must not follow. None where the check will say why not."""
    with _engines_needed():
        from logitcache.capture.options import parse_engine_options
        from logitcache.capture.rescore import prepare_rescoring

    engine_options = parse_engine_options(rest)
    try:
        cache = open_cache(path)
    except UserError:
        return None
    return prepare_rescoring(cache, num_rows, **settings, **engine_options)


_COMMANDS: dict[str, Callable[[argparse.Namespace, list[str]], int | None]] = {
    "build": _build,
    "plan": _plan,
    "finish": _finish,
    "recode": _recode,
    "slice": _slice,
    "merge": _merge,
    "import": _import,
    "export": _export,
    "push": _push,
    "pull": _pull,
    "info": _info,
    "view": _view,
    "verify": _verify,
}
_CONTINUED = _COMMANDS.keys() - {"plan", "info", "view", "verify", "export"}


@contextmanager
def _engines_needed() -> Iterator[None]:
    """Around the import of what makes a cache."""
    # Before transformers and vLLM are imported, which read these.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")  # of vLLM's processes
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install 'logitcache[capture]' (or [vllm])") from error


def _refuse(rest: list[str], command: str) -> None:
    """Raises UserError for arguments that nobody knows."""
    if rest:
        raise UserError(f"unknown argument {rest[0]} (`logitcache {command} --help` lists the options)")


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(options).items() if name != "command"}


def _print_cache(cache: LogitCache) -> None:
    manifest = cache.manifest
    print(f"cache      {cache.path}")
    print(f"sequences  {len(cache):,}")
    print(f"positions  {cache.num_positions:,}")
    positions = max(cache.num_positions, 1)
    print(
        f"entries    {manifest.num_entries / positions:.1f} per position, {1 - manifest.mean_tail_mass:.2%} of the mass"
    )
    print(f"bytes      {manifest.num_bytes:,} ({manifest.num_bytes / positions:.0f} per position)")
    print(f"identity   {cache.identity}")


def _print_rewritten(cache: LogitCache) -> None:
    """The cache, and what the last step of its history changed."""
    _print_cache(cache)
    step = cache.manifest.history[-1]
    num_bytes, num_rows = (sum(source[name] for source in step["from"]) for name in ("bytes", "sequences"))
    duplicates = f", {step['duplicates']:,} duplicates left out" if "duplicates" in step else ""
    print(
        f"changed    {num_bytes:,} → {cache.manifest.num_bytes:,} bytes, {num_rows:,} → {len(cache):,} sequences{duplicates}"
    )
