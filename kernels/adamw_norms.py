"""The norm of gradients that do not come all at once: of each tensor when its gradient is there, of all at the end.

Two launches for a list of tensors, and one for the step: sums of squares, as adamw.py has them, but none of two
tensors; the norm of each tensor; norm of all, clip factor and bias corrections from those norms, which arrived in any
number of lists. The updates are `adamw.update_fp32` and `adamw_8bit.update_8bit`, of any tensors and whenever their
weights are on the device. The norm may differ from that of `adamw_fp32` in its last place, since squares are added in
another order; where it does not clip, an update has the same bits.

A tensor's norm is fp64: its square is the sum of squares again, within 2^-52 of itself.

Shapes: S tensors, B blocks, P partial sums, C control numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .adamw import control, sum_squares
from .adamw_plan import (
    LAUNCH,
    NotedPart,
    check_given,
    check_lists,
    check_vectors,
    gradients,
    kind,
    part_plan,
    part_table,
)


@triton.jit
def _norms_kernel(sums_ptr, bounds_ptr, norms_ptr, BLOCK_P: tl.constexpr):
    tensor = tl.program_id(0)
    begin = tl.load(bounds_ptr + tensor)
    end = tl.load(bounds_ptr + tensor + 1)
    total_P = tl.zeros([BLOCK_P], dtype=tl.float64)
    for first in range(begin, end, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)
        total_P += tl.load(sums_ptr + part, mask=part < end, other=0.0).to(tl.float64)
    tl.store(norms_ptr + tensor, tl.sqrt(tl.sum(total_P, axis=0)))


def leaf_norms(grads: Sequence[torch.Tensor], noted: NotedPart | None = None) -> torch.Tensor:
    """The norm of each gradient: fp64 [S]; waits for nothing once these sizes have their plan.

    Args:
        grads: bf16 or fp32, all of one type, contiguous.
        noted: of `noting_part`, where the launches are captured.

    Raises:
        ValueError: wrong type, strides or device, or no elements.
    """
    named, dtype = gradients(grads, grads)
    part = noted or part_plan(grads)
    norms_S = torch.empty(len(grads), dtype=torch.float64, device=grads[0].device)
    check_lists({**named, "weights": grads}, {}, norms_S=norms_S)
    with torch.cuda.device_of(norms_S):
        plan, table_SC, aligned = part_table(part, grads, [])
        sums_P = torch.empty(plan.sums, dtype=torch.float32, device=norms_S.device)
        sum_squares(table_SC, plan.map_B2, sums_P, kind(dtype), aligned)
        _norms_kernel[(len(grads),)](
            sums_P, plan.bounds_S1, norms_S, BLOCK_P=LAUNCH.sums_per_round, num_warps=LAUNCH.fold_warps
        )
    return norms_S


def step_control(
    norms_S: torch.Tensor, powers: torch.Tensor, *, lr: float, clip: float | None, given: torch.Tensor | None = None
) -> torch.Tensor:
    """The control numbers of a step over tensors with these norms; advances powers; waits for nothing.

    Args:
        norms_S: fp64, of all tensors of the model, as `leaf_norms` made them. powers: of `adamw_powers`. clip: largest
            global norm, None for no clipping. lr: as in torch.optim.AdamW. given: as in `adamw_fp32`.

    Returns:
        As `adamw_fp32`; powers stay as they are where the norm is not finite.

    Raises:
        ValueError: wrong shape, type, strides or device.
    """
    if norms_S.dim() != 1 or norms_S.dtype != torch.float64 or not norms_S.is_contiguous():
        raise ValueError(
            f"norms_S: {tuple(norms_S.shape)} of {norms_S.dtype}, strides {norms_S.stride()}; pass the numbers that "
            "leaf_norms made as one contiguous vector"
        )
    check_vectors(powers=powers, norms_S=norms_S)
    check_given(given, powers)
    with torch.cuda.device_of(powers):
        return control(norms_S, powers, lr, clip, norms=True, given=given)
