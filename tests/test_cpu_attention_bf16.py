"""Causal attention on the CPU in bf16: C++ on fp32 copies where a window or a soft-cap is at work, else torch."""

from __future__ import annotations

import pytest
import torch
from cpu_paths import NATIVE
from test_cpu_attention import _case, _compare, _run, path

from elo_engine.model import cpu_native
from elo_engine.model.cpu_attention import attention

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


