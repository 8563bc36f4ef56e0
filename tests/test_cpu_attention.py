"""Causal attention by segment on the CPU, against float64 and torch's scaled_dot_product_attention."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cpu_paths import NATIVE, PATHS, Recorder
from kernel_errors import HALF_UNIT, assert_no_worse
from torch import Tensor

from elo_engine.errors import UsageError
from elo_engine.model import cpu_attention, cpu_native, reference
from elo_engine.model.cpu_attention import attention


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> Any:
    with cpu_native.using(request.param):
        yield request.param


def _case(N: int, H: int, K: int, E: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(N + 10 * E)
    shapes = ((N, H, E), (N, K, E), (N, K, E), (N, H, E))
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def _exact(
    q_NHE: Tensor, k_NKE: Tensor, v_NKE: Tensor, starts: list[int], scale: float,
    window: int | None = None, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """The definition, with one mask over all N x N."""
    N, H, _ = q_NHE.shape
    group = H // k_NKE.shape[1]
    segment_N = torch.zeros(N, dtype=torch.int64)
    for index, (start, stop) in enumerate(pairwise(starts)):
        segment_N[start:stop] = index
    seen_NN = (segment_N[:, None] == segment_N[None]) & torch.ones(N, N, dtype=torch.bool).tril()
    if window is not None:
        seen_NN = seen_NN.triu(1 - window)
    scores_HNN = torch.einsum("nhe,mhe->hnm", q_NHE, k_NKE.repeat_interleave(group, dim=1)) * scale
    if softcap is not None:
        scores_HNN = softcap * torch.tanh(scores_HNN / softcap)
    p_HNN = torch.where(seen_NN, scores_HNN, -torch.inf).softmax(dim=-1)
    return torch.einsum("hnm,mhe->nhe", p_HNN, v_NKE.repeat_interleave(group, dim=1))


def _sdpa(
    q_NHE: Tensor, k_NKE: Tensor, v_NKE: Tensor, starts: list[int], scale: float,
    window: int | None = None, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """Plain torch; it has no fused call for a cap."""
    if softcap is not None:
        return reference.attention(q_NHE, k_NKE, v_NKE, starts, scale, window, softcap)
    outputs = []
    for start, stop in pairwise(starts):
        q, k, v = (x[start:stop].transpose(0, 1)[None] for x in (q_NHE, k_NKE, v_NKE))
        seen = (
            None if window is None else torch.ones(stop - start, stop - start, dtype=torch.bool).tril().triu(1 - window)
        )
        out = F.scaled_dot_product_attention(q, k, v, seen, is_causal=seen is None, scale=scale, enable_gqa=True)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def _run(how: Any, inputs: tuple[Tensor, ...], *rest: Any) -> tuple[Tensor, ...]:
    """rest: segment starts, scale, and where wanted window and softcap."""
    *qkv, d_out_NHE = inputs
    leaves = [x.detach().requires_grad_() for x in qkv]
    out_NHE = how(*leaves, *rest)
    return out_NHE.detach(), *torch.autograd.grad(out_NHE, leaves, d_out_NHE)


def _of_largest(found: Tensor, truth: Tensor) -> float:
    """Relative to the largest entry, or to 1, the size of the inputs: a segment's first query has a gradient of 0."""
    return float((found.double() - truth).abs().max() / truth.abs().max().clamp_min(1.0))


def _compare(inputs: tuple[Tensor, ...], *rest: Any) -> None:
    truths = _run(_exact, tuple(x.double() for x in inputs), *rest)
    theirs = _run(_sdpa, inputs, *rest)
    for mine, other, truth in zip(_run(attention, inputs, *rest), theirs, truths, strict=True):
        assert mine.dtype == inputs[0].dtype and mine.shape == truth.shape
        # a score's E products are added one after the other: E roundings of half a unit, growing as a random walk
        chain = inputs[0].shape[-1] ** 0.5 * HALF_UNIT[torch.float32]
        assert_no_worse(mine, other, truth, lambda x, y, own=mine, chain=chain: _of_largest(x, y) - chain * (x is own))


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


RAGGED = [0, 1, 97, 98, 194, 250]
LIMITED = [  # N, H, K, E, segment starts, window, softcap
    (1, 1, 1, 1, [0, 1], 1, 0.5),
    (97, 2, 1, 4, [0, 97], 1, None),
    (250, 3, 1, 20, RAGGED, 2, None),
    (250, 3, 1, 20, RAGGED, 13, None),
    (300, 9, 3, 64, [0, 300], 50, None),
    (300, 2, 1, 8, [0, 300], 95, None),
    (300, 2, 2, 8, [0, 300], 96, None),
    (900, 2, 1, 8, [0, 900], 97, None),
    (900, 2, 1, 8, [0, 10, 900], 98, None),
    (520, 4, 2, 128, [0, 500, 520], 200, None),
    (900, 2, 1, 16, [0, 900], 30, None),
    (900, 2, 1, 16, [0, 900], 500, None),
    (97, 2, 1, 32, [0, 97], None, 0.7),
    (250, 3, 1, 20, RAGGED, None, 2.0),
    (300, 9, 3, 64, [0, 300], None, 50.0),
    (250, 3, 1, 20, RAGGED, 20, 1.0),
    (230, 2, 1, 256, [0, 30, 230], 110, 3.0),
    (700, 4, 2, 16, [0, 600, 700], 96, 5.0),
]


@pytest.mark.parametrize(("N", "H", "K", "E", "starts", "window", "softcap"), LIMITED)
def test_window_and_softcap_against_float64(
    path: str, N: int, H: int, K: int, E: int, starts: list[int], window: int | None, softcap: float | None
) -> None:
    _compare(_case(N, H, K, E), starts, E**-0.5, window, softcap)


@pytest.mark.parametrize("chunk", [1, 40, 64])
@pytest.mark.parametrize(("window", "softcap"), [(1, None), (30, None), (64, 1.0), (None, 2.0)])
def test_the_twin_in_chunks(chunk: int, window: int | None, softcap: float | None, monkeypatch: Any) -> None:
    monkeypatch.setattr(cpu_attention, "CHOICE", replace(cpu_attention.CHOICE, twin_chunk=chunk))
    with cpu_native.using("torch"):
        _compare(_case(130, 4, 2, 16), [0, 60, 120, 130], 0.25, window, softcap)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_twin_holds_a_chunk_at_a_time(softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_attention, "CHOICE", replace(cpu_attention.CHOICE, twin_chunk=64))
    inputs = _case(2000, 2, 1, 8)
    with cpu_native.using("torch"), Recorder() as seen:
        _run(attention, inputs, [0, 2000], 0.3, 32, softcap)
    assert seen.largest <= max(inputs[0].numel(), 2 * 64 * (64 + 32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_a_window_of_the_whole_segment_is_none(path: str, dtype: torch.dtype, softcap: float | None) -> None:
    inputs, starts = _case(400, 3, 1, 20, dtype), [0, 1, 97, 400]
    before = _run(attention, inputs, starts, 0.2, None, softcap)
    for window in (303, 304, 10**30):
        after = _run(attention, inputs, starts, 0.2, window, softcap)
        assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert not torch.equal(_run(attention, inputs, starts, 0.2, 302, softcap)[0], before[0])


def test_large_scores(path: str) -> None:
    """One key takes nearly everything, and which one changes from block to block."""
    q_NHE, *rest = _case(300, 2, 1, 16)
    _compare((q_NHE * 100, *rest), [0, 300], 1.0)


@pytest.mark.parametrize(("window", "softcap"), [(70, None), (None, 30.0), (70, 30.0), (None, 300.0)])
def test_large_scores_within_limits(path: str, window: int | None, softcap: float | None) -> None:
    """Inputs are whole 16ths, so dot products are exact: compared is the cap and the softmax, not how a sum rounds."""
    q_NHE, *rest = ((x * 16).round() / 16 for x in _case(300, 2, 1, 16))
    _compare((q_NHE * 100, *rest), [0, 300], 1.0, window, softcap)


@pytest.mark.skipif(not NATIVE, reason=f"no C++ extension: {cpu_native.CSRC_REASON}")
@pytest.mark.parametrize("choice", NATIVE)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_window_of_one_passes_values_through(choice: str, softcap: float | None) -> None:
    q_NHE, k_NKE, v_NKE, d_out_NHE = _case(250, 1, 1, 32)
    inputs = (q_NHE, k_NKE, v_NKE, d_out_NHE)
    with cpu_native.using(choice):
        out_NHE, d_q_NHE, d_k_NKE, d_v_NKE = _run(attention, inputs, [0, 100, 250], 0.2, 1, softcap)
    assert torch.equal(out_NHE, v_NKE) and torch.equal(d_v_NKE, d_out_NHE)
    # One key has all the weight whatever its score. What is left is how d_out . v rounds, twice.
    left_N11 = 32 * 2.0**-23 * (d_out_NHE * v_NKE).abs().sum(-1, keepdim=True)
    assert bool((d_q_NHE.abs() <= left_N11 * k_NKE.abs()).all())
    assert bool((d_k_NKE.abs() <= left_N11 * q_NHE.abs()).all())


@pytest.mark.skipif(not NATIVE, reason=f"no C++ extension: {cpu_native.CSRC_REASON}")
@pytest.mark.parametrize("choice", NATIVE)
@pytest.mark.parametrize("softcap", [1.0, 50.0, 1e-30, 1e30])
def test_the_cap_is_accurate_at_every_size(choice: str, softcap: float) -> None:
    """A segment of one token: its largest score is its only one."""
    size_R = torch.logspace(-6, 3, 700, dtype=torch.float64)
    ratio_R = torch.cat((size_R, -size_R, torch.linspace(-1.0, 1.0, 301, dtype=torch.float64)))
    q_N11 = (ratio_R * softcap).float()[:, None, None]
    N, one_N11 = len(q_N11), torch.ones(len(q_N11), 1, 1)
    with cpu_native.using(choice):
        _, lse_21N = cpu_native.attention_forward(q_N11, one_N11, one_N11, list(range(N + 1)), 1.0, None, softcap)
    truth_N = softcap * torch.tanh(q_N11.flatten().double() / softcap)
    assert bool((lse_21N[1] == 0).all())
    assert bool((lse_21N[0, 0].double() - truth_N).abs().le(4 * 2.0**-23 * truth_N.abs()).all())


@pytest.mark.parametrize("softcap", [None, 1.0])
def test_float64_stays(softcap: float | None) -> None:
    inputs = _case(60, 2, 1, 8, torch.float64)
    found, truths = (_run(how, inputs, [0, 20, 60], 0.3, 15, softcap) for how in (attention, _exact))
    for mine, truth in zip(found, truths, strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_what_lies_outside_the_window_is_not_touched(path: str, softcap: float | None, monkeypatch: Any) -> None:
    """NaN would show: 0 * NaN is NaN. So no block outside the window is multiplied, forward or backward."""
    monkeypatch.setattr(cpu_attention, "CHOICE", replace(cpu_attention.CHOICE, twin_chunk=32))
    inputs, rest = _case(700, 4, 2, 16), ([0, 700], 0.25, 50, softcap)
    before = _run(attention, inputs, *rest)
    old = tuple(x.clone() for x in inputs)
    for x in old:
        x[:192] = torch.nan
    for x, y in zip(before, _run(attention, old, *rest), strict=True):  # query 241 sees 192; 256 starts whole tiles
        assert torch.equal(x[256:], y[256:]) and bool(y[:100].isnan().all())
    new = tuple(x.clone() for x in inputs)
    new[0][400:], new[3][400:] = torch.nan, torch.nan
    for x, y in zip(before, _run(attention, new, *rest), strict=True):  # key 350 is seen by query 399, not by 400
        assert torch.equal(x[: 350 - 32], y[: 350 - 32])


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


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (30, None), (70, 2.0)])
@pytest.mark.parametrize("bad", [0.0, torch.nan])
def test_a_segment_leaves_the_others_bit_for_bit(
    path: str, bad: float, window: int | None, softcap: float | None
) -> None:
    starts = [0, 40, 141, 240, 300]
    inputs = _case(300, 6, 2, 32)
    before = _run(attention, inputs, starts, 0.2, window, softcap)
    changed = tuple(x.clone() for x in inputs)
    for x in changed:
        x[40:141] = torch.randn_like(x[40:141]) * 3 + bad
    after = _run(attention, changed, starts, 0.2, window, softcap)
    for x, y in zip(before, after, strict=True):
        assert torch.equal(x[:40], y[:40]) and torch.equal(x[141:], y[141:])
        assert not torch.equal(x[40:141], y[40:141])


def test_a_future_key_does_not_matter(path: str) -> None:
    q_NHE, k_NKE, v_NKE, _ = _case(250, 2, 1, 16)
    before = attention(q_NHE, k_NKE, v_NKE, [0, 250], 0.25)
    k_NKE[200:], v_NKE[200:] = 9.0, 9.0
    assert torch.equal(attention(q_NHE, k_NKE, v_NKE, [0, 250], 0.25)[:200], before[:200])


@pytest.mark.skipif(not NATIVE, reason=f"no C++ extension: {cpu_native.CSRC_REASON}")
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (150, 2.0)])
def test_the_number_of_threads_does_not_change_a_bit(window: int | None, softcap: float | None) -> None:
    inputs, threads = _case(700, 3, 1, 32), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(_run(attention, inputs, [0, 600, 700], 0.2, window, softcap))
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


@pytest.mark.skipif(not NATIVE, reason=f"no C++ extension: {cpu_native.CSRC_REASON}")
@pytest.mark.parametrize("direction", ["attention_forward", "attention_backward"])
@pytest.mark.parametrize(("window", "softcap"), [(41, 2.0), (39, 2.0), (40, 2.01), (None, 2.0), (40, 1e30)])
def test_the_comparison_sees_a_wrong_limit(
    direction: str, window: int | None, softcap: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(cpu_native, direction)
    inputs, rest = _case(250, 3, 1, 20), ([0, 250], 0.2, 40, 2.0)
    _compare(inputs, *rest)
    monkeypatch.setattr(cpu_native, direction, lambda *arguments: right(*arguments[:-2], window, softcap))
    with pytest.raises(AssertionError, match="error"):
        _compare(inputs, *rest)


@pytest.mark.parametrize(("name", "place", "wrong"), [("_seen", -1, 41), ("_seen", -1, 39), ("_capped", -1, 2.01)])
def test_the_comparison_sees_a_wrong_twin(name: str, place: int, wrong: float, monkeypatch: Any) -> None:
    right = getattr(cpu_attention, name)

    def planted(*arguments: Any) -> Any:
        changed = list(arguments)
        changed[place] = wrong
        return right(*changed)

    inputs, rest = _case(250, 3, 1, 20), ([0, 250], 0.2, 40, 2.0)
    with cpu_native.using("torch"):
        _compare(inputs, *rest)
        monkeypatch.setattr(cpu_attention, name, planted)
        with pytest.raises(AssertionError, match="error"):
            _compare(inputs, *rest)


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
    for wrong in (0, -1, True, 2.0, "3"):
        with pytest.raises(UsageError, match="window must be an int"):
            attention(q_NHE, k_NKE, v_NKE, [0, 10], 1.0, wrong)  # type: ignore[arg-type]
    for wrong in (0.0, -2.0, torch.nan, torch.inf, True, 1e-40, "30"):
        with pytest.raises(UsageError, match="softcap must be a number"):
            attention(q_NHE, k_NKE, v_NKE, [0, 10], 1.0, None, wrong)  # type: ignore[arg-type]


@pytest.mark.skipif(not NATIVE, reason=f"no C++ extension: {cpu_native.CSRC_REASON}")
def test_the_extension_checks_window_and_softcap() -> None:
    native = cpu_native._csrc
    assert native is not None
    at = torch.zeros(64).data_ptr()
    forward = (at, at, at, 8, 4, 4, 2, 2, 1, 4, 1.0, at, at, [0, 2], "auto")
    backward = (at, at, at, 8, 4, 4, 2, 2, 1, 4, 1.0, at, at, at, at, at, at, at, [0, 2], "auto")
    for call, arguments in ((native.attention_forward, forward), (native.attention_backward, backward)):
        with pytest.raises(ValueError, match="window"):
            call(*arguments, -1, 0.0)
        for wrong in (-1.0, torch.nan, torch.inf, 1e-40):
            with pytest.raises(ValueError, match="softcap"):
                call(*arguments, 0, wrong)
