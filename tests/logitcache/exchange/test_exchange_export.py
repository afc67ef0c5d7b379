"""Caches leave for other tools: nothing of plain top-k rows is lost, and Axolotl finds every position at its token."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitcache import CachedSequence, LogitCache
from logitcache.cli import main
from logitcache.errors import UserError
from logitcache.exchange.axolotl import NOTHING_NATS
from logitcache.exchange.exporting import export
from logitcache.format.layout import Layout
from logitcache.format.quantization import PRESETS
from logitcache.format.sequences import TokenSequence
from logitcache.format.tail_basis import extended, rebuilt
from logitcache.format.tail_parts import TailParts
from logitcache.format.targets import SparseTargets
from tests.helpers.exchanging import findings, import_topk, write_tokenizer
from tests.helpers.maintained import CAPTURE, assert_same_targets, make_cache
from tests.helpers.objectstore import bucket, s3_endpoint  # noqa: F401  (fixtures)
from tests.helpers.smallcaches import (
    COEFFICIENT_STEP,
    VOCAB,
    Row,
    full_distributions,
    layouts,
    random_rows,
    scored_rows,
    small,
    sparse_targets,
)

CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "what?"},
    {"role": "assistant", "content": "that", "weight": 1},
]
LAYOUT = Layout(VOCAB, columns={"id": "int64", "messages": "string"})
ONE_ENTRY = SparseTargets(
    np.array([[3]], np.int32), np.log([[0.5]]).astype(np.float32), np.log([0.5]).astype(np.float32)
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"), VOCAB)


def chats(count: int, max_entries: int = 8, seed: int = 0) -> list[Row]:
    rows = random_rows(count, replace(LAYOUT, columns={}), seed=seed, max_entries=max_entries)
    kept = [{"id": number, "messages": json.dumps(CHAT[: 1 + number % 2])} for number in range(count)]
    return [(replace(tokens, columns=one), targets) for (tokens, targets), one in zip(rows, kept, strict=True)]


def keeping(root: Path, column_type: str, values: Sequence[Any], name: str = "kept") -> LogitCache:
    """A cache of rows that keep these values, in row groups of one row each."""
    tokens = [TokenSequence(np.array([number, 1], np.int32), np.array([False, True])) for number in range(len(values))]
    rows = [(replace(one, columns={name: value}), ONE_ENTRY) for one, value in zip(tokens, values, strict=True)]
    layout = Layout(VOCAB, columns={name: column_type}, precision="exact")
    return make_cache(root, rows, layout, rows_per_shard=1)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class TestTopK:
    @pytest.mark.slow
    @pytest.mark.parametrize("precision", sorted(PRESETS))
    @pytest.mark.parametrize("kind", ["parquet", "jsonl"])
    def test_imported_again_the_rows_are_the_same(
        self, tmp_path: Path, tokenizer: Path, precision: str, kind: str
    ) -> None:
        cache = make_cache(tmp_path / "cache", chats(30), replace(LAYOUT, precision=precision, quantization=None))
        exported = export(cache, tmp_path / f"rows.{kind}", to="topk")
        assert (exported.num_rows, exported.num_positions, exported.num_left_out) == (30, cache.num_positions, 0)
        again = import_topk(exported.path, tmp_path / "again", tokenizer, precision=precision, keep=["id", "messages"])
        for ours, theirs in zip(again, cache, strict=True):
            assert ours.row_id == theirs.row_id
            assert_same_targets(ours.targets, theirs.targets)
            assert ours.columns == theirs.columns
        assert findings(again) == []
        assert "tail" not in again.manifest.fingerprint["capture"]

    @pytest.mark.slow
    @small
    @given(st.data())
    def test_any_cache_comes_back(
        self, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
    ) -> None:
        layout = replace(data.draw(layouts()), columns={})
        rows = data.draw(scored_rows(layout))
        path = tmp_path_factory.mktemp("any")
        cache = make_cache(path / "cache", rows, layout)
        if not cache.num_positions:
            with pytest.raises(UserError, match="no row with a trained token"):
                export(cache, path / "rows.jsonl", to="topk")
            return
        export(cache, path / "rows.parquet", to="topk")
        again = import_topk(path / "rows.parquet", path / "again", tokenizer, precision=layout.precision)
        kept = [row for row in cache if len(row.positions)]
        for ours, theirs in zip(again, kept, strict=True):
            assert ours.row_id == theirs.row_id
            assert np.array_equal(ours.targets.token_ids, theirs.targets.token_ids)
            assert np.allclose(ours.targets.logprobs, theirs.targets.logprobs, atol=1e-6)
            assert np.allclose(ours.targets.tail_logprob, theirs.targets.tail_logprob, atol=1e-6)

    def test_prompt_positions_have_empty_lists_and_every_token_but_the_first_has_one(self, tmp_path: Path) -> None:
        cache = make_cache(tmp_path / "cache", chats(5), LAYOUT)
        export(cache, tmp_path / "rows.jsonl", to="topk")
        for row, sequence in zip(lines(tmp_path / "rows.jsonl"), cache, strict=True):
            assert row["row_id"] == sequence.row_id
            assert row["loss_mask"] == sequence.loss_mask.tolist()
            assert len(row["topk_ids"]) == len(row["topk_logprobs"]) == len(row["input_ids"]) - 1
            for position, ids in enumerate(row["topk_ids"]):
                assert bool(ids) == row["loss_mask"][position + 1]
                assert (row["tail_logprob"][position] is not None) == bool(ids)

    def test_an_entry_of_probability_0_is_left_out(self, tmp_path: Path) -> None:
        tokens = TokenSequence(np.array([7, 8], np.int32), np.array([False, True]))
        impossible = SparseTargets(
            np.array([[3, 4]], np.int32), np.array([[0, -np.inf]], np.float32), np.array([-np.inf], np.float32)
        )
        cache = make_cache(tmp_path / "cache", [(tokens, impossible)], Layout(VOCAB, precision="exact"))
        export(cache, tmp_path / "rows.jsonl", to="topk")
        (row,) = lines(tmp_path / "rows.jsonl")
        assert (row["topk_ids"], row["topk_logprobs"]) == ([[3]], [[0.0]])

    def test_an_approximate_tail_is_not_passed_on_as_the_teachers(self, tmp_path: Path, tokenizer: Path) -> None:
        cache = make_cache(tmp_path / "cache", chats(5), LAYOUT, capture={**CAPTURE, "tail": "approximate (…)"})
        export(cache, tmp_path / "rows.parquet", to="topk")
        assert "tail_logprob" not in pq.read_schema(tmp_path / "rows.parquet").names
        again = import_topk(tmp_path / "rows.parquet", tmp_path / "again", tokenizer)
        assert again.manifest.fingerprint["capture"]["tail"].startswith("approximate")


def as_axolotl_reads(row: dict[str, Any], field: str, num_tokens: int) -> list[tuple[list[int], np.ndarray] | None]:
    """Ids and probabilities, which add up to 1, for each token of the sequence: lists stand at its end, padded at the front."""
    read: list[tuple[list[int], np.ndarray] | None] = [None] * (num_tokens - len(row[field]))
    assert len({len(part) for part in row[field]}) == 1  # otherwise its collator fails
    for place, part in enumerate(row[field]):
        if "target_token_ids" in row:
            ids, logprobs = row["target_token_ids"][place], part
        else:
            ids = [int(entry["token"].removeprefix("token_id:")) for entry in part]
            logprobs = [entry["logprob"] for entry in part]
        assert len(set(ids)) == len(ids)
        assert all(0 <= one < VOCAB for one in ids)
        probs = np.exp(np.array(logprobs, dtype=np.float64))
        read.append((ids, probs / probs.sum()))
    return read


def assert_axolotl_sees(read: list[tuple[list[int], np.ndarray] | None], sequence: CachedSequence) -> None:
    for place, position in enumerate(sequence.positions.tolist()):
        seen = read[position + 1]
        assert seen is not None
        targets = sequence.targets[place : place + 1].cut_to_width(int(sequence.targets.num_entries[place]))
        wanted = np.exp(targets.logprobs[0].astype(np.float64))
        assert seen[0][: len(wanted)] == targets.token_ids[0].tolist()
        assert np.allclose(seen[1][: len(wanted)], wanted / wanted.sum(), atol=1e-6)
        assert (seen[1][len(wanted) :] < 1e-30).all()
    for token in range(int(sequence.positions[0]) + 2, len(sequence.input_ids)):
        if not sequence.loss_mask[token]:  # masked by Axolotl; and if it were not, the token itself
            seen = read[token]
            assert seen is not None
            assert seen[0][0] == sequence.input_ids[token]
            assert np.isclose(seen[1][0], 1)


class TestAxolotl:
    @pytest.mark.slow
    @pytest.mark.parametrize("to", ["axolotl", "axolotl-v2"])
    def test_every_position_is_found_at_the_token_that_it_predicts(self, tmp_path: Path, to: str) -> None:
        cache = make_cache(tmp_path / "cache", chats(40), LAYOUT)
        export(cache, tmp_path / "rows.jsonl", to=to, logprobs_field="teacher")
        rows = lines(tmp_path / "rows.jsonl")
        for row, sequence in zip(rows, cache, strict=True):
            assert_axolotl_sees(as_axolotl_reads(row, "teacher", len(sequence.input_ids)), sequence)
            assert len(row["teacher"]) == len(sequence.input_ids) - 1 - sequence.positions[0]
        assert [row["messages"] for row in rows] == [CHAT[: 1 + number % 2] for number in range(40)]
        assert [row["id"] for row in rows] == list(range(40))

    def test_the_entries_are_spelled_as_its_first_version_reads_them(self, tmp_path: Path) -> None:
        full = full_distributions(np.random.default_rng(0), 2)
        tokens = TokenSequence(np.array([7, 8, 9, 3], np.int32), np.array([False, False, True, True]))
        targets = sparse_targets(full, [2, 2], replace(LAYOUT, columns={}))
        cache = make_cache(tmp_path / "cache", [(tokens, targets)], Layout(VOCAB, precision="exact"))
        export(cache, tmp_path / "rows.jsonl", to="axolotl")
        (row,) = lines(tmp_path / "rows.jsonl")
        assert row["logprobs"] == [
            [
                {"token": f"token_id:{token}", "logprob": float(logprob)}
                for token, logprob in zip(targets.token_ids[position], targets.logprobs[position], strict=True)
            ]
            for position in range(2)
        ]

    @pytest.mark.parametrize("to", ["axolotl", "axolotl-v2"])
    def test_parquet_holds_the_same_as_json_lines(self, tmp_path: Path, to: str) -> None:
        rows = [
            (replace(tokens, columns={"id": 1, "messages": json.dumps(CHAT)}), targets) for tokens, targets in chats(12)
        ]
        cache = make_cache(tmp_path / "cache", rows, LAYOUT)
        export(cache, tmp_path / "rows.jsonl", to=to)
        export(cache, tmp_path / "rows.parquet", to=to)
        expected = [
            {**row, "messages": [{"weight": None, **one} for one in CHAT]} for row in lines(tmp_path / "rows.jsonl")
        ]
        assert pq.read_table(tmp_path / "rows.parquet").to_pylist() == expected

    def test_a_row_with_nothing_trained_is_left_out(self, tmp_path: Path) -> None:
        rows = chats(3)
        nothing = TokenSequence(np.array([1, 2], np.int32), np.array([False, False]), {})
        empty = sparse_targets(np.empty((0, VOCAB)), [], replace(LAYOUT, columns={}))
        cache = make_cache(tmp_path / "cache", [rows[0], (nothing, empty), rows[1]], LAYOUT)
        exported = export(cache, tmp_path / "rows.jsonl", to="axolotl")
        assert (exported.num_rows, exported.num_left_out) == (2, 1)
        assert [row["row_id"] for row in lines(tmp_path / "rows.jsonl")] == [cache[0].row_id, cache[2].row_id]

    def test_that_there_are_no_messages_is_said(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        layout = replace(LAYOUT, columns={})
        cache = make_cache(tmp_path / "cache", random_rows(3, layout), layout)
        export(cache, tmp_path / "rows.jsonl", to="axolotl")
        assert "keeps no column of its source: Axolotl needs the chat messages" in caplog.text

    @pytest.mark.parametrize("to", ["axolotl", "axolotl-v2"])
    @pytest.mark.parametrize("counts", [[0, 3], [3, 0, 2], [0]])
    def test_a_position_without_entries_has_the_token_itself(self, tmp_path: Path, to: str, counts: list[int]) -> None:
        full = full_distributions(np.random.default_rng(0), len(counts))
        targets = sparse_targets(full, counts, replace(LAYOUT, columns={}))
        ids = np.arange(20, 21 + len(counts), dtype=np.int32)
        tokens = TokenSequence(ids, ids > 20)
        cache = make_cache(tmp_path / "cache", [(tokens, targets)], Layout(VOCAB, precision="exact"))
        export(cache, tmp_path / "rows.jsonl", to=to)
        read = as_axolotl_reads(lines(tmp_path / "rows.jsonl")[0], "logprobs", len(ids))
        for place, count in enumerate(counts):
            seen = read[place + 1]
            assert seen is not None
            best = targets.token_ids[place, 0] if count else ids[place + 1]
            assert seen[0][0] == best
            assert count or np.isclose(seen[1][0], 1)

    @pytest.mark.slow
    def test_a_row_of_more_entries_than_numpy_text_fits_one_array_of_arrow(self, tmp_path: Path) -> None:
        positions, k = 40_000, 50
        logprobs = np.full((positions, k), np.log(0.01), np.float32)
        targets = SparseTargets(
            np.tile(np.arange(k, dtype=np.int32), (positions, 1)), logprobs, np.full(positions, np.log(0.5), np.float32)
        )
        tokens = TokenSequence(np.ones(positions + 1, np.int32), np.arange(positions + 1) > 0)
        cache = make_cache(tmp_path / "cache", [(tokens, targets)], Layout(VOCAB, precision="exact"))
        export(cache, tmp_path / "rows.parquet", to="axolotl")
        read = pq.read_table(tmp_path / "rows.parquet")["logprobs"][0]
        assert len(read) == positions
        assert [entry["token"] for entry in read[-1].as_py()] == [f"token_id:{token}" for token in range(k)]

    def test_nothing_is_below_the_number_that_json_can_hold(self, tmp_path: Path) -> None:
        full = full_distributions(np.random.default_rng(0), 1)
        targets = sparse_targets(full, [2], replace(LAYOUT, columns={}))
        targets = replace(
            targets, logprobs=np.array([[0.0, -1e4]], np.float32), tail_logprob=np.array([-np.inf], np.float32)
        )
        tokens = TokenSequence(np.array([7, 8], np.int32), np.array([False, True]))
        cache = make_cache(tmp_path / "cache", [(tokens, targets)], Layout(VOCAB, precision="exact"))
        export(cache, tmp_path / "a.jsonl", to="axolotl-v2")
        assert lines(tmp_path / "a.jsonl")[0]["logprobs"] == [[0.0, NOTHING_NATS]]
        export(cache, tmp_path / "b.jsonl", to="topk")
        assert lines(tmp_path / "b.jsonl")[0]["tail_logprob"] == [None]


class TestMoreEntriesThanStored:
    """Of a cache with up to three entries a position and coefficients."""

    @pytest.fixture
    def low_rank_cache(self, tmp_path: Path) -> LogitCache:
        layout = Layout(VOCAB, TailParts(rank=3), columns=LAYOUT.columns).with_coefficient_step(COEFFICIENT_STEP)
        kept = {"id": 1, "messages": json.dumps(CHAT)}
        rows = random_rows(12, replace(layout, columns={}), max_entries=3)
        return make_cache(
            tmp_path / "low_rank", [(replace(tokens, columns=kept), targets) for tokens, targets in rows], layout
        )

    @pytest.mark.parametrize("top_k", [3, 7, VOCAB])
    def test_they_are_the_likeliest_of_the_rebuilt_tail_behind_the_caches_own(
        self, low_rank_cache: LogitCache, tmp_path: Path, top_k: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level("INFO", "logitcache"):
            export(low_rank_cache, tmp_path / "rows.jsonl", to="topk", top_k=top_k)
        assert "rebuilt from its coefficients, approximately: column exact_entries has the number" in caplog.text
        assert low_rank_cache.tail_basis is not None
        for row, sequence in zip(lines(tmp_path / "rows.jsonl"), low_rank_cache, strict=True):
            full = rebuilt(sequence.targets, low_rank_cache.tail_basis)
            of_position = dict(zip(sequence.positions.tolist(), range(len(full)), strict=True))
            for position, (ids, logprobs, exact) in enumerate(
                zip(row["topk_ids"], row["topk_logprobs"], row["exact_entries"], strict=True)
            ):
                if position not in of_position:
                    assert (ids, logprobs, exact) == ([], [], 0)
                    continue
                number = of_position[position]
                targets = sequence.targets[number : number + 1]
                assert exact == targets.num_entries[0]
                assert ids[:exact] == targets.token_ids[0, :exact].tolist()
                assert logprobs[:exact] == pytest.approx(targets.logprobs[0, :exact].tolist())
                others = np.setdiff1d(np.arange(VOCAB), ids[:exact])
                likeliest = others[np.argsort(-full[number, others], kind="stable")][: top_k - exact]
                assert ids[exact:] == likeliest.tolist()
                assert logprobs[exact:] == pytest.approx(full[number, likeliest].tolist(), rel=1e-5)
                rest = row["tail_logprob"][position]
                assert np.exp(logprobs).sum() + np.exp(-np.inf if rest is None else rest) == pytest.approx(1, abs=2e-3)

    def test_they_are_taken_for_nobodys_when_they_are_imported(
        self, low_rank_cache: LogitCache, tmp_path: Path, tokenizer: Path
    ) -> None:
        export(low_rank_cache, tmp_path / "rows.parquet", to="topk", top_k=7)
        with pytest.raises(UserError, match=r"row 0: entries beyond exact_entries are no teacher's: export the rows"):
            import_topk(tmp_path / "rows.parquet", tmp_path / "again", tokenizer)

    @pytest.mark.parametrize("to", ["axolotl", "axolotl-v2"])
    def test_axolotl_has_them_too(self, low_rank_cache: LogitCache, tmp_path: Path, to: str) -> None:
        export(low_rank_cache, tmp_path / "rows.jsonl", to=to, top_k=7)
        assert low_rank_cache.tail_basis is not None
        for row, sequence in zip(lines(tmp_path / "rows.jsonl"), low_rank_cache, strict=True):
            targets = extended(sequence.targets, low_rank_cache.tail_basis, 7)
            seen = replace(sequence, targets=targets)
            assert_axolotl_sees(as_axolotl_reads(row, "logprobs", len(sequence.input_ids)), seen)
            exact = np.zeros(len(row["logprobs"]), int)
            exact[sequence.positions - sequence.positions[0]] = sequence.targets.num_entries
            assert row["exact_entries"] == exact.tolist()

    def test_what_cannot_be_given_is_refused(
        self, low_rank_cache: LogitCache, cache: LogitCache, tmp_path: Path
    ) -> None:
        out = tmp_path / "rows.jsonl"
        with pytest.raises(UserError, match=r"--top-k 7: .* has no coefficients \(--tail-rank\)"):
            export(cache, out, to="topk", top_k=7)
        with pytest.raises(UserError, match=r"--top-k 2: .* stores up to 3, `logitcache recode --top-k` keeps fewer"):
            export(low_rank_cache, out, to="topk", top_k=2)
        for wrong in (0, VOCAB + 1):
            with pytest.raises(UserError, match=f"--top-k {wrong}: the teacher's vocabulary has 50 tokens"):
                export(low_rank_cache, out, to="topk", top_k=wrong)
        assert not out.exists()


@pytest.fixture
def cache(tmp_path: Path) -> LogitCache:
    return make_cache(tmp_path / "cache", chats(20), LAYOUT)


class TestWriting:
    @pytest.mark.slow
    def test_from_and_to_an_object_store(self, cache: LogitCache, tmp_path: Path, bucket: str) -> None:  # noqa: F811
        import fsspec

        filesystem, root = fsspec.url_to_fs(f"{bucket}/cache")
        filesystem.put(cache.path, root, recursive=True)
        export(f"{bucket}/cache", f"{bucket}/rows.jsonl", to="topk")
        export(cache, tmp_path / "rows.jsonl", to="topk")
        assert filesystem.cat_file(root.replace("/cache", "/rows.jsonl")) == (tmp_path / "rows.jsonl").read_bytes()
        with pytest.raises(UserError, match="exists: choose another name"):
            export(cache, f"{bucket}/rows.jsonl", to="topk")

    def test_what_is_there_stays_unless_it_is_to_be_replaced(self, cache: LogitCache, tmp_path: Path) -> None:
        out = tmp_path / "rows.jsonl"
        out.write_text("precious")
        with pytest.raises(UserError, match=r"exists: choose another name, or replace it with --overwrite"):
            export(cache, out, to="topk")
        assert out.read_text() == "precious"
        export(cache, out, to="topk", overwrite=True)
        assert len(lines(out)) == 20

    @pytest.mark.parametrize("kind", ["jsonl", "parquet"])
    def test_a_damaged_cache_leaves_nothing_half_written(self, cache: LogitCache, tmp_path: Path, kind: str) -> None:
        last = sorted((tmp_path / "cache/data").iterdir())[-1]
        content = bytearray(last.read_bytes())
        content[len(content) // 3] ^= 1
        last.write_bytes(content)
        with pytest.raises(UserError, match="was altered"):
            export(LogitCache(cache.path), tmp_path / f"rows.{kind}", to="topk")
        assert [path.name for path in tmp_path.iterdir()] == ["cache"]

    def test_values_that_parquet_does_not_take_are_refused(self, tmp_path: Path) -> None:
        rows = chats(20)
        rows[15] = (replace(rows[15][0], columns={"id": 1, "messages": '{"a": "b"}'}), rows[15][1])
        cache = make_cache(tmp_path / "cache", rows, LAYOUT)
        with pytest.raises(UserError, match="which Parquet does not take"):
            export(cache, tmp_path / "rows.parquet", to="axolotl")
        assert not (tmp_path / "rows.parquet").exists()
        export(cache, tmp_path / "rows.jsonl", to="axolotl")

    def test_keys_that_first_appear_in_a_later_row_group_are_not_lost(self, tmp_path: Path) -> None:
        chats = [
            [{"role": "user", "content": "hi"}],
            None,
            [{"role": "assistant", "content": "x", "reasoning": "DEEP", "calls": [{"name": "f"}]}],
            [{"role": "tool", "calls": [{"id": 1.5}]}],
        ]
        values = [None if chat is None else json.dumps(chat) for chat in chats]
        cache = keeping(tmp_path / "cache", "string", values, "messages")
        export(cache, tmp_path / "rows.parquet", to="axolotl")
        read = pq.read_table(tmp_path / "rows.parquet")["messages"].to_pylist()
        without_nulls = json.loads(json.dumps(read), object_hook=lambda one: {k: v for k, v in one.items() if v})
        assert without_nulls == chats

    @pytest.mark.slow
    @pytest.mark.parametrize("to", ["topk", "axolotl"])
    @pytest.mark.parametrize(("column_type", "value"), [("string", "x"), ("double", 1.5), ("int64", 3), ("bool", True)])
    def test_a_column_may_begin_with_nulls_or_hold_nothing_else(
        self, tmp_path: Path, to: str, column_type: str, value: Any
    ) -> None:
        for values in ([None, None, value], [None, None]):
            cache = keeping(tmp_path / f"cache{len(values)}", column_type, values)
            out = tmp_path / f"rows{len(values)}.parquet"
            export(cache, out, to=to)
            assert pq.read_table(out)["kept"].to_pylist() == values
            assert str(pq.read_schema(out).field("kept").type) == column_type

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "text",
        ["{}", '{"a": 1}', "[1, 2]", "[NaN]", '[{"a": NaN}]', '[{"a": 1e999}]', '[{"a": "\\ud83d"}]', "[", "[" * 9999],
    )
    @pytest.mark.parametrize("kind", ["jsonl", "parquet"])
    def test_text_that_is_no_list_of_objects_or_cannot_be_written_as_one_stays_text(
        self, tmp_path: Path, kind: str, text: str
    ) -> None:
        out = tmp_path / f"rows.{kind}"
        export(keeping(tmp_path / "cache", "string", [text, "hello"]), out, to="axolotl")
        read = lines(out) if kind == "jsonl" else pq.read_table(out).to_pylist()
        assert [row["kept"] for row in read] == [text, "hello"]

    def test_a_whole_number_that_parquet_cannot_hold_is_refused(self, tmp_path: Path) -> None:
        cache = keeping(tmp_path / "cache", "string", [json.dumps([{"a": 2**70}])])
        with pytest.raises(UserError, match=r"which Parquet does not take .*: write .jsonl"):
            export(cache, tmp_path / "rows.parquet", to="axolotl")
        export(cache, tmp_path / "rows.jsonl", to="axolotl")
        assert lines(tmp_path / "rows.jsonl")[0]["kept"] == [{"a": 2**70}]

    @pytest.mark.parametrize("to", ["topk", "axolotl"])
    def test_a_kept_number_that_json_does_not_have_is_null(self, tmp_path: Path, to: str) -> None:
        cache = keeping(tmp_path / "cache", "double", [float("nan"), 0.5, float("inf")])
        export(cache, tmp_path / "rows.jsonl", to=to)
        assert [row["kept"] for row in lines(tmp_path / "rows.jsonl")] == [None, 0.5, None]
        export(cache, tmp_path / "rows.parquet", to=to)
        assert np.isnan(pq.read_table(tmp_path / "rows.parquet")["kept"][0].as_py())

    def test_a_kept_column_of_the_same_name_is_refused(self, tmp_path: Path) -> None:
        layout = Layout(VOCAB, columns={"url": "string"})
        cache = make_cache(tmp_path / "cache", random_rows(3, layout), layout)
        with pytest.raises(UserError, match="keeps a column 'url', as the rows to write have one"):
            export(cache, tmp_path / "rows.jsonl", to="axolotl", logprobs_field="url")


class TestCommandLine:
    def test_exports_and_says_what(self, cache: LogitCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "rows.jsonl"
        assert main(["export", cache.path, "--to", "axolotl-v2", "--out", str(out), "--logprobs-field", "teacher"]) == 0
        printed = capsys.readouterr().out
        assert f"exported   {out}" in printed
        assert "rows       20" in printed
        assert "teacher" in lines(out)[0]

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--to", "topk", "--out", "rows.csv"], "a name that ends with .parquet or .jsonl is wanted"),
            (["--to", "topk", "--out", "cache/rows.jsonl"], "lies in the cache that is read"),
            (["--to", "topk", "--out", "folder.jsonl"], "exists"),
            (["--to", "topk", "--out", "folder.jsonl", "--overwrite"], "this is a folder"),
            (["--to", "topk", "--out", "a.jsonl", "--logprobs-field", "x"], "only Axolotl's rows have such a field"),
            (["--to", "axolotl", "--out", "a.jsonl", "--logprobs-field", ""], "--logprobs-field '': choose a name"),
            (["--to", "axolotl", "--out", "a.jsonl", "--logprobs-field", "row_id"], "that no other column has"),
            (["--to", "axolotl-v2", "--out", "a.jsonl", "--logprobs-field", "target_token_ids"], "no other column has"),
            (["--to", "topk", "--out", "/proc/x.jsonl"], "--out /proc/x.jsonl: cannot be written (No such file"),
            (
                ["--to", "topk", "--out", "/dev/null/x.jsonl"],
                "/dev/null/x.jsonl: a folder that can be written is wanted (",
            ),
            (["--to", "topk", "--out", "a.jsonl", "--rows", "1:2"], "unknown argument --rows"),
            (["--to", "topk", "--out", "nowhere://a/b.jsonl"], "no file system for such a URL"),
        ],
    )
    def test_what_cannot_be_is_one_line_and_status_2(
        self,
        cache: LogitCache,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        arguments: list[str],
        message: str,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "folder.jsonl").mkdir()
        assert main(["export", cache.path, *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
