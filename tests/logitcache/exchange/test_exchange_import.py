"""Other people's logit datasets become caches, in which `logitcache verify` finds nothing."""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import logitcache
from logitcache import LogitCache
from logitcache.cli import main
from logitcache.errors import UserError
from logitcache.exchange.importing import import_logits
from logitcache.exchange.source_files import find_sources
from logitcache.exchange.source_rows import read_rows
from logitcache.exchange.tails import LEAST_TAIL
from logitcache.format.quantization import PRESETS
from logitcache.maintenance.info import info
from logitcache.maintenance.recode import recode
from tests.helpers.exchanging import (
    FIXTURES,
    VOCAB,
    findings,
    import_topk,
    random_row,
    random_rows,
    write_rows,
    write_tokenizer,
)
from tests.helpers.maintained import contents
from tests.helpers.objectstore import bucket, s3_endpoint  # noqa: F401  (fixtures)
from tests.helpers.processes import FORKED
from tests.helpers.underway import num_finished_shards


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def large_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("large"), 151936)


@pytest.fixture(scope="module")
def medium_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("medium"), 32000)


def import_distillkit(source: Path | str, out: Path, tokenizer: Path, **settings: Any) -> LogitCache:
    settings = {"teacher": "big", "precision": "exact", **settings}
    cache: LogitCache = import_logits(
        str(source), out, source_format="distillkit", tokenizer=str(tokenizer), **settings
    )
    return cache


def assert_holds_rows(cache: LogitCache, rows: list[dict[str, Any]]) -> None:
    """Every position of plain top-k rows without masks, exactly."""
    assert len(cache) == len(rows)
    for sequence, row in zip(cache, rows, strict=True):
        assert sequence.input_ids.tolist() == row["input_ids"]
        assert sequence.loss_mask.tolist() == [False] + [True] * (len(row["input_ids"]) - 1)
        assert sequence.targets.token_ids.tolist() == row["topk_ids"]
        assert np.array_equal(sequence.targets.logprobs, np.array(row["topk_logprobs"], dtype=np.float32))
        mass = np.exp(np.array(row["topk_logprobs"])).sum(axis=1)
        assert np.allclose(sequence.targets.tail_logprob, np.log(1 - mass), atol=1e-4)


class TestDistillKit:
    @pytest.mark.slow
    def test_a_sample_becomes_a_cache_of_the_same_numbers_in_order(self, tmp_path: Path, large_tokenizer: Path) -> None:
        cache = import_distillkit(FIXTURES / "recommended", tmp_path / "out", large_tokenizer)
        expected = np.load(FIXTURES / "recommended" / "expected.npz")
        num_scaled = 0
        for sequence, ids, logprobs in zip(cache, expected["token_ids"], expected["logprobs"], strict=True):
            order = np.argsort(-logprobs, axis=1, kind="stable")
            assert np.array_equal(sequence.targets.token_ids, np.take_along_axis(ids, order, axis=1))
            stored, wanted = sequence.targets.logprobs, np.take_along_axis(logprobs, order, axis=1)
            mass = np.exp(wanted, dtype=np.float64).sum(axis=1)
            fits = mass <= 1 + 1e-5
            assert np.array_equal(stored[fits], wanted[fits])
            assert np.allclose(stored[~fits], wanted[~fits] - np.log(mass[~fits])[:, None], atol=1e-5)
            tail = np.exp(sequence.targets.tail_logprob, dtype=np.float64)
            assert np.allclose(tail, np.maximum(1 - mass, LEAST_TAIL), rtol=1e-5, atol=2e-7)
            num_scaled += int((~fits).sum())
        assert cache.manifest.history[-1]["scaled"] == num_scaled > 0
        assert findings(cache) == []

    @pytest.mark.slow
    @pytest.mark.parametrize("precision", sorted(PRESETS))
    def test_verify_finds_nothing_in_any_precision(
        self, tmp_path: Path, medium_tokenizer: Path, precision: str
    ) -> None:
        exact = import_distillkit(FIXTURES / "residual_bins", tmp_path / "exact", medium_tokenizer)
        cache = import_distillkit(FIXTURES / "residual_bins", tmp_path / "out", medium_tokenizer, precision=precision)
        assert findings(cache) == []
        quantization = PRESETS[precision]
        for rounded, sequence in zip(cache, exact, strict=True):
            for now_ids, now, was_ids, was in zip(
                rounded.targets.token_ids,
                rounded.targets.logprobs,
                sequence.targets.token_ids,
                sequence.targets.logprobs,
                strict=True,
            ):
                known = dict(zip(was_ids.tolist(), was, strict=True))
                wanted = np.array([known.pop(token) for token in now_ids.tolist()])
                assert not known
                bound = quantization.bound(wanted) if quantization else np.zeros_like(wanted)
                assert (np.abs(now - wanted) <= bound + 1e-5).all()

    @pytest.mark.slow
    def test_the_cache_says_where_it_is_from_and_that_its_tail_is_approximate(
        self, tmp_path: Path, large_tokenizer: Path
    ) -> None:
        cache = import_distillkit(
            FIXTURES / "recommended", tmp_path / "out", large_tokenizer, teacher="Qwen3-235B", data_name="web"
        )
        fingerprint = cache.manifest.fingerprint
        assert fingerprint["teacher"]["name"] == "Qwen3-235B"
        assert fingerprint["teacher"]["engine"] == "distillkit"
        assert fingerprint["teacher"]["vocab_size"] == cache.vocab_size == 151936
        assert fingerprint["source"]["config"]["polynomial_terms"] == [0, 1, 2, 3, 4, "sqrt"]
        assert fingerprint["corpus"]["sources"][0]["name"] == "web"
        assert fingerprint["capture"]["top_k"] == 64
        lines = dict(line.split("  ", 1) for line in info(cache).splitlines() if "  " in line)
        assert lines["tail"].strip().startswith("approximate (1 − Σp")
        assert "t5" in json.loads((tmp_path / "out/tokenizer/tokenizer.json").read_text())["model"]["vocab"]
        narrowed = recode(cache.path, tmp_path / "narrowed", top_k=8)
        assert narrowed.manifest.fingerprint["capture"]["tail"].startswith("approximate")

    @pytest.mark.slow
    def test_only_the_most_probable_entries_are_kept_and_the_others_join_the_tail(
        self, tmp_path: Path, medium_tokenizer: Path
    ) -> None:
        whole = import_distillkit(FIXTURES / "residual_bins", tmp_path / "whole", medium_tokenizer)
        part = import_distillkit(FIXTURES / "residual_bins", tmp_path / "part", medium_tokenizer, top_k=5)
        assert part.manifest.fingerprint["capture"]["top_k"] == 5
        for some, all_of_it in zip(part, whole, strict=True):
            assert np.array_equal(some.targets.token_ids, all_of_it.targets.token_ids[:, :5])
            mass = np.exp(some.targets.logprobs, dtype=np.float64).sum(axis=1)
            assert np.allclose(np.exp(some.targets.tail_logprob), 1 - mass, atol=1e-5)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                {"compressed_logprobs": [[0, 1]] * 95},
                "row 1: position 0: 2 bytes in compressed_logprobs, by the config",
            ),
            ({"compressed_logprobs": [[255] * 69] * 95}, "row 1: position 0: a log-probability that is not a number"),
            ({"bytepacked_indices": [[0] * 90] * 95}, "row 1: position 0: the same token id twice"),
            (
                {"bytepacked_indices": [[255] * 90] * 95},
                "row 1: position 0: a token id outside the vocabulary of 32,000",
            ),
            (
                {"bytepacked_indices": [[0] * 90] * 90},
                "row 1: bytepacked_indices has 90 positions for 96 tokens, 95 are",
            ),
            ({"input_ids": [1, 2, 400_000]}, "row 1: input_ids holds 400000, the tokenizer has"),
            ({"input_ids": None}, "row 1: column 'input_ids' is missing or null"),
        ],
    )
    def test_a_damaged_row_is_named(
        self, tmp_path: Path, medium_tokenizer: Path, change: dict[str, Any], message: str
    ) -> None:
        sample = FIXTURES / "residual_bins"
        table = pq.read_table(sample / "data_0.parquet")
        rows = table.to_pylist()
        rows[1] |= change
        (tmp_path / "data").mkdir()
        pq.write_table(pa.Table.from_pylist(rows, table.schema), tmp_path / "data/x.parquet")
        shutil.copy(sample / "compression_config.yaml", tmp_path / "data")
        with pytest.raises(UserError) as error:
            import_distillkit(tmp_path / "data", tmp_path / "out", medium_tokenizer)
        assert message in str(error.value)
        assert str(tmp_path / "data/x.parquet") in str(error.value)
        assert not (tmp_path / "out/logitcache.json").exists()
        cache = import_distillkit(tmp_path / "data", tmp_path / "out", medium_tokenizer, skip_bad=True, overwrite=True)
        assert len(cache) == 2
        assert cache.manifest.skipped == {"bad": 1}
        assert findings(cache) == []

    @pytest.mark.slow
    def test_the_configuration_is_looked_for_beside_the_data_and_in_the_folder_named(
        self, tmp_path: Path, medium_tokenizer: Path
    ) -> None:
        sample = FIXTURES / "residual_bins"
        (tmp_path / "set/data").mkdir(parents=True)
        shutil.copy(sample / "data_0.parquet", tmp_path / "set/data")
        with pytest.raises(UserError, match=r"no compression_config.yaml beside it; name .* with --config"):
            import_distillkit(tmp_path / "set", tmp_path / "out", medium_tokenizer)
        config = str(sample / "compression_config.yaml")
        named = import_distillkit(tmp_path / "set", tmp_path / "named", medium_tokenizer, config=config)
        shutil.copy(config, tmp_path / "set")
        found = import_distillkit(tmp_path / "set", tmp_path / "found", medium_tokenizer)
        assert [row.row_id for row in named] == [row.row_id for row in found]
        with pytest.raises(UserError, match="differ: import what each describes to a cache of its own"):
            import_logits(
                [str(tmp_path / "set"), str(FIXTURES / "recommended")],
                tmp_path / "both",
                source_format="distillkit",
                teacher="big",
                tokenizer=str(medium_tokenizer),
            )


class TestTopK:
    def test_rows_come_out_as_they_went_in(self, tmp_path: Path, tokenizer: Path) -> None:
        rows = random_rows(20)
        parquet = import_topk(write_rows(tmp_path / "a.parquet", rows), tmp_path / "parquet", tokenizer)
        lines = import_topk(write_rows(tmp_path / "a.jsonl", rows), tmp_path / "lines", tokenizer)
        for cache in (parquet, lines):
            assert_holds_rows(cache, rows)
            assert findings(cache) == []
        assert [row.row_id for row in parquet] == [row.row_id for row in lines]

    def test_compressed_lines_large_lists_and_other_numbers_are_read_too(self, tmp_path: Path, tokenizer: Path) -> None:
        import gzip

        import zstandard

        rows = random_rows(5)
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
        (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(content))
        schema = pa.schema(
            {
                "input_ids": pa.large_list(pa.uint16()),
                "topk_ids": pa.large_list(pa.list_(pa.uint64(), 4)),
                "topk_logprobs": pa.list_(pa.large_list(pa.float64())),
            }
        )
        pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "a.parquet")
        for name in ("a.jsonl.gz", "a.jsonl.zst", "a.parquet"):
            assert_holds_rows(import_topk(tmp_path / name, tmp_path / f"of {name}", tokenizer), rows)

    def test_frames_of_zstd_one_after_the_other_are_read_and_one_that_is_cut_off_is_refused(
        self, tmp_path: Path, tokenizer: Path
    ) -> None:
        import zstandard

        rows = random_rows(300)
        first, second = (
            zstandard.compress("".join(json.dumps(row) + "\n" for row in part).encode())
            for part in (rows[:150], rows[150:])
        )
        path = tmp_path / "a.jsonl.zst"
        path.write_bytes(first + second)
        assert_holds_rows(import_topk(path, tmp_path / "whole", tokenizer), rows)
        for content in (first[: len(first) // 2], first[:-1], first + second[:-1], first + second[:3]):
            path.write_bytes(content)
            with pytest.raises(UserError, match=r"a.jsonl.zst, line \d+: not readable, the file is damaged"):
                import_topk(path, tmp_path / "out", tokenizer, skip_bad=True)
            assert not (tmp_path / "out").exists()

    def test_blank_lines_are_no_rows(self, tmp_path: Path, tokenizer: Path) -> None:
        rows = random_rows(12)
        path = tmp_path / "a.jsonl"
        path.write_text("\n" + "".join(json.dumps(row) + "\n \n" for row in rows))
        assert_holds_rows(import_topk(path, tmp_path / "out", tokenizer, shard_positions=10), rows)
        file = find_sources([str(path)])[0].files[0]
        assert [row.where for row in read_rows(file, ["input_ids"], first=10)] == [
            f"{path}, line 22",
            f"{path}, line 24",
        ]

    def test_half_a_surrogate_pair_is_no_text(self, tmp_path: Path, tokenizer: Path) -> None:
        rows = random_rows(3, text="whole \U0001f600")
        path = write_rows(tmp_path / "a.jsonl", [*rows[:2], {**rows[2], "text": ["half \ud83d"]}])
        with pytest.raises(UserError, match=r"a\.jsonl, line 3: half a surrogate pair"):
            import_topk(path, tmp_path / "out", tokenizer, keep=["text"])
        cache = import_topk(path, tmp_path / "skipped", tokenizer, keep=["text"], skip_bad=True)
        assert [row.columns["text"] for row in cache] == ["whole \U0001f600"] * 2

    @pytest.mark.filterwarnings("error")
    @pytest.mark.parametrize("change", [{"topk_logprobs": [[1e39]]}, {"tail_logprob": [1e39]}])
    def test_a_number_that_no_float32_holds_is_refused_without_a_warning(
        self, tmp_path: Path, tokenizer: Path, change: dict[str, Any]
    ) -> None:
        row = {"input_ids": [1, 2], "topk_ids": [[1]], "topk_logprobs": [[-1.0]], **change}
        with pytest.raises(UserError, match="above 0"):
            import_topk(write_rows(tmp_path / "a.jsonl", [row]), tmp_path / "out", tokenizer)

    def test_entries_in_any_order_are_sorted(self, tmp_path: Path, tokenizer: Path) -> None:
        rows = random_rows(4)
        mixed = []
        for row in rows:
            order = [random.Random(i).sample(range(4), 4) for i in range(len(row["topk_ids"]))]
            mixed.append(
                {
                    "input_ids": row["input_ids"],
                    **{
                        name: [[part[i] for i in some] for part, some in zip(row[name], order, strict=True)]
                        for name in ("topk_ids", "topk_logprobs")
                    },
                }
            )
        assert_holds_rows(import_topk(write_rows(tmp_path / "a.jsonl", mixed), tmp_path / "out", tokenizer), rows)

    def test_a_list_for_the_last_token_is_not_used(self, tmp_path: Path, tokenizer: Path) -> None:
        rows = random_rows(4)
        unused = {"topk_ids": [[9, 9]], "topk_logprobs": [[5.0, 5.0]]}
        longer = [{**row, **{name: row[name] + more for name, more in unused.items()}} for row in rows]
        assert_holds_rows(import_topk(write_rows(tmp_path / "a.jsonl", longer), tmp_path / "out", tokenizer), rows)

    @pytest.mark.parametrize("column", ["loss_mask", "assistant"])
    def test_only_what_the_mask_trains_is_stored(self, tmp_path: Path, tokenizer: Path, column: str) -> None:
        row = random_row(np.random.default_rng(0), 6)
        ids, logprobs = row["topk_ids"], row["topk_logprobs"]
        masked = {
            "input_ids": row["input_ids"],
            "topk_ids": [[], ids[1], None, ids[3], []],
            "topk_logprobs": [[], logprobs[1], None, logprobs[3], []],
            column: [1, 0, 1, 0, 1, 0],  # nothing predicts the first token
        }
        settings = {} if column == "loss_mask" else {"loss_mask": column}
        (sequence,) = import_topk(write_rows(tmp_path / "a.jsonl", [masked]), tmp_path / "out", tokenizer, **settings)
        assert sequence.loss_mask.tolist() == [False, False, True, False, True, False]
        assert sequence.targets.token_ids.tolist() == [ids[1], ids[3]]

    def test_labels_are_a_mask_and_padding_is_not_trained(self, tmp_path: Path, tokenizer: Path) -> None:
        row = random_row(np.random.default_rng(0), 6)
        _, second, third, *_ = row["input_ids"]
        masked = row | {"labels": [-100, second, -100, -100, -100, -100], "attention_mask": [1, 1, 1, 1, 0, 0]}
        whole = row | {"attention_mask": [1, 1, 1, 1, 0, 0]}
        path = write_rows(tmp_path / "a.jsonl", [masked, whole])
        labelled, padded = import_topk(path, tmp_path / "out", tokenizer)
        assert labelled.loss_mask.tolist() == [False, True, False, False, False, False]
        assert padded.loss_mask.tolist() == [False, True, True, True, False, False]
        for change, message in (
            ({"labels": [-100, second + 1, third, -100, -100, -100]}, "`labels` holds .* at token 1, whose id is"),
            ({"labels": [-100] * 6, "loss_mask": [0, 1, 0, 0, 0, 0]}, "`loss_mask` and `labels` contradict each other"),
            ({"attention_mask": [0, 1, 1, 1, 1, 1]}, "attention_mask: padding on the left"),
        ):
            bad = write_rows(tmp_path / "bad.jsonl", [row | change])
            with pytest.raises(UserError, match=rf"bad\.jsonl, line 1: {message}"):
                import_topk(bad, tmp_path / "none", tokenizer)

    def test_kept_columns_of_parquet_have_no_keys_that_arrow_made(self, tmp_path: Path, tokenizer: Path) -> None:
        chats = [
            [{"role": "user", "content": "Hi"}],
            [{"role": "user", "content": None, "name": "n", "call": {"a": 1}}],
        ]
        chats.append([{"role": "user", "content": "Ho", "call": {"b": 2}}])
        rows = [row | {"messages": chat} for row, chat in zip(random_rows(3), chats, strict=True)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
        cache = import_topk(tmp_path / "rows.parquet", tmp_path / "out", tokenizer, keep=["messages"])
        assert [json.loads(row.columns["messages"]) for row in cache] == chats

    def test_a_kept_text_that_is_not_utf8_is_a_bad_row(self, tmp_path: Path, tokenizer: Path) -> None:
        table = pa.Table.from_pylist(random_rows(2))
        name = pa.array([b"fine", b"caf\xe9"]).view(pa.string())
        pq.write_table(table.append_column("name", name), tmp_path / "rows.parquet")
        with pytest.raises(UserError, match=r"rows\.parquet, row 1: a kept column is not readable"):
            import_topk(tmp_path / "rows.parquet", tmp_path / "out", tokenizer, keep=["name"])
        cache = import_topk(tmp_path / "rows.parquet", tmp_path / "out", tokenizer, keep=["name"], skip_bad=True)
        assert [row.columns["name"] for row in cache] == ["fine"]

    def test_entries_of_no_probability_only_fill_lists_up(self, tmp_path: Path, tokenizer: Path) -> None:
        row = {
            "input_ids": [1, 2, 3],
            "topk_ids": [[4, 5, 0, 0], [7, 0, 0, 0]],
            "topk_logprobs": [[-0.5, -2.0, -np.inf, -np.inf], [-0.25, -np.inf, -np.inf, -np.inf]],
        }
        (sequence,) = import_topk(write_rows(tmp_path / "a.parquet", [row]), tmp_path / "out", tokenizer)
        assert sequence.targets.token_ids.tolist() == [[4, 5], [7, -1]]

    def test_a_tail_that_the_source_knows_is_kept(self, tmp_path: Path, tokenizer: Path) -> None:
        rows = random_rows(3)
        for row in rows:
            row["tail_logprob"] = [float(np.log(1 - np.exp(part).sum()) + 1e-5) for part in row["topk_logprobs"]]
        cache = import_topk(write_rows(tmp_path / "a.jsonl", rows), tmp_path / "out", tokenizer)
        for sequence, row in zip(cache, rows, strict=True):
            assert np.array_equal(sequence.targets.tail_logprob, np.array(row["tail_logprob"], dtype=np.float32))
        assert "tail" not in cache.manifest.fingerprint["capture"]
        assert "approximate" not in info(cache)

    def test_probabilities_above_one_in_sum_are_scaled_and_counted(self, tmp_path: Path, tokenizer: Path) -> None:
        row = {
            "input_ids": [1, 2, 3],
            "topk_ids": [[4, 5], [4, 5]],
            "topk_logprobs": [np.log([0.9, 0.12]).tolist(), np.log([0.5, 0.25]).tolist()],
        }
        cache = import_topk(write_rows(tmp_path / "a.jsonl", [row]), tmp_path / "out", tokenizer)
        probs = np.exp(cache[0].targets.logprobs.astype(np.float64))
        assert np.allclose(probs[0], np.array([0.9, 0.12]) / 1.02, atol=1e-5)
        assert np.allclose(probs[1], [0.5, 0.25])
        assert np.allclose(np.exp(cache[0].targets.tail_logprob), [LEAST_TAIL, 0.25])
        assert cache.manifest.history[-1]["scaled"] == 1
        assert findings(cache) == []

    def test_columns_travel_along(self, tmp_path: Path, tokenizer: Path) -> None:
        rows = random_rows(3)
        messages = [{"role": "user", "content": "<b>"}]
        for number, row in enumerate(rows):
            row |= {"messages": messages, "number": number}
        cache = import_topk(
            write_rows(tmp_path / "a.parquet", rows), tmp_path / "out", tokenizer, keep=["messages", "number"]
        )
        assert [row.columns["number"] for row in cache] == [0, 1, 2]
        assert [json.loads(row.columns["messages"]) for row in cache] == [messages] * 3
        with pytest.raises(UserError, match="--keep url: no row has this column"):
            import_topk(tmp_path / "a.parquet", tmp_path / "other", tokenizer, keep=["url"])
        assert not (tmp_path / "other").exists()

    def test_rows_of_which_nothing_is_trained_are_left_out_and_counted(self, tmp_path: Path, tokenizer: Path) -> None:
        good = random_row(np.random.default_rng(0), 3)
        empty = {"input_ids": [1], "topk_ids": [], "topk_logprobs": []}
        rows = [empty, {**good, "loss_mask": [0, 0, 0]}, {**good, "loss_mask": [0, 1, 1]}, empty]
        cache = import_topk(write_rows(tmp_path / "a.jsonl", rows), tmp_path / "out", tokenizer)
        assert cache.manifest.skipped == {"empty": 2, "untrainable": 1}
        assert len(cache) == 1

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"topk_ids": [[1, 2], [3, 3]]}, "position 1: the same token id twice"),
            ({"topk_ids": [[1, 2], [3, VOCAB]]}, "position 1: a token id outside the vocabulary of 60"),
            ({"topk_ids": [[1, 2], [-1, 3]]}, "position 1: a token id outside the vocabulary of 60"),
            ({"topk_logprobs": [[-1.0, 0.5], [-1.0, -2.0]]}, "position 0: a log-probability above 0"),
            ({"topk_logprobs": [[-1.0, np.nan], [-1.0, -2.0]]}, "position 0: a log-probability that is not a number"),
            (
                {"topk_logprobs": [[-0.01, -0.01], [-1.0, -2.0]]},
                "position 0: probabilities that add up to more than 1.05",
            ),
            ({"topk_logprobs": [[-1.0], [-1.0, -2.0]]}, "position 0: 2 topk_ids, 1 topk_logprobs"),
            ({"topk_logprobs": [[-1.0, -2.0]]}, "topk_ids has 2 positions, topk_logprobs has 1"),
            ({"topk_ids": [[1, 2]]}, "topk_ids has 1 positions for 3 tokens, 2 are wanted"),
            ({"topk_ids": [[1, 2], []], "topk_logprobs": [[-1.0, -2.0], []]}, "position 1: no entry, though its token"),
            ({"topk_ids": [1, 2]}, "column 'topk_ids': a list is wanted, this is 1"),
            ({"topk_ids": [["a", 2], [3, 4]]}, "column 'topk_ids' holds 'a', numbers are wanted"),
            ({"topk_ids": [[1.5, 2], [3, 4]]}, "column 'topk_ids' holds 1.5, numbers are wanted"),
            ({"topk_logprobs": None}, "column 'topk_logprobs' is missing or null"),
            ({"input_ids": [1, 2, VOCAB]}, "input_ids holds 60, the tokenizer has 60 tokens: is it the teacher's?"),
            ({"input_ids": [1, -2, 3]}, "input_ids holds -2"),
            ({"input_ids": [1, 2**70, 3]}, "column 'input_ids' holds"),
            ({"loss_mask": [1, 1]}, "`loss_mask` must be a list of true and false as long as `input_ids`, 3"),
            ({"loss_mask": [1, 2, 0]}, "`loss_mask` must be a list of true and false as long as `input_ids`, 3"),
            ({"tail_logprob": [-1.0, 3.0]}, "tail_logprob is above 0"),
            ({"tail_logprob": [-1.0]}, "tail_logprob has 1 positions"),
            ({"tail_logprob": [-9.0, -9.0]}, "position 0: entries and tail that do not add up to 1"),
        ],
    )
    def test_a_bad_row_is_named_with_its_file(
        self, tmp_path: Path, tokenizer: Path, change: dict[str, Any], message: str
    ) -> None:
        row = {"input_ids": [1, 2, 3], "topk_ids": [[1, 2], [3, 4]], "topk_logprobs": [[-1.0, -2.0], [-1.5, -2.5]]}
        path = write_rows(tmp_path / "rows.jsonl", [row, {**row, **change}])
        with pytest.raises(UserError) as error:
            import_topk(path, tmp_path / "out", tokenizer)
        assert str(error.value).startswith(f"{path}, line 2: {message}")
        assert "\n" not in str(error.value)
        cache = import_topk(path, tmp_path / "out", tokenizer, skip_bad=True, overwrite=True)
        assert cache.manifest.skipped == {"bad": 1}
        assert findings(cache) == []

    def test_lines_that_are_no_json_are_named(self, tmp_path: Path, tokenizer: Path) -> None:
        path = write_rows(tmp_path / "a.jsonl", random_rows(2))
        path.write_text(path.read_text() + "{\n[1]\n")
        with pytest.raises(UserError, match="line 3: not JSON"):
            import_topk(path, tmp_path / "out", tokenizer)
        assert import_topk(path, tmp_path / "out", tokenizer, skip_bad=True).manifest.skipped == {"bad": 2}


class TestSources:
    def test_folders_patterns_and_several_arguments_in_a_fixed_order(self, tmp_path: Path, tokenizer: Path) -> None:
        rows = random_rows(6)
        write_rows(tmp_path / "set/b/1.parquet", rows[2:4])
        write_rows(tmp_path / "set/a.jsonl", rows[:2])
        write_rows(tmp_path / "set/c.parquet", rows[4:])
        (tmp_path / "set/README.md").write_text("not data")
        assert_holds_rows(import_topk(tmp_path / "set", tmp_path / "folder", tokenizer), rows)
        pattern = import_topk(f"{tmp_path}/set/*", tmp_path / "pattern", tokenizer)
        assert_holds_rows(pattern, [*rows[:2], *rows[4:]])
        several = import_logits(
            [str(tmp_path / "set/c.parquet"), str(tmp_path / "set/b")],
            tmp_path / "several",
            source_format="topk",
            teacher="big",
            tokenizer=str(tokenizer),
            precision="exact",
        )
        assert_holds_rows(several, [*rows[4:], *rows[2:4]])

    @pytest.mark.slow
    def test_from_and_to_an_object_store(self, tmp_path: Path, tokenizer: Path, bucket: str) -> None:  # noqa: F811
        import fsspec

        rows = random_rows(5)
        for part in (0, 1):
            path = write_rows(tmp_path / f"{part}.parquet", rows[3 * part : 3 + 3 * part])
            filesystem, root = fsspec.url_to_fs(f"{bucket}/set/{part}.parquet")
            filesystem.put_file(str(path), root)
        cache = import_topk(f"{bucket}/set", f"{bucket}/cache", tokenizer)  # type: ignore[arg-type]
        assert_holds_rows(logitcache.open(f"{bucket}/cache"), rows)
        assert cache.manifest.history[-1]["from"][0]["path"] == f"{bucket}/set"
        filesystem.put_file(str(tmp_path / "0.parquet"), root)
        with pytest.raises(UserError, match=r"from\[0\]\.(bytes|sha256) was"):
            import_topk(f"{bucket}/set", f"{bucket}/cache", tokenizer)  # type: ignore[arg-type]
        with pytest.raises(UserError, match="no such file or folder"):
            import_topk(f"{bucket}/nothing", tmp_path / "out", tokenizer)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("nothing", "no such file or folder"),
            ("a.csv", "unknown kind of file, accepted are .parquet"),
            ("empty", "no file of a kind that is read here"),
            ("*.arrow", "no file of a kind that is read here"),
            ("broken.parquet", "broken.parquet, row 0: not readable, the file is damaged"),
            ("broken.jsonl.gz", "line 1: not readable, the file is damaged"),
            ("broken.jsonl.zst", "line 1: not readable, the file is damaged"),
        ],
    )
    def test_what_is_no_source_is_refused(self, tmp_path: Path, tokenizer: Path, name: str, message: str) -> None:
        (tmp_path / "empty").mkdir()
        for file in ("a.csv", "broken.parquet", "broken.jsonl.gz", "broken.jsonl.zst"):
            (tmp_path / file).write_text("PAR1 and nothing more")
        with pytest.raises(UserError) as error:
            import_topk(tmp_path / name, tmp_path / "out", tokenizer)
        assert message in str(error.value)
        assert not (tmp_path / "out").exists()

    def test_a_file_that_was_cut_off_is_refused(self, tmp_path: Path, tokenizer: Path) -> None:
        path = write_rows(tmp_path / "a.parquet", random_rows(40))
        path.write_bytes(path.read_bytes()[:-200])
        with pytest.raises(UserError, match=r"a.parquet, row 0: not readable"):
            import_topk(path, tmp_path / "out", tokenizer)

    def test_a_cache_within_its_own_source_is_refused(self, tmp_path: Path, tokenizer: Path) -> None:
        write_rows(tmp_path / "set/a.jsonl", random_rows(2))
        with pytest.raises(UserError, match=r"lies in .*, which is read; choose a folder beside it"):
            import_topk(tmp_path / "set", tmp_path / "set/cache", tokenizer)
        import_topk(tmp_path / "set/a.jsonl", tmp_path / "set/cache", tokenizer)

    def test_an_unknown_protocol_is_refused(self, tmp_path: Path, tokenizer: Path) -> None:
        with pytest.raises(UserError, match="no file system for such a URL"):
            import_topk("nowhere://bucket/x", tmp_path / "out", tokenizer)


SHARD_POSITIONS = 20


def settings(source: Path, out: Path, tokenizer: Path) -> dict[str, Any]:
    return {
        "source": source,
        "out": out,
        "tokenizer": tokenizer,
        "shard_positions": SHARD_POSITIONS,
        "precision": "balanced",
    }


def run_import(arguments: dict[str, Any]) -> None:
    import_topk(**arguments)


class TestResuming:
    @pytest.mark.slow
    @pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
    def test_kills_at_any_moment_end_in_the_same_bytes(self, tmp_path: Path, tokenizer: Path, suffix: str) -> None:
        rows = random_rows(60)
        for part in range(3):
            write_rows(tmp_path / f"set/{part}.{suffix}", rows[20 * part : 20 * part + 20], row_group_size=7)
        whole = import_topk(**settings(tmp_path / "set", tmp_path / "whole", tokenizer))
        assert len(whole.manifest.shards) > 10
        out, moments, kills = tmp_path / "killed", random.Random(0), 0
        while kills < 2:
            process = FORKED.Process(target=run_import, args=(settings(tmp_path / "set", out, tokenizer),))
            process.start()
            done = num_finished_shards(out)
            wanted = done + moments.randint(1, 3)
            while process.is_alive() and num_finished_shards(out) < wanted:
                time.sleep(0.001)
            finished = (out / "logitcache.json").exists()
            process.kill()
            process.join()
            kills += not finished
            if (out / "logitcache.json").exists():
                shutil.rmtree(out)
        cache = import_topk(**settings(tmp_path / "set", out, tokenizer))
        ours, theirs = contents(out), contents(tmp_path / "whole")
        assert ours == theirs
        assert findings(cache) == []
        assert [row.row_id for row in cache] == [row.row_id for row in whole]

    def test_a_bad_row_that_is_skipped_later_is_counted_once(self, tmp_path: Path, tokenizer: Path) -> None:
        rows = random_rows(30)
        rows[25]["topk_ids"] = [[1, 1, 1, 1] for _ in rows[25]["topk_ids"]]
        source = write_rows(tmp_path / "a.jsonl", rows)
        arguments = settings(source, tmp_path / "out", tokenizer)
        with pytest.raises(UserError, match="line 26: position 0: the same token id twice"):
            import_topk(**arguments)
        assert (tmp_path / "out/.build/plan.json").exists()
        with pytest.raises(UserError, match=r"an unfinished cache made otherwise: skip_bad was False, now True"):
            import_topk(**arguments, skip_bad=True)
        cache = import_topk(**arguments, skip_bad=True, overwrite=True)
        assert cache.manifest.skipped == {"bad": 1}
        assert len(cache) == 29
        assert findings(cache) == []

    def test_a_shard_of_bad_rows_only_is_left_out(self, tmp_path: Path, tokenizer: Path) -> None:
        rows = [random_row(np.random.default_rng(i), 7) for i in range(6)]
        for row in rows[2:4]:
            row["topk_ids"] = [[1, 1, 1, 1] for _ in row["topk_ids"]]
        source = write_rows(tmp_path / "a.jsonl", rows)
        cache = import_topk(source, tmp_path / "out", tokenizer, skip_bad=True, shard_positions=12)
        assert len(cache.manifest.shards) == 2
        assert [row.row_id for row in cache] == [
            row.row_id
            for row in import_topk(write_rows(tmp_path / "b.jsonl", rows[:2] + rows[4:]), tmp_path / "other", tokenizer)
        ]
        assert findings(cache) == []

    def test_where_no_row_is_good_nothing_is_made(self, tmp_path: Path, tokenizer: Path) -> None:
        rows = random_rows(2)
        for row in rows:
            row["topk_logprobs"] = None
        with pytest.raises(UserError, match="no row could be imported: 2 bad"):
            import_topk(write_rows(tmp_path / "a.jsonl", rows), tmp_path / "out", tokenizer, skip_bad=True)
        assert not (tmp_path / "out/logitcache.json").exists()

    def test_the_same_command_again_does_nothing(self, tmp_path: Path, tokenizer: Path) -> None:
        source = write_rows(tmp_path / "a.jsonl", random_rows(8))
        import_topk(source, tmp_path / "out", tokenizer)
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
        import_topk(source, tmp_path / "out", tokenizer)
        assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before

    def test_other_settings_and_changed_sources_are_refused(self, tmp_path: Path, tokenizer: Path) -> None:
        source = write_rows(tmp_path / "a.jsonl", random_rows(8))
        import_topk(source, tmp_path / "out", tokenizer)
        with pytest.raises(UserError, match="a finished cache made otherwise: top_k was None, now 2"):
            import_topk(source, tmp_path / "out", tokenizer, top_k=2)
        with pytest.raises(UserError, match="teacher was big, now small"):
            import_topk(source, tmp_path / "out", tokenizer, teacher="small")
        write_rows(source, random_rows(8, seed=1))
        with pytest.raises(UserError, match=r"from\[0\]\."):
            import_topk(source, tmp_path / "out", tokenizer)
        assert_holds_rows(import_topk(source, tmp_path / "out", tokenizer, overwrite=True), random_rows(8, seed=1))

    def test_a_folder_of_something_else_is_left_alone(self, tmp_path: Path, tokenizer: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out/thesis.tex").write_text("years of work")
        with pytest.raises(UserError, match="the folder is not empty and holds no cache"):
            import_topk(write_rows(tmp_path / "a.jsonl", random_rows(2)), tmp_path / "out", tokenizer, overwrite=True)
        assert (tmp_path / "out/thesis.tex").read_text() == "years of work"


class TestCommandLine:
    def test_imports_prints_the_cache_and_finds_nothing_wrong(
        self, tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        source = write_rows(tmp_path / "a.jsonl", random_rows(8))
        arguments = [str(source), "--from", "topk", "--teacher", "big", "--tokenizer", str(tokenizer)]
        assert main(["import", *arguments, "--vocab-size", "80", "--out", str(tmp_path / "out")]) == 0
        printed = capsys.readouterr().out
        assert "identity" in printed
        assert logitcache.open(tmp_path / "out").vocab_size == 80
        assert main(["verify", str(tmp_path / "out")]) == 0

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            (["--tokenizer", "/nowhere"], "--tokenizer /nowhere: no such folder"),
            (["--top-k", "0"], "--top-k 0: at least 1 is needed"),
            (["--vocab-size", "0"], "--vocab-size 0: at least 1 is needed"),
            (["--vocab-size", "10"], "is it the teacher's?"),
            (["--vocab-size", "2147483648"], "--vocab-size 2147483648: at most 16,777,216 tokens"),
            (["--config", "x.yaml"], "--config is of DistillKit's data only"),
            (["--keep", "row_id"], "--keep row_id: the cache has a column of that name"),
            (["--loss-mask", "mask"], "column 'mask' is missing or null"),
            (["--rows", "1:2"], "unknown argument --rows"),
        ],
    )
    def test_what_cannot_be_is_one_line_and_status_2(
        self, tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str], changed: list[str], message: str
    ) -> None:
        source = write_rows(tmp_path / "a.jsonl", random_rows(8))
        arguments = [str(source), "--from", "topk", "--teacher", "big", "--tokenizer", str(tokenizer), *changed]
        assert main(["import", *arguments, "--out", str(tmp_path / "out")]) == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if line != f"logitcache: reading {source}"]
        assert len(errors) == 1
        assert message in errors[0]
        assert not (tmp_path / "out").exists()
