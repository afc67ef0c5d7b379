"""A cache goes to a dataset repository of the Hugging Face Hub: blobs ahead, then one commit that shows them all at once."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from logitcache.errors import UserError, one_line
from logitcache.storage.hub_errors import LOG_IN, hub_refusal
from logitcache.storage.regular_files import regular_file

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

logger = logging.getLogger("logitcache")

UPLOAD_BYTES = 1 << 30
"""Files whose upload is finished together: the most that an interrupted push sends again."""


def push_to_hub(
    cache: Path, names: Sequence[str], remove: Sequence[str], url: str, *, private: bool, message: str
) -> str:
    """Uploads files of a local cache and makes them, and the removal of others, visible in one commit. Returns its id.

    names: relative to `cache`.  remove: files of the repository.  url: hf://datasets/ORG/NAME[@BRANCH].  private: whether only
    its organisation reads the repository, if this makes it. The Hub knows blobs by their content: what an interrupted push sent
    is not sent again. Raises UserError for another form of URL, without a login or a permission, if somebody else pushed
    meanwhile, and if the connection breaks more often than huggingface_hub tries.
    """
    repo_id, branch = parse_dataset_url(url)
    try:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install 'logitcache[hub]'") from error
    if get_token() is None:
        raise UserError(f"{url}: nobody is logged in to the Hub; {LOG_IN}")
    with _refusing(url):
        api = HfApi(library_name="logitcache")
        head = _head(api, repo_id, branch, private)
        additions = [CommitOperationAdd(name, regular_file(cache, name)) for name in names]
        for batch in _batches(additions):
            api.preupload_lfs_files(repo_id, batch, repo_type="dataset", revision=branch)
        deletions = [CommitOperationDelete(name) for name in remove]
        if not additions and not deletions:
            return head
        return api.create_commit(
            repo_id,
            [*deletions, *additions],
            commit_message=message,
            repo_type="dataset",
            revision=branch,
            parent_commit=head,
        ).oid


def parse_dataset_url(url: str) -> tuple[str, str | None]:
    """Reads "ORG/NAME" and the branch of hf://datasets/ORG/NAME[@BRANCH]. Raises UserError for any other form."""
    match = re.fullmatch(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?/?", url)
    if match is None:
        raise UserError(f"{url}: a cache is pushed to a dataset repository, hf://datasets/ORG/NAME or …/NAME@BRANCH")
    return match[1], unquote(match[2]) if match[2] else None


def _head(api: HfApi, repo_id: str, branch: str | None, private: bool) -> str:
    """Returns the commit that the push goes on top of; makes the repository, unless a branch of it is named."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        info = api.repo_info(repo_id, repo_type="dataset", revision=branch)
        if info.private is not None and info.private != private:
            is_now = "private" if info.private else "public"
            logger.info(
                "%s is %s already and stays so: the repository's settings on the Hub change that", repo_id, is_now
            )
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        if branch is not None:
            raise
        api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        info = api.repo_info(repo_id, repo_type="dataset")
    assert info.sha is not None
    return info.sha


def _batches(additions: Sequence[CommitOperationAdd]) -> Iterator[list[CommitOperationAdd]]:
    """Yields files in order, `UPLOAD_BYTES` and the rest of the last file at a time."""
    batch: list[CommitOperationAdd] = []
    num_bytes = 0
    for addition in additions:
        batch.append(addition)
        num_bytes += addition.upload_info.size
        if num_bytes >= UPLOAD_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


@contextmanager
def _refusing(url: str) -> Iterator[None]:
    """Raises UserError for whatever huggingface_hub raises in the block."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of httpx, of xet, its own
        if getattr(getattr(error, "response", None), "status_code", None) == 412:
            raise UserError(f"{url}: somebody else pushed to it meanwhile; the same command compares again") from error
        if refusal := hub_refusal(error, url):
            raise UserError(refusal) from error
        cause = error.__cause__ or error
        raise UserError(
            f"{url}: the push broke off ({one_line(cause)}); the same command continues, what the Hub has is not sent again"
        ) from error
