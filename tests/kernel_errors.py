"""How wrong is a kernel: errors against an fp64 truth, and the two bounds that every kernel is held to.

The unit is half a unit in the last place (2^-8 of a bf16 value, 2^-24 of an fp32 one), the most that one
rounding to nearest may cost. Bounds are relative to the largest entry of the truth's row, because a kernel's
fp32 arithmetic errs by a share of what it added up, not of a small difference that came out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

HALF_UNIT = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}

# What the kernels' fp32 arithmetic may lose against exact arithmetic, as a share of the row's largest entry:
# a GPU's ex2.approx and rsqrt.approx are good to 2 units (2^-22), a product chain of four adds 4 half units
# (2^-22), and sums of thousands of terms are folded pairwise, so they add a few more. 2^-20 is 16 half units;
# truncation to bf16 costs up to 2^-7.
ARITHMETIC = 2.0**-20


def error_by_row(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest error in the matrix or vector, relative to the largest entry of the row it is in."""
    assert found.shape == truth.shape, (found.shape, truth.shape)
    if found.numel() == 0:
        return 0.0
    scale = truth.abs().amax(dim=-1, keepdim=True).clamp_min(1e-30)
    return float(((found.double() - truth) / scale).abs().amax())


def assert_no_worse(
    ours: torch.Tensor,
    theirs: torch.Tensor,
    truth: torch.Tensor,
    measure: Callable[[torch.Tensor, torch.Tensor], float],
) -> None:
    """The kernel's error is at most plain torch's in the same type plus slack.

    Slack: the arithmetic above; and in bf16 an eighth of a half unit, since both round once, at different
    points of the interval, so the larger of the two maxima is a matter of the sample.
    """
    slack = ARITHMETIC + (HALF_UNIT[torch.bfloat16] / 8 if ours.dtype == torch.bfloat16 else 0.0)
    our_error, their_error = measure(ours, truth), measure(theirs, truth)
    assert our_error <= their_error + slack, (
        f"error {our_error:.3g}, plain torch {their_error:.3g}, slack {slack:.3g}"
    )


def assert_rounded_once(found: torch.Tensor, truth: torch.Tensor) -> None:
    """Every entry is within half a unit of the truth, plus the arithmetic's share of the row."""
    assert found.shape == truth.shape, (found.shape, truth.shape)
    scale = truth.abs().amax(dim=-1, keepdim=True)
    allowed = truth.abs() * HALF_UNIT[found.dtype] + scale * ARITHMETIC
    excess = (found.double() - truth).abs() - allowed
    assert bool((excess <= 0).all()), f"worst entry is {float(excess.max()):.3g} beyond one rounding"
