"""A token folder is either read as it was written, or its damage is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elo_engine.data.store import TokenStore
from elo_engine.errors import FailedError, UsageError

DOCUMENTS = [[5, 6, 7, 0], [8, 0], [9, 10, 11, 12, 0], [13, 0], [14, 15, 0]]


@pytest.fixture
def folder(make_store_folder: Callable[..., Path], tmp_path: Path) -> Path:
    return make_store_folder(tmp_path / "tokens", DOCUMENTS, shard_documents=2)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, "<u2"), (65537, "<u4")])
def test_a_store_gives_back_what_was_written(
    make_store_folder: Callable[..., Path], tmp_path: Path, vocab_size: int, dtype: str
) -> None:
    documents = [*DOCUMENTS, [vocab_size - 1, 0]]
    folder = make_store_folder(tmp_path / "tokens", documents, shard_documents=2, vocab_size=vocab_size)
    store = TokenStore(folder)
    assert [store.document(number).tolist() for number in range(6)] == documents
    assert store.document(0).dtype == np.dtype(dtype)
    assert (store.documents, store.tokens_total) == (6, 18)
    assert store.lengths.tolist() == [4, 2, 5, 2, 3, 2] and store.lengths.dtype == np.int64
    assert store.text_bytes_by_doc.tolist() == [12, 6, 15, 6, 9, 6]
    assert store.text_bytes == 54
    assert store.vocab_size == vocab_size
    assert store.tokenizer_sha256 == "0" * 64
    assert np.fromfile(folder / "tokens-00001.bin", dtype=dtype).tolist() == [*DOCUMENTS[2], *DOCUMENTS[3]]
    for outside in (-1, 6):
        with pytest.raises(IndexError):
            store.document(outside)


def test_documents_are_read_only_views(folder: Path) -> None:
    document = TokenStore(folder).document(2)
    assert not document.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        document[0] = 1


def test_gather_joins_parts_of_documents(folder: Path) -> None:
    out = np.full(6, -1)
    TokenStore(folder).gather(np.array([4, 2, 0]), np.array([0, 1, 3]), np.array([2, 3, 4]), out)
    assert out.tolist() == [14, 15, 10, 11, 0, -1]


def test_identity_follows_the_content_and_not_the_place(
    make_store_folder: Callable[..., Path], folder: Path, tmp_path: Path
) -> None:
    moved = folder.rename(tmp_path / "moved")
    again = make_store_folder(tmp_path / "again", DOCUMENTS, shard_documents=2)
    other = make_store_folder(tmp_path / "other", [*DOCUMENTS[:-1], [14, 16, 0]], shard_documents=2)
    assert TokenStore(moved).identity == TokenStore(again).identity != TokenStore(other).identity


def test_ids_outside_the_vocabulary_are_named_with_their_position(folder: Path) -> None:
    store = TokenStore(folder)
    store.check_ids(16)
    # 12 is the first id that is not below 12: the fourth token of document 2, which begins shard 1.
    with pytest.raises(FailedError, match=r"tokens-00001\.bin: token 3 \(document 2, position 3\) has id 12"):
        store.check_ids(12)
    with pytest.raises(FailedError, match=r"tokens-00002\.bin: token 1 \(document 4, position 1\) has id 15"):
        store.check_ids(15)


@pytest.mark.parametrize("name", ["tokens-00001.bin", "documents-00002.bin"])
@pytest.mark.parametrize("change", ["truncated", "longer", "missing"])
def test_a_file_of_another_size_is_named(folder: Path, name: str, change: str) -> None:
    path = folder / name
    if change == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-2] if change == "truncated" else path.read_bytes() + b"\0")
    with pytest.raises(FailedError, match=name.replace(".", r"\.")):
        TokenStore(folder)


@pytest.mark.parametrize(
    "table",
    [
        [[4, 12], [4, 6]],  # a document without tokens
        [[2, 12], [5, 6]],  # ends before the tokens do
        [[-4, 12], [6, 6]],
        [[4, 11], [6, 6]],  # another sum of text bytes
        [[4, 18], [6, 0]],
    ],
)
def test_a_document_table_that_does_not_fit_is_named(folder: Path, table: list[list[int]]) -> None:
    (folder / "documents-00000.bin").write_bytes(np.array(table, dtype="<i8").tobytes())
    with pytest.raises(FailedError, match=r"documents-00000\.bin"):
        TokenStore(folder)


def test_a_folder_without_manifest_is_a_usage_error(folder: Path, tmp_path: Path) -> None:
    (folder / "manifest.json").unlink()
    for wrong in (folder, tmp_path / "absent"):
        with pytest.raises(UsageError, match="not a token folder"):
            TokenStore(wrong)


def _set(value: object, *keys: str | int) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        inner: Any = manifest
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_set(2, "format"), "format"),
        (_set("6", "shards", 0, "tokens"), "shards.0.tokens"),
        (_set(-6, "shards", 0, "tokens"), "shards.0.tokens"),
        (_set(True, "totals", "documents"), "totals.documents"),
        (_set(1, "surprise"), "surprise"),
        (_set([], "shards"), "shards"),
        (_set("float64", "recipe", "dtype"), "recipe.dtype"),
        (_set(7, "recipe", "eos_id"), "checksum"),
        (_set(17, "totals", "tokens"), "checksum"),
        (_set("e" * 64, "shards", 1, "tokens_sha256"), "checksum"),
        (lambda manifest: manifest.pop("totals"), "totals"),
    ],
)
def test_a_damaged_manifest_is_named_with_its_key(
    folder: Path, change: Callable[[dict[str, Any]], None], said: str
) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(FailedError, match=said) as error:
        TokenStore(folder)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe{}", b"[]"])
def test_a_manifest_that_is_no_json_object_is_damaged(folder: Path, content: bytes) -> None:
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(FailedError, match=r"manifest\.json: damaged"):
        TokenStore(folder)


@pytest.mark.parametrize("name", ["tokens-00001.bin", "documents-00000.bin"])
def test_verify_finds_a_flipped_bit(folder: Path, name: str) -> None:
    store = TokenStore(folder)
    store.verify()
    content = bytearray((folder / name).read_bytes())
    content[0] ^= 1
    (folder / name).write_bytes(bytes(content))
    with pytest.raises(FailedError, match=rf"{name}: content differs".replace(".", r"\.")):
        store.verify()


def test_check_unchanged_sees_a_replaced_and_a_vanished_file(folder: Path) -> None:
    store = TokenStore(folder)
    store.check_unchanged()
    path = folder / "tokens-00001.bin"
    copy = folder / "copy"
    copy.write_bytes(path.read_bytes())
    copy.replace(path)
    with pytest.raises(FailedError, match=r"tokens-00001\.bin: changed while in use"):
        store.check_unchanged()
    path.unlink()
    with pytest.raises(FailedError, match=r"tokens-00001\.bin: vanished while in use"):
        store.check_unchanged()
