"""logitcache.verify: everything that is wrong with a cache and, with `rescore`, whether its teacher still agrees with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Unpack

from logitcache.capture.options import TeacherOptions, passes_on_to
from logitcache.capture.rescore import prepare_rescoring
from logitcache.errors import UserError
from logitcache.maintenance.verify.findings import Report
from logitcache.maintenance.verify.verification import Verification
from logitcache.reading.cache import LogitCache, open_cache, path_of


class RescoringOptions(TeacherOptions, total=False):
    """Options of a rescoring beside its number of rows."""

    seed: int
    teacher: str | None


@passes_on_to(prepare_rescoring)
def verify(
    path: LogitCache | str | Path,
    *,
    against: str | None = None,
    rescore: int | None = None,
    **options: Unpack[RescoringOptions],
) -> Report:
    """Reads a whole cache and reports everything that is wrong with it.

    What is damaged does not keep the rest from being checked. Memory and disk are bounded. The options below `rescore` need it.

    Args:
        path: A cache, or its folder or URL.
        against: Identity that the cache must have. If it has another, that is the only finding, and nothing else is read.
        rescore: Number of random rows that the teacher scores once more, if the cache has no other finding.
        seed: Random seed for choosing the rows.
        teacher: Model name or folder. None: the teacher of the cache's fingerprint.
        backend: As of `logitcache.build`, like the options below.
        capture_route: Of vLLM.
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
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if rescore is None and (needing := [name for name, value in given.items() if value is not False]):
        raise UserError(f"--{needing[0].replace('_', '-')} needs --rescore")
    path = path_of(path)
    verification, rescoring = Verification(path, against), None
    if rescore is not None and not verification.is_another:
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
