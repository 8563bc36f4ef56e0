"""Causal attention on the CPU in bf16: C++ on fp32 copies where a window or a soft-cap is at work, else torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cpu_paths import NATIVE
from forked import Forked
from test_cpu_attention import _case, _compare, _run, path
from torch import Tensor

from elo_engine.model import cpu_native
from elo_engine.model.cpu_attention import attention, few_lengths

__all__ = ["path"]


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (20, None), (None, 2.0), (20, 2.0)])
def test_bf16(path: str, window: int | None, softcap: float | None) -> None:
    _compare(_case(150, 3, 1, 32, torch.bfloat16), [0, 100, 150], 0.2, window, softcap)


@pytest.mark.skipif(not NATIVE, reason=f"no C++ extension: {cpu_native.CSRC_REASON}")
@pytest.mark.parametrize(("window", "softcap"), [(20, None), (None, 2.0), (20, 2.0)])
def test_bf16_within_limits_is_fp32_rounded_once(window: int | None, softcap: float | None) -> None:
    """The same C++ on the same numbers; gradients see the output rounded, in the row sums that they subtract."""
    inputs, rest = _case(150, 6, 2, 32, torch.bfloat16), ([0, 100, 150], 0.2, window, softcap)
    found = _run(attention, inputs, *rest)
    wide = _run(attention, tuple(x.float() for x in inputs), *rest)
    assert torch.equal(found[0], wide[0].bfloat16()) and torch.equal(found[3], wide[3].bfloat16()), "values' too"
    for mine, other in zip(found[1:3], wide[1:3], strict=True):
        # 32 products of a value with half a unit of rounding each, then scores' gradients of about the same size
        torch.testing.assert_close(mine.float(), other, rtol=2.0**-7, atol=2.0**-7 * float(other.abs().max()))


def test_bf16_without_limits_stays_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_native, "attention_forward", None)  # a call would fail
    inputs = _case(150, 3, 1, 32, torch.bfloat16)
    for window in (None, 100, 101):
        _compare(inputs, [0, 100, 150], 0.2, window)


def test_torch_meets_few_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps code for each one; what is added is no part of a segment, whose output alone is given back."""
    starts, inputs = [0, 1, 20, 21, 49, 97, 146, 210, 275, 400, 600], _case(600, 3, 1, 32, torch.bfloat16)
    _compare(inputs, starts, 0.2, None)
    met, plain = set[int](), torch.nn.functional.scaled_dot_product_attention

    def noted(q: Tensor, *rest: Any, **options: Any) -> Tensor:
        met.add(q.shape[2])
        return plain(q, *rest, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    _run(attention, inputs, starts, 0.2, None, None)
    assert met == {16, 32, 48, 64, 80, 128, 256}
    assert len({few_lengths(T) for T in range(1, 2049)}) == 38
    assert all(T <= few_lengths(T) < T + 64 and few_lengths(few_lengths(T)) == few_lengths(T) for T in range(1, 2049))
    met.clear()
    _run(attention, _case(100, 3, 1, 32, torch.bfloat16), [0, 100], 0.2, None, None)
    assert met == {112}


GROWTH = """
import sys, torch
from elo_engine.model import cpu_attention
if "planted" in sys.argv:
    cpu_attention.few_lengths = lambda T: T
def resident():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024
def step(T):
    q, k, v = (torch.randn(T, heads, 64, dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2, 2))
    cpu_attention.attention(q, k, v, [0, T], 0.1).sum().backward()
for T in (192, 256, 320, 384):
    step(T)
before = resident()
for T in range(131, 385, 5):
    step(T)
print(resident() - before)
"""


def test_a_process_does_not_grow_with_every_length(forked: Forked) -> None:
    """51 lengths. Where torch compiles none, on a CPU without such instructions, they take nothing either way."""
    found = [float(forked(GROWTH, *arguments).stdout) for arguments in ((), ("planted",))]
    assert found[0] < 16.0, "MiB"
    if torch.cpu._is_amx_tile_supported():
        assert found[1] > 5 * max(found[0], 8.0), "without it they take a few MiB each"
