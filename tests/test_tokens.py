"""Text to token shards: what is written, that a restart changes nothing, that memory is bounded."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from elo_engine.data.store import TokenStore
from elo_engine.data.tokens import build_tokens, tokenizer_hash
from elo_engine.data.writing import ShardWriter
from elo_engine.errors import FailedError, RefusedError, UsageError

ROOT = Path(__file__).resolve().parents[1]
TEXTS = (
    "The quick brown fox.",
    "  two  spaces\n\nand a blank line ",
    "日本語の文章、そして emoji 🦊 and a zero\0byte",
    "x",
    "café cafe\u0301 \u200b",
    "a name like <|begin|> is only text here",
)


@pytest.fixture(scope="session")
def tokenizer_folder(make_tokenizer: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def write_jsonl(path: Path, texts: list[str] | tuple[str, ...]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def partial(out: Path) -> Path:
    return out.with_name(f".{out.name}.partial")


def test_documents_are_the_tokenizers_own_ids_with_an_end(tokenizer_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    manifest = build_tokens([write_jsonl(tmp_path / "a.jsonl", TEXTS)], tokenizer_folder, tmp_path / "out")
    store = TokenStore(tmp_path / "out")
    oracle = AutoTokenizer.from_pretrained(str(tokenizer_folder), local_files_only=True)
    for number, text in enumerate(TEXTS):
        expected = [*oracle(text, add_special_tokens=False)["input_ids"], oracle.eos_token_id]
        assert store.document(number).tolist() == expected
        assert oracle.decode(store.document(number)[:-1]) == text
    assert store.text_bytes_by_doc.tolist() == [len(text.encode()) for text in TEXTS]
    assert store.vocab_size == 320
    assert manifest.recipe.bos_id is None and manifest.recipe.eos_id == 0
    assert manifest == store.manifest
    store.verify()
    store.check_ids(320)


def test_the_folder_is_what_the_manifest_says(tokenizer_folder: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    build_tokens([source], tokenizer_folder, tmp_path / "new" / "out", shard_tokens=40)
    files = files_of(tmp_path / "new" / "out")
    manifest = json.loads(files.pop("manifest.json"))
    assert manifest["format"] == 1
    assert manifest["recipe"]["tokenizer_sha256"] == tokenizer_hash(tokenizer_folder)
    assert manifest["recipe"]["inputs"] == [
        {
            "name": "a.jsonl",
            "bytes": source.stat().st_size,
            "sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        }
    ]
    assert len(files) == 2 * len(manifest["shards"]) > 2
    for number, shard in enumerate(manifest["shards"]):
        ids, table = files[f"tokens-{number:05d}.bin"], files[f"documents-{number:05d}.bin"]
        assert shard["tokens_sha256"] == hashlib.sha256(ids).hexdigest()
        assert shard["documents_sha256"] == hashlib.sha256(table).hexdigest()
        assert shard["tokens"] == len(ids) // 2
        assert shard["documents"] == len(table) // 16
    assert manifest["totals"]["documents"] == len(TEXTS)
    assert os.listdir(tmp_path / "new") == ["out"], "something was left beside the output"


def test_the_same_documents_in_any_format_are_the_same_shards(tokenizer_folder: Path, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    texts = [f"document {number} of some length\nwith two lines" for number in range(50)]
    inputs = {name: tmp_path / f"a.{name}" for name in ("txt", "jsonl", "parquet")}
    inputs["txt"].write_text("\n\f\n".join(texts))
    write_jsonl(inputs["jsonl"], texts)
    pytest.importorskip("pyarrow.parquet").write_table(
        pyarrow.table({"text": texts}), inputs["parquet"], row_group_size=7
    )
    shards = []
    for name, path in inputs.items():
        build_tokens([path], tokenizer_folder, tmp_path / name, shard_tokens=300)
        files = files_of(tmp_path / name)
        del files["manifest.json"]
        shards.append(files)
    assert len(shards[0]) > 4
    assert shards[0] == shards[1] == shards[2]


def test_a_text_file_is_one_document_unless_it_is_split(tokenizer_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo\n")
    one = build_tokens([path], tokenizer_folder, tmp_path / "one")
    two = build_tokens([path], tokenizer_folder, tmp_path / "two", split_blank_lines=True)
    assert (one.totals.documents, two.totals.documents) == (1, 2)
    assert (one.totals.text_bytes, two.totals.text_bytes) == (8, 6)


def test_a_tokenizer_that_adds_a_begin_token_gets_it_once(make_tokenizer: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_tokenizer(tmp_path / "tokenizer", adds_bos=True)
    manifest = build_tokens([write_jsonl(tmp_path / "a.jsonl", TEXTS[:2])], folder, tmp_path / "out")
    store = TokenStore(tmp_path / "out")
    assert manifest.recipe.bos_id == 1
    for number in range(2):
        ids = store.document(number).tolist()
        assert ids[0] == 1 and ids[-1] == 0 and ids.count(1) == ids.count(0) == 1
        assert len(ids) > 2


def test_a_large_vocabulary_takes_four_bytes(make_tokenizer: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_tokenizer(tmp_path / "tokenizer", vocab_size=70_000)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 70_000, "content": "fox", "special": False})
    (folder / "tokenizer.json").write_text(json.dumps(content))
    build_tokens([write_jsonl(tmp_path / "a.jsonl", ["fox"])], folder, tmp_path / "out")
    store = TokenStore(tmp_path / "out")
    assert store.vocab_size == 70_001
    assert store.document(0).dtype == np.dtype("<u4")
    assert store.document(0).tolist() == [70_000, 0]


def test_truncation_and_padding_saved_in_the_tokenizer_are_not_applied(tokenizer_folder: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    folder = tmp_path / "tokenizer"
    folder.mkdir()
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=30, pad_id=7)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_bytes((tokenizer_folder / "tokenizer_config.json").read_bytes())
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    for name, tokenizer_path in (("plain", tokenizer_folder), ("cutting", folder)):
        build_tokens([source], tokenizer_path, tmp_path / name)
    assert files_of(tmp_path / "plain")["tokens-00000.bin"] == files_of(tmp_path / "cutting")["tokens-00000.bin"]


def test_documents_never_span_shards_and_a_long_one_has_its_own(tokenizer_folder: Path, tmp_path: Path) -> None:
    texts = ["x" * length for length in (30, 30, 200, 30, 30, 30)]  # x is in no merge: one token a letter
    manifest = build_tokens(
        [write_jsonl(tmp_path / "a.jsonl", texts)], tokenizer_folder, tmp_path / "out", shard_tokens=62
    )
    assert [shard.tokens for shard in manifest.shards] == [62, 201, 62, 31]
    assert [shard.documents for shard in manifest.shards] == [2, 1, 2, 1]


def test_records_without_text_are_left_out_and_counted(tokenizer_folder: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["", "one", " \n\t", "two", ""])
    totals = build_tokens([source], tokenizer_folder, tmp_path / "out").totals
    assert (totals.documents, totals.empty_documents) == (2, 3)


def test_an_input_without_any_text_is_named(tokenizer_folder: Path, tmp_path: Path) -> None:
    good = write_jsonl(tmp_path / "good.jsonl", TEXTS)
    for name, content in (("bad.jsonl", '{"text": " "}\n{"text": ""}\n'), ("bad.txt", " \n\n\f\n")):
        (tmp_path / name).write_text(content)
        with pytest.raises(UsageError, match=rf"{name}: no text in this file".replace(".", r"\.")):
            build_tokens([good, tmp_path / name], tokenizer_folder, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_progress_counts_input_bytes_up_to_the_total(tokenizer_folder: Path, tmp_path: Path) -> None:
    inputs = [write_jsonl(tmp_path / f"{number}.jsonl", TEXTS * 300) for number in range(2)]
    calls: list[tuple[int, int]] = []
    build_tokens(inputs, tokenizer_folder, tmp_path / "out", progress=lambda *call: calls.append(call))
    total = sum(path.stat().st_size for path in inputs)
    assert {call[1] for call in calls} == {total}
    done = [call[0] for call in calls]
    assert done == sorted(done) and 0 < done[0] < total and done[-1] == total


# Errors before any work
# ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "dangling link"])
def test_an_existing_output_is_refused_and_kept(tokenizer_folder: Path, tmp_path: Path, kind: str) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    out = tmp_path / "out"
    if kind == "folder":
        build_tokens([source], tokenizer_folder, out)
    elif kind == "empty folder":
        out.mkdir()
    elif kind == "file":
        out.write_text("mine")
    else:
        out.symlink_to(tmp_path / "nowhere")
    before = files_of(out) if out.is_dir() else None
    with pytest.raises(RefusedError, match="exists already"):
        build_tokens([source], tokenizer_folder, out)
    assert before is None or files_of(out) == before


def test_a_folder_without_tokenizer_is_a_usage_error(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UsageError, match="no tokenizer here"):
        build_tokens([source], tmp_path / "model", tmp_path / "out")
    with pytest.raises(UsageError, match="no such folder"):
        build_tokens([source], tmp_path / "absent", tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "content", "kind", "said"),
    [
        ("tokenizer.json", "{", FailedError, "cannot be loaded"),
        ("tokenizer_config.json", "{", FailedError, "not JSON"),
        (
            "tokenizer_config.json",
            '{"tokenizer_class": "PreTrainedTokenizerFast"}',
            UsageError,
            "end-of-text",
        ),
        ("tokenizer_config.json", '{"tokenizer_class": "ByT5Tokenizer"}', RefusedError, "no fast form"),
        ("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["a.B", null]}}', RefusedError, "auto_map"),
        ("config.json", '{"auto_map": {"AutoConfig": "a.B"}}', RefusedError, "auto_map"),
    ],
)
def test_tokenizers_that_cannot_be_used(
    make_tokenizer: Callable[..., Path],
    tmp_path: Path,
    name: str,
    content: str,
    kind: type[Exception],
    said: str,
) -> None:
    folder = make_tokenizer(tmp_path / "tokenizer")
    (folder / name).write_text(content)
    with pytest.raises(kind, match=said) as error:
        build_tokens([write_jsonl(tmp_path / "a.jsonl", TEXTS)], folder, tmp_path / "out")
    assert str(folder) in str(error.value)
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "tokenizer"]


def test_tokenizer_hash_covers_the_model_files_only(tokenizer_folder: Path, tmp_path: Path) -> None:
    content = (tokenizer_folder / "tokenizer.json").read_bytes()
    assert tokenizer_hash(tokenizer_folder) == hashlib.sha256(content).hexdigest()
    hashes = []
    for vocabulary, merges in (("{}", "a b"), ("{}", "a c"), ("{}a", " b")):
        (tmp_path / "vocab.json").write_text(vocabulary)
        (tmp_path / "merges.txt").write_text(merges)
        (tmp_path / "tokenizer_config.json").write_text(merges)
        hashes.append(tokenizer_hash(tmp_path))
    assert len(set(hashes)) == 3
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert tokenizer_hash(tmp_path) == hashes[-1]


def test_an_id_that_the_shard_cannot_hold_is_named(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 0, "uint16")
    writer.add(np.array([1, 65535, 0]), 3)
    with pytest.raises(FailedError, match="id 65536 at position 1 of document 1"):
        writer.add(np.array([1, 65536, 0]), 3)
    writer.close()


def test_importing_the_package_loads_no_heavy_library() -> None:
    code = """
import sys, elo_engine.data
print([name for name in ("torch", "transformers", "pyarrow") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
