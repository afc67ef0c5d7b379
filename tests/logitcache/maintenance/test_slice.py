"""Some rows of a cache: by number, by id, by expression, at random."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import logitcache
from logitcache import LogitCache, UserError
from logitcache.cli import main
from logitcache.format.layout import Layout
from tests.helpers.maintained import assert_same_row, contents, history, make_cache
from tests.helpers.smallcaches import COLUMNS, EVERYTHING, VOCAB, layouts, random_rows, scored_rows, small, write_cache

LAYOUT = Layout(VOCAB, columns=COLUMNS)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> LogitCache:
    return make_cache(tmp_path_factory.mktemp("source") / "cache", random_rows(40, LAYOUT), LAYOUT)


def numbers(part: LogitCache, source: LogitCache) -> list[int]:
    """Rows of the source that a part holds."""
    ids = [sequence.row_id for sequence in source]
    return [ids.index(sequence.row_id) for sequence in part]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "expected"), [("0:3", range(3)), ("5:30", range(5, 30)), (":2", range(2)), ("38:", range(38, 40))]
)
def test_rows_by_number_are_those_of_a_python_range(
    source: LogitCache, tmp_path: Path, rows: str, expected: range
) -> None:
    part = logitcache.slice(source.path, tmp_path / "out", rows=rows)
    assert numbers(part, source) == list(expected)
    for row, number in zip(part, expected, strict=True):
        assert_same_row(row, source[number])


@pytest.mark.slow
@small
@given(data=st.data())
def test_a_slice_of_everything_is_the_same_in_any_layout_and_precision(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    layout = data.draw(layouts())
    root = tmp_path_factory.mktemp("slice")
    rows = data.draw(scored_rows(layout))
    assume(any(len(targets) for _, targets in rows))
    whole = write_cache(root / "whole", rows, layout)
    part = logitcache.slice(whole.path, root / "part", rows=":", shard_positions=3)
    assert part.manifest.layout == whole.manifest.layout
    for ours, theirs in zip(part, whole, strict=True):
        assert_same_row(ours, theirs)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("3", r"--rows 3: write A:B"),
        ("-3:", r"--rows -3:: write A:B"),
        ("a:b", "write A:B"),
        ("10:10", "0 ≤ A < B ≤ 40 is needed"),
        ("10:41", r"the cache has rows 0…39"),
        ("50:", "is needed"),
    ],
)
def test_ranges_that_are_none_are_refused(source: LogitCache, tmp_path: Path, rows: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        logitcache.slice(source.path, tmp_path / "out", rows=rows)
    assert not (tmp_path / "out").exists()


def test_rows_by_id_come_in_the_order_of_the_cache(source: LogitCache, tmp_path: Path) -> None:
    wanted = [31, 4, 17, 4]
    (tmp_path / "ids").write_text("\n".join(source[i].row_id for i in wanted) + "\n\n" + source[8].row_id.upper())
    part = logitcache.slice(source.path, tmp_path / "out", row_ids=tmp_path / "ids")
    assert numbers(part, source) == [4, 8, 17, 31]


def test_ids_that_end_in_zero_bytes_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "ids").write_text("ab" + "0" * 30)
    cache = make_cache(tmp_path / "cache", random_rows(2, LAYOUT), LAYOUT)
    with pytest.raises(UserError, match=f"1 of 1 ids are not in .*cache: ab{'0' * 30}$"):
        logitcache.slice(cache.path, tmp_path / "out", row_ids=tmp_path / "ids")


def test_unknown_ids_are_counted_and_the_first_are_named(source: LogitCache, tmp_path: Path) -> None:
    unknown = [f"{i:032x}" for i in range(5)]
    (tmp_path / "ids").write_text("\n".join([source[3].row_id, *unknown]))
    with pytest.raises(UserError, match=rf"5 of 6 ids are not in .*: {unknown[0]}, {unknown[1]}, {unknown[2]}, …$"):
        logitcache.slice(source.path, tmp_path / "out", row_ids=tmp_path / "ids")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"0123\n", "line 1: '0123' is no row id, which has 32 hexadecimal digits"),
        (b"\n" + b"g" * 32, "line 2: 'g"),
        (b"\xff\xfe", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_files_that_hold_no_ids_are_refused(
    source: LogitCache, tmp_path: Path, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "ids").write_bytes(content)
    with pytest.raises(UserError, match=message):
        logitcache.slice(source.path, tmp_path / "out", row_ids=tmp_path / "ids")


def test_an_empty_list_of_ids_selects_nothing(source: LogitCache, tmp_path: Path) -> None:
    (tmp_path / "ids").touch()
    with pytest.raises(UserError, match="no row with a stored position is selected, nothing is written"):
        logitcache.slice(source.path, tmp_path / "out", row_ids=tmp_path / "ids")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "meets"),
    [
        ("id >= 10 AND id < 20", lambda s: s.columns["id"] is not None and 10 <= s.columns["id"] < 20),
        ("url LIKE '%/1_' OR flag", lambda s: _two_digits(s.columns["url"]) or bool(s.columns["flag"])),
        ("score IS NULL", lambda s: s.columns["score"] is None),
        ("num_tokens < 6", lambda s: len(s.input_ids) < 6),
        ("num_positions = 1 -- only short ones", lambda s: len(s.positions) == 1),
        ("row_id < '8'", lambda s: s.row_id < "8"),
        ("NOT flag", lambda s: s.columns["flag"] is False),
    ],
)
def test_an_expression_selects_the_rows_that_meet_it(
    source: LogitCache, tmp_path: Path, where: str, meets: Any
) -> None:
    part = logitcache.slice(source.path, tmp_path / "out", where=where)
    expected = [i for i, sequence in enumerate(source) if meets(sequence)]
    assert expected
    assert numbers(part, source) == expected


def _two_digits(url: str | None) -> bool:
    return url is not None and len(url.rsplit("/", 1)[1]) == 2 and url.rsplit("/", 1)[1][0] == "1"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "message"),
    [
        (
            "nope = 3",
            r'--where .*"nope" not found.*\(columns: row_id, num_tokens, num_positions, id, url, score, flag\)',
        ),
        ("id >", "Parser Error"),
        ("", "Parser Error"),
        ("id = 1; DROP TABLE x", "Parser Error"),
        ("id = 1) OR (1 = 1", "Parser Error"),
        ("sum(id) > 1", "WHERE clause cannot contain aggregates"),
        ("url", "Could not convert string"),
        ("id > (SELECT count(*) FROM read_csv('/etc/passwd'))", "file system operations are disabled"),
        ("id > (SELECT count(*) FROM '/etc/passwd')", "Error"),
        ('id IN (SELECT id FROM "table")', "table does not exist"),  # a variable of the function that asks DuckDB
        ("input_ids[1] = 3", "not found"),
        ("id = $1", "Invalid Input Error"),
    ],
)
def test_an_expression_reaches_these_columns_and_nothing_else(
    source: LogitCache, tmp_path: Path, where: str, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        logitcache.slice(source.path, tmp_path / "out", where=where)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_where_without_duckdb_says_what_to_install(
    source: LogitCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "duckdb", None)
    with pytest.raises(UserError, match=r"--where needs DuckDB: pip install 'logitcache\[sql\]'"):
        logitcache.slice(source.path, tmp_path / "out", where="id = 1")


@pytest.mark.slow
def test_a_sample_depends_on_the_ids_and_the_seed_alone(tmp_path: Path) -> None:
    rows = random_rows(60, LAYOUT)
    one = make_cache(tmp_path / "one", rows, LAYOUT)
    other = make_cache(tmp_path / "other", rows[::-1], LAYOUT, rows_per_shard=50)
    drawn = [
        {sequence.row_id for sequence in logitcache.slice(cache.path, tmp_path / f"{name}{seed}", sample=5, seed=seed)}
        for name, cache in (("a", one), ("b", other))
        for seed in (0, 1)
    ]
    assert len(drawn[0]) == 5
    assert drawn[0] == drawn[2]
    assert drawn[1] == drawn[3]
    assert drawn[0] != drawn[1]


@pytest.mark.slow
def test_samples_draw_every_row_equally_often(tmp_path: Path) -> None:
    source = make_cache(tmp_path / "cache", random_rows(20, LAYOUT), LAYOUT, rows_per_shard=20, row_group_bytes=1 << 20)
    counts = np.zeros(20)
    for seed in range(60):
        part = logitcache.slice(source.path, tmp_path / "out", sample=5, seed=seed, overwrite=True)
        drawn = numbers(part, source)
        assert drawn == sorted(drawn)
        counts[drawn] += 1
    chi_square = ((counts - 15) ** 2 / 15).sum() / (1 - 5 / 20)
    assert chi_square < 45.3  # 0.1 % of the distribution with 19 degrees of freedom


@pytest.mark.parametrize(("sample", "message"), [(41, "--sample 41: only 40 rows to draw from"), (0, "at least 1 row")])
def test_samples_of_more_than_there_is_are_refused(
    source: LogitCache, tmp_path: Path, sample: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        logitcache.slice(source.path, tmp_path / "out", sample=sample)


def test_a_seed_below_0_is_refused(source: LogitCache, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--seed -1: choose 0 or more"):
        logitcache.slice(source.path, tmp_path / "out", sample=3, seed=-1)


def test_columns_that_sql_takes_for_one_are_refused(tmp_path: Path) -> None:
    layout = Layout(VOCAB, columns={"id": "int64", "ID": "int64"})
    cache = make_cache(tmp_path / "cache", random_rows(3, Layout(VOCAB)), layout)
    with pytest.raises(UserError, match="--where: SQL takes the columns id and ID for one"):
        logitcache.slice(cache.path, tmp_path / "out", where="ID = 7")


def test_what_duckdb_makes_of_ctrl_c_stops_the_command(
    source: LogitCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: str) -> None:
        raise RuntimeError("Query interrupted")

    monkeypatch.setattr("duckdb.SQLExpression", interrupted)
    assert main(["slice", source.path, "--out", str(tmp_path / "out"), "--where", "id > 3"]) == 130
    assert capsys.readouterr().err.endswith("stopped; the same command continues where it was\n")
    assert not (tmp_path / "out").exists()


def test_conditions_hold_together(source: LogitCache, tmp_path: Path) -> None:
    (tmp_path / "ids").write_text("\n".join(source[i].row_id for i in range(0, 40, 2)))
    part = logitcache.slice(
        source.path, tmp_path / "out", rows="10:30", row_ids=tmp_path / "ids", where="num_tokens > 3", sample=4
    )
    found = numbers(part, source)
    assert len(found) == 4
    assert all(10 <= row < 30 and row % 2 == 0 and len(source[row].input_ids) > 3 for row in found)


def test_nothing_is_written_where_no_row_matches(
    source: LogitCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["slice", source.path, "--out", str(tmp_path / "out"), "--where", "id < 0"]) == 2
    assert "logitcache slice: no row with a stored position is selected" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_to_slice_by_is_refused(source: LogitCache, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to slice by: give --rows, --row-ids, --where or --sample"):
        logitcache.slice(source.path, tmp_path / "out")


def test_the_history_says_what_was_chosen(tmp_path: Path) -> None:
    source = make_cache(tmp_path / "cache", random_rows(20, EVERYTHING), EVERYTHING)
    part = logitcache.slice(source.path, tmp_path / "a", rows="2:12", where="num_tokens > 1")
    part = logitcache.slice(part.path, tmp_path / "b", sample=3, seed=5)
    first, second = history(part)
    assert (first["command"], first["rows"], first["where"]) == ("slice", "2:12", "num_tokens > 1")
    assert (first["sequences"], first["left_out"]) == (10, 10)
    assert (second["sample"], second["seed"], second["sequences"]) == (3, 5, 3)
    assert second["from"][0]["path"] == str(tmp_path / "a")
    assert second["created_by"].startswith("logitcache ")


def test_the_command_prints_the_cache_and_what_changed(
    source: LogitCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["slice", source.path, "--rows", "0:10", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "sequences  10\n" in printed
    assert printed.endswith(" bytes, 40 → 10 sequences\n")
    assert "README.md" in contents(tmp_path / "out")
    assert main(["slice", source.path, "--rows", "0:10", "--out", str(tmp_path / "out"), "--nonsense"]) == 2
    assert "unknown argument --nonsense (`logitcache slice --help` lists the options)" in capsys.readouterr().err
