"""Freed memory is kept where glibc serves it, and nowhere is anything broken by asking."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from elo_engine.model import cpu_memory

PROGRAM = """
import resource, sys
if sys.argv[1] == "keep":
    from elo_engine.model.cpu_memory import keep_freed_memory
    assert keep_freed_memory()
import torch
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def turn():
    torch.ones(25_000_000)  # 100 MB
for _ in range(20):  # until no small block splits the large ones any more
    turn()
before = faults()
for _ in range(5):
    turn()
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_memory_that_comes_back_is_not_faulted_in_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five times 100 MB are 122,000 pages of 4 KiB, or 240 of 2 MiB; kept, none are new."""
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)

    def faults(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert faults("keep") < 100 < faults("leave")


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_a_tuned_malloc_is_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    assert not cpu_memory.keep_freed_memory()


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not cpu_memory.keep_freed_memory()
