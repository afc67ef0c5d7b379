"""A later version, which stores one more number of the tail, leaves all as it is that was made before; and the reverse."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import logitcache
from logitcache.cli import main
from logitcache.format.manifest import fingerprint_digest
from tests.helpers.maintained import contents, make_cache
from tests.helpers.smallcaches import EVERYTHING, random_rows
from tests.logitcache.maintenance.test_rewrite import Stopped, stopped_after

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
FORMAT_1 = ROOT / "tests/data/format1/cache"
MARKS = """
class _Marks(TailPart):
    name, option, layout_key, since = "marks", "tail_marks", "num_tail_marks", 4
    file = "tail_marks.txt"
    fields = (Field("tail_marks", "tail_step", "marks of the tail"),)

    def truncate(self, leaving: Leaving) -> dict[str, Any]:
        return {"tail_marks": leaving.targets.tail_marks}


PARTS: tuple[TailPart, ...] = ("""
ADDED = {
    "targets.py": {
        "    probe_ids: np.ndarray | None = None\n": "    probe_ids: np.ndarray | None = None\n"
        "    tail_marks: np.ndarray | None = None\n"
    },
    "tail_parts.py": {
        "PARTS: tuple[TailPart, ...] = (": MARKS.lstrip(),
        "_Probes())": "_Probes(), _Marks())",
        "    probes: int = 0\n": "    probes: int = 0\n    marks: int = 0\n",
    },
}
"""What CONTRIBUTING.md's checklist asks for, but for a teacher that gives the number and a loss that uses it."""
STORE = """
import sys
from dataclasses import replace
from pathlib import Path
import numpy as np
from logitcache.capture.settings import CaptureSettings
from logitcache.format.layout import Layout
from logitcache.format.tail_parts import TailParts
from logitcache.storage.atomic import file_sha256
from logitcache.storage.folder import Folder
from tests.helpers.maintained import make_cache
from tests.helpers.smallcaches import VOCAB, random_rows

root, parts = Path(sys.argv[1]), TailParts(entropy=True, marks=2)
for name, places in (("a", slice(0, 12)), ("b", slice(8, 20))):
    rows = [
        (sequence, replace(targets, tail_marks=np.float32(np.arange(2 * len(targets))).reshape(-1, 2)))
        for sequence, targets in random_rows(20, Layout(VOCAB, parts))[places]
    ]
    capture = CaptureSettings(8, tail_parts=parts).to_json() | {"shard_positions": 1000}
    cache = make_cache(root / name, rows, Layout(VOCAB, parts), capture=capture)
    (root / name / "tail_marks.txt").write_text("of all positions")
    files = cache.manifest.files | {"tail_marks.txt": file_sha256(root / name / "tail_marks.txt")}
    replace(cache.manifest, files=files).write(Folder(root / name))
"""
RUN = """
import json, sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from logitcache.cli import main

done = []
for command in json.loads(sys.argv[1]):
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        status = main(command)
    done.append((status, out.getvalue(), err.getvalue()))
print(json.dumps(done))
"""


class Later:
    """The later version, made of the source of this one."""

    def __init__(self, home: Path) -> None:
        self._home = home
        shutil.copytree(ROOT / "logitcache", home / "logitcache", ignore=shutil.ignore_patterns("__pycache__"))
        for name, changes in ADDED.items():
            path = home / "logitcache/format" / name
            source = path.read_text(encoding="utf-8")
            for before, after in changes.items():
                assert source.count(before) == 1, before
                source = source.replace(before, after)
            path.write_text(source, encoding="utf-8")

    def python(self, code: str, *arguments: str | Path) -> str:
        """Runs code with it. Returns what the code prints."""
        told = {**os.environ, "PYTHONPATH": os.pathsep.join([str(self._home), str(ROOT)])}
        command = [sys.executable, "-c", code, *map(str, arguments)]
        done = subprocess.run(command, cwd=self._home, env=told, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def __call__(self, *commands: Sequence[object], status: int = 0) -> list[str]:
        """Runs commands, of which the last ends with `status`. Returns what each prints, errors included."""
        done = json.loads(self.python(RUN, json.dumps([[str(word) for word in command] for command in commands])))
        assert [one for one, _, _ in done] == [0] * (len(commands) - 1) + [status], done
        return [out + err for _, out, err in done]


@pytest.fixture(scope="module")
def later(tmp_path_factory: pytest.TempPathFactory) -> Later:
    return Later(tmp_path_factory.mktemp("later"))


@pytest.fixture(scope="module")
def marked(later: Later, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two caches with the number, some of whose rows are the same."""
    root = tmp_path_factory.mktemp("marked")
    later.python(STORE, root)
    return root


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """Two caches without it."""
    rows = random_rows(60, EVERYTHING)
    make_cache(tmp_path / "a", rows[:40], EVERYTHING)
    make_cache(tmp_path / "b", rows[30:], EVERYTHING)
    return tmp_path


def test_old_caches_read_as_before(later: Later, old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    caches = [FORMAT_1, old / "a"]
    *described, first, second = later(*(["info", cache] for cache in caches), *(["verify", cache] for cache in caches))
    for cache, text in zip(caches, described, strict=True):
        main(["info", str(cache)])
        assert text == capsys.readouterr().out
    assert "0 findings" in first and "0 findings" in second


def test_what_is_made_of_old_caches_is_made_byte_for_byte(later: Later, old: Path) -> None:
    sources = [old / "a", old / "b"]
    logitcache.merge(sources, old / "merged", shard_positions=50)
    logitcache.recode(old / "merged", old / "recoded", drop="tail_samples")
    with stopped_after(2), pytest.raises(Stopped):
        logitcache.merge(sources, old / "out", shard_positions=50)
    kept = {path: path.stat().st_mtime_ns for path in (old / "out/data").iterdir()}
    assert len(kept) == 2
    merge = ["merge", *sources, "--shard-positions", "50", "--out"]
    later(
        [*merge, old / "anew"],
        [*merge, old / "out"],
        ["recode", old / "merged", "--drop", "tail_samples", "--out", old / "fewer"],
    )
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert contents(old / "anew") == contents(old / "out") == contents(old / "merged")
    assert contents(old / "fewer") == contents(old / "recoded")


def test_an_unfinished_build_is_continued_and_a_finished_one_left_alone_and_reused(
    later: Later, teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"backend": "transformers", "top_k": 8, "tail_groups": 4, "shard_positions": 400}
    whole = logitcache.build(str(teacher), str(corpus), tmp_path / "whole", **settings)
    with stopped_after(2), pytest.raises(Stopped):
        logitcache.build(str(teacher), str(corpus), tmp_path / "out", **settings)
    before, plan = contents(tmp_path / "whole"), (tmp_path / "out/.build/plan.json").read_text()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/data").iterdir()}
    assert len(kept) == 2 and "tail_samples" in plan

    build = ["build", "--teacher", teacher, "--data", corpus, "--backend", "transformers", "--top-k", "8"]
    build += ["--tail-groups", "4", "--shard-positions", "400", "--out"]
    _, again, copied = later(
        [*build, tmp_path / "out"],
        [*build, tmp_path / "whole"],
        [*build, tmp_path / "copy", "--reuse", tmp_path / "whole"],
    )
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert "is already complete" in again and contents(tmp_path / "whole") == before
    assert "(100 % of the positions)" in copied
    for name in ("out", "copy"):
        manifest = logitcache.open(tmp_path / name).manifest
        assert fingerprint_digest(manifest.fingerprint) == fingerprint_digest(whole.manifest.fingerprint)
        assert manifest.layout.to_json() == whole.manifest.layout.to_json()
    assert [shard.sha256 for shard in manifest.shards] == [shard.sha256 for shard in whole.manifest.shards]


def test_a_cache_with_the_number_is_refused_by_its_format_in_one_line(
    marked: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    expected = (
        f"{marked / 'a'}/logitcache.json is written in cache format 4, this logitcache reads up to format 3: "
        "install a logitcache that reads format 4"
    )
    with pytest.raises(logitcache.UserError) as refused:
        logitcache.open(marked / "a")
    assert str(refused.value) == expected
    for command, *options in (["info"], ["slice", "--rows", "0:3", "--out", str(tmp_path / "c")]):
        assert main([command, str(marked / "a"), *options]) == 2
        assert capsys.readouterr().err.splitlines() == [f"logitcache: error: {expected}"]
    assert main(["verify", str(marked / "a")]) == 1
    assert "newer" in capsys.readouterr().out


def test_the_later_version_keeps_the_number_and_what_drops_it_is_an_old_cache(
    later: Later, marked: Path, tmp_path: Path
) -> None:
    merged, fewer, pulled, dropped = (tmp_path / name for name in ("merged", "fewer", "pulled", "dropped"))
    _, _, _, verified, described, _, refused = later(
        ["merge", marked / "a", marked / "b", "--out", merged],
        ["recode", merged, "--top-k", "4", "--out", fewer],
        ["pull", fewer, "--out", pulled],
        ["verify", pulled],
        ["info", pulled],
        ["recode", pulled, "--drop", "tail_marks", "--out", dropped],
        ["merge", dropped, marked / "b", "--out", tmp_path / "both"],
        status=2,
    )
    assert "0 findings" in verified and "2 marks" in described
    assert (pulled / "tail_marks.txt").read_text() == "of all positions" and not (dropped / "tail_marks.txt").exists()
    assert "num_tail_marks is 0 in" in refused and len(refused.splitlines()) == 1
    cache = logitcache.open(dropped)
    assert len(cache) == len([*cache]) == 20
    assert cache.manifest.fingerprint["format"]["version"] == 2
    assert "tail_marks" not in cache.manifest.fingerprint["capture"]
