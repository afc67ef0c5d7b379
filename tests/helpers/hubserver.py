"""A stand-in for the Hugging Face Hub: the endpoints that our calls make, with its rules, spoken to over HTTP on loopback.

Blobs travel by LFS's basic transfer; the Hub's own binary protocol, xet, is switched off by HF_HUB_DISABLE_XET.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml

LFS_SUFFIXES = (".parquet",)
"""What a dataset repository's `.gitattributes` names, of what a cache holds."""
LFS_BYTES = 10_000_000
"""A larger file of any name goes by LFS."""
PAGE_SIZE = 3
"""Entries of a listing in one answer; the Hub's 1,000 would never need a second here."""
GIT_ATTRIBUTES = b"*.parquet filter=lfs diff=lfs merge=lfs -text\n"


class Refused(Exception):
    """An answer that is an error. code: the Hub's `X-Error-Code`."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Blob(NamedTuple):
    """A file of a commit. sha256: None for one that git itself holds."""

    content: bytes
    sha256: str | None

    @property
    def oid(self) -> str:
        """git's id: of the file, or of the pointer that LFS leaves in its place."""
        content = self.content
        if self.sha256:
            content = b"version https://git-lfs.github.com/spec/v1\noid sha256:%b\nsize %d\n" % (
                self.sha256.encode(),
                len(self.content),
            )
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Commit(NamedTuple):
    """One state of a repository."""

    oid: str
    title: str
    files: dict[str, Blob]


@dataclass
class Repository:
    """branches: commits of each, oldest first.  blobs: LFS's, by SHA-256, from before a commit names them."""

    private: bool
    gated: bool = False
    branches: dict[str, list[Commit]] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)

    def commit(self, branch: str, title: str, files: dict[str, Blob]) -> str:
        """Adds a commit, all of whose files appear at once. Returns its id."""
        history = self.branches.setdefault(branch, [])
        state = json.dumps([title, len(history), {name: blob.oid for name, blob in files.items()}], sort_keys=True)
        history.append(Commit(hashlib.sha1(state.encode()).hexdigest(), title, files))
        return history[-1].oid

    def at(self, revision: str) -> Commit:
        """Last commit of a branch, or the one of an id."""
        if revision in self.branches:
            return self.branches[revision][-1]
        for history in self.branches.values():
            for commit in history:
                if commit.oid == revision:
                    return commit
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")


class HubServer:
    """repositories: by "ORG/NAME".  requests: "METHOD path" of all, in order.  uploaded: sizes of the blobs received whole.

    writers, readers: for every token the organisations whose repositories it may write, and read.
    whole_uploads: blobs that are received before every upload's connection is closed in the middle; None: all.
    was_cut: a connection was closed so, and those blobs have been kept.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.writers = {"hf_team_a": {"team-a"}, "hf_team_b": set[str]()}
        self.readers = {"hf_team_a": {"team-a"}, "hf_team_b": {"team-a"}, "hf_stranger": set[str]()}
        self.requests: list[str] = []
        self.uploaded: list[int] = []
        self.whole_uploads: int | None = None
        self.was_cut = threading.Event()
        self.lock = threading.RLock()
        self.receiving = 0
        self.kept = threading.Condition(self.lock)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        """The HF_ENDPOINT."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """What a revision holds."""
        return {name: blob.content for name, blob in self.repositories[repo_id].at(revision).files.items()}

    @contextmanager
    def counting(self) -> Iterator[list[str]]:
        """Yields a list that holds the block's requests after it."""
        before, seen = len(self.requests), list[str]()
        yield seen
        seen.extend(self.requests[before:])

    def close(self) -> None:
        """Ends the server."""
        self._server.shutdown()
        self._server.server_close()


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            self.length = int(self.headers["Content-Length"] or 0)
            self.url = urlsplit(self.path)
            with hub.lock:
                hub.requests.append(f"{self.command} {unquote(self.url.path)}")
            try:
                for method, pattern, answer in _ROUTES:
                    if method == self.command and (match := re.fullmatch(pattern, self.url.path)):
                        answer(self, hub, *(unquote(part) for part in match.groups(default="")))
                        return
                raise Refused(404, f"the stand-in has no {self.command} {self.path}")
            except Refused as error:
                self._body()
                headers = {"X-Error-Message": str(error)} | ({"X-Error-Code": error.code} if error.code else {})
                self.send(error.status, {"error": str(error)}, headers)

        do_GET = do_HEAD = do_POST = do_PUT = _answer

        def _body(self) -> bytes:
            length, self.length = self.length, 0
            return self.rfile.read(length)

        def json(self) -> Any:
            """The request's body."""
            return json.loads(self._body())

        def token(self) -> str | None:
            """The login; refused where nobody has it."""
            token = (self.headers["Authorization"] or "").removeprefix("Bearer ") or None
            if token is not None and token not in hub.readers:
                raise Refused(401, "Invalid credentials in Authorization header")
            return token

        def reading(self, repo_id: str) -> Repository:
            """The repository, for one who may read it; others are not told whether there is one."""
            token, repository = self.token(), hub.repositories.get(repo_id)
            allowed = token is not None and repo_id.split("/")[0] in hub.readers[token]
            if repository is None or (repository.private and not allowed):
                if token is None:
                    raise Refused(401, "Invalid username or password.")
                raise Refused(404, "Repository not found", "RepoNotFound")
            if repository.gated and not allowed:
                raise Refused(403, f"Access to dataset {repo_id} is restricted: request it", "GatedRepo")
            return repository

        def writing(self, repo_id: str) -> Repository:
            """The repository, for one who may write it."""
            repository = self.reading(repo_id)
            self.check_writes(repo_id.split("/")[0])
            return repository

        def check_writes(self, organisation: str) -> None:
            """Refuses who may not write there."""
            token = self.token()
            if token is None:
                raise Refused(401, "Invalid username or password.")
            if organisation not in hub.writers.get(token, ()):
                raise Refused(403, f"You don't have the rights to write under the namespace {organisation}")

        def send(self, status: int, body: Any = b"", headers: dict[str, str] | None = None) -> None:
            """body: bytes, or what becomes JSON."""
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def send_file(self, content: bytes, headers: dict[str, str]) -> None:
            """The file, or the range of it that was asked for."""
            if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or ""):
                start, end = int(match[1]), min(int(match[2] or len(content) - 1), len(content) - 1)
                if start >= len(content):
                    raise Refused(416, f"there are {len(content)} bytes")
                headers = headers | {"Content-Range": f"bytes {start}-{end}/{len(content)}"}
                self.send(206, content[start : end + 1], headers)
            else:
                self.send(200, content, headers | {"Accept-Ranges": "bytes"})

        def receive(self) -> bytes | None:
            """A blob; None where the connection is cut in the middle of it."""
            with hub.lock:
                cut = hub.whole_uploads == 0
                if hub.whole_uploads:
                    hub.whole_uploads -= 1
                hub.receiving += not cut
            if cut:
                self.rfile.read(self.length // 2)
                with hub.kept:
                    hub.kept.wait_for(lambda: not hub.receiving)
                self.close_connection = True
                hub.was_cut.set()
                return None
            return self._body()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler


def _create(handler: Any, hub: HubServer) -> None:
    request = handler.json()
    handler.check_writes(request["organization"])
    assert request["type"] == "dataset"
    repo_id = f"{request['organization']}/{request['name']}"
    answer = {"url": f"{hub.url}/datasets/{repo_id}"}
    with hub.lock:
        if repo_id in hub.repositories:
            handler.send(409, answer | {"error": "You already created this dataset repo"})
            return
        repository = hub.repositories[repo_id] = Repository(request.get("visibility") == "private")
        repository.commit("main", "initial commit", {".gitattributes": Blob(GIT_ATTRIBUTES, None)})
    handler.send(200, answer)


def _info(handler: Any, hub: HubServer, repo_id: str, revision: str) -> None:
    repository = handler.reading(repo_id)
    commit = repository.at(revision or "main")
    siblings = [{"rfilename": name} for name in sorted(commit.files)]
    handler.send(200, {"id": repo_id, "sha": commit.oid, "private": repository.private, "siblings": siblings})


def _validate_card(handler: Any, hub: HubServer) -> None:
    content = handler.json()["content"]
    try:
        match = re.match(r"---\n(.*?\n)---\n", content, re.DOTALL)
        yaml.safe_load(match[1] if match else "")
    except yaml.YAMLError as error:
        handler.send(400, {"errors": [{"message": str(error)}]})
        return
    handler.send(200, {"errors": [], "warnings": []})


def _preupload(handler: Any, hub: HubServer, repo_id: str, revision: str) -> None:
    """Which files go by LFS, and which are there already."""
    commit = handler.writing(repo_id).at(revision)
    answers = []
    for file in handler.json()["files"]:
        known = commit.files.get(file["path"])
        lfs = file["path"].endswith(LFS_SUFFIXES) or file["size"] > LFS_BYTES
        answer = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
        answers.append(answer | ({"oid": known.sha256 or known.oid} if known else {}))
    handler.send(200, {"files": answers})


def _batch(handler: Any, hub: HubServer, repo_id: str) -> None:
    """Where to send which blobs; nowhere for those that are there."""
    repository, request = handler.writing(repo_id), handler.json()
    assert request["operation"] == "upload" and request["hash_algo"] == "sha256"
    objects = []
    for blob in request["objects"]:
        actions = {
            "upload": {"href": f"{hub.url}/lfs-upload/{repo_id}/{blob['oid']}"},  # signed, so it needs no login
            "verify": {"href": f"{hub.url}/datasets/{repo_id}/lfs-verify"},
        }
        objects.append(blob | ({} if blob["oid"] in repository.blobs else {"actions": actions}))
    handler.send(200, {"transfer": "basic", "objects": objects})


def _upload(handler: Any, hub: HubServer, repo_id: str, sha256: str) -> None:
    content = handler.receive()
    if content is None:
        return
    if hashlib.sha256(content).hexdigest() != sha256:
        raise Refused(400, "the content has another SHA-256")
    with hub.lock:
        hub.repositories[repo_id].blobs[sha256] = content
        hub.uploaded.append(len(content))
        hub.receiving -= 1
        hub.kept.notify_all()
    handler.send(200)


def _verify(handler: Any, hub: HubServer, repo_id: str) -> None:
    repository, blob = handler.writing(repo_id), handler.json()
    if len(repository.blobs.get(blob["oid"], b"")) != blob["size"]:
        raise Refused(404, "no such blob")
    handler.send(200)


def _commit(handler: Any, hub: HubServer, repo_id: str, branch: str) -> None:
    """All operations or none."""
    repository = handler.writing(repo_id)
    lines = [json.loads(line) for line in handler._body().splitlines()]
    header = lines.pop(0)["value"]
    with hub.lock:
        parent = repository.at(branch)
        if header.get("parentCommit", parent.oid) != parent.oid:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files = dict(parent.files)
        for line in lines:
            name, value = line["value"]["path"], line["value"]
            if line["key"] == "file":
                files[name] = Blob(base64.b64decode(value["content"]), None)
            elif line["key"] == "lfsFile":
                if len(repository.blobs.get(value["oid"], b"")) != value["size"]:
                    raise Refused(400, f"{name}: the LFS blob {value['oid']} was not uploaded")
                files[name] = Blob(repository.blobs[value["oid"]], value["oid"])
            elif line["key"] == "deletedFile":
                if files.pop(name, None) is None:
                    raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
            else:
                raise Refused(400, f"unknown operation {line['key']}")
        oid = repository.commit(branch, header["summary"], files)
    handler.send(200, {"commitUrl": f"{hub.url}/datasets/{repo_id}/commit/{oid}", "commitOid": oid})


def _tree(handler: Any, hub: HubServer, repo_id: str, revision: str, folder: str) -> None:
    """Files and folders below a folder, a page at a time."""
    commit, query = handler.reading(repo_id).at(revision), parse_qs(handler.url.query)
    prefix = f"{folder}/" if folder else ""
    entries: dict[str, dict[str, Any]] = {}
    for name, blob in sorted(commit.files.items()):
        if not name.startswith(prefix):
            continue
        parts = name.removeprefix(prefix).split("/")
        parents = {prefix + "/".join(parts[:i]) for i in range(1, len(parts))}
        for path in sorted(parents):
            entries[path] = {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest()}
        entries[name] = {"type": "file", "path": name, "size": len(blob.content), "oid": blob.oid}
        if blob.sha256:
            entries[name]["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 134}
    if folder and not entries:
        raise Refused(404, f"{folder} does not exist on {revision}", "EntryNotFound")
    recursive = query.get("recursive") == ["true"]
    found = [entry for path, entry in entries.items() if recursive or "/" not in path.removeprefix(prefix)]
    start = int(query.get("cursor", ["0"])[0])
    headers = {}
    if start + PAGE_SIZE < len(found):
        more = f"{hub.url}{handler.url.path}?recursive={str(recursive).lower()}&cursor={start + PAGE_SIZE}"
        headers["Link"] = f'<{more}>; rel="next"'
    handler.send(200, found[start : start + PAGE_SIZE], headers)


def _resolve(handler: Any, hub: HubServer, repo_id: str, revision: str, name: str) -> None:
    """A file that git holds, or the way to where LFS keeps its blob."""
    commit = handler.reading(repo_id).at(revision)
    if (blob := commit.files.get(name)) is None:
        raise Refused(404, f"{name} does not exist", "EntryNotFound")
    headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.sha256 or blob.oid}"'}
    if blob.sha256 is None:
        handler.send_file(blob.content, headers)
        return
    elsewhere = hub.url.replace("127.0.0.1", "localhost")  # another host, to which no login is sent
    location = {"Location": f"{elsewhere}/lfs-blobs/{repo_id}/{blob.sha256}"}
    handler.send(302, b"", headers | location | {"X-Linked-Size": str(len(blob.content)), "X-Linked-Etag": blob.sha256})


def _blob(handler: Any, hub: HubServer, repo_id: str, sha256: str) -> None:
    assert handler.headers["Authorization"] is None
    handler.send_file(hub.repositories[repo_id].blobs[sha256], {})


def _nothing(handler: Any, hub: HubServer, repo_id: str) -> None:
    """A model or a bucket, of which there are none."""
    raise Refused(404, "Repository not found", "RepoNotFound")


_REPO = r"([^/]+/[^/]+)"
_ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("POST", "/api/repos/create", _create),
    ("POST", "/api/validate-yaml", _validate_card),
    ("GET", rf"/api/datasets/{_REPO}(?:/revision/([^/]+))?", _info),
    ("POST", rf"/api/datasets/{_REPO}/preupload/([^/]+)", _preupload),
    ("POST", rf"/datasets/{_REPO}\.git/info/lfs/objects/batch", _batch),
    ("PUT", rf"/lfs-upload/{_REPO}/(\w+)", _upload),
    ("POST", rf"/datasets/{_REPO}/lfs-verify", _verify),
    ("POST", rf"/api/datasets/{_REPO}/commit/([^/]+)", _commit),
    ("GET", rf"/api/datasets/{_REPO}/tree/([^/]+)(?:/(.+))?", _tree),
    ("GET", rf"/datasets/{_REPO}/resolve/([^/]+)/(.+)", _resolve),
    ("HEAD", rf"/datasets/{_REPO}/resolve/([^/]+)/(.+)", _resolve),
    ("GET", rf"/lfs-blobs/{_REPO}/(\w+)", _blob),
    ("GET", rf"/api/(?:models|buckets)/{_REPO}(?:/.*)?", _nothing),
]


@pytest.fixture(name="hub")
def hub_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The Hub of this process and of those that it starts, logged in as team A."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    server = HubServer()
    for name, value in {
        "HF_ENDPOINT": server.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_TOKEN": "hf_team_a",
    }.items():
        monkeypatch.setenv(name, value)
    # huggingface_hub read these from the environment when it was imported.
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(_http, "time", _NoWaiting)
    yield server
    server.close()


class _NoWaiting:
    """In place of the module `time` where huggingface_hub waits between its attempts."""

    @staticmethod
    def sleep(seconds: float) -> None:
        pass
