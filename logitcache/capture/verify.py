"""logitcache.verify: everything that is wrong with a cache and, with `rescore`, whether its teacher still agrees with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Unpack

from logitcache.capture.options import EngineOptions
from logitcache.errors import UserError
from logitcache.maintenance.verify.findings import Report
from logitcache.maintenance.verify.verify import Verification
from logitcache.reading.cache import LogitCache, open_cache, path_of


def verify(
    path: LogitCache | str | Path,
    *,
    against: str | None = None,
    rescore: int | None = None,
    seed: int | None = None,
    teacher: str | None = None,
    backend: str | None = None,
    capture_route: str | None = None,
    base_url: str | None = None,
    model: str | None = None,
    revision: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    **engine_options: Unpack[EngineOptions],
) -> Report:
    """Reads a whole cache and reports everything that is wrong with it.

    What is damaged does not keep the rest from being checked. Memory and disk are bounded. The options below `rescore` need it.

    Args:
        path: A cache, or its folder or URL.
        against: Identity that the cache must have. If it has another, that is the only finding, and nothing else is read.
        rescore: Number of random rows that the teacher scores once more, if the cache has no other finding.
        seed: Random seed for choosing the rows. None: 0.
        teacher: Model name or folder. None: the teacher of the cache's fingerprint.
        backend: As of `logitcache.build`, like the options below. None: "auto".
        capture_route: None: "auto".
        base_url: Address of the server, with backend "openai".
        model: Name by which the server serves the teacher.
        revision: Branch, tag or commit of the model. None: that of the cache's fingerprint.
        dtype: Of the teacher's weights. None: that of the cache's fingerprint.
        trust_remote_code: Runs code that comes with the model.
        attn_implementation: Of transformers. None: an implementation that computes all that the model's configuration says.
        **engine_options: Options of vLLM under their own names.

    Returns:
        The findings, of which there are `len(report)`; `text()`, `rescored` and `summary` are for people.

    Raises:
        UserError: There is no cache, the identity or an option is none, the teacher is not the cache's or does not load, or
            the store stops answering.
    """
    named = {
        "seed": seed,
        "teacher": teacher,
        "backend": backend,
        "capture_route": capture_route,
        "base_url": base_url,
        "model": model,
        "revision": revision,
        "dtype": dtype,
        "trust_remote_code": trust_remote_code or None,
        "attn_implementation": attn_implementation,
    }
    given: dict[str, Any] = {name: value for name, value in named.items() if value is not None} | engine_options
    if given and rescore is None:
        raise UserError(f"--{next(iter(given)).replace('_', '-')} needs --rescore")
    path = path_of(path)
    verification, rescoring = Verification(path, against), None
    if rescore is not None and not verification.is_another:
        from logitcache.capture.rescore import prepare_rescoring

        try:
            cache = open_cache(path)
        except UserError:  # the check will say what is wrong
            cache = None
        if cache is not None:  # before the long check, which a mistyped teacher must not follow
            rescoring = prepare_rescoring(cache, rescore, **given)
    report = Report()
    for finding in verification:
        report.add(finding)
    if rescoring is not None and not report:
        rescored = rescoring.run()
        report.rescored = rescored.table()
        for finding in rescored.findings():
            report.add(finding)
    report.summary = verification.summary()
    return report
