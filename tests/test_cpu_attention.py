"""Causal attention by segment on the CPU, against float64 and torch's scaled_dot_product_attention."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cpu_paths import NATIVE, PATHS
from kernel_errors import assert_no_worse
from torch import Tensor

from elo_engine.errors import UsageError
from elo_engine.model import cpu_attention, cpu_native
from elo_engine.model.cpu_attention import attention


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> Any:
    with cpu_native.using(request.param):
        yield request.param


def _case(N: int, H: int, K: int, E: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(N + 10 * E)
    shapes = ((N, H, E), (N, K, E), (N, K, E), (N, H, E))
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def _exact(q_NHE: Tensor, k_NKE: Tensor, v_NKE: Tensor, starts: list[int], scale: float) -> Tensor:
    """The definition, with one mask over all N x N."""
    N, H, _ = q_NHE.shape
    group = H // k_NKE.shape[1]
    segment_N = torch.zeros(N, dtype=torch.int64)
    for index, (start, stop) in enumerate(pairwise(starts)):
        segment_N[start:stop] = index
    seen_NN = (segment_N[:, None] == segment_N[None]) & torch.ones(N, N, dtype=torch.bool).tril()
    scores_HNN = torch.einsum("nhe,mhe->hnm", q_NHE, k_NKE.repeat_interleave(group, dim=1)) * scale
    p_HNN = torch.where(seen_NN, scores_HNN, -torch.inf).softmax(dim=-1)
    return torch.einsum("hnm,mhe->nhe", p_HNN, v_NKE.repeat_interleave(group, dim=1))


def _sdpa(q_NHE: Tensor, k_NKE: Tensor, v_NKE: Tensor, starts: list[int], scale: float) -> Tensor:
    outputs = []
    for start, stop in pairwise(starts):
        q, k, v = (x[start:stop].transpose(0, 1)[None] for x in (q_NHE, k_NKE, v_NKE))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def _run(how: Any, inputs: tuple[Tensor, ...], starts: list[int], scale: float) -> tuple[Tensor, ...]:
    *qkv, d_out_NHE = inputs
    leaves = [x.detach().requires_grad_() for x in qkv]
    out_NHE = how(*leaves, starts, scale)
    return out_NHE.detach(), *torch.autograd.grad(out_NHE, leaves, d_out_NHE)


def _of_largest(found: Tensor, truth: Tensor) -> float:
    """Relative to the largest entry, or to 1, the size of the inputs: a segment's first query has a gradient of 0."""
    return float((found.double() - truth).abs().max() / truth.abs().max().clamp_min(1.0))


def _compare(inputs: tuple[Tensor, ...], starts: list[int], scale: float) -> None:
    truths = _run(_exact, tuple(x.double() for x in inputs), starts, scale)
    theirs = _run(_sdpa, inputs, starts, scale)
    for mine, other, truth in zip(_run(attention, inputs, starts, scale), theirs, truths, strict=True):
        assert mine.dtype == inputs[0].dtype and mine.shape == truth.shape
        assert_no_worse(mine, other, truth, _of_largest)


CASES = [
    (1, 1, 1, 1, [0, 1]),
    (1, 9, 3, 64, [0, 1]),
    (5, 2, 1, 3, [0, 2, 5]),
    (96, 2, 2, 16, [0, 96]),
    (97, 2, 1, 32, [0, 97]),
    (250, 3, 1, 20, [0, 1, 97, 98, 194, 250]),
    (300, 9, 3, 64, [0, 300]),
    (520, 4, 2, 128, [0, 500, 520]),
    (230, 2, 1, 256, [0, 30, 230]),
]


@pytest.mark.parametrize(("N", "H", "K", "E", "starts"), CASES)
def test_against_float64(path: str, N: int, H: int, K: int, E: int, starts: list[int]) -> None:
    _compare(_case(N, H, K, E), starts, E**-0.5)


def test_large_scores(path: str) -> None:
    """One key takes nearly everything, and which one changes from block to block."""
    q_NHE, *rest = _case(300, 2, 1, 16)
    _compare((q_NHE * 100, *rest), [0, 300], 1.0)


def test_bf16(path: str) -> None:
    _compare(_case(150, 3, 1, 32, torch.bfloat16), [0, 100, 150], 0.2)


def test_views_of_one_projection(path: str) -> None:
    """q, k and v as a fused projection leaves them: rows with gaps, no copy made."""
    H, K, E, N = 4, 2, 16, 130
    qkv_NCE = torch.randn(N, H + 2 * K, E, generator=torch.Generator().manual_seed(3))
    starts, d_out_NHE = [0, 100, 130], torch.randn(N, H, E, generator=torch.Generator().manual_seed(4))
    grads = []
    for pieces in (lambda x: x, lambda x: x.contiguous()):
        leaf_NCE = qkv_NCE.clone().requires_grad_()
        q_NHE, k_NKE, v_NKE = (pieces(x) for x in leaf_NCE.split((H, K, K), dim=1))
        out_NHE = attention(q_NHE, k_NKE, v_NKE, starts, 0.25)
        # a gradient that arrives transposed must not be read as if it were contiguous
        grads.append(
            (out_NHE, *torch.autograd.grad(out_NHE, leaf_NCE, d_out_NHE.transpose(0, 1).contiguous().transpose(0, 1)))
        )
    assert torch.equal(grads[0][0], grads[1][0]) and torch.equal(grads[0][1], grads[1][1])
    turned = qkv_NCE[:, :H].transpose(0, 1).contiguous().transpose(0, 1)  # heads outermost: has to be copied
    assert torch.equal(attention(turned, qkv_NCE[:, H : H + K], qkv_NCE[:, H + K :], starts, 0.25), grads[0][0])


@pytest.mark.parametrize("bad", [0.0, torch.nan])
def test_a_segment_leaves_the_others_bit_for_bit(path: str, bad: float) -> None:
    starts = [0, 40, 141, 240, 300]
    inputs = _case(300, 6, 2, 32)
    before = _run(attention, inputs, starts, 0.2)
    changed = tuple(x.clone() for x in inputs)
    for x in changed:
        x[40:141] = torch.randn_like(x[40:141]) * 3 + bad
    after = _run(attention, changed, starts, 0.2)
    for x, y in zip(before, after, strict=True):
        assert torch.equal(x[:40], y[:40]) and torch.equal(x[141:], y[141:])
        assert not torch.equal(x[40:141], y[40:141])


def test_a_future_key_does_not_matter(path: str) -> None:
    q_NHE, k_NKE, v_NKE, _ = _case(250, 2, 1, 16)
    before = attention(q_NHE, k_NKE, v_NKE, [0, 250], 0.25)
    k_NKE[200:], v_NKE[200:] = 9.0, 9.0
    assert torch.equal(attention(q_NHE, k_NKE, v_NKE, [0, 250], 0.25)[:200], before[:200])


@pytest.mark.skipif(not NATIVE, reason=f"no C++ extension: {cpu_native.CSRC_REASON}")
def test_the_number_of_threads_does_not_change_a_bit() -> None:
    inputs, threads = _case(700, 3, 1, 32), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(_run(attention, inputs, [0, 600, 700], 0.2))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.skipif(not NATIVE, reason=f"no C++ extension: {cpu_native.CSRC_REASON}")
@pytest.mark.parametrize("fault", ["out", "lse"])
def test_the_comparison_sees_a_wrong_number(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = cpu_native.attention_forward

    def wrong(*arguments: Any) -> tuple[Tensor, Tensor]:
        out_NHE, lse_HN = right(*arguments)
        (out_NHE[200, 1] if fault == "out" else lse_HN[1, 200]).mul_(1.001)
        return out_NHE, lse_HN

    inputs = _case(250, 3, 1, 20)
    _compare(inputs, [0, 250], 0.2)
    monkeypatch.setattr(cpu_native, "attention_forward", wrong)
    with pytest.raises(AssertionError, match="error"):
        _compare(inputs, [0, 250], 0.2)


def test_head_wider_than_the_scratch_goes_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_native, "attention_forward", None)  # a call would fail
    E = cpu_attention.CHOICE.widest_head + 1
    _compare(_case(20, 2, 1, E), [0, 20], 0.1)


def test_differentiable_once(path: str) -> None:
    if path == "torch":
        pytest.skip("torch's own attention has its own rules")
    q_NHE, k_NKE, v_NKE, _ = (x.requires_grad_() for x in _case(10, 1, 1, 4))
    (d_q_NHE,) = torch.autograd.grad(
        attention(q_NHE, k_NKE, v_NKE, [0, 10], 1.0).square().sum(), q_NHE, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        d_q_NHE.sum().backward()


def test_what_does_not_fit_is_refused() -> None:
    q_NHE, k_NKE, v_NKE, _ = _case(10, 4, 2, 8)
    for starts in ([0, 9], [1, 10], [0], [], [0, 5, 5, 10], [0, 11, 10]):
        with pytest.raises(UsageError, match="segment starts"):
            attention(q_NHE, k_NKE, v_NKE, starts, 1.0)
    for bad in (
        (q_NHE[:, :3], k_NKE, v_NKE), (q_NHE, k_NKE[:9], v_NKE[:9]), (q_NHE, k_NKE, v_NKE[:, :1]),
        (q_NHE[0], k_NKE, v_NKE),
        (q_NHE, k_NKE[..., :7], v_NKE[..., :7]), (q_NHE.bfloat16(), k_NKE, v_NKE), (q_NHE[:0], k_NKE[:0], v_NKE[:0]),
    ):  # fmt: skip
        with pytest.raises(UsageError, match="attention"):
            attention(*bad, [0, 10], 1.0)
