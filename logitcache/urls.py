"""URLs are shown and recorded without what lets their reader in."""

from __future__ import annotations

import re

_SCHEME = r"[A-Za-z][A-Za-z0-9+.\-]{0,30}"
_LINK = re.compile(rf"(?P<scheme>{_SCHEME})://(?P<rest>.*?)(?=::{_SCHEME}::|::{_SCHEME}://|$)", re.DOTALL)
"""One URL of a chain such as `simplecache::http://…`."""
_QUOTED = re.compile(rf"(?:{_SCHEME}::){{0,4}}{_SCHEME}://[^\s\"<>`]+")
_LOCAL = ("file", "local")
_NAMED_BEFORE_AT = ("hf", "abfs", "abfss")
"""A repository before its revision, a container before its account: where no password follows, this is a name."""
_WEB = ("http", "https", "ftp", "webdav", "webhdfs")


def public_url(url: str) -> str:
    """Returns a path or URL without user name, password, query and fragment; a path on this machine as it is.

    On the web all from the first `?` or `#` on is left out. In an object store, where names and patterns have these characters,
    a query is what begins as `?NAME=`. Every URL of a chain (`simplecache::http://…`) is treated so.
    """
    return _LINK.sub(_public, url)


def split_query(url: str) -> tuple[str, str]:
    """Splits a path or URL before its query or fragment, which is empty if it has none."""
    *_, last = [None, *_LINK.finditer(url)]
    found = None if last is None or _is_local(last) else _query_of(last["scheme"]).search(url, last.start("rest"))
    return (url[: found.start()], url[found.start() :]) if found else (url, "")


def without_secrets(text: str) -> str:
    """Returns a text with `public_url` in the place of every URL that it quotes."""
    return _QUOTED.sub(_quoted, text) if "://" in text else text


def _public(link: re.Match[str]) -> str:
    scheme, rest = link["scheme"].lower(), link["rest"]
    if _is_local(link):
        return link[0]
    authority = re.split("[/?#]", rest, maxsplit=1)[0]
    user, at, _ = authority.rpartition("@")
    if at and not (scheme in _NAMED_BEFORE_AT and ":" not in user):
        rest = rest[len(user) + 1 :]
    elif not at and re.search(
        r":(?!\d*$)", re.sub(r"^\[.*\]", "", authority)
    ):  # a password with a `/`, `?` or `#` in it
        rest = rest.rpartition("@")[2]
    return f"{link['scheme']}://{_query_of(scheme).sub('', rest)}"


def _is_local(link: re.Match[str]) -> bool:
    return link["scheme"].lower() in _LOCAL


def _query_of(scheme: str) -> re.Pattern[str]:
    return re.compile(r"[?#].*" if scheme.lower() in _WEB else r"\?[\w.%~\-]+=.*", re.DOTALL)


def _quoted(found: re.Match[str]) -> str:
    """Takes a URL out of a text, without the signs that end the sentence."""
    url = found[0].rstrip("'\").,:;!]}")
    return public_url(url) + found[0][len(url) :]
