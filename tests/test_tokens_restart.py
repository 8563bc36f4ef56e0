"""An interrupted tokenisation continues and ends byte-identical; memory and disk faults stay within their
bounds.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from forked import Forked

from elo_engine.data import tokens as tokens_module
from elo_engine.data.tokens import build_tokens
from elo_engine.data.writing import locked
from elo_engine.errors import FailedError, RefusedError, UsageError

ROOT = Path(__file__).resolve().parents[1]
SHARD_TOKENS = 500


class Crash(BaseException):
    """Ends a call the way a signal does: nothing in the package catches it."""


@pytest.fixture(scope="session")
def tokenizer_folder(make_tokenizer: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """All kinds, each long enough for a shard to end inside it, with empty records between."""
    pyarrow = pytest.importorskip("pyarrow")
    folder = tmp_path_factory.mktemp("inputs")
    texts = [f"document {number}, with 日本語 and some more words " * (1 + number % 3) for number in range(25)]
    texts[3] = texts[17] = ""
    (folder / "a.txt").write_text("\n\n".join(texts))
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    pytest.importorskip("pyarrow.parquet").write_table(
        pyarrow.table({"text": texts}), folder / "c.parquet", row_group_size=6
    )
    return [folder / "a.txt", folder / "b.jsonl", folder / "c.parquet"]


@pytest.fixture
def build(
    inputs: list[Path], tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, bytes]]:
    monkeypatch.setattr(tokens_module, "_BATCH_DOCUMENTS", 3)

    def run(out: Path, **options: Any) -> dict[str, bytes]:
        settings = {"shard_tokens": SHARD_TOKENS, "split_blank_lines": True, **options}
        build_tokens(settings.pop("inputs", inputs), tokenizer_folder, out, **settings)
        return {path.name: path.read_bytes() for path in out.iterdir()}

    return run


@pytest.fixture
def expected(build: Callable[..., dict[str, bytes]], tmp_path: Path) -> dict[str, bytes]:
    files = build(tmp_path / "uninterrupted")
    assert len(files) > 8, "too few shards to be interrupted between"
    return files


def crash_at(call: int) -> Callable[[int, int], None]:
    calls = iter(range(call + 1))

    def progress(done: int, total: int) -> None:
        if next(calls) == call:
            raise Crash

    return progress


def partial(out: Path) -> Path:
    return out.with_name(f".{out.name}.partial")


def test_a_crash_after_any_batch_changes_nothing_in_the_end(
    build: Callable[..., dict[str, bytes]], expected: dict[str, bytes], tmp_path: Path
) -> None:
    calls: list[int] = []
    build(tmp_path / "counted", progress=lambda done, total: calls.append(done))
    for call in range(0, len(calls), 3):
        out = tmp_path / f"out{call}"
        with pytest.raises(Crash):
            build(out, progress=crash_at(call))
        assert not out.exists()
        resumed: list[int] = []
        assert build(out, progress=lambda done, total, resumed=resumed: resumed.append(done)) == expected
        assert not partial(out).exists()
        if call >= len(calls) - 3:
            assert len(resumed) < len(calls) // 2, "the second call began from the start"


def test_crash_after_crash_still_comes_to_the_same_end(
    build: Callable[..., dict[str, bytes]], expected: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    crashes = 0
    while not out.exists():
        with contextlib.suppress(Crash):
            build(out, progress=crash_at(9))
        crashes += 1
        assert crashes < 50, "no progress from call to call"
    assert crashes > 3
    assert {path.name: path.read_bytes() for path in out.iterdir()} == expected


@contextlib.contextmanager
def failing_system_calls(monkeypatch: pytest.MonkeyPatch, at: int, error: BaseException) -> Iterator[list[str]]:
    """Let the `at`-th call that makes something durable or visible fail before it happens."""
    made: list[str] = []
    with monkeypatch.context() as patch:
        for name in ("fsync", "replace", "rename", "unlink"):
            real = getattr(os, name)

            def call(*args: Any, _real: Any = real, _name: str = name, **options: Any) -> Any:
                made.append(_name)
                if len(made) - 1 == at:
                    raise error
                return _real(*args, **options)

            patch.setattr(os, name, call)
        yield made


def test_a_crash_before_any_durable_step_changes_nothing_in_the_end(
    build: Callable[..., dict[str, bytes]],
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with failing_system_calls(monkeypatch, -1, Crash()) as made:
        build(tmp_path / "counted")
    assert made[-2:] == ["rename", "fsync"]
    # All steps of the first two shards and of the end; those between repeat the first.
    for at in [*range(14), *range(len(made) - 9, len(made) - 1)]:
        out = tmp_path / f"out{at}"
        with failing_system_calls(monkeypatch, at, Crash()), pytest.raises(Crash):
            build(out)
        assert not out.exists()
        assert build(out) == expected, f"crash before step {at} ({made[at]})"
        assert not partial(out).exists()


def test_a_finished_folder_that_was_not_renamed_is_not_made_again(
    build: Callable[..., dict[str, bytes]],
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    with failing_system_calls(monkeypatch, -1, Crash()) as made:
        build(tmp_path / "counted")
    with failing_system_calls(monkeypatch, len(made) - 2, Crash()), pytest.raises(Crash):
        build(out)
    calls: list[int] = []
    assert build(out, progress=lambda done, total: calls.append(done)) == expected
    assert calls == []


def test_a_finished_folder_of_another_recipe_is_made_again(
    build: Callable[..., dict[str, bytes]], expected: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    build(tmp_path / "other", shard_tokens=700)
    (tmp_path / "other").rename(partial(out))
    assert build(out) == expected


def test_an_error_has_the_same_line_number_after_a_restart(
    build: Callable[..., dict[str, bytes]], inputs: list[Path], tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(inputs[1].read_bytes() + b"oops\n")
    for _ in range(2):
        with pytest.raises(UsageError, match=r"a\.jsonl, line 26: not JSON"):
            build(tmp_path / "out", inputs=[path])
        assert (partial(tmp_path / "out") / "tokens-00001.bin").exists()


def test_a_killed_process_is_continued(
    build: Callable[..., dict[str, bytes]],
    expected: dict[str, bytes],
    inputs: list[Path],
    tokenizer_folder: Path,
    tmp_path: Path,
    forked: Forked,
) -> None:
    out = tmp_path / "out"
    code = f"""
import os, signal
from pathlib import Path
from elo_engine.data import tokens
tokens._BATCH_DOCUMENTS = 3
def progress(done, total):
    if done > total // 2:
        os.kill(os.getpid(), signal.SIGKILL)
tokens.build_tokens([Path(path) for path in {[str(path) for path in inputs]!r}],
Path({str(tokenizer_folder)!r}),
    Path({str(out)!r}), shard_tokens={SHARD_TOKENS}, split_blank_lines=True, progress=progress)
"""
    done = forked(code)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (partial(out) / "progress.json").exists() and not out.exists()
    assert build(out) == expected


def test_other_inputs_or_options_start_afresh(
    build: Callable[..., dict[str, bytes]], inputs: list[Path], tmp_path: Path
) -> None:
    for name, options in (("fewer", {"inputs": inputs[:2]}), ("larger", {"shard_tokens": 700})):
        wanted = build(tmp_path / name, **options)
        out = tmp_path / f"{name}-out"
        with pytest.raises(Crash):
            build(out, progress=crash_at(15))
        assert build(out, **options) == wanted


@pytest.mark.parametrize("name", ["tokens-00001.bin", "documents-00000.bin", "progress.json"])
def test_damage_to_the_unfinished_folder_is_not_built_upon(
    build: Callable[..., dict[str, bytes]], expected: dict[str, bytes], tmp_path: Path, name: str
) -> None:
    out = tmp_path / "out"
    with pytest.raises(Crash):
        build(out, progress=crash_at(20))
    path = partial(out) / name
    content = path.read_bytes()
    path.write_bytes(content[:-4] + b"\xff\xff\xff\xff")
    assert build(out) == expected


def test_foreign_files_are_never_removed(build: Callable[..., dict[str, bytes]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    partial(out).mkdir()
    (partial(out) / "thesis.txt").write_text("mine")
    with pytest.raises(RefusedError, match=r"thesis\.txt: is not from here"):
        build(out)
    assert (partial(out) / "thesis.txt").read_text() == "mine"


def test_two_writers_of_one_output_are_refused(build: Callable[..., dict[str, bytes]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with locked(partial(out)), pytest.raises(RefusedError, match="another process is writing"):
        build(out)
    build(out)


def test_an_input_that_changes_meanwhile_is_an_error(
    build: Callable[..., dict[str, bytes]], inputs: list[Path], tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(inputs[1].read_bytes())

    def grow(done: int, total: int) -> None:
        with path.open("a") as file:
            file.write('{"text": "more"}\n')

    with pytest.raises(FailedError, match=r"a\.jsonl: changed while it was being tokenised"):
        build(tmp_path / "out", inputs=[path], progress=grow)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_an_error_of_any_durable_step_is_reported_and_survived(
    build: Callable[..., dict[str, bytes]],
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
) -> None:
    for at in (0, 1, 2, 4, 9):
        out = tmp_path / f"out{at}"
        error = OSError(code, os.strerror(code))
        with failing_system_calls(monkeypatch, at, error), pytest.raises(FailedError) as raised:
            build(out)
        assert os.strerror(code) in str(raised.value) and str(partial(out)) in str(raised.value)
        assert not out.exists()
        assert build(out) == expected


def test_a_full_disk_in_the_middle_of_a_shard_is_reported_and_survived(tokenizer_folder: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands in for the full disk: the write itself fails, half of it done."""
    source = tmp_path / "a.jsonl"
    source.write_text(('{"text": "' + "y z " * 100 + '"}\n') * 1000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(FailedError, match=r"tokens-00000\.bin: cannot be written \(File too large\)"):
            build_tokens([source], tokenizer_folder, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    build_tokens([source], tokenizer_folder, tmp_path / "out")
    build_tokens([source], tokenizer_folder, tmp_path / "again")
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("out", "again"))
    assert first == second and len(first["tokens-00000.bin"]) > 200_000


def test_memory_does_not_grow_with_the_input(tokenizer_folder: Path, tmp_path: Path) -> None:
    """After 2 MB of text, 12 MB more raise the peak by less than 6 MiB.

    Holding the text would need 12 MB, holding its tokens 8 MB at two bytes each. Measured: 2 to 3 MiB.
    """
    line = json.dumps({"text": "the model reads the layer the shells the weather " * 40}) + "\n"
    for name, size in (("small", 2_000_000), ("large", 12_000_000)):
        (tmp_path / f"{name}.jsonl").write_text(line * (size // len(line)))
    code = f"""
import resource
from pathlib import Path
from elo_engine.data.tokens import build_tokens
for name in ("small", "large"):
    folder = Path({str(tmp_path)!r})
    manifest = build_tokens([folder / f"{{name}}.jsonl"], Path({str(tokenizer_folder)!r}), folder / name)
    print(manifest.totals.tokens, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    (_, small_bytes), (tokens, large_bytes) = (map(int, line.split()) for line in done.stdout.splitlines())
    assert tokens > 3_500_000
    assert large_bytes - small_bytes < 6 << 20
