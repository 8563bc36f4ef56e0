"""Faults that the environment asks for: they come where they should, and cost nothing where none is asked for."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from forked import Forked

from elo_engine.checkpoint import fault_points, syscalls
from elo_engine.checkpoint.syscalls import SYSCALLS, Syscalls
from elo_engine.errors import UsageError
from elo_engine.native import CSRC

# Publishes a file of 64 KiB, reads it through the mover, and says how it ended.
PROGRAM = """
import sys
from pathlib import Path
from elo_engine.checkpoint import mover, publish
from elo_engine.checkpoint.publish_file import publish_file
import os, torch
folder = Path(sys.argv[1])
with publish(folder / "model") as made:
    (made / "a").write_bytes(bytes(range(256)) * 256)
own = mover.make(2, 1 << 16, 1)
target = torch.zeros(1 << 16, dtype=torch.uint8)
fd = os.open(folder / "model" / "a", os.O_RDONLY)
own.wait(own.into(target, fd, 0))
assert bytes(target.numpy()) == bytes(range(256)) * 256
print("whole", type(own).__name__)
"""


def run(forked: Forked, folder: Path, fault: str | None) -> tuple[int, str]:
    environment = {name: value for name, value in os.environ.items() if name != fault_points.VARIABLE}
    if fault is not None:
        environment[fault_points.VARIABLE] = fault
    done = forked(PROGRAM, folder, environment=environment)
    return done.returncode, done.stdout + done.stderr


def test_without_the_variable_the_tables_hold_the_plain_calls() -> None:
    """No wrapper, no counter, no look-up: the table is what it was made as, and csrc gets no plan, so it has the
    plain class (bind_mover.cpp)."""
    plain = Syscalls()
    assert fault_points.VARIABLE not in os.environ
    assert all(getattr(SYSCALLS, name) is getattr(plain, name) for name in Syscalls.__slots__)
    assert SYSCALLS.fsync is os.fsync and syscalls.NATIVE_FAULTS == ()


@pytest.mark.parametrize(
    ("fault", "status", "shown", "left"),
    [
        (None, 0, "whole", {"model"}),
        ("fsync:1:KILL", -9, "", {"temporary"}),
        ("rename:1:KILL", -9, "", {"temporary"}),
        ("rename:1:ENOSPC", 1, "no space left", set()),
        ("fsync:*:EIO", 1, "Input/output error", set()),
        pytest.param(
            "native:1:KILL", -9, "", {"model"}, marks=pytest.mark.skipif(CSRC is None, reason="needs the C++ extension")
        ),
        pytest.param(
            "native:1:EIO", 1, "TransferError", {"model"},
            marks=pytest.mark.skipif(CSRC is None, reason="needs the C++ extension"),
        ),
        ("native:*:SHORT,native:2:EINTR", 0, "whole", {"model"}),
        ("sync:1:KILL", 1, "CALL:NTH:WHAT", set()),
    ],
)  # fmt: skip
def test_a_fault_comes_where_it_was_asked_for(
    fault: str | None, status: int, shown: str, left: set[str], tmp_path: Path, forked: Forked
) -> None:
    found, said = run(forked, tmp_path, fault)
    assert found == status and shown in said, said
    assert {"temporary" if path.name.startswith(".model.tmp-") else path.name for path in tmp_path.iterdir()} == left


def test_the_nth_call_alone_and_short_ones() -> None:
    calls: list[Any] = []

    class Table:
        __slots__ = ("fsync", "write")

    table: Any = Table()
    table.write, table.fsync = lambda fd, data: calls.append(bytes(data)) or len(data), calls.append
    assert fault_points.arm(table, "write:2:SHORT, write:3:EIO,native:4:ENOSPC,native:*:SHORT") == (
        (3, errno.ENOSPC, 2**62),
        (-1, 0, 1),
    )
    assert [table.write(1, memoryview(b"abc")) for _ in range(2)] == [3, 1]
    with pytest.raises(OSError, match="Input/output error"):
        table.write(1, memoryview(b"abc"))
    assert table.write(1, memoryview(b"abc")) == 3 and calls == [b"abc", b"a", b"abc"]
    table.fsync(7)
    assert calls[-1] == 7


@pytest.mark.parametrize(
    "text", ["", "write", "write:0:KILL", "write:one:KILL", "write:1:EVIL", "fsync:1:SHORT", "a:1:KILL"]
)
def test_what_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=fault_points.VARIABLE):
        fault_points.parse(text, tuple(Syscalls.__slots__))
