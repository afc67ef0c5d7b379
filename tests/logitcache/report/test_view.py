"""logitcache view without a browser: what the page holds, which rows, how they are cut, and that data stays data."""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import os
import shutil
from dataclasses import replace
from math import exp, log
from pathlib import Path
from typing import Any
from unittest.mock import patch

import fsspec
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import logitcache
from logitcache import LogitCache, UserError
from logitcache.cli import main
from logitcache.format.layout import Layout
from logitcache.format.manifest import Manifest
from logitcache.format.tail_basis import rebuilt
from logitcache.format.tail_parts import TailParts
from logitcache.report.page import view
from logitcache.report.samples import MOST_ROWS, PAGE_TOKENS, SHOWN_CHARACTERS, chosen_rows, fair_lengths, read_samples
from logitcache.report.token_text import MOST_CHARACTERS, TOKENIZER_NAME, token_texts
from logitcache.storage.folder import Folder
from tests.helpers.readable import HOSTILE, Elements, page_data, readable_cache, write_tokenizer, write_tokenizer_json
from tests.helpers.smallcaches import EVERYTHING, VOCAB, random_rows, write_cache
from tests.helpers.tokenizing import CORPUS, byte_level

# Texts of tokens


def byte_fallback() -> Tokenizer:
    vocab = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}}
    for piece in ["▁", *"abcdefghijklmnopqrstuvwxyz", "▁a", "an", "▁an", "and", "▁and"]:
        vocab.setdefault(piece, len(vocab))
    merges = [("▁", "a"), ("a", "n"), ("▁a", "n"), ("an", "d"), ("▁an", "d")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[UNK]"], show_progress=False)
    )
    return tokenizer


@pytest.fixture
def cache(tmp_path: Path) -> LogitCache:
    """30 ragged rows with everything that a cache can hold, without a tokenizer."""
    return write_cache(tmp_path / "small", ROWS, EVERYTHING, rows_per_shard=10)


def texts_of(cache: LogitCache, ids: list[int]) -> tuple[list[Any], str]:
    cache = logitcache.open(cache.path)
    return token_texts(Folder(cache.path), cache.manifest, ids)


@pytest.mark.parametrize("kind", [byte_level, byte_fallback, unigram, word_piece])
def test_texts_of_tokens_join_to_what_the_tokenizers_library_decodes(kind: Any, cache: LogitCache) -> None:
    tokenizer = kind()
    write_tokenizer_json(Path(cache.path), tokenizer.to_str())
    for text in CORPUS:
        ids = tokenizer.encode(text).ids
        texts, note = texts_of(cache, ids)
        joined = b"".join(text if isinstance(text, bytes) else text.encode() for text in texts).decode()
        assert joined.removeprefix(" ") == tokenizer.decode(ids, skip_special_tokens=False).removeprefix(" ")
        assert not note


def test_a_part_of_a_character_is_its_bytes_and_whole_characters_are_text(cache: LogitCache) -> None:
    tokenizer = byte_level()
    write_tokenizer_json(Path(cache.path), tokenizer.to_str())
    ids = tokenizer.encode("🦖 x").ids
    texts, _ = texts_of(cache, ids)
    assert texts[-1].endswith("x")
    assert b"".join(text for text in texts if isinstance(text, bytes)) == "🦖".encode()
    assert tokenizer.id_to_token(0) == "<|end|>"
    assert texts_of(cache, [0]) == (["<|end|>"], "")


def test_ids_that_no_text_is_known_of_have_none(cache: LogitCache) -> None:
    write_tokenizer_json(Path(cache.path), byte_level().to_str())
    assert texts_of(cache, [10**6]) == ([None], "")


def vocabulary(decoder: Any) -> str:
    return json.dumps({"model": {"vocab": {"ta": 0, "t" * 10**6: 1}}, "decoder": decoder})


ROWS = random_rows(30, EVERYTHING)
REPLACE = {"type": "Replace", "pattern": {"String": "t"}}


@pytest.mark.slow
@pytest.mark.parametrize(
    "steps",
    [
        [REPLACE | {"content": "tt"}] * 31,
        [REPLACE | {"content": "t" * 10**6}] * 31,
        [{"type": "Metaspace", "replacement": "t"}, REPLACE | {"pattern": {"String": " "}, "content": "t" * 10**6}]
        * 15,
    ],
)
def test_a_decoder_that_lengthens_texts_is_cut_at_each_step(steps: list[Any], cache: LogitCache) -> None:
    write_tokenizer_json(Path(cache.path), vocabulary({"type": "Sequence", "decoders": steps}))
    (short, long), note = texts_of(cache, [0, 1])
    assert not note
    assert SHOWN_CHARACTERS < len(short) <= MOST_CHARACTERS
    assert set(short) == set(long) == {"t"}


@pytest.mark.parametrize(
    "step",
    [
        {"type": "BPEDecoder", "suffix": ""},
        {"type": "Metaspace", "replacement": ""},
        {"type": "Replace", "pattern": {"String": ""}, "content": "x"},
    ],
)
def test_a_decoders_empty_pattern_changes_nothing(step: Any, cache: LogitCache) -> None:
    write_tokenizer_json(Path(cache.path), vocabulary({"type": "Sequence", "decoders": [step] * 30}))
    assert texts_of(cache, [0]) == (["ta"], "")


def test_a_decoder_of_many_steps_leaves_the_ids_with_a_note(cache: LogitCache) -> None:
    step = {"type": "Metaspace", "replacement": "x"}
    write_tokenizer_json(Path(cache.path), vocabulary({"type": "Sequence", "decoders": [step] * 100_000}))
    texts, note = texts_of(cache, [0])
    assert texts == [None]
    assert "more than 32 steps" in note


def test_of_a_tokenizer_without_end_only_the_beginning_is_read(
    cache: LogitCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logitcache.report.token_text.MAX_TOKENIZER_BYTES", 1 << 20)
    write_tokenizer_json(Path(cache.path), "{}")
    cache = logitcache.open(cache.path)
    (Path(cache.path) / TOKENIZER_NAME).write_bytes(bytes((1 << 20) + 1))
    with pytest.raises(UserError, match=r"tokenizer\.json is refused: it has more than the 1048576 bytes"):
        token_texts(Folder(cache.path), cache.manifest, [0])


@pytest.mark.parametrize("piece", [123, None, ["a"], {"a": 1}])
def test_a_piece_that_is_no_text_has_none(piece: Any, cache: LogitCache) -> None:
    write_tokenizer_json(Path(cache.path), json.dumps({"model": {"vocab": [[piece, 0.0], ["b", 0.0]]}}))
    assert texts_of(cache, [0, 1]) == ([None, "b"], "")


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"model": 3}', '{"model": {"vocab": {"a": "b"}}, "added_tokens": [1]}', "[" * 10**5]
)
def test_a_tokenizer_that_is_not_understood_leaves_the_ids_with_a_note(content: str, cache: LogitCache) -> None:
    write_tokenizer_json(Path(cache.path), content)
    texts, note = texts_of(cache, [1, 2])
    assert texts == [None, None]
    assert "shown as ids" in note


def test_a_cache_without_a_tokenizer_is_shown_as_ids(cache: LogitCache, tmp_path: Path) -> None:
    page = view(cache, tmp_path / "page.html")
    data = page_data(page.path)
    assert "shown as ids" in data["note"]
    assert set(data["texts"]) == {None}


def test_an_altered_tokenizer_is_refused(cache: LogitCache) -> None:
    write_tokenizer_json(Path(cache.path), byte_level().to_str())
    path = Path(cache.path) / TOKENIZER_NAME
    path.write_text(path.read_text() + " ")
    with pytest.raises(UserError, match=r"tokenizer.json was altered"):
        texts_of(cache, [1])
    path.unlink()
    with pytest.raises(UserError, match=r"tokenizer.json is missing"):
        texts_of(cache, [1])


# Rows


def test_rows_are_spread_from_the_first_to_the_last(cache: LogitCache) -> None:
    rows = chosen_rows(cache, (), 4)
    assert rows == [0, 9, 19, 29]
    assert chosen_rows(cache, (), 100) == list(range(30))


def test_rows_are_named_by_range_number_and_id(cache: LogitCache) -> None:
    wanted = cache[17]
    assert chosen_rows(cache, ("0:3", "29", wanted.row_id, wanted.row_id[:10], "28:"), 24) == [0, 1, 2, 17, 28, 29]


@pytest.mark.parametrize("rows", [["30"], ["30:40"], ["f" * 32], ["zebra"], ["2:1"], ["9" * 31]])
def test_rows_that_the_cache_has_not_are_bad_input(rows: list[str], cache: LogitCache) -> None:
    with pytest.raises(UserError, match=f"--rows {rows[0]}"):
        chosen_rows(cache, rows, 24)


@pytest.mark.parametrize("rows", ["9" * 5000, f"0:{'9' * 5000}", f"{'9' * 5000}:"])
def test_rows_of_very_many_digits_are_bad_input_in_one_short_line(
    rows: str, cache: LogitCache, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["view", cache.path, "--rows", rows]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert len(said) < 500


def test_more_rows_than_a_page_takes_are_bad_input(tmp_path: Path) -> None:
    layout = Layout(VOCAB)
    cache = write_cache(tmp_path, random_rows(MOST_ROWS + 1, layout, longest=3), layout)
    with pytest.raises(UserError, match=f"at most {MOST_ROWS} rows"):
        chosen_rows(cache, ["0:1000"], 24)
    for number in (0, MOST_ROWS + 1):
        with pytest.raises(UserError, match="--num-sequences"):
            chosen_rows(cache, (), number)


def test_long_rows_are_cut_equally_and_short_ones_are_not() -> None:
    assert fair_lengths([3, 100, 5, 100], 68) == [3, 30, 5, 30]
    assert fair_lengths([3, 4], 100) == [3, 4]
    assert sum(fair_lengths([50] * 7, 100)) <= 100
    assert fair_lengths([], 100) == []


def test_numbers_of_a_page_are_those_of_the_targets_that_predicted_each_token(tmp_path: Path) -> None:
    cache = readable_cache(
        tmp_path / "c", [f"w{i}" for i in range(60)], layout=replace(EVERYTHING, vocab_size=60, columns={})
    )
    numbers = [1, 4]
    samples = read_samples(cache, numbers)
    arrays, ids = samples.arrays, samples.ids
    basis = cache.tail_basis
    assert basis is not None
    token = position = 0
    for number in numbers:
        sequence = cache[number]
        targets = sequence.targets
        for i, (token_id, trained) in enumerate(zip(sequence.input_ids, sequence.loss_mask, strict=True)):
            assert ids[arrays["tokens"][token]] == token_id
            assert arrays["trained"][token] == trained
            token += 1
            if not trained:
                continue
            m = sequence.positions.tolist().index(i - 1)  # row i − 1 of the logits predicts token i
            entries = [entry for entry in targets.token_ids[m].tolist() if entry >= 0]
            logprobs = targets.logprobs[m].tolist()
            shown = min(len(entries), 16)
            assert ids[arrays["entries"][position][:shown]].tolist() == entries[:shown]
            assert arrays["logprobs"][position][:shown].tolist() == [round(-p * 1000) for p in logprobs[:shown]]
            assert arrays["num_entries"][position] == len(entries)
            rank = entries.index(token_id) + 1 if token_id in entries else 0
            assert arrays["rank"][position] == rank
            assert arrays["actual"][position] == (round(-logprobs[rank - 1] * 1000) if rank else 0xFFFF)
            rest = sum(exp(p) for p in logprobs[16 : len(entries)])
            assert arrays["rest"][position] == (round(-log(rest) * 1000) if rest else 0xFFFF)
            assert arrays["tail"][position] == round(-float(targets.tail_logprob[m]) * 1000)
            assert targets.group_logprobs is not None
            heaviest = np.argsort(-targets.group_logprobs[m], kind="stable").tolist()
            assert arrays["groups"][position][:3].tolist() == heaviest
            dealt = rebuilt(targets[m : m + 1], basis)[0]
            outside = sorted(set(range(60)) - set(entries), key=lambda token: -dealt[token])[:4]
            assert ids[arrays["rebuilt"][position][: len(outside)]].tolist() == outside
            assert arrays["rebuilt_logprobs"][position][: len(outside)].tolist() == [
                round(-p * 1000) for p in dealt[outside].tolist()
            ]
            position += 1
    assert position == len(arrays["entropy"])


@pytest.mark.slow
def test_a_cut_row_has_the_positions_of_the_tokens_that_are_shown(tmp_path: Path) -> None:
    texts = [f"w{i}" for i in range(40)]
    cache = readable_cache(tmp_path / "c", texts, num_rows=2, length=PAGE_TOKENS // 2 + 100, entries=2)
    samples = read_samples(cache, [0, 1])
    assert [row["shown"] for row in samples.rows] == [PAGE_TOKENS // 2] * 2
    assert [row["tokens"] for row in samples.rows] == [PAGE_TOKENS // 2 + 100] * 2
    assert samples.num_tokens == PAGE_TOKENS
    assert len(samples.arrays["entropy"]) == samples.arrays["trained"].sum() == PAGE_TOKENS - 2 * 5


# The page


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> LogitCache:
    """A cache whose every text tries to be markup: tokens, columns, teacher, history, name."""
    root = tmp_path_factory.mktemp("hostile") / "<img src=x onerror=alert(0)>"
    texts = [text.encode("utf-8", "ignore").decode() for text in HOSTILE]
    layout = Layout(len(HOSTILE), columns={"<b>column</b>": "string"})
    readable_cache(root, texts, layout=layout)
    write_tokenizer(root, HOSTILE)  # with the halves of surrogates, which a kept column cannot hold
    manifest = LogitCache(str(root)).manifest
    fingerprint = {
        "teacher": {"name": HOSTILE[1], "architecture": HOSTILE[0]},
        "corpus": {"sources": [{"name": HOSTILE[2]}]},
        "capture": {"top_k": 3},
    }
    history = ({"command": HOSTILE[1], "rows": HOSTILE[0], "from": []},)
    replace(manifest, fingerprint=fingerprint, history=history).write(Folder(root))
    return LogitCache(str(root))


def test_whatever_a_cache_says_the_page_has_the_elements_of_any_page(
    hostile: LogitCache, cache: LogitCache, tmp_path: Path
) -> None:
    plain = Elements(view(cache, tmp_path / "plain.html").path.read_text())
    odd = Elements(view(hostile, tmp_path / "odd.html").path.read_text())
    assert [tag for tag, _ in odd.tags] == [tag for tag, _ in plain.tags]
    assert not any(name.startswith("on") for _, attributes in odd.tags for name in attributes)
    assert {"img", "iframe", "link", "object", "base"}.isdisjoint(tag for tag, _ in odd.tags)


def test_odd_texts_come_through_whole(hostile: LogitCache, tmp_path: Path) -> None:
    data = page_data(view(hostile, tmp_path / "page.html").path)
    texts = dict(zip(data["ids"].tolist(), data["texts"], strict=True))
    assert [texts[i] for i in range(len(HOSTILE))] == HOSTILE
    assert data["rows"][0]["columns"] == [["<b>column</b>", HOSTILE[0]]]
    assert data["teacher"] == HOSTILE[1]


def test_a_token_or_a_value_without_end_is_cut(tmp_path: Path) -> None:
    texts = ["x" * 10**5, "y"]
    readable_cache(tmp_path / "c", texts, layout=Layout(2, columns={"text": "string"}), entries=1)
    page = view(tmp_path / "c", tmp_path / "page.html")
    data = page_data(page.path)
    assert data["texts"] == ["x" * SHOWN_CHARACTERS + "…", "y"]
    assert data["rows"][0]["columns"][0][1] == data["texts"][0]


def long_cache(root: Path) -> LogitCache:
    """A cache with names, values, history and columns that have no end, and with marks of direction."""
    name = "\u202e\x1b" + "x" * 10**5
    columns = {f"c{i:03}" + "y" * 300: "string" for i in range(100)}
    readable_cache(root, ["a", "b"], layout=Layout(2, columns=columns), num_rows=2, entries=1)
    manifest = LogitCache(str(root)).manifest
    fingerprint = {"teacher": {"name": name}, "corpus": {"sources": [{"name": name}]}, "capture": {"top_k": 1}}
    history = ({"command": name[:2000]},) * 1000
    replace(manifest, fingerprint=fingerprint, history=history).write(Folder(root))
    (root / "README.md").write_text(f"---\nlicense: {name}\n---\n")
    return LogitCache(str(root))


def test_names_facts_history_and_columns_without_end_are_cut(tmp_path: Path) -> None:
    page = view(long_cache(tmp_path / "c"), tmp_path / "page.html")
    data = page_data(page.path)
    assert page.num_bytes < 300_000
    assert data["teacher"].endswith("xxx…")
    assert data["history"][0] == "968 steps before:"
    assert len(data["history"]) == 33
    for row in data["rows"]:
        assert len(row["columns"]) == 16
        assert row["more_columns"] == 84
    assert (
        "more columns" in dict(data["column_bytes"]["columns"]).popitem()[0]
        or len(data["column_bytes"]["columns"]) < 30
    )


def test_controls_and_marks_of_direction_in_names_are_shown_as_codes(tmp_path: Path) -> None:
    data = page_data(view(long_cache(tmp_path / "c\u202ed"), tmp_path / "page.html").path)
    facts = dict(data["facts"])
    assert data["name"] == "c‹U+202E›d"
    for text in (
        data["teacher"],
        data["corpus"],
        facts["corpus"],
        facts["teacher"],
        facts["licence"],
        data["history"][1],
    ):
        assert text.startswith("‹U+202E›‹U+001B›xxx")
    assert "\u202e" not in (tmp_path / "page.html").read_text()


def test_texts_of_very_many_tokens_are_cut_shorter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("logitcache.report.page.TEXT_CHARACTERS", 100)
    cache = readable_cache(tmp_path / "c", ["x" * 200, "y" * 200, "z"], entries=1)
    data = page_data(view(cache, tmp_path / "page.html").path)
    assert data["texts"] == ["x" * 32 + "…", "y" * 32 + "…", "z"]


@pytest.mark.parametrize("spaces", ["a" + " " * 200_000 + "b", " " * 200_000, "a" + "\nlicense: a" * 10**5])
def test_a_card_of_very_many_spaces_or_licences_has_a_page(spaces: str, cache: LogitCache, tmp_path: Path) -> None:
    (Path(cache.path) / "README.md").write_text(f"---\nlicense: {spaces}\n---\n")
    assert view(cache, tmp_path / "page.html").num_bytes < 200_000


def test_the_policy_allows_the_pages_own_script_and_style_and_nothing_else(hostile: LogitCache, tmp_path: Path) -> None:
    page = Elements(view(hostile, tmp_path / "page.html").path.read_text())
    (policy,) = [a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    (style,) = [text for tag, text in page.inline if tag == "style"]
    data, script = [text for tag, text in page.inline if tag == "script"]
    json.loads(data)
    for inline in (style, script):
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert "unsafe" not in policy
    assert policy.count("sha256-") == 2


def test_the_page_names_nothing_outside_itself(cache: LogitCache, tmp_path: Path) -> None:
    page = Elements(view(cache, tmp_path / "page.html").path.read_text())
    assert not {name for _, attributes in page.tags for name in attributes} & {
        "src",
        "href",
        "action",
        "srcset",
        "style",
    }
    code = "".join(text for _, text in page.inline[:1] + page.inline[2:])
    for word in ("url(", "@import", "fetch(", "XMLHttpRequest", "innerHTML", "insertAdjacentHTML", "eval(", "import("):
        assert word not in code
    assert code.count("http") == code.count("http://www.w3.org/2000/svg") == 1


def test_the_same_cache_gives_the_same_bytes_wherever_it_lies(cache: LogitCache, tmp_path: Path) -> None:
    first = view(cache, tmp_path / "a.html").path.read_bytes()
    shutil.copytree(cache.path, tmp_path / "elsewhere/small")
    assert view(tmp_path / "elsewhere/small", tmp_path / "b.html").path.read_bytes() == first
    assert str(tmp_path).encode() not in first


def test_a_url_gives_the_page_that_the_folder_gives(cache: LogitCache, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(cache.path, "/viewed/small", recursive=True)
    try:
        with patch.object(Folder, "fetch", autospec=True, side_effect=Folder.fetch) as fetch:
            page = view("memory://viewed/small", tmp_path / "page.html")
        # Ranges of shards, never a whole one.
        assert not [call for call in fetch.call_args_list if call.args[1].endswith(".parquet")]
        assert page.path.read_bytes() == view(cache, tmp_path / "local.html").path.read_bytes()
    finally:
        memory.rm("/viewed", recursive=True)


def test_the_overview_says_what_info_says(cache: LogitCache, tmp_path: Path) -> None:
    head = "---\nlicense: apache-2.0\nteacher_license: 'llama3'\ndata_license: <b>cc</b>\n---\n# license: no\n"
    (Path(cache.path) / "README.md").write_text(head)
    data = page_data(view(cache, tmp_path / "page.html").path)
    facts = dict(data["facts"])
    assert facts["identity"] == cache.identity
    assert facts["teacher"].startswith("tiny")
    assert facts["kept columns"].startswith("id (int64)")
    assert [facts[label] for label in ("licence", "teacher's licence", "data's licence")] == [
        "apache-2.0",
        "llama3",
        "<b>cc</b>",
    ]
    assert [tile[0] for tile in data["tiles"][:2]] == [f"{cache.num_positions:,}", "30"]
    sizes = sum(size for _, size in data["column_bytes"]["columns"])
    assert sizes == cache.manifest.num_bytes
    assert sum(data["group_sizes"]) == VOCAB


@pytest.mark.slow
def test_a_full_page_of_a_large_vocabulary_is_less_than_5_mb(tmp_path: Path) -> None:
    texts = [f"token{i:06}" for i in range(100_000)]
    layout = Layout(len(texts), TailParts(groups=32))
    random = np.random.default_rng(0)
    rows = [
        (sequence, wide(random, len(targets), layout)) for sequence, targets in random_rows(4, Layout(VOCAB), 0, 5000)
    ]
    rows += rows[:1] * 3
    cache = write_cache(tmp_path / "c", rows, layout)
    write_tokenizer(tmp_path / "c", texts)
    page = view(cache.path, tmp_path / "page.html")
    assert page.num_tokens > PAGE_TOKENS // 2
    assert page.num_bytes < 5_000_000


def wide(random: np.random.Generator, positions: int, layout: Layout) -> logitcache.SparseTargets:
    """20 entries of random ids and 32 groups at each position."""
    step = layout.vocab_size // 20
    shares = random.dirichlet(np.ones(21), positions)
    tail = shares[:, 20]
    return logitcache.SparseTargets(
        token_ids=(random.integers(0, step, (positions, 20)) + np.arange(20) * step).astype(np.int32),
        logprobs=np.sort(np.log(shares[:, :20]), axis=1)[:, ::-1].astype(np.float32),
        tail_logprob=np.log(tail).astype(np.float32),
        group_logprobs=np.log(random.dirichlet(np.ones(32), positions) * tail[:, None]).astype(np.float32),
    )


def test_a_cache_without_rows_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    Manifest(Layout(VOCAB), {}, (), {}, "tests").write(Folder(tmp_path / "none"))
    page = view(tmp_path / "none", tmp_path / "page.html")
    assert (page.num_rows, page.num_tokens) == (0, 0)


def test_a_cache_of_format_1_has_a_page(tmp_path: Path) -> None:
    page = view(Path(__file__).parents[2] / "data/format1" / "cache", tmp_path / "page.html")
    assert page.num_rows > 0


# The command


def test_the_command_writes_the_page_beside_and_says_what_it_shows(
    cache: LogitCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["view", "small", "--rows", "0:2,7"]) == 0
    page = tmp_path / "small.html"
    tokens = sum(len(cache[row].input_ids) for row in (0, 1, 7))
    said = capsys.readouterr().out
    assert (
        said
        == f"page       small.html ({page.stat().st_size:,} bytes), which shows 3 of 30 rows, {tokens} tokens of them\n"
    )
    assert [row["number"] for row in page_data(page)["rows"]] == [0, 1, 7]
    assert main(["view", "small", "--num-sequences", "5"]) == 0
    assert len(page_data(page)["rows"]) == 5


def test_only_a_page_of_ours_is_written_over(
    cache: LogitCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "thesis.html"
    other.write_text("<!doctype html><p>mine")
    assert main(["view", cache.path, "--out", str(other)]) == 2
    assert "thesis.html exists and is not a page of `logitcache view`" in capsys.readouterr().err
    assert other.read_text() == "<!doctype html><p>mine"
    assert main(["view", cache.path, "--out", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err
    assert main(["view", cache.path, "--out", str(tmp_path / "new/page.html")]) == 0


def test_what_is_no_regular_file_is_not_read_and_not_written_over(
    cache: LogitCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "endless").symlink_to("/dev/zero")
    for name in ("fifo", "endless"):
        assert main(["view", cache.path, "--out", str(tmp_path / name)]) == 2
        assert f"{name} exists and is not a page" in capsys.readouterr().err
    assert main(["view", cache.path, "--out", str(tmp_path / ("x" * 300))]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_full_disk_promises_nothing_to_continue(
    cache: LogitCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with patch.object(Path, "write_text", side_effect=OSError(errno.ENOSPC, "No space left on device")):
        assert main(["view", cache.path, "--out", str(tmp_path / "page.html")]) == 2
    said = capsys.readouterr().err
    assert "no space left for" in said
    assert "continue" not in said


def test_a_place_that_cannot_be_written_is_bad_input(
    cache: LogitCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["view", cache.path, "--out", str(tmp_path / "file/page.html")]) == 2
    assert "file/page.html: a folder that can be written is wanted" in capsys.readouterr().err


def test_what_is_no_cache_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["view", str(tmp_path)]) == 2
    assert "is not a cache" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
