"""AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) over a list of tensors with fp32 masters and moments.

A step is three launches whatever the number of tensors, and none waits for the host: sums of squares of the
gradients; one small program that makes norm, clip factor and bias corrections of them; the update. The kernels find
the tensors through a table of addresses (adamw_plan.py; the multi-tensor idea of NVIDIA Apex). A step whose norm is
not finite changes nothing. The bf16 leaf that the model computes with is written beside its master. adamw_8bit.py has
the same step with moments of 8 bits, adamw_norms.py the first two launches for gradients that do not come all at once.

Bytes per parameter with the gradient read twice, and the time that takes at 4.3 TB/s for two layers of Llama-3.1-8B,
436 M parameters; a prediction, not measured:
    bf16 gradient: 2 x 2 + 3 x 8 + 2 = 30 bytes, 3.0 ms.    fp32 gradient: 2 x 4 + 3 x 8 + 2 = 34 bytes, 3.4 ms.

Shapes: S tensors, B blocks, P partial sums, C control numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .adamw_plan import (
    CONTROL,
    LAUNCH,
    AdamwPlan,
    NotedPart,
    check_given,
    check_lists,
    fitting,
    gradients,
    kind,
    part_plan,
    part_table,
    send,
)


@triton.jit
def size(table_ptr, tensor, ALIGNED: tl.constexpr):
    elements = tl.load(table_ptr + tensor * 8)
    # Without this the mask alone would make every load one element wide.
    if ALIGNED:
        elements = tl.multiple_of(elements, 16)
    return elements


@triton.jit
def pointer(table_ptr, tensor, COLUMN: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    found = tl.load(table_ptr + tensor * 8 + COLUMN).to(tl.pointer_type(TYPE))
    # Said of the pointer, not of the number that it was: Triton forgets it where the one becomes the other.
    if ALIGNED:
        found = tl.multiple_of(found, 16)
    return found


@triton.jit
def _sum_of_squares_kernel(
    table_ptr,
    map_ptr,
    sums_ptr,
    blocks,
    GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    program = tl.program_id(0)
    lane = tl.arange(0, TILE)
    total = tl.zeros([TILE], dtype=tl.float32)
    for block in range(program * TILES, min(program * TILES + TILES, blocks)):
        tensor = tl.load(map_ptr + 2 * block)
        start = tl.load(map_ptr + 2 * block + 1).to(tl.int64) * TILE
        inside = lane < size(table_ptr, tensor, ALIGNED) - start
        grad_ptr = pointer(table_ptr, tensor, 1, GRAD, ALIGNED)
        grad = tl.load(grad_ptr + start + lane, mask=inside, other=0.0).to(tl.float32)
        total += grad * grad
    tl.store(sums_ptr + program, tl.sum(total, axis=0))


@triton.jit
def _control_kernel(
    sums_ptr,
    powers_ptr,
    control_ptr,
    given_ptr,
    P,
    clip,
    lr,
    NORMS: tl.constexpr,
    CLIP: tl.constexpr,
    GIVEN: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    if GIVEN:
        lr = tl.load(given_ptr).to(tl.float32, bitcast=True)
    total_P = tl.zeros([BLOCK_P], dtype=tl.float64)
    for first in range(0, P, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)
        number = tl.load(sums_ptr + part, mask=part < P, other=0.0).to(tl.float64)
        # Norms of tensors, not sums of squares.
        if NORMS:
            number = number * number
        total_P += number
    norm = tl.sqrt(tl.sum(total_P, axis=0))
    # False for nan too.
    finite = norm < float("inf")
    # In fp64: beta rounded to fp32 would put 1 - beta wrong by 1e-5 of itself where beta is 0.999.
    beta1 = tl.load(powers_ptr + 3)
    beta2 = tl.load(powers_ptr + 4)
    power1 = tl.load(powers_ptr) * beta1
    power2 = tl.load(powers_ptr + 1) * beta2
    count = tl.load(powers_ptr + 2) + 1.0
    tl.store(powers_ptr, power1, mask=finite)
    tl.store(powers_ptr + 1, power2, mask=finite)
    tl.store(powers_ptr + 2, count, mask=finite)
    factor = norm * 0.0 + 1.0
    if CLIP:
        factor = tl.where(norm > clip, clip / norm, 1.0)
    tl.store(control_ptr, norm.to(tl.float32))
    tl.store(control_ptr + 1, finite.to(tl.float32))
    tl.store(control_ptr + 2, factor.to(tl.float32))
    tl.store(control_ptr + 3, (lr / (1.0 - power1)).to(tl.float32))
    tl.store(control_ptr + 4, (1.0 / tl.sqrt(1.0 - power2)).to(tl.float32))
    tl.store(control_ptr + 5, (1.0 - beta1).to(tl.float32))
    tl.store(control_ptr + 6, (1.0 - beta2).to(tl.float32))


@triton.jit
def _update_fp32_kernel(
    table_ptr,
    map_ptr,
    control_ptr,
    given_ptr,
    eps,
    decay,
    GRAD: tl.constexpr,
    HAS_LEAF: tl.constexpr,
    GIVEN: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
):
    block = tl.program_id(0)
    if GIVEN:
        decay = tl.load(given_ptr + 1).to(tl.float32, bitcast=True)
    if tl.load(control_ptr + 1) != 0.0:
        tensor = tl.load(map_ptr + 2 * block)
        # 64 bits: an embedding of 128256 x 16384 fills 31.
        start = tl.load(map_ptr + 2 * block + 1).to(tl.int64) * TILE
        lane = tl.arange(0, TILE)
        inside = lane < size(table_ptr, tensor, ALIGNED) - start
        grad_ptr = pointer(table_ptr, tensor, 1, GRAD, ALIGNED) + start + lane
        master_ptr = pointer(table_ptr, tensor, 2, tl.float32, ALIGNED) + start + lane
        m_ptr = pointer(table_ptr, tensor, 3, tl.float32, ALIGNED) + start + lane
        v_ptr = pointer(table_ptr, tensor, 4, tl.float32, ALIGNED) + start + lane
        grad = tl.load(grad_ptr, mask=inside, other=0.0).to(tl.float32) * tl.load(control_ptr + 2)
        master = tl.load(master_ptr, mask=inside, other=0.0)
        m = tl.load(m_ptr, mask=inside, other=0.0)
        v = tl.load(v_ptr, mask=inside, other=0.0)
        m += (grad - m) * tl.load(control_ptr + 5)
        v += (grad * grad - v) * tl.load(control_ptr + 6)
        denominator = tl.sqrt(v) * tl.load(control_ptr + 4) + eps
        # Both changes first: the weight is rounded once.
        master -= decay * master + tl.load(control_ptr + 3) * m / denominator
        tl.store(master_ptr, master, mask=inside)
        tl.store(m_ptr, m, mask=inside)
        tl.store(v_ptr, v, mask=inside)
        if HAS_LEAF:
            leaf_ptr = pointer(table_ptr, tensor, 5, tl.bfloat16, ALIGNED) + start + lane
            tl.store(leaf_ptr, master.to(tl.bfloat16), mask=inside)


def sum_squares(
    table_SC: torch.Tensor, map_B2: torch.Tensor, sums_P: torch.Tensor, grad_type: tl.dtype, aligned: bool
) -> None:
    """The first launch: fills the partial sums, one for every 8 blocks of the map."""
    _sum_of_squares_kernel[(len(sums_P),)](
        table_SC,
        map_B2,
        sums_P,
        len(map_B2),
        GRAD=grad_type,
        ALIGNED=aligned,
        TILES=LAUNCH.tiles_per_sum,
        TILE=LAUNCH.tile,
        num_warps=LAUNCH.num_warps,
    )


def control(
    parts_P: torch.Tensor,
    powers: torch.Tensor,
    lr: float,
    clip: float | None,
    *,
    norms: bool,
    given: torch.Tensor | None = None,
) -> torch.Tensor:
    """The second launch: the control numbers from sums of squares, or from norms; powers are advanced."""
    control_C = torch.empty(CONTROL, dtype=torch.float32, device=powers.device)
    _control_kernel[(1,)](
        parts_P,
        powers,
        control_C,
        given,
        len(parts_P),
        clip if clip is not None else 0.0,
        0.0 if given is not None else lr,
        NORMS=norms,
        CLIP=clip is not None,
        GIVEN=given is not None,
        BLOCK_P=LAUNCH.sums_per_round,
        num_warps=LAUNCH.fold_warps,
    )
    return control_C


def begin(
    plan: AdamwPlan,
    grad_type: tl.dtype,
    aligned: bool,
    powers: torch.Tensor,
    lr: float,
    clip: float | None,
    given: torch.Tensor | None = None,
) -> torch.Tensor:
    """The first two launches; returns the control numbers."""
    assert plan.table_SC is not None, "send(plan, ...) comes first"
    sum_squares(plan.table_SC, plan.map_B2, plan.sums_P, grad_type, aligned)
    return control(plan.sums_P, powers, lr, clip, norms=False, given=given)


def _checked(
    grads: Sequence[torch.Tensor | None],
    weights: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    leaves: Sequence[torch.Tensor] | None,
    **beside: torch.Tensor,
) -> tl.dtype:
    """Triton's name of the gradients' type; ValueError as the launchers below have it."""
    named, dtype = gradients(grads, weights)
    copies = {} if leaves is None else {"leaves": leaves}
    named |= {"weights": weights, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, **copies}
    types = {name: torch.float32 for name in ("weights", "exp_avgs", "exp_avg_sqs")}
    check_lists(named, {**types, "leaves": torch.bfloat16}, **beside)
    return kind(dtype)


def _update(
    table_SC: torch.Tensor | None,
    map_B2: torch.Tensor,
    control_C: torch.Tensor,
    eps: float,
    decay: float,
    grad_type: tl.dtype,
    has_leaf: bool,
    aligned: bool,
    given: torch.Tensor | None = None,
) -> None:
    _update_fp32_kernel[(len(map_B2),)](
        table_SC,
        map_B2,
        control_C,
        given,
        eps,
        0.0 if given is not None else decay,
        GRAD=grad_type,
        HAS_LEAF=has_leaf,
        GIVEN=given is not None,
        ALIGNED=aligned,
        TILE=LAUNCH.tile,
        num_warps=LAUNCH.fp32_warps,
    )


def adamw_fp32(
    grads: Sequence[torch.Tensor | None],
    weights: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    leaves: Sequence[torch.Tensor] | None,
    powers: torch.Tensor,
    *,
    lr: float,
    eps: float,
    weight_decay: float,
    clip: float | None,
    plan: AdamwPlan | None = None,
    given: torch.Tensor | None = None,
) -> torch.Tensor:
    """One step with fp32 moments, in place; waits for nothing.

    Args:
        grads: bf16 or fp32, all of one type; None leaves a tensor as it is. weights: fp32 masters.
        exp_avgs, exp_avg_sqs: fp32. leaves: bf16 copies of the masters to rewrite, None if there are none.
            All contiguous; every list has the weights' sizes.
        powers: of `adamw_powers`. clip: largest global norm, None for no clipping. plan: of `adamw_plan`, made
            anew if not given. lr, eps, weight_decay: as in torch.optim.AdamW.
        given: of `given_bits` on the device: its numbers take the place of lr and of lr * weight_decay, which are not
            looked at, so that launches that are repeated as they are see those of their own step.

    Returns:
        fp32 vector; its first number is the norm before clipping, its second 1 if the step was taken and 0 if
        the norm was not finite: then nothing has changed.

    Raises:
        ValueError: wrong number, size, type, strides or device, or no elements.
    """
    grad_type = _checked(grads, weights, exp_avgs, exp_avg_sqs, leaves, powers=powers)
    check_given(given, powers)
    plan = fitting(plan, weights)
    with torch.cuda.device_of(powers):
        aligned = send(plan, grads, [weights, exp_avgs, exp_avg_sqs, *([] if leaves is None else [leaves])])
        control_C = begin(plan, grad_type, aligned, powers, lr, clip, given)
        has_leaf = leaves is not None
        _update(plan.table_SC, plan.map_B2, control_C, eps, lr * weight_decay, grad_type, has_leaf, aligned, given)
    return control_C


def update_fp32(
    grads: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    leaves: Sequence[torch.Tensor] | None,
    control_C: torch.Tensor,
    *,
    lr: float,
    eps: float,
    weight_decay: float,
    given: torch.Tensor | None = None,
    noted: NotedPart | None = None,
) -> None:
    """The update of some tensors in a step whose control numbers are made, in place; waits for nothing.

    Args:
        control_C: of `adamw_norms.step_control`; where it says that the step is not taken nothing changes. lr: the one
            that was passed there. noted: of `adamw_plan.noting_part`, where the launches are captured. What is not
            named here is as in `adamw_fp32`.

    Raises:
        ValueError: as `adamw_fp32`.
    """
    grad_type = _checked(grads, weights, exp_avgs, exp_avg_sqs, leaves, control_C=control_C)
    check_given(given, control_C)
    part = noted or part_plan(weights)
    with torch.cuda.device_of(control_C):
        lists = [weights, exp_avgs, exp_avg_sqs, *([] if leaves is None else [leaves])]
        plan, table_SC, aligned = part_table(part, grads, lists)
        has_leaf = leaves is not None
        _update(table_SC, plan.map_B2, control_C, eps, lr * weight_decay, grad_type, has_leaf, aligned, given)
