"""The chat vector refused where it means nothing, and whole or not there whatever goes wrong."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Forked
from torch import Tensor

from elo_engine.chat_vector import chat_vector
from elo_engine.checkpoint import SYSCALLS, open_checkpoint, verify_commit
from elo_engine.errors import FailedError, RefusedError, UsageError
from elo_engine.model.names import EMBEDDING, HEAD

from .chat_vector_fixture import NORM, calm, make_model, three, write_tokenizer  # noqa: F401
from .checkpoint_fixture import leftovers

# ruff: noqa: F811 (fixtures are parameters of their own name)


def put(name: str, value: Tensor | None) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        calm(tensors)
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value

    return change


@pytest.mark.parametrize(
    ("message", "which", "edit", "tied"),
    [
        (r"shape \(24, 40\) in INSTRUCT and \(40, 24\) in TARGET", 1, put(EMBEDDING, torch.zeros(24, 40)), True),
        (r"shape \(25,\) in BASE and \(24,\) in TARGET", 0, put(NORM, torch.zeros(25)), True),
        (r"42 vocabulary rows in INSTRUCT and 40 in TARGET.*INSTRUCT has tokens added", 1,
         put(EMBEDDING, torch.zeros(42, 24)), True),
        (r"40 vocabulary rows in BASE and 41 in TARGET.*TARGET has tokens added", 2,
         put(EMBEDDING, torch.zeros(41, 24)), True),
        (r"'model\.norm\.weight' is in TARGET and not in INSTRUCT", 1, put(NORM, None), True),
        (r"'extra' is in BASE and not in TARGET", 0, put("extra", torch.zeros(1)), True),
        (r"'lm_head\.weight' is in INSTRUCT and not in TARGET \(tie_word_embeddings differs", 1,
         put(HEAD, torch.zeros(40, 24)), False),
        (r"'model\.norm\.weight' of TARGET is I64, and only", 2, put(NORM, torch.zeros(24, dtype=torch.int64)), True),
        (r"'model\.norm\.weight' of INSTRUCT is F8_E4M3", 1, put(NORM, torch.zeros(24).to(torch.float8_e4m3fn)), True),
        (r"'model\.norm\.weight': TARGET .* x \(INSTRUCT inf - BASE .* at position 3 is not finite as F32", 1,
         put(NORM, torch.ones(24).index_fill(0, torch.tensor([3]), float("inf"))), True),
        (r"'lm_head\.weight' is F8_E4M3 .* although config\.json says that they are tied", 2,
         put(HEAD, torch.zeros(40, 24).to(torch.float8_e4m3fn)), True),
        (r"'lm_head\.weight' is F32 \[41, 24\] and 'model\.embed_tokens\.weight' F32 \[40, 24\]", 2,
         put(HEAD, torch.zeros(41, 24)), True),
        (r"TARGET nan .* is not finite", 2, put(NORM, torch.full((24,), float("nan"))), True),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(
    three: tuple[str, str, str], tmp_path: Path, message: str, which: int, edit: Callable[..., None], tied: bool
) -> None:
    folders = list(three)
    folders[which] = str(make_model(tmp_path / "other", 5, edit=edit, tied=tied))
    with pytest.raises(RefusedError, match=message) as caught:
        chat_vector(*folders, tmp_path / "out")
    assert any(folder in str(caught.value) for folder in folders)
    assert not (tmp_path / "out").exists() and not leftovers(tmp_path)


def test_a_sum_too_large_for_the_targets_dtype_is_refused(tmp_path: Path) -> None:
    folders = [
        make_model(tmp_path / name, seed, torch.float16, edit=put(NORM, torch.full((24,), value).half()))
        for seed, (name, value) in enumerate({"base": 0.0, "instruct": 4e4, "target": 4e4}.items())
    ]
    with pytest.raises(RefusedError, match=r"TARGET 40000 \+ 1 x \(INSTRUCT 40000 - BASE 0\).*not finite as F16"):
        chat_vector(*map(str, folders), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not leftovers(tmp_path)
    chat_vector(*map(str, folders), tmp_path / "out", 0.5)


@pytest.mark.parametrize(
    ("message", "vocabulary"),
    [
        (r"1 tokens are in INSTRUCT alone: 'new' \(2\)", {"a": 0, "b": 1, "new": 2}),
        (r"token 'b' has id 0 in INSTRUCT and 1 in TARGET", {"a": 1, "b": 0}),
        (r"1 tokens are in INSTRUCT alone: 'c' \(1\); 1 tokens are in TARGET alone: 'b' \(1\)", {"a": 0, "c": 1}),
    ],
)
def test_another_vocabulary_is_refused_and_another_file_is_not(
    three: tuple[str, str, str], tmp_path: Path, message: str, vocabulary: dict[str, int]
) -> None:
    base, instruct, target = map(Path, three)
    for number, folder in enumerate((base, target)):
        write_tokenizer(folder, {"a": 0, "b": 1}, note=str(number))
    write_tokenizer(instruct, vocabulary)
    with pytest.raises(RefusedError, match=message):
        chat_vector(*three, tmp_path / "out")
    (instruct / "tokenizer.json").write_text("[1]")
    with pytest.raises(FailedError, match=r"not a tokenizer\.json that can be read"):
        chat_vector(*three, tmp_path / "out")
    unigram = {"model": {"vocab": [["a", 0.0], ["b", -1.0]]}, "added_tokens": [{"content": "</s>", "id": 9}]}
    (instruct / "tokenizer.json").write_text(json.dumps(unigram))
    assert "compared by" not in chat_vector(*three, tmp_path / "out")
    (instruct / "tokenizer.json").unlink()
    assert "INSTRUCT and TARGET were compared by their size alone" in chat_vector(*three, tmp_path / "more")


def test_arguments_that_cannot_be_meant(three: tuple[str, str, str], tmp_path: Path) -> None:
    for weight in (float("nan"), float("inf")):
        with pytest.raises(UsageError, match="--weight"):
            chat_vector(*three, tmp_path / "out", weight)
    (tmp_path / "there").mkdir()
    with pytest.raises(RefusedError, match="the output exists"):
        chat_vector(*three, tmp_path / "there")
    for source in three:
        with pytest.raises(RefusedError, match="lies in its source"):
            chat_vector(*three, Path(source) / "out")
    with pytest.raises(UsageError):
        chat_vector(str(tmp_path / "nowhere"), *three[1:], tmp_path / "out")


def test_settings_that_compute_something_else_are_told(three: tuple[str, str, str], tmp_path: Path) -> None:
    for folder, theta in zip(three, (1e4, 1e6, 1e4), strict=True):
        config = {"model_type": "llama", "tie_word_embeddings": True, "rope_theta": theta}
        (Path(folder) / "config.json").write_text(json.dumps(config))
    text = chat_vector(*three, tmp_path / "out")
    assert "rope_theta is 1000000.0 in INSTRUCT and 10000.0 in TARGET" in text and "in BASE and" not in text


def test_no_room_is_said_before_anything_is_written(
    three: tuple[str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["elo_engine.checkpoint.publish"], "free_bytes", lambda path: 1000)
    with pytest.raises(RefusedError, match=r"are needed and 1000 .* are free"):
        chat_vector(*three, tmp_path / "out")
    assert not leftovers(tmp_path)


def test_a_source_that_changes_meanwhile_is_seen(
    three: tuple[str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the last piece was read, in a file that only the final check can see."""
    from elo_engine.checkpoint import task_vector

    real = task_vector.rewrite_checkpoint

    def meanwhile(*arguments: Any) -> Any:
        stats = real(*arguments)
        path = next(Path(three[1]).glob("part-0*"))
        os.utime(path, ns=(1, 1))
        return stats

    monkeypatch.setattr(task_vector, "rewrite_checkpoint", meanwhile)
    with pytest.raises(FailedError, match=r"instruct/part-0\.safetensors: was changed while it was read"):
        chat_vector(*three, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not leftovers(tmp_path)


def test_a_disk_that_fails_in_the_middle_leaves_nothing(
    three: tuple[str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, large = SYSCALLS.pread, []

    def pread(fd: int, buffer: memoryview, offset: int) -> int:
        large.append(len(buffer) > 90_000)
        if sum(large) == 5:  # in the second chunk of the largest tensor
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, buffer, offset)

    monkeypatch.setattr(SYSCALLS, "pread", pread)
    with pytest.raises(FailedError, match=r"reading \d+ bytes .* failed .*Input/output error"):
        chat_vector(*three, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not leftovers(tmp_path)


KILLED = """
import os, signal, sys
from pathlib import Path
from elo_engine.chat_vector import chat_vector
from elo_engine.checkpoint import SYSCALLS
from elo_engine.checkpoint.mover import using

calls, real = [0], SYSCALLS.pwrite
def pwrite(*arguments):
    calls[0] += 1
    if calls[0] == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)

SYSCALLS.pwrite = pwrite
with using("python"):
    chat_vector(*sys.argv[1:4], Path(sys.argv[4]))
"""


def test_killed_in_the_middle_nothing_is_there_that_opens(
    three: tuple[str, str, str], tmp_path: Path, forked: Forked
) -> None:
    done = forked(KILLED, *three, tmp_path / "out", timeout_s=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "out").exists() and len(leftovers(tmp_path)) == 1
    with pytest.raises((UsageError, FailedError)):
        open_checkpoint(tmp_path / leftovers(tmp_path)[0])
    chat_vector(*three, tmp_path / "out")  # and the next call clears up
    assert not leftovers(tmp_path)
    verify_commit(tmp_path / "out")
