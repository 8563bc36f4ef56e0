"""Triton's interpreter computes the same with less searching, and leaves its language as it found it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from forked import Forked

PROGRAM = """
import inspect, sys
import numpy, torch, triton.language as tl
sys.path.append(sys.argv[1])
import quick_interpreter
from triton.runtime import interpreter
from elo_engine.kernels import rms_norm, swiglu
assert rms_norm.triton.knobs.runtime.interpret
searched, search = [0], inspect.getmembers
def counted(*of):
    searched[0] += 1
    return search(*of)
interpreter.inspect.getmembers = counted
made = torch.Generator().manual_seed(1)
x_ND, gamma_D = torch.randn(5, 24, generator=made), torch.randn(24, generator=made)
narrow_NF = torch.randn(3, 80, generator=made).to(torch.bfloat16)
def both():
    searched[0] = 0
    out_ND, rstd_N, _ = rms_norm.rms_norm_forward(x_ND, gamma_D, 1e-5)
    gated_NF = swiglu.swiglu_forward(narrow_NF, narrow_NF.flip(0).contiguous())
    return [out_ND, rstd_N, *rms_norm.rms_norm_backward(out_ND, x_ND, gamma_D, rstd_N), gated_NF], searched[0]
def language():
    return {(owner.__name__, name): member for owner in (tl, tl.tensor, tl.math) for name, member in search(owner)
            if tl.core.is_builtin(member)}
semantic, handle = interpreter.interpreter_semantic, interpreter.TensorHandle
def integers(*values, kind="int32"):
    dtype = getattr(tl, kind)
    return tl.tensor(handle(numpy.array(values, kind), dtype), tl.block_type(dtype, [len(values)]))
def refused(operation, *of, **options):
    try:
        return operation(*of, **options).handle.data.tolist()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
def odd():
    "Integers that end at a limit of their type and go over it, shapes that are none or do not fit, types."
    top, pair, four = 2**31 - 1, integers(1, 2), integers(1, 2, 3, 4)
    sides = ("int32", (top, -5), (0, 1)), ("int32", (1, top), (0, 1)), ("int32", (-top, 0), (1, 0)), (
        "int32", (2, -top), (1, 2)), ("int64", (2**62, 1), (2**62, 1)), ("uint32", (2, 3), (3, 2))
    found = []
    for debug in (False, True):
        object.__setattr__(semantic.builder.options, "debug", debug)
        found += [refused(operation, integers(*left, kind=kind), integers(*right, kind=kind), True)
                  for kind, left, right in sides for operation in (semantic.add, semantic.sub, semantic.mul)]
    object.__setattr__(semantic.builder.options, "debug", False)
    found += [refused(tl.block_type, tl.int32, shape) for shape in ([3], [], [2.0], 4)]
    found += [refused(semantic.add, pair, other, True) for other in (four, integers(1), 3, 2**40)]
    types = [tl.block_type(tl.int8, [size]) for size in (2, 2, 4)] + [tl.int8, tl.uint8, tl.pointer_type(tl.int8)]
    return found + [str(one) for one in types] + [bool(a == b) for a in types for b in types]
def conversions():
    "Every number of a narrow type."
    pairs = ((tl.bfloat16, tl.float32), (tl.float8e4nv, tl.float32), (tl.float8e5, tl.bfloat16),
             (tl.float16, tl.float8e5))
    every = {8: numpy.arange(256, dtype="uint8"), 16: numpy.arange(65536, dtype="uint16")}
    return [interpreter._convert_float(every[a.primitive_bitwidth], a, b, None).copy() for a, b in pairs]
before = language()
plain, first = both()
told, converted = odd(), conversions()
assert language() == before
quick_interpreter.install()
quick_interpreter.install()
quick, second = both()
assert language() == before and len(before) > 100
assert all(torch.equal(a, b) for a, b in zip(plain, quick, strict=True)) and plain[0].abs().sum() > 1
assert odd() == told and odd() == told, (odd(), told)
assert sum("overflow" in str(said) for said in told) == 4 and sum("Error" in str(said) for said in told) == 10, told
for _ in range(2):
    assert all(numpy.array_equal(a, b) for a, b in zip(conversions(), converted, strict=True))
print(first, second)
"""


def test_the_same_numbers_and_refusals_without_searching(forked: Forked) -> None:
    pytest.importorskip("triton", reason="triton is not installed; pip install 'elo-engine[gpu]'")
    done = forked(PROGRAM, Path(__file__).parent, environment={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stderr
    first, second = map(int, done.stdout.split())
    assert first > 5 and second == 0
