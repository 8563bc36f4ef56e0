"""The head's loss and gradients in tiles, against float64 and plain torch in the same dtype."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cpu_paths import PATHS, Recorder
from kernel_errors import HALF_UNIT, assert_no_worse, error_by_row
from torch import Tensor

from elo_engine.errors import UsageError
from elo_engine.model import cpu_head, cpu_native

SMALL = cpu_head.HeadTiles(rows=16, cols=48, most_cols=96, chunk_bytes=4 * 1000 * 12)


@pytest.fixture(autouse=True)
def many_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small tiles, so that small shapes cross many borders; one thread, which is enough for them on a busy machine."""
    monkeypatch.setattr(cpu_head, "TILES", SMALL)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> Any:
    with cpu_native.using(request.param):
        yield request.param


def _case(
    N: int, D: int, V: int, *, scale: float = 1.0, ignored: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(N * 1000 + V)
    hidden_ND = (torch.randn(N, D, generator=generator) * scale).to(dtype)
    head_VD = torch.randn(V, D, generator=generator).to(dtype)
    labels_N = torch.randint(0, V, (N,), generator=generator)
    labels_N[torch.randperm(N, generator=generator)[:ignored]] = -100
    return hidden_ND, head_VD, labels_N


def _eager(hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """What a user of torch writes, in a given dtype: losses and the gradients of their sum."""
    hidden_ND, head_VD = hidden_ND.to(dtype).requires_grad_(), head_VD.to(dtype).requires_grad_()
    logits_NV = F.linear(hidden_ND, head_VD)
    logits_NV = logits_NV.float() if dtype == torch.bfloat16 else logits_NV
    losses_N = F.cross_entropy(logits_NV, labels_N, reduction="none")
    d_hidden_ND, d_head_VD = torch.autograd.grad(losses_N.sum(), (hidden_ND, head_VD))
    return losses_N.detach(), d_hidden_ND, d_head_VD


def _compare(hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor, slack: float = 0.0) -> None:
    """Frozen and trainable head, each no worse than plain torch in the same dtype (and the slack of kernel_errors)."""
    truths = _eager(hidden_ND, head_VD, labels_N, torch.float64)
    theirs = _eager(hidden_ND, head_VD, labels_N, hidden_ND.dtype)
    loss_N, d_hidden_ND = cpu_head.frozen_head_loss(hidden_ND, head_VD, labels_N, need_d_hidden=True)
    assert d_hidden_ND is not None and d_hidden_ND.dtype == hidden_ND.dtype and loss_N.dtype == torch.float32
    full = cpu_head.head_loss(hidden_ND, head_VD, labels_N, need_grads=True)
    assert full[1] is not None and full[2] is not None and full[2].dtype == torch.float32
    for ours in ((loss_N, d_hidden_ND), full):
        for mine, other, truth in zip(ours, theirs, truths, strict=False):
            assert mine is not None
            assert_no_worse(mine, other, truth, lambda x, y, own=mine: error_by_row(x, y) - slack * (x is own))
    for skipped in (loss_N, d_hidden_ND, full[0], full[1]):
        assert bool((skipped[labels_N == -100] == 0).all())


# widths of whole register tiles (32, 64, 352, 704) take the C++ sweep, the others torch's products in tiles
SHAPES = [(1, 8, 1), (1, 16, 5), (2, 3, 48), (16, 16, 96), (17, 24, 97), (40, 33, 1009)]
SHAPES += [(1, 32, 1), (1, 32, 97), (5, 64, 95), (100, 32, 96), (193, 64, 500), (20, 352, 193), (9, 704, 200)]


@pytest.mark.parametrize(("N", "D", "V"), SHAPES)
def test_fp32_against_float64(path: str, N: int, D: int, V: int) -> None:
    """The C++ adds the D products of a logit one after the other: D roundings of half a unit, which grow as a random
    walk. ARITHMETIC was argued for sums folded pairwise, and MKL on AVX-512 folds, so its own error does not cover it.
    """
    _compare(*_case(N, D, V, ignored=N // 3), slack=D**0.5 * HALF_UNIT[torch.float32])


@pytest.mark.parametrize("units", [False, True])
def test_bf16_against_float64(path: str, units: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With bf16 products each tile's share of a gradient is rounded once more than torch rounds: half a unit."""
    monkeypatch.setattr(cpu_head, "_has_bf16_products", lambda: units)
    _compare(*_case(19, 32, 300, ignored=3, dtype=torch.bfloat16), slack=HALF_UNIT[torch.bfloat16] * units)


def test_mixed_dtypes_meet_in_fp32(path: str) -> None:
    hidden_ND, head_VD, labels_N = _case(9, 16, 100)
    loss_N, _ = cpu_head.frozen_head_loss(hidden_ND, head_VD.bfloat16(), labels_N, need_d_hidden=False)
    truth_N = _eager(hidden_ND, head_VD.bfloat16(), labels_N, torch.float64)[0]
    assert error_by_row(loss_N, truth_N) < 2.0**-20


def test_huge_logits(path: str) -> None:
    """Logits of +-1e4: with the maximum in any tile, first, last or between, and on the target or not."""
    hidden_ND, head_VD, labels_N = _case(20, 32, 500)
    hidden_ND *= 1e4 / (hidden_ND @ head_VD.t()).abs().max()
    labels_N[:5] = (hidden_ND @ head_VD.t()).argmax(dim=1)[:5]
    _compare(hidden_ND, head_VD, labels_N)


def test_repeated_targets(path: str) -> None:
    hidden_ND, head_VD, labels_N = _case(33, 32, 200)
    labels_N[:] = 77
    _compare(hidden_ND, head_VD, labels_N)


def test_a_confident_token_keeps_its_tiny_loss(path: str) -> None:
    """lse - logit cancels to 0 or 1e-6 here; softplus of the others' log-sum-exp does not."""
    head_VD = torch.eye(32)[:2] * torch.tensor([[1.0], [-1.0]])
    hidden_ND = torch.zeros(1, 32)
    hidden_ND[0, 0] = 20.0
    labels_N = torch.tensor([0])
    truths = _eager(hidden_ND, head_VD, labels_N, torch.float64)
    loss_N, d_hidden_ND = cpu_head.frozen_head_loss(hidden_ND, head_VD, labels_N, need_d_hidden=True)
    assert d_hidden_ND is not None and float(truths[0]) < 1e-8
    torch.testing.assert_close(loss_N.double(), truths[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(d_hidden_ND.double(), truths[1], rtol=1e-5, atol=0)


def test_all_labels_ignored(path: str) -> None:
    hidden_ND, head_VD, labels_N = _case(6, 32, 50, ignored=6)
    hidden_ND[2] = torch.nan  # padding may hold anything
    loss_N, d_hidden_ND, d_head_VD = cpu_head.head_loss(hidden_ND, head_VD, labels_N, need_grads=True)
    assert d_hidden_ND is not None and d_head_VD is not None
    for zero in (
        loss_N,
        d_hidden_ND,
        d_head_VD,
        *cpu_head.frozen_head_loss(hidden_ND, head_VD, labels_N, need_d_hidden=True),
    ):
        assert zero is not None and bool((zero == 0).all())
    empty, nothing = cpu_head.frozen_head_loss(hidden_ND[:0], head_VD, labels_N[:0], need_d_hidden=False)
    assert empty.shape == (0,) and nothing is None


def test_a_row_does_not_depend_on_the_others(path: str) -> None:
    hidden_ND, head_VD, labels_N = _case(40, 32, 300)
    before = cpu_head.head_loss(hidden_ND, head_VD, labels_N, need_grads=True)
    frozen = cpu_head.frozen_head_loss(hidden_ND, head_VD, labels_N, need_d_hidden=True)
    hidden_ND[1:] = torch.randn(39, 32) * 50
    hidden_ND[7] = torch.nan
    labels_N[1:] = labels_N[1:].flip(0)
    after = cpu_head.head_loss(hidden_ND, head_VD, labels_N, need_grads=True)
    again = cpu_head.frozen_head_loss(hidden_ND, head_VD, labels_N, need_d_hidden=True)
    for x, y in zip((*before[:2], *frozen), (*after[:2], *again), strict=True):
        assert x is not None and y is not None and torch.equal(x[0], y[0])
    for loss_N in (after[0], again[0]):
        assert bool(loss_N[7].isnan()), "a hidden state that is not a number must show in its loss"


@pytest.mark.skipif(not cpu_native.HAS_CSRC, reason=f"no C++ extension: {cpu_native.CSRC_REASON}")
def test_the_number_of_threads_does_not_change_a_bit() -> None:
    """Threads cut the rows into other blocks; torch's products, where they serve, promise no such thing."""
    hidden_ND, head_VD, labels_N = _case(203, 64, 300)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(cpu_head.frozen_head_loss(hidden_ND, head_VD, labels_N, need_d_hidden=True))
    for loss_N, d_hidden_ND in results[1:]:
        assert torch.equal(loss_N, results[0][0])
        assert d_hidden_ND is not None and results[0][1] is not None and torch.equal(d_hidden_ND, results[0][1])


def test_nothing_of_the_size_of_the_head_or_the_logits_is_made(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        cpu_head, "TILES", cpu_head.HeadTiles(rows=16, cols=256, most_cols=256, chunk_bytes=4 * 4096 * 16)
    )
    hidden_ND, head_VD, labels_N = _case(64, 32, 4096, ignored=16)
    smallest = min(hidden_ND.shape[0] * head_VD.shape[0], head_VD.numel())
    with Recorder() as recorder:
        cpu_head.frozen_head_loss(hidden_ND, head_VD, labels_N, need_d_hidden=True)
    assert 0 < recorder.largest < smallest / 8
    in_torch = path == "torch"
    assert recorder.flops == in_torch * 4 * 32 * 4096 * 48, "4 D V for each of the 48 tokens with a label"
    with Recorder() as recorder:
        cpu_head.frozen_head_loss(hidden_ND, head_VD, labels_N, need_d_hidden=False)
    assert recorder.flops == in_torch * 2 * 32 * 4096 * 48
    with Recorder() as recorder:
        d_head_VD = torch.zeros_like(head_VD)
        cpu_head.head_loss(hidden_ND, head_VD, labels_N, need_grads=True, d_head_out_VD=d_head_VD)
    assert recorder.flops == 6 * 32 * 4096 * 48
    with Recorder() as recorder:
        _eager(hidden_ND, head_VD, labels_N, torch.float32)
    assert recorder.largest >= smallest, "the recorder must see what plain torch makes"


def test_the_process_stays_smaller_than_the_logits_or_the_head() -> None:
    """What the recorder cannot see: memory of the C++ side."""
    code = """
import resource, torch
from elo_engine.model.cpu import frozen_head_loss
torch.set_num_threads(2)
hidden, head, labels = torch.randn(1024, 512), torch.randn(16384, 512), torch.randint(0, 16384, (1024,))
frozen_head_loss(hidden[:8], head[:300], labels[:8] % 300, need_d_hidden=True)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
frozen_head_loss(hidden, head, labels, need_d_hidden=True)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    root = Path(__file__).parent.parent
    grown_kib = int(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root).stdout
    )
    assert grown_kib < 24 * 1024, "the logits would be 64 MiB, a gradient of the head 32 MiB"


def test_the_heads_gradient_is_accumulated(path: str) -> None:
    hidden_ND, head_VD, labels_N = _case(20, 8, 100, ignored=2)
    one = cpu_head.head_loss(hidden_ND, head_VD, labels_N, need_grads=True)[2]
    total_VD = torch.ones(100, 8)
    same = cpu_head.head_loss(hidden_ND, head_VD, labels_N, need_grads=True, d_head_out_VD=total_VD)[2]
    assert one is not None and same is total_VD
    torch.testing.assert_close(total_VD - 1, one, rtol=0, atol=1e-5)
    loss_N, *nothing = cpu_head.head_loss(
        hidden_ND, head_VD, labels_N, need_grads=False, d_head_out_VD=total_VD.clone()
    )
    assert nothing == [None, None] and torch.equal(loss_N > 0, labels_N != -100)


def test_a_parameter_gets_no_graph(path: str) -> None:
    hidden_ND, head_VD, labels_N = _case(5, 8, 30)
    loss_N, d_hidden_ND, d_head_VD = cpu_head.head_loss(
        hidden_ND.requires_grad_(), head_VD.requires_grad_(), labels_N, need_grads=True
    )
    assert d_hidden_ND is not None and d_head_VD is not None
    assert not (loss_N.requires_grad or d_hidden_ND.requires_grad or d_head_VD.requires_grad)


@pytest.mark.parametrize("fault", ["sum", "maximum", "accumulator"])
def test_the_comparison_sees_a_wrong_sweep(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not cpu_native.HAS_CSRC:
        pytest.skip(cpu_native.CSRC_REASON)
    right: Callable[..., None] = cpu_head.frozen_head

    def wrong(hidden: Tensor, head: Tensor, labels: Tensor, top: Tensor, total: Tensor, acc: Tensor) -> None:
        right(hidden, head, labels, top, total, acc)
        place = {"sum": total, "maximum": top, "accumulator": acc}[fault]
        place[-1] *= 1 + 1e-4

    case = _case(20, 32, 300)
    _compare(*case)
    monkeypatch.setattr(cpu_head, "frozen_head", wrong)
    with pytest.raises(AssertionError, match="error"):
        _compare(*case)


@pytest.mark.parametrize("fault", ["sum", "maximum", "accumulator", "target"])
def test_the_comparison_sees_a_wrong_tile(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right: Callable[..., None] = cpu_head.softmax_tile

    def wrong(tile: Tensor, labels: Tensor, begin: int, top: Tensor, total: Tensor, acc: Tensor | None) -> None:
        before = top.clone()
        right(tile, torch.full_like(labels, -100) if fault == "target" else labels, begin, top, total, acc)
        if fault == "sum" and begin > 0:
            total += tile[:, -1]
        if fault == "maximum" and begin > 0:
            top += 1e-3
        if fault == "accumulator" and acc is not None:
            acc /= torch.exp(before - top).clamp_min(1e-3)[:, None]

    case = _case(17, 24, 500)
    _compare(*case)
    monkeypatch.setattr(cpu_head, "softmax_tile", wrong)
    with pytest.raises(AssertionError, match="error"):
        _compare(*case)


def test_what_does_not_fit_is_refused() -> None:
    hidden_ND, head_VD, labels_N = _case(4, 8, 10)
    labels_N[2] = 10
    with pytest.raises(UsageError, match="label 10 at position 2"):
        cpu_head.frozen_head_loss(hidden_ND, head_VD, labels_N, need_d_hidden=True)
    labels_N[2] = -1
    with pytest.raises(UsageError, match="label -1 at position 2"):
        cpu_head.head_loss(hidden_ND, head_VD, labels_N, need_grads=True)
    labels_N[2] = 1
    for bad in (
        (hidden_ND[:, :7], head_VD, labels_N), (hidden_ND[:3], head_VD, labels_N), (hidden_ND, head_VD, labels_N.int()),
        (hidden_ND.double(), head_VD, labels_N), (hidden_ND, head_VD[:0], labels_N), (hidden_ND[0], head_VD, labels_N),
    ):  # fmt: skip
        with pytest.raises(UsageError, match="head"):
            cpu_head.frozen_head_loss(*bad, need_d_hidden=True)
    with pytest.raises(UsageError, match="d_head_out_VD"):
        cpu_head.head_loss(hidden_ND, head_VD, labels_N, need_grads=True, d_head_out_VD=torch.zeros(10, 7))
