"""Triton's interpreter computes the same with less searching, and leaves its language as it found it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from forked import Forked

PROGRAM = """
import inspect, sys
import torch, triton.language as tl
sys.path.append(sys.argv[1])
import quick_interpreter
from triton.runtime import interpreter
from elo_engine.kernels import rms_norm
assert rms_norm.triton.knobs.runtime.interpret
searched, search = [0], inspect.getmembers
def counted(*of):
    searched[0] += 1
    return search(*of)
interpreter.inspect.getmembers = counted
made = torch.Generator().manual_seed(1)
x_ND, gamma_D = torch.randn(5, 24, generator=made), torch.randn(24, generator=made)
def both():
    searched[0] = 0
    out_ND, rstd_N, _ = rms_norm.rms_norm_forward(x_ND, gamma_D, 1e-5)
    return [out_ND, rstd_N, *rms_norm.rms_norm_backward(out_ND, x_ND, gamma_D, rstd_N)], searched[0]
def language():
    return {(owner.__name__, name): member for owner in (tl, tl.tensor, tl.math) for name, member in search(owner)
            if tl.core.is_builtin(member)}
before = language()
plain, first = both()
assert language() == before
quick_interpreter.install()
quick_interpreter.install()
quick, second = both()
assert language() == before and len(before) > 100
assert all(torch.equal(a, b) for a, b in zip(plain, quick, strict=True)) and plain[0].abs().sum() > 1
print(first, second)
"""


def test_the_same_numbers_without_searching(forked: Forked) -> None:
    pytest.importorskip("triton", reason="triton is not installed; pip install 'elo-engine[gpu]'")
    done = forked(PROGRAM, Path(__file__).parent, environment={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stderr
    first, second = map(int, done.stdout.split())
    assert first > 5 and second == 0
