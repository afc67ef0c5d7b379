"""A refusal of the Hugging Face Hub becomes one line that says what to do."""

from __future__ import annotations

from collections.abc import Iterator

from logitcache.errors import one_line

LOG_IN = "log in with `hf auth login` or set HF_TOKEN"
_PASSING = (408, 429)
"""Time-out and too many requests: the same may succeed later."""


def hub_refusal(error: BaseException, url: str) -> str | None:
    """Says why the Hub refused a request to `url`, from what huggingface_hub raised; None if the error is of another kind."""
    if not url.startswith("hf://"):
        return None
    from huggingface_hub import errors

    for cause in _causes(error):
        if isinstance(cause, errors.HFValidationError):
            return f"{url}: no such name on the Hub; a dataset is hf://datasets/ORG/NAME, of letters, digits, `-`, `_` and `.`"
        if isinstance(cause, errors.OfflineModeIsEnabled):
            return f"{url} cannot be reached: HF_HUB_OFFLINE is set"
        if not isinstance(cause, errors.HfHubHTTPError):
            continue
        status = cause.response.status_code
        if isinstance(cause, errors.GatedRepoError):
            return f"{url} is gated: ask for access on its page, then {LOG_IN}"
        if isinstance(cause, errors.RevisionNotFoundError):
            return f"{url}: the repository has no such revision; a branch, a tag or a commit id goes after the @"
        if status == 401 and "credentials" in (cause.server_message or ""):
            return f"{url}: the Hub does not know this token; {LOG_IN} anew"
        if status == 401 or cause.response.headers.get("X-Error-Code") == "RepoNotFound":
            datasets = "" if url.startswith("hf://datasets/") else " (a dataset is hf://datasets/ORG/NAME)"
            return f"{url} does not exist{datasets}, or is private: {LOG_IN}, of an account that may read it"
        if status == 403:
            why = " ".join((cause.server_message or str(cause)).split())
            return f"{url}: this token has no permission ({why}); {LOG_IN}, of an account that has it"
        if 400 <= status < 500 and status not in _PASSING:
            return f"{url}: the Hub refuses this ({one_line(cause)})"
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yields the error and what it was raised from, outermost first."""
    while error is not None:
        yield error
        error = error.__cause__
