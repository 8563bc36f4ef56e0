"""Ctrl-C at any moment, forks, and limits: no thread goes on with memory or a descriptor that was given back."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from forked import Forked
from mover_fixture import KINDS

from elo_engine.checkpoint.mover import PythonMover
from elo_engine.checkpoint.syscalls import SYSCALLS

each = pytest.mark.parametrize("kind", KINDS)
native_only = pytest.mark.skipif("native" not in KINDS, reason="no C++ extension")

STRESS = """
import collections, os, random, shutil, signal, sys, time, warnings
from pathlib import Path
import torch
from safetensors.torch import save_file
from elo_engine.checkpoint import CheckpointReader, open_checkpoint, publish, rewrite_checkpoint
from elo_engine.checkpoint.mover import using

warnings.simplefilter("ignore")
kind, folder, seconds = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])
(folder / "model").mkdir()
(folder / "model" / "config.json").write_text("{}")
tensors = {f"a{i}": torch.full((1 << 17,), float(i)) for i in range(16)}
save_file(tensors, folder / "model" / "model.safetensors")
index = open_checkpoint(folder / "model")

def interrupt(*_):
    raise KeyboardInterrupt

def read(number):
    with CheckpointReader(index, rng.choice(["pread", "direct"])) as reader:
        reader.read(tensors, dtype=rng.choice([None, torch.bfloat16]))

def write(number):
    with publish(folder / f"out-{number}") as out:
        rewrite_checkpoint(index, {name: tensor + 1 for name, tensor in tensors.items()}, out)
    shutil.rmtree(folder / f"out-{number}")

signal.signal(signal.SIGALRM, interrupt)
rng = random.Random(1)

def stress(what):
    seen, number, end = collections.Counter(), 0, time.monotonic() + seconds
    while time.monotonic() < end or min(seen["done"], seen["interrupted"]) < 3:
        number += 1
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.0005, 0.04 if what == "read" else 0.4))
                (read if what == "read" else write)(number)
                seen["done"] += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            seen["interrupted"] += 1
    print(what, dict(seen))

with using(kind):
    stress("read")
    stress("write")
    with CheckpointReader(index) as reader:
        found = reader.read(tensors)
assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
"""


@each
def test_interrupted_at_random_moments(kind: str, tmp_path: Path, forked: Forked) -> None:
    """Nothing but KeyboardInterrupt comes out, and what comes after works."""
    done = forked(STRESS, kind, tmp_path, "1")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "interrupted" in done.stdout


@pytest.mark.parametrize("where", ["wait", "drain"])
def test_draining_waits_for_a_write_whose_wait_was_interrupted(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the thread writes on, into whatever file gets the descriptor's number next."""
    real, ended = SYSCALLS.pwrite, []

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        time.sleep(0.3)
        ended.append(fd)
        return real(fd, data, offset)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(SYSCALLS, "pwrite", pwrite)
    before = signal.signal(signal.SIGALRM, interrupt)
    mover = PythonMover(1, 8192, 1)
    slot = mover.acquire()
    assert slot is not None
    fd = os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT)
    try:
        number = mover.store(slot, fd, 0, 8192)
        time.sleep(0.05)  # it is under way
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            mover.wait(number) if where == "wait" else mover.drain()
        if where == "wait":
            assert not ended
            mover.drain()
        assert ended == [fd]
        mover.release(slot)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        os.close(fd)


FORKED_AND_OUTLIVED = """
import os, sys
from elo_engine.checkpoint.mover import borrowed, make
with borrowed(2, 8192, 4): pass
pid = os.fork()
if pid == 0: sys.exit(0)
slot = make(1, 8192, 1).acquire()
slot.memory.fill_(7)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), int(slot.memory.sum()))
"""


def test_a_forked_child_ends_as_usual_and_a_slot_keeps_its_memory(forked: Forked) -> None:
    done = forked(FORKED_AND_OUTLIVED, timeout_s=60)
    assert (done.returncode, done.stdout.split()) == (0, ["0", str(7 * 8192)]), done.stderr


LIMITED = """
import resource
from elo_engine.checkpoint.mover import NativeMover
from elo_engine.errors import FailedError
room = int(open("/proc/self/statm").read().split()[0]) * 4096 + (200 << 20)
resource.setrlimit(resource.RLIMIT_AS, (room, room))
try:
    NativeMover(2, 8192, 256)  # 256 threads' stacks need 2 GB of addresses
except FailedError as error:
    print("refused:", error)
"""


@native_only
def test_too_few_threads_is_an_error(forked: Forked) -> None:
    limited = forked(LIMITED, timeout_s=60)
    assert limited.returncode == 0 and "ulimit" in limited.stdout, (limited.stdout, limited.stderr)


def test_more_shards_than_may_be_open(tmp_path: Path) -> None:
    from reader_fixture import write_folder

    from elo_engine.checkpoint import CheckpointReader, open_checkpoint

    shards = {f"s-{i:03}.safetensors": {f"t{i}": torch.full((5,), float(i))} for i in range(80)}
    write_folder(tmp_path / "model", shards)
    opened = 0
    with CheckpointReader(open_checkpoint(tmp_path / "model"), "direct") as reader:

        def count(done: int, total: int) -> None:
            nonlocal opened
            links = [
                os.readlink(f"/proc/self/fd/{fd}")
                for fd in os.listdir("/proc/self/fd")
                if os.path.exists(f"/proc/self/fd/{fd}")
            ]
            opened = max(opened, sum(link.endswith(".safetensors") for link in links))

        found = reader.read([f"t{i}" for i in range(80)], progress=count)
    assert all(float(found[f"t{i}"][4]) == i for i in range(80))
    assert 2 <= opened <= 64  # two descriptors for each of 32


def test_tiny_tensors_share_their_pages(tmp_path: Path) -> None:
    from reader_fixture import write_folder

    from elo_engine.checkpoint import CheckpointReader, open_checkpoint

    tensors = {f"t{i:04}": torch.full((16,), float(i)) for i in range(2000)}
    write_folder(tmp_path / "model", {"model-1.safetensors": tensors})
    index = open_checkpoint(tmp_path / "model")
    for method in ("direct", "pread"):
        with CheckpointReader(index, method) as reader:
            found = reader.read(tensors)
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)
        assert reader.bytes_read <= index.total_bytes + 2 * 4096
