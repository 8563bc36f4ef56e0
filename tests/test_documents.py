"""What the tokens command says to input that it cannot take; every message names the file and the place."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from elo_engine.data.documents import MAX_DOCUMENT_BYTES, inspect_inputs, read_documents
from elo_engine.errors import FailedError, UsageError


def texts(path: Path, *, split_blank_lines: bool = False, text_field: str = "text") -> list[str]:
    (file,) = inspect_inputs([path], text_field)
    return [
        document.text for document in read_documents(file, text_field=text_field, split_blank_lines=split_blank_lines)
    ]


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def write_parquet(path: Path, rows: list[str | None], *, row_group_size: int = 3, column: str = "text") -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"number": list(range(len(rows))), column: pyarrow.array(rows, pyarrow.string())})
    pytest.importorskip("pyarrow.parquet").write_table(table, path, row_group_size=row_group_size)
    return path


TEXT = b"\xef\xbb\xbf\r\n one\r\ntwo\r\n\f\r\nthree\n \t\n\n four \n\f\n\n\f\nf\x0cive"


def test_a_text_file_is_cut_at_form_feed_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", TEXT)
    assert texts(path) == [" one\r\ntwo", "three\n \t\n\n four ", "f\x0cive"]


def test_a_text_file_is_cut_at_blank_lines_when_asked(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", TEXT)
    assert texts(path, split_blank_lines=True) == [" one\r\ntwo", "three", " four ", "f\x0cive"]


def test_json_lines_are_taken_as_they_are(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        b'\xef\xbb\xbf{"text": " a\\n", "more": 1}\r\n\n{"text": ""}\n{"text": "\\u65e5\\ud83d\\ude00"}',
    )
    assert texts(path) == [" a\n", "", "日😀"]


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_reading_goes_on_from_the_position_of_any_document(tmp_path: Path, kind: str) -> None:
    content = [f"日本 number {number}" for number in range(10)]
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        write_parquet(path, list(content))
    else:
        lines = "\n\n".join(content) if kind == "txt" else "\n".join(f'{{"text": "{text}"}}' for text in content)
        write(path, b"\xef\xbb\xbf" + lines.encode())
    (file,) = inspect_inputs([path], "text")
    whole = list(read_documents(file, text_field="text", split_blank_lines=True))
    assert [document.text for document in whole] == content
    for number, document in enumerate(whole):
        assert document.utf8_bytes == len(content[number].encode())
        assert document.offset <= file.units
        rest = read_documents(
            file, text_field="text", split_blank_lines=True, offset=document.offset, line=document.line
        )
        assert list(rest) == whole[number + 1 :]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("absent.txt", "cannot be read as input"),
        ("folder.txt", "not a regular file"),
        ("pipe.jsonl", "not a regular file"),
        ("letter.docx", "unknown kind of input '.docx'"),
        ("nothing.txt", "the file is empty"),
    ],
)
def test_inputs_that_cannot_be_meant_are_usage_errors(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "folder.txt").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    write(tmp_path / "letter.docx", b"PK")
    write(tmp_path / "nothing.txt", b"")
    with pytest.raises(UsageError, match=said) as error:
        inspect_inputs([tmp_path / name], "text")
    assert str(tmp_path / name) in str(error.value)


def test_no_inputs_and_the_same_input_twice_are_usage_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no input files"):
        inspect_inputs([], "text")
    path = write(tmp_path / "a.txt", b"text")
    (tmp_path / "link.txt").symlink_to(path)
    with pytest.raises(UsageError, match=r"link\.txt: given twice"):
        inspect_inputs([path, tmp_path / "link.txt"], "text")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{'text': 1}", "not JSON"),
        (b'{"text": "a"', "not JSON"),
        (b"[" * 200_000, "not JSON"),
        (b'["text"]', "a JSON list where an object"),
        (b'{"body": "a", "id": 2}', r"no field 'text' \(fields here: 'body', 'id'\)"),
        (b'{"text": null}', "'text' is a NoneType"),
        (b'{"text": 3}', "'text' is a int"),
        (b'{"text": "a\\ud800b"}', r"half of a surrogate pair \(\\ud800\)"),
    ],
)
def test_a_bad_json_line_is_named_by_its_number(tmp_path: Path, line: bytes, said: str) -> None:
    path = write(tmp_path / "a.jsonl", b'{"text": "a"}\n\n{"text": "b"}\n' + line + b"\n")
    with pytest.raises(UsageError, match=said) as error:
        texts(path)
    assert f"{path}, line 4" in str(error.value)


@pytest.mark.parametrize(
    ("name", "before"),
    [("a.txt", "日本\n\f\n".encode()), ("a.jsonl", '{"text": "日本"}\n{"text": "'.encode())],
)
def test_text_that_is_not_utf8_is_named_by_its_byte(tmp_path: Path, name: str, before: bytes) -> None:
    path = write(tmp_path / name, before + b"ab\xe9 c")
    with pytest.raises(FailedError, match=rf"byte {len(before) + 2} \(0xe9\) is not UTF-8") as error:
        texts(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(("name", "next_step"), [("a.txt", "--split-blank-lines"), ("a.jsonl", "split the document")])
def test_a_document_too_long_for_bounded_memory_is_refused_early(tmp_path: Path, name: str, next_step: str) -> None:
    long = b"word " * (MAX_DOCUMENT_BYTES // 5 + 1)
    path = write(tmp_path / name, long if name == "a.txt" else b'{"text": "' + long + b'"}\n')
    with pytest.raises(UsageError, match=r"longer than 16 MiB") as error:
        texts(path)
    assert next_step in str(error.value)


def test_parquet_gives_its_column_and_other_columns_are_named(tmp_path: Path) -> None:
    rows = [f"text {number}" for number in range(200)]
    path = write_parquet(tmp_path / "a.parquet", list(rows), row_group_size=90, column="body")
    assert texts(path, text_field="body") == rows
    with pytest.raises(UsageError, match=r"no column 'text' \(columns: 'number', 'body'\)"):
        texts(path)
    with pytest.raises(UsageError, match="'number' holds int64, not strings"):
        texts(path, text_field="number")


def _null(path: Path) -> None:
    write_parquet(path, ["a", "b", None, "c"], row_group_size=2)


def _no_rows(path: Path) -> None:
    write_parquet(path, [])


def _truncated(path: Path) -> None:
    write_parquet(path, ["a"] * 100)
    path.write_bytes(path.read_bytes()[:-5])


def _overwritten_page(path: Path) -> None:
    write_parquet(path, ["some text"] * 100)
    parquet = pytest.importorskip("pyarrow.parquet")
    with parquet.ParquetFile(path) as file:
        begin = file.metadata.row_group(1).column(1).dictionary_page_offset
    content = path.read_bytes()
    path.write_bytes(content[:begin] + b"\xff" * 20 + content[begin + 20 :])


def _not_utf8(path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    binary = pyarrow.array([b"a", b"b\xff"], pyarrow.binary())
    column = pyarrow.StringArray.from_buffers(2, *binary.buffers()[1:])
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table({"text": column}), path)


@pytest.mark.parametrize(
    ("damage", "kind", "said"),
    [
        (_null, UsageError, "row 3: column 'text' is null"),
        (_no_rows, UsageError, "the file has no rows"),
        (_truncated, FailedError, "damaged or not a parquet file"),
        (_overwritten_page, FailedError, "damaged or not a parquet file"),
        (_not_utf8, FailedError, "row 2: byte 1 of the text is not UTF-8"),
    ],
)
def test_bad_parquet_is_named(tmp_path: Path, damage: Callable[[Path], None], kind: type[Exception], said: str) -> None:
    path = tmp_path / "a.parquet"
    damage(path)
    with pytest.raises(kind, match=said) as error:
        texts(path)
    assert str(path) in str(error.value)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "a.parquet", ["a"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match="pip install pyarrow"):
        texts(path)


@pytest.mark.parametrize("change", ["longer", "replaced", "removed"])
def test_an_input_that_changes_while_it_is_read_is_noticed(tmp_path: Path, change: str) -> None:
    path = write(tmp_path / "a.txt", b"text")
    (file,) = inspect_inputs([path], "text")
    file.check_unchanged()
    if change == "longer":
        write(path, b"text and more")
    elif change == "replaced":
        write(tmp_path / "b.txt", b"test").replace(path)
    else:
        path.unlink()
    with pytest.raises(FailedError, match="while it was being tokenised"):
        file.check_unchanged()
