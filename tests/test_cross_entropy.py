"""kernels/cross_entropy.py against an fp64 truth: the loss, and the gradient in the place of the logits."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="triton is not installed; pip install 'elo-engine[gpu]'")

from .kernel_errors import ARITHMETIC, HALF_UNIT, assert_no_worse, assert_rounded_once, error_by_row
from .launching import BACKENDS, Launcher

DTYPES = [torch.float32, torch.bfloat16]
# A block is 1024 to 4096 columns: one row, less than a block, one more than a block, several blocks and a
# rest.
SHAPES = [(1, 2), (5, 300), (3, 4097), (2, 10_000)]


@pytest.fixture(scope="module", params=BACKENDS)
def launch(request: pytest.FixtureRequest) -> Launcher:
    return Launcher(request.param)


def example(rows: int, vocabulary: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows * 10_000 + vocabulary)
    logits = (3 * torch.randn(rows, vocabulary, generator=generator)).to(dtype)
    return logits, torch.randint(0, vocabulary, (rows,), generator=generator)


def plain(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and d loss / d logits by plain torch and autograd, in the type of the logits."""
    logits = logits.clone().requires_grad_()
    loss = F.cross_entropy(logits, labels, reduction="none", ignore_index=-100)
    (d_logits,) = torch.autograd.grad(loss.sum(), logits)
    return loss.detach(), d_logits


def run(
    launch: Launcher, logits: torch.Tensor, labels: torch.Tensor, planted: list[tuple[str, str]] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient by the kernel; the caller's logits stay as they are."""
    d_logits = logits.clone()
    (loss,) = launch("cross_entropy", "cross_entropy_forward", d_logits, labels, planted=planted)
    assert loss is not None and loss.dtype == torch.float32
    return loss, d_logits


def assert_close(
    loss: torch.Tensor, d_logits: torch.Tensor, truth: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """The loss is fp32 whatever the logits are; the gradient is rounded once to the logits' type."""
    assert_rounded_once(loss, truth[0])
    assert_rounded_once(d_logits, truth[1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_worse_than_torch(launch: Launcher, shape: tuple[int, int], dtype: torch.dtype) -> None:
    logits, labels = example(*shape, dtype)
    loss, d_logits = run(launch, logits, labels)
    truth, theirs = plain(logits.double(), labels), plain(logits, labels)
    assert_no_worse(loss, theirs[0], truth[0], error_by_row)
    assert_no_worse(d_logits, theirs[1], truth[1], error_by_row)
    assert_close(loss, d_logits, truth)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ignored_rows_cost_nothing_and_hold_zero(launch: Launcher, dtype: torch.dtype) -> None:
    logits, labels = example(6, 1500, dtype)
    labels[1::2] = -100
    logits[3] = float("nan")  # padding may hold anything
    loss, d_logits = run(launch, logits, labels)
    assert torch.equal(loss[1::2], torch.zeros(3)) and not bool(d_logits[1::2].any())
    assert_close(loss[::2], d_logits[::2], plain(logits[::2].double(), labels[::2]))


def test_all_rows_ignored(launch: Launcher) -> None:
    logits, _ = example(4, 1030, torch.bfloat16)
    loss, d_logits = run(launch, logits, torch.full((4,), -100))
    assert torch.equal(loss, torch.zeros(4)) and not bool(d_logits.any())


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_huge_logits_keep_their_differences(launch: Launcher, size: float) -> None:
    """exp(10,000) is inf, and 10,000 has no room for the loss: all is taken relative to the largest logit."""
    logits, labels = example(4, 5000, torch.float32)
    logits += size
    loss, d_logits = run(launch, logits, labels)
    assert_close(loss, d_logits, plain(logits.double(), labels))


def test_a_certain_prediction(launch: Launcher) -> None:
    """p nears 1: p - 1 is taken in fp32, where 1 - 2e-4 is not yet 1 as it is in bf16."""
    logits, labels = torch.zeros(1, 1200, dtype=torch.bfloat16), torch.tensor([7])
    logits[0, 7] = 15.5
    loss, d_logits = run(launch, logits, labels)
    truth = plain(logits.double(), labels)
    # log(1 + 2e-4): the sum is an fp32 number just above 1, and what it lost is lost to the loss.
    assert abs(float(loss - truth[0])) <= ARITHMETIC
    assert_rounded_once(d_logits, truth[1])
    exact = float(truth[1][0, 7])
    assert -3e-4 < exact < -1e-4
    assert abs(float(d_logits[0, 7]) - exact) <= abs(exact) * HALF_UNIT[torch.bfloat16] + ARITHMETIC


def test_logits_of_minus_infinity_have_no_probability(launch: Launcher) -> None:
    """A masked vocabulary: its first whole block and a rest are -inf."""
    logits, _ = example(2, 6000, torch.float32)
    logits[:, :4100] = float("-inf")
    logits[:, 5000:] = float("-inf")
    labels = torch.tensor([4200, 4900])
    loss, d_logits = run(launch, logits, labels)
    assert_close(loss, d_logits, plain(logits.double(), labels))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_logit_is_not_hidden(launch: Launcher, bad: float) -> None:
    logits, labels = example(3, 2000, torch.float32)
    labels[1] = 5
    logits[1, 1999] = bad
    loss, d_logits = run(launch, logits, labels)
    assert math.isnan(float(loss[1])) and bool(torch.isnan(d_logits[1]).any())
    assert_close(loss[::2], d_logits[::2], plain(logits[::2].double(), labels[::2]))


@pytest.mark.parametrize("label", [1030, -1, 2**32 + 5, -(2**40)])
def test_a_label_outside_the_vocabulary_is_not_hidden(launch: Launcher, label: int) -> None:
    logits, labels = example(3, 1030, torch.bfloat16)
    labels[1] = label
    loss, d_logits = run(launch, logits, labels)
    assert math.isnan(float(loss[1])) and bool(torch.isnan(d_logits[1]).all())
    assert_close(loss[::2], d_logits[::2], plain(logits[::2].double(), labels[::2]))


def test_a_padded_vocabulary_is_passed_as_a_slice(launch: Launcher) -> None:
    padded, labels = example(4, 1088, torch.bfloat16)
    kept = padded[:, 1030:].clone()
    loss, d_logits = run(launch, padded[:, :1030].contiguous(), labels % 1030)
    (loss_slice,) = launch("cross_entropy", "cross_entropy_forward", padded[:, :1030], labels % 1030)
    assert loss_slice is not None and torch.equal(loss_slice, loss)
    assert torch.equal(padded[:, :1030], d_logits) and torch.equal(padded[:, 1030:], kept)


def test_evaluation_leaves_the_logits_alone(launch: Launcher) -> None:
    logits, labels = example(4, 5000, torch.bfloat16)
    labels[2] = -100
    expected, _ = run(launch, logits, labels)
    kept = logits.clone()
    (loss,) = launch("cross_entropy", "cross_entropy_forward", logits, labels, need_d_logits=False)
    assert loss is not None and torch.equal(loss, expected) and torch.equal(logits, kept)


def test_labels_in_32_bits(launch: Launcher) -> None:
    logits, labels = example(4, 1030, torch.float32)
    labels[0] = -100
    for found, expected in zip(run(launch, logits, labels.int()), run(launch, logits, labels), strict=True):
        assert torch.equal(found, expected)


def test_no_rows(launch: Launcher) -> None:
    loss, d_logits = run(launch, torch.empty(0, 8), torch.empty(0, dtype=torch.int64))
    assert loss.shape == (0,) and d_logits.shape == (0, 8)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(6, 4).t(), torch.zeros(4).long(), r"logits_NV: strides \(1, 4\).*contiguous\(\)"),
        (torch.zeros(1, 6).expand(4, 6), torch.zeros(4).long(), "logits_NV: strides .*must not overlap"),
        (torch.zeros(4, 6), torch.zeros(3).long(), "labels_N: expected a vector of 4 elements"),
        (torch.zeros(4, 6), torch.zeros(8).long()[::2], "labels_N: stride 2"),
        (torch.zeros(4, 6), torch.zeros(4), "labels_N: dtype torch.float32"),
        (torch.zeros(4, 6).half(), torch.zeros(4).long(), "logits_NV: dtype torch.float16"),
    ],
)
def test_refused(launch: Launcher, logits: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        launch("cross_entropy", "cross_entropy_forward", logits, labels)


@pytest.mark.parametrize(
    "planted",
    [
        ("sum_V * tl.exp(top - shift) + ", "sum_V + "),
        ("tl.where(col_V == target, 1.0, 0.0)", "tl.where(col_V == target + 1, 1.0, 0.0)"),
        ("(top - target_logit)", "(top - target_logit) * 1.001"),
        ("d_x_V = tl.exp(x_V - top) * scale -", "d_x_V = (tl.exp(x_V - top) * scale).to(tl.bfloat16) -"),
        ('mask=col_V < V, other=float("-inf")', "mask=col_V < V, other=0.0"),
    ],
)
def test_a_planted_error_is_seen(launch: Launcher, planted: tuple[str, str]) -> None:
    logits, labels = example(3, 9000, torch.bfloat16)
    # The largest comes late; in one row it is the label and all but certain.
    logits[:, 8500] = torch.tensor([14.0, 22.0, 14.0])
    labels[1] = 8500
    found = run(launch, logits, labels, planted=[planted])
    with pytest.raises(AssertionError):
        assert_close(*found, plain(logits.double(), labels))
