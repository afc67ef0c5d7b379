"""A student must read the cache's ids as the teacher wrote them."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import logitcache
from logitcache import LogitCache, UserError
from logitcache.format.tokenizer import tokenizer_fingerprint
from logitcache.storage.atomic import file_sha256
from logitcache.storage.folder import Folder
from tests.helpers.cachemaking import VOCAB, random_sequences, tokenizer, write_cache
from trainer.cli import main
from trainer.model.tokenizers import cache_tokenizer, check_tokenizer, student_tokenizer

CLASSES = "class Slow: pass\nclass Fast: pass\n"
WORDS = ["<eos>", *(f"word{i}" for i in range(1, VOCAB))]


def bpe(merges: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    tokens = ["<eos>", "a", "b", "c", "ab", "bc", "abc"]
    vocabulary = {token: i for i, token in enumerate([*tokens, *(f"t{i}" for i in range(len(tokens), VOCAB))])}
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def test_the_same_tokenizer_passes_without_a_word(heldout: LogitCache) -> None:
    assert check_tokenizer(tokenizer(), heldout, "student") == []


def test_a_mismatch_names_how_many_ids_differ_and_the_first_of_them(heldout: LogitCache) -> None:
    words = WORDS.copy()
    words[5], words[9] = words[9], words[5]
    with pytest.raises(UserError) as refusal:
        check_tokenizer(tokenizer(words), heldout, "my-student")
    message = str(refusal.value)
    assert message.startswith("my-student: ")
    assert "2 ids differ" in message
    assert "id 5 is 'word5' in the cache, 'word9' in the student" in message
    assert "id 9 is 'word9' in the cache, 'word5' in the student" in message


def test_ids_that_the_student_does_not_have_are_named(heldout: LogitCache) -> None:
    with pytest.raises(
        UserError, match=r"4 ids differ: id 60 is 'word60' in the cache, unused in the student.* 1 more"
    ):
        check_tokenizer(tokenizer(WORDS[:60]), heldout, "student")


def test_ids_that_only_the_student_has_are_no_difference(heldout: LogitCache) -> None:
    check_tokenizer(tokenizer([*WORDS, "extra1", "extra2"]), heldout, "student")


def test_other_merges_are_refused(tmp_path: Path) -> None:
    merges = [("a", "b"), ("b", "c"), ("ab", "c")]
    cache = write_cache(tmp_path, random_sequences(2, seed=0), teacher_tokenizer=bpe(merges))
    check_tokenizer(bpe(merges), cache, "student")
    with pytest.raises(UserError, match="other merges"):
        check_tokenizer(bpe([("b", "c"), ("a", "b"), ("ab", "c")]), cache, "student")


def test_special_tokens_and_chat_template_only_warn(heldout: LogitCache) -> None:
    other = tokenizer()
    other.pad_token = "word3"
    other.chat_template = "{{ messages }}"
    warnings = check_tokenizer(other, heldout, "student")
    assert len(warnings) == 2
    assert "special tokens" in warnings[0]
    assert "chat template" in warnings[1]


@pytest.mark.parametrize("missing", ["merges_sha256", "special_tokens", "chat_template_sha256"])
def test_what_a_fingerprint_does_not_say_of_the_tokenizer_is_no_error(tmp_path: Path, missing: str) -> None:
    cache = write_cache(tmp_path, random_sequences(2, seed=0))
    recorded = {name: value for name, value in cache.manifest.fingerprint["tokenizer"].items() if name != missing}
    replace(cache.manifest, fingerprint={"tokenizer": recorded}).write(Folder(tmp_path))
    warnings = check_tokenizer(tokenizer(), logitcache.open(tmp_path), "student")
    assert [warning for warning in warnings if "cache's None" not in warning] == []


@pytest.mark.parametrize("change", [{"merges_sha256": 7}, {"special_tokens": []}])
def test_a_fingerprint_of_another_kind_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    cache = write_cache(tmp_path, random_sequences(2, seed=0))
    recorded = {**cache.manifest.fingerprint["tokenizer"], **change}
    replace(cache.manifest, fingerprint={"tokenizer": recorded}).write(Folder(tmp_path))
    with pytest.raises(UserError, match="is not a cache manifest"):
        logitcache.open(tmp_path)


def test_a_cache_without_its_tokenizer_is_compared_by_hash(tmp_path: Path) -> None:
    replace(write_cache(tmp_path, random_sequences(2, seed=0)).manifest, files={}).write(Folder(tmp_path))
    cache = logitcache.open(tmp_path)
    assert cache_tokenizer(cache) is None
    assert check_tokenizer(tokenizer(), cache, "student") == []
    with pytest.raises(UserError, match=r"another vocabulary \(60 tokens\)"):
        check_tokenizer(tokenizer(WORDS[:60]), cache, "student")


def test_an_altered_tokenizer_folder_does_not_pass_for_the_teachers(tmp_path: Path) -> None:
    cache = write_cache(tmp_path, random_sequences(2, seed=0))
    other = tokenizer(["<eos>", *(f"other{i}" for i in range(1, VOCAB))])
    other.save_pretrained(cache.tokenizer_path)
    with pytest.raises(UserError, match=r"another vocabulary .*tokenizer\.json was altered"):
        check_tokenizer(other, cache, "student")
    assert check_tokenizer(tokenizer(), cache, "student") == []


def test_a_cache_that_does_not_name_its_tokenizer_gives_a_warning(tmp_path: Path) -> None:
    cache = write_cache(tmp_path, random_sequences(2, seed=0))
    replace(cache.manifest, fingerprint={"teacher": {"name": "random"}}).write(Folder(tmp_path))
    [warning] = check_tokenizer(tokenizer(WORDS[:60]), logitcache.open(tmp_path), "student")
    assert "could not be checked" in warning


def with_tokenizer(folder: Path, change: Callable[[dict[str, Any]], None]) -> LogitCache:
    """A cache whose manifest vouches for a tokenizer_config.json that somebody changed, and for code beside it."""
    cache = write_cache(folder, random_sequences(8, seed=0))
    path = folder / "tokenizer" / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    change(settings)
    path.write_text(json.dumps(settings))
    code = folder / "tokenizer" / "code.py"
    code.write_text(f"import pathlib\npathlib.Path({str(folder / 'ran')!r}).touch()\n{CLASSES}")
    files = {f"tokenizer/{file.name}": file_sha256(file) for file in (path, code)}
    replace(cache.manifest, files={**cache.manifest.files, **files}).write(Folder(folder))
    return logitcache.open(folder)


@pytest.mark.parametrize("known", [True, False], ids=["of a known class", "of no known class"])
def test_code_beside_the_tokenizer_of_a_cache_never_runs_and_nobody_is_asked(
    tmp_path: Path,
    student_folder: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    known: bool,
) -> None:
    def change(settings: dict[str, Any]) -> None:
        settings["auto_map"] = {"AutoTokenizer": ["code.Slow", "code.Fast"]}
        settings["tokenizer_class"] = settings["tokenizer_class"] if known else "Fast"

    cache = with_tokenizer(tmp_path / "cache", change)
    monkeypatch.setattr("builtins.input", lambda prompt: pytest.fail(f"asked: {prompt}"))
    monkeypatch.setattr("sys.stdin", StringIO("y\n"))
    out = tmp_path / "out"
    options = ["--cache", cache.path, "--student", student_folder, "--output_dir", str(out), "--max_steps", "1"]
    assert main(["fit", *options, "--use_cpu"]) == (0 if known else 2)
    assert not (tmp_path / "cache" / "ran").exists()
    if known:
        assert "auto_map" not in json.loads((out / "tokenizer_config.json").read_text())
    else:
        assert (
            "the tokenizer does not load: it needs code of its own, which is never run here" in capsys.readouterr().err
        )


def test_code_beside_a_student_never_runs_and_nobody_is_asked(
    tmp_path: Path, cache: LogitCache, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("builtins.input", lambda prompt: pytest.fail(f"asked: {prompt}"))
    (tmp_path / "code.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n{CLASSES}")
    settings = {"model_type": "own", "auto_map": {"AutoConfig": "code.Slow", "AutoModelForCausalLM": "code.Fast"}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    for command in (
        ["fit", "--student", str(tmp_path), "--output_dir", str(tmp_path / "out")],
        ["eval", str(tmp_path)],
    ):
        assert main([*command, "--cache", cache.path]) == 2
        assert "it needs code of its own, which is never run here" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_every_from_pretrained_of_the_trainer_says_that_no_code_runs() -> None:
    for path in sorted((Path(__file__).parents[3] / "trainer").rglob("*.py")):
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
            function = ast.unparse(call.func)
            if function.startswith("Auto") and function.endswith((".from_pretrained", ".from_config")):
                assert "NO_CODE" in {ast.unparse(option.value) for option in call.keywords}, f"{path}: {function}"


@pytest.mark.parametrize(
    "change",
    [
        {"model_max_length": "x", "padding_side": -1},
        {"added_tokens_decoder": 7},
        {"tokenizer_class": 7},
        {"eos_token": {"a": {}}},
        {"name": "\ud800"},  # loads, and could not be saved at the end of a run
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_tokenizer_of_another_kind_is_one_line(tmp_path: Path, change: dict[str, Any]) -> None:
    cache = with_tokenizer(tmp_path, lambda settings: settings.update(change))
    with pytest.raises(UserError, match="tokenizer: the tokenizer does not load: "):
        cache_tokenizer(cache)


@pytest.mark.parametrize("content", ["[]", "{}", "x", '{"model": {"type": "BPE"}}', '{"added_tokens": 7}'])
def test_a_tokenizer_json_of_another_kind_is_one_line(tmp_path: Path, content: str) -> None:
    cache = write_cache(tmp_path, random_sequences(2, seed=0))
    path = tmp_path / "tokenizer" / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"tokenizer\.json was altered"):
        cache_tokenizer(cache)
    files = {**cache.manifest.files, "tokenizer/tokenizer.json": file_sha256(path)}
    replace(cache.manifest, files=files).write(Folder(tmp_path))
    with pytest.raises(UserError, match="the tokenizer does not load: "):
        cache_tokenizer(logitcache.open(tmp_path))


def test_a_folder_without_tokenizer_files_has_no_tokenizer(student_folder: str) -> None:
    assert student_tokenizer(student_folder) is None


class ToyTokenizer:
    """No more than what a fingerprint needs."""

    def __init__(self, merges: list[Any]) -> None:
        self.special_tokens_map = {"eos_token": "<eos>"}
        self.backend_tokenizer = self
        self._merges = merges

    def get_vocab(self) -> dict[str, int]:
        return {"a": 0, "b": 1}

    def to_str(self) -> str:
        return json.dumps({"model": {"type": "BPE", "merges": self._merges}})


def test_merges_are_the_same_however_their_file_writes_them() -> None:
    one_string = tokenizer_fingerprint(ToyTokenizer(["a b"]))
    assert one_string == tokenizer_fingerprint(ToyTokenizer([["a", "b"]]))
    assert one_string != tokenizer_fingerprint(ToyTokenizer([["b", "a"]]))
