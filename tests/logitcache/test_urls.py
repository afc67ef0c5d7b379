"""What may be shown of a URL."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitcache import UserError
from logitcache.errors import one_line, printable
from logitcache.urls import public_url, split_query, without_secrets

CASES = {
    "http://host/cache": "http://host/cache",
    "http://user:secret@host:8080/cache": "http://host:8080/cache",
    "https://secret@host/cache?sig=secret#secret": "https://host/cache",
    "http://user:sec/ret@host/cache": "http://host/cache",
    "http://user:sec?ret@host/cache?more": "http://host/cache",
    "http://user:sec::ret@host/cache": "http://host/cache",
    "http://[::1]:80/a@b": "http://[::1]:80/a@b",
    "https://host/package@1.0?secret": "https://host/package@1.0",
    "simplecache::http://user:secret@host/cache?secret": "simplecache::http://host/cache",
    "zip://in.csv::simplecache::https://secret@host/all.zip?secret": "zip://in.csv::simplecache::https://host/all.zip",
    "ftp://user:secret@host/cache": "ftp://host/cache",
    "s3://key:secret@bucket/cache": "s3://bucket/cache",
    "s3://bucket/part-?.parquet": "s3://bucket/part-?.parquet",
    "s3://bucket/cache?X-Amz-Signature=secret": "s3://bucket/cache",
    "s3://arn:aws:s3:eu-west-1:12:accesspoint/x/cache": "s3://arn:aws:s3:eu-west-1:12:accesspoint/x/cache",
    "hf://datasets/ORG/NAME@refs%2Fpr%2F1/part": "hf://datasets/ORG/NAME@refs%2Fpr%2F1/part",
    "abfs://container@account.dfs.core.windows.net/cache": "abfs://container@account.dfs.core.windows.net/cache",
    "abfs://container:secret@account/cache": "abfs://account/cache",
    "/data/what?=x@y#z": "/data/what?=x@y#z",
    "file:///data/what?x=y": "file:///data/what?x=y",
    "cache": "cache",
}


@pytest.mark.parametrize(("url", "shown"), CASES.items())
def test_user_name_password_query_and_fragment_are_left_out(url: str, shown: str) -> None:
    assert public_url(url) == shown
    assert public_url(shown) == shown
    assert "secret" not in shown


@pytest.mark.parametrize(("url", "shown"), CASES.items())
def test_a_text_that_quotes_a_url_is_shown_without_its_secrets(url: str, shown: str) -> None:
    if "://" not in url or url.startswith("file:"):
        return
    for text in ("{}", "403, url='{}'", "({}): no, {}!", "--data={}", "see {}."):
        assert without_secrets(text.format(url, url)) == text.format(shown, shown)


def test_messages_of_errors_and_lines_for_a_terminal_hold_no_secrets() -> None:
    url = "http://user:secret@host/cache?sig=secret"
    assert str(UserError(f"{url}: does not answer")) == "http://host/cache: does not answer"
    assert one_line(ValueError(f"403,\n url='{url}'")) == "403, url='http://host/cache'"
    assert printable(f"{url}\n\x1b") == "http://host/cache\n\\x1b"


names = st.text("abcdefghijklmnop-_.~%", min_size=1, max_size=12)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, database=None)
@given(
    st.sampled_from(["http", "https", "ftp", "s3", "gs", "sftp"]),
    names,
    names,
    names,
    st.lists(st.sampled_from(["simplecache", "filecache", "zip"]), max_size=3),
)
def test_whatever_stands_in_a_url_its_secrets_do_not_come_out(
    scheme: str, user: str, host: str, path: str, chain: list[str]
) -> None:
    url = f"{''.join(f'{name}::' for name in chain)}{scheme}://{user}:TOP-SECRET@{host}/{path}?key=TOP-SECRET"
    for shown in (public_url(url), without_secrets(f"error at {url} ({url})")):
        assert "TOP-SECRET" not in shown
        assert f"{host}/{path}" in shown


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("http://host/c.tar.zst?a=b/c", ("http://host/c.tar.zst", "?a=b/c")),
        ("s3://bucket/c?.tar.zst", ("s3://bucket/c?.tar.zst", "")),
        ("simplecache::http://host/c#d", ("simplecache::http://host/c", "#d")),
        ("/data/a?b", ("/data/a?b", "")),
    ],
)
def test_a_query_is_told_from_the_rest(url: str, parts: tuple[str, str]) -> None:
    assert split_query(url) == parts


@pytest.mark.slow
@pytest.mark.parametrize("text", ["a" * 1_000_000, "a::" * 300_000, "http" * 250_000 + "://x", "://" * 300_000])
def test_a_long_text_is_gone_through_once(text: str) -> None:
    assert without_secrets(f"{text} http://user:secret@host/x") == f"{text} http://host/x"
