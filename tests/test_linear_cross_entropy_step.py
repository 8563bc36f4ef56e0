"""The kernel of kernels/linear_cross_entropy.py, the step between the two products, against an fp64 truth."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed; pip install 'elo-engine[gpu]'")

from .kernel_errors import assert_no_worse, error_by_row
from .launching import BACKENDS, Launcher
from .linear_cross_entropy_cases import (
    CASES,
    DTYPES,
    SMALL,
    STEM,
    assert_close,
    check_case,
    exact,
    example,
    odd_or_even,
    plain,
    run,
)

# A block is 1024 or 4096 columns and 2048 of the width: one row, less than a block, one more than a block, several.
SHAPES = [(1, 8, 2), (5, 64, 300), (3, 100, 4097), (2, 16, 8200), (2, 2100, 300)]


@pytest.fixture(scope="module", params=BACKENDS)
def launch(request: pytest.FixtureRequest) -> Launcher:
    return Launcher(request.param)


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_step_no_worse_than_torch(
    launch: Launcher, shape: tuple[int, int, int], dtype: torch.dtype, softcap: float | None
) -> None:
    step = example(*shape, dtype)
    truth, theirs = exact(step, softcap), plain(*step[:2], softcap)
    found = run(launch, step, softcap=softcap)
    for ours, other, true in zip(found, theirs, truth, strict=True):
        assert_no_worse(ours, other, true, error_by_row)
    assert_close(found, truth)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ignored_rows_cost_nothing_and_hold_zero(launch: Launcher, dtype: torch.dtype) -> None:
    step = logits, labels, hidden, _ = example(6, 16, 1500, dtype)
    labels[1::2] = -100
    logits[3] = hidden[3] = float("nan")  # padding may hold anything
    loss, d_logits = run(launch, step)
    assert torch.equal(loss[1::2], torch.zeros(3)) and not bool(d_logits[1::2].any())
    assert_close((loss[::2], d_logits[::2]), exact(odd_or_even(step, 0)))


@pytest.mark.parametrize("case", CASES)
def test_case(launch: Launcher, case: str) -> None:
    check_case(launch, case, [])
    check_case(launch, case, SMALL)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("at_target", [True, False])
def test_a_non_finite_logit_is_not_hidden(launch: Launcher, bad: float, at_target: bool) -> None:
    step = logits, labels, hidden, head = example(3, 8, 2000, torch.float32)
    labels[1] = 5
    truth = exact(odd_or_even(step, 0))
    if at_target:
        hidden[1] = head[5] = 0.0
        hidden[1, 0], head[5, 0] = bad, 1.0
    else:
        logits[1, 1999] = bad
    loss, d_logits = run(launch, step)
    assert math.isnan(float(loss[1])) and bool(torch.isnan(d_logits[1]).all())
    assert_close((loss[::2], d_logits[::2]), truth)


@pytest.mark.parametrize("label", [1030, -1, 2**32 + 5, -(2**40)])
def test_a_label_outside_the_vocabulary_is_not_hidden(launch: Launcher, label: int) -> None:
    step = _, labels, _, _ = example(3, 8, 1030, torch.bfloat16)
    labels[1] = label
    loss, d_logits = run(launch, step)
    assert math.isnan(float(loss[1])) and bool(torch.isnan(d_logits[1]).all())
    assert_close((loss[::2], d_logits[::2]), exact(odd_or_even(step, 0)))


def test_softcap_saturates_without_nan(launch: Launcher) -> None:
    step = logits, labels, _, _ = example(3, 8, 1100, torch.float32)
    logits[:, ::3] *= 1e4
    logits[0, :2] = torch.tensor([float("inf"), float("-inf")])
    labels[:] = 2
    assert_close(run(launch, step, softcap=2.0), exact(step, 2.0))


def test_a_distant_softcap_changes_nothing(launch: Launcher) -> None:
    """tanh(x / 1e5) keeps the relative accuracy of x; a difference of exponentials has three digits of it."""
    step = example(3, 8, 1100, torch.float32)
    assert_close(run(launch, step, softcap=1e5), exact(step, 1e5))


def test_evaluation_leaves_the_logits_alone_and_labels_may_be_narrow(launch: Launcher) -> None:
    step = example(4, 8, 5000, torch.bfloat16)
    step[1][2] = -100
    loss, logits = run(launch, step, need_d_logits=False)
    assert torch.equal(logits, step[0])
    expected = run(launch, step)
    narrow = run(launch, (step[0], step[1].int(), *step[2:]))
    assert torch.equal(loss, expected[0]) and all(torch.equal(a, b) for a, b in zip(narrow, expected, strict=True))


def test_refused(launch: Launcher) -> None:
    labels, hidden, head = torch.zeros(4).long(), torch.zeros(4, 6), torch.zeros(5, 6)
    for logits in (torch.zeros(4, 6), torch.zeros(4, 5).bfloat16()):
        with pytest.raises(ValueError, match=r"logits_NV: \(4, .*make \(4, 5\) of torch.float32. Pass their product"):
            launch(STEM, "cross_entropy_forward", logits, labels, hidden, head)
    with pytest.raises(ValueError, match="logits_NV: strides"):
        launch(STEM, "cross_entropy_forward", torch.zeros(5, 4).t(), labels, hidden, head)


@pytest.mark.parametrize(
    ("case", "old", "new"),
    [
        ("strided", "row * stride_logits_n", "row * V"),
        ("strided", "row * stride_hidden_n", "row * D"),
        ("strided", "target * stride_head_v", "target * D"),
        ("strided", "dot_D += ", "dot_D = "),
        ("strided", "hidden_D.to(tl.float32) * head_D.to(tl.float32)", "(hidden_D * head_D).to(tl.float32)"),
        ("strided", "z = tl.sum(dot_D, axis=0)", "z = tl.load(row_ptr + target).to(tl.float32)"),
        ("strided", "(col_V < V) & (col_V != target)", "col_V < V"),
        ("strided", "(col_V < V) & (col_V != target)", "col_V != target"),
        (
            "strided",
            "new_top = tl.maximum(top, tl.max(x_V, axis=0))",
            "new_top = tl.minimum(tl.max(x_V, axis=0), -90.0)",
        ),
        ("strided", "sum_V * tl.exp(top - shift) + ", "sum_V + "),
        ("strided", "        top = new_top\n", ""),
        ("strided", "tl.where(odds > 0.0, odds, 0.0) + _log1p(u)", "odds + _log1p(u)"),
        ("strided", "u = tl.exp(-tl.abs(odds))", "u = tl.exp(odds)"),
        ("strided", "tl.where(odds > 0.0, 1.0, u) / (1.0 + u)", "tl.where(odds > 0.0, 1.0, u)"),
        ("strided", "d_target = -others", "d_target = -1.0"),
        ("strided", "scale = others /", "scale = 1.0 /"),
        ("strided", "d_x_V = tl.exp(x_V - shift) * scale", "d_x_V = tl.exp(x_V - shift) * scale * 1.01"),
        ("strided", "tl.where(col_V == target, d_target, d_x_V)", "tl.where(col_V == target + 1, d_target, d_x_V)"),
        (
            "strided",
            "in range(0, V_OWNED, BLOCK_V):\n                col_V = start +",
            "in range(0, 1):\n                col_V =",
        ),
        ("strided", "mask=col_V < V_OWNED)", "mask=col_V < V_OWNED + 3)"),
        ("huge", "tl.log(total) + (top - z)", "(tl.log(total) + top) - z"),
        ("certain", "tl.where(odds > 0.0, odds, 0.0) + _log1p(u)", "tl.where(odds > 0.0, odds, 0.0) + tl.log(1.0 + u)"),
        ("alone", "tl.where(total == 0.0, 1.0, total)", "total"),
        ("alone", 'shift = tl.where(top == float("-inf"), 0.0, top)', "shift = top"),
        ("masked", 'tl.where(new_top == float("-inf"), 0.0, new_top)', "new_top"),
        ("even", "s = u / (2.0 + u)", "s = u / (2.0 + u) * 1.00001"),
        ("even", "1.0 / 11.0 +", "1.0 / 5.0 +"),
        ("even", "(1.0 / 13.0 +", "(1.0 +"),
        ("even", "(1.0 / 15.0)", "15.0"),
        ("even", "series = 1.0 / 5.0 + w * (1.0 / 7.0", "series = 1.0 / 6.0 + w * (1.0 / 7.0"),
        ("even", "(1.0 / 7.0 +", "(1.0 / 8.0 +"),
        ("even", "(1.0 / 9.0 +", "(1.0 / 7.0 +"),
        ("even", "(1.0 / 3.0 + w * series)", "(1.0 / 3.0 - w * series)"),
        ("capped", "y = x * (1.0 / cap)", "y = x * (1.0001 / cap)"),
        ("capped", "e = tl.exp(-2.0 * tl.abs(y))", "e = tl.exp(-2.0 * y)"),
        ("capped", "series = 62.0 / 2835.0", "series = 0.0"),
        ("capped", "(1382.0 / 155925.0)", "0.08"),
        ("capped", "(17.0 / 315.0", "(18.0 / 315.0"),
        ("capped", "(2.0 / 15.0", "(2.01 / 15.0"),
        ("capped", "(1.0 / 3.0 - w", "(1.001 / 3.0 - w"),
        ("capped", "far = (1.0 - e)", "far = (1.0001 - e)"),
        ("capped", "-far, far", "far, far"),
        ("capped", "tl.abs(y) < 0.35", "tl.abs(y) < 1.35"),
        ("capped", "return cap * tanh, 4.0 * e", "return cap * tanh, 4.001 * e"),
        ("capped", "z, target_slope = _softcap(z, cap)", "_, target_slope = _softcap(z, cap)"),
        ("capped", "d_target = d_target * target_slope", "d_target = d_target"),
        ("capped", "d_x_V = d_x_V * slope_V", "d_x_V = d_x_V"),
    ],
)
def test_a_planted_error_is_seen(launch: Launcher, case: str, old: str, new: str) -> None:
    with pytest.raises(AssertionError, match=r"beyond (one rounding|the row)|times its loss"):
        check_case(launch, case, [*SMALL, (old, new)])
