"""AdamW with moments of 8 bits and no master weight: 4.03 bytes of weight and state a parameter with a bf16 weight.

Block-wise numbers (idea of Dettmers et al. 2022, arXiv 2110.02861): 256 consecutive elements share one fp32 scale,
their largest magnitude, and a code c means
    scale * sign(c) * (c / 127)^2 in exp_avg    and    scale * (c / 255)^4 in exp_avg_sq,
whose root so has a resolution like the first's. Codes and bf16 weights are rounded at random, so that what they mean
is right on average: an average that moves by less than half a step never moves under rounding to nearest. A positive
second moment never gets code 0: m over a root of 0 would explode. The root of code 1 is scale^0.5 / 65025, and of m's
code 1 it is 1 / 16129: the smallest m over the smallest root is 4 times the largest over the largest.
elo_engine.model.reference_adamw is the same in plain torch, bit for bit where fp32 arithmetic is.

Bytes per parameter with the gradient read twice, and the time that takes at 4.3 TB/s for two layers of Llama-3.1-8B,
436 M parameters; a prediction, not measured:
    bf16 gradient and weight: 2 x 2 + 2 x 2 + 2 x 2 + 16 / 256 = 12.1 bytes, 1.2 ms; the update's share is 10.1.
Random bits cost about 10 integer operations an element: one hash of 32 bits and a multiplication. While the update's
10 bytes move, 2.3 ps, an H200 issues about 34 integer operations (132 SMs x 64 lanes x 1.7 GHz); the 10 rounds of
Philox alone would take more than those.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .adamw import begin, pointer, size
from .adamw_plan import (
    GROUP,
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
    signed,
)
from .arguments import check_float


@triton.jit
def _mix(x, key):
    # The 32-bit finaliser of MurmurHash3 (Appleby), with a key in its middle.
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13) ^ key) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _round_up(chance, low, high, value, bits):
    # value lies between low and high: high with probability (value - low) / (high - low).
    return tl.where((bits.to(tl.float32) + 0.5) * 1.52587890625e-05 * (high - low) < value - low, chance + 1.0, chance)


@triton.jit(do_not_specialize=["key", "first"])
def _update_8bit_kernel(
    table_ptr,
    map_ptr,
    control_ptr,
    given_ptr,
    eps,
    decay,
    key,
    first,
    GRAD: tl.constexpr,
    WEIGHT: tl.constexpr,
    ROUNDED: tl.constexpr,
    GIVEN: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
):
    block = tl.program_id(0)
    if GIVEN:
        decay = tl.load(given_ptr + 1).to(tl.float32, bitcast=True)
        key = tl.load(given_ptr + 2)
    if tl.load(control_ptr + 1) != 0.0:
        tensor = tl.load(map_ptr + 2 * block)
        tile = tl.load(map_ptr + 2 * block + 1)
        start = tile.to(tl.int64) * (ROWS * 256)
        left = size(table_ptr, tensor, ALIGNED) - start
        row = tl.arange(0, ROWS)
        lane = row[:, None] * 256 + tl.arange(0, 256)[None, :]
        inside = lane < left
        has_row = row * 256 < left
        grad_ptr = pointer(table_ptr, tensor, 1, GRAD, ALIGNED) + start + lane
        weight_ptr = pointer(table_ptr, tensor, 2, WEIGHT, ALIGNED) + start + lane
        m_ptr = pointer(table_ptr, tensor, 3, tl.int8, ALIGNED) + start + lane
        v_ptr = pointer(table_ptr, tensor, 4, tl.uint8, ALIGNED) + start + lane
        scale_row = tile.to(tl.int64) * ROWS + row
        m_scale_ptr = pointer(table_ptr, tensor, 5, tl.float32, ALIGNED) + scale_row
        v_scale_ptr = pointer(table_ptr, tensor, 6, tl.float32, ALIGNED) + scale_row
        grad = tl.load(grad_ptr, mask=inside, other=0.0).to(tl.float32) * tl.load(control_ptr + 2)
        weight = tl.load(weight_ptr, mask=inside, other=0.0).to(tl.float32)
        m_code = tl.load(m_ptr, mask=inside, other=0).to(tl.float32) * (1.0 / 127.0)
        v_code = tl.load(v_ptr, mask=inside, other=0).to(tl.float32) * (1.0 / 255.0)
        m_scale = tl.load(m_scale_ptr, mask=has_row, other=0.0)
        v_scale = tl.load(v_scale_ptr, mask=has_row, other=0.0)
        v_code = v_code * v_code
        m = m_code * tl.abs(m_code) * m_scale[:, None]
        v = v_code * v_code * v_scale[:, None]
        m += (grad - m) * tl.load(control_ptr + 5)
        v += (grad * grad - v) * tl.load(control_ptr + 6)
        root = tl.sqrt(v)
        weight -= decay * weight + tl.load(control_ptr + 3) * m / (root * tl.load(control_ptr + 4) + eps)

        base = _mix(key.to(tl.uint32) + (first + tensor).to(tl.uint32) * 0x9E3779B9, 0)
        element = (tile * (ROWS * 256) + lane).to(tl.uint32)
        bits = _mix(element * 0x9E3779B1 + base, _mix(base, base))

        m_scale = tl.max(tl.abs(m), axis=1)
        v_scale = tl.max(v, axis=1)
        # Below 2^-120 the roots would lose their meaning, and the moments have none beside eps.
        m_steps = tl.where(m_scale > 7.52316384526264e-37, 127.0 / tl.sqrt(m_scale), 0.0)
        v_steps = tl.where(v_scale > 7.52316384526264e-37, 255.0 / tl.sqrt(tl.sqrt(v_scale)), 0.0)
        m_at = tl.sqrt(tl.abs(m)) * m_steps[:, None]
        v_at = tl.sqrt(root) * v_steps[:, None]
        # Adding 2^23 rounds to a whole number and leaves it in the low bits: a conversion runs at a quarter of
        # that rate. A whole number comes out one too low half of the time, and is then rounded up with certainty.
        m_low = tl.minimum(tl.maximum(m_at - 0.5, 0.0) + 8388608.0 - 8388608.0, 126.0)
        v_low = tl.minimum(tl.maximum(v_at - 0.5, 0.0) + 8388608.0 - 8388608.0, 254.0)
        v_at = v_at * v_at
        v_low_2 = v_low * v_low
        v_high_2 = v_low_2 + 2.0 * v_low + 1.0
        m_new = _round_up(m_low, m_low * m_low, m_low * m_low + 2.0 * m_low + 1.0, m_at * m_at, bits >> 16)
        # These 16 bits are independent of each half of `bits`, which is all that three separate averages need.
        v_bits = (bits * 0x9E3779B1) >> 16
        v_new = _round_up(v_low, v_low_2 * v_low_2, v_high_2 * v_high_2, v_at * v_at, v_bits)
        v_new = tl.where((v > 0.0) & (v_new < 1.0), 1.0, v_new)
        m_new = tl.where(m < 0.0, -m_new, m_new) + 12582912.0
        v_new = v_new + 8388608.0
        tl.store(m_ptr, m_new.to(tl.int32, bitcast=True).to(tl.int8), mask=inside)
        tl.store(v_ptr, v_new.to(tl.int32, bitcast=True).to(tl.uint8), mask=inside)
        tl.store(m_scale_ptr, m_scale, mask=has_row)
        tl.store(v_scale_ptr, v_scale, mask=has_row)
        if ROUNDED:
            exact = weight.to(tl.uint32, bitcast=True)
            rounded = exact + (bits & 0xFFFF)
            # Beyond the largest bf16 the sum would read as infinity: cut there.
            rounded = tl.where((rounded & 0x7F800000) == 0x7F800000, exact, rounded)
            tl.store(weight_ptr, (rounded >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=inside)
        else:
            tl.store(weight_ptr, weight, mask=inside)


def _checked(
    grads: Sequence[torch.Tensor | None],
    weights: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    exp_avg_scales: Sequence[torch.Tensor],
    exp_avg_sq_scales: Sequence[torch.Tensor],
    key: int,
    **beside: torch.Tensor,
) -> tl.dtype:
    """Triton's name of the gradients' type; ValueError as the launchers below have it."""
    if not 0 <= key < 2**32:
        raise ValueError(f"key: {key} is outside 0 to 2^32 - 1; pass what reference_adamw.step_key makes")
    named, dtype = gradients(grads, weights)
    named |= {"weights": weights, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    named |= {"exp_avg_scales": exp_avg_scales, "exp_avg_sq_scales": exp_avg_sq_scales}
    types = {"exp_avgs": torch.int8, "exp_avg_sqs": torch.uint8}
    types |= {"exp_avg_scales": torch.float32, "exp_avg_sq_scales": torch.float32}
    for i, weight in enumerate(weights):
        check_float(f"weights[{i}]", weight)
        types["weights"] = weights[0].dtype
    check_lists(named, types, **beside)
    return kind(dtype)


def _update(
    table_SC: torch.Tensor | None,
    map_B2: torch.Tensor,
    control_C: torch.Tensor,
    eps: float,
    decay: float,
    key: int,
    first: int,
    grad_type: tl.dtype,
    weight: torch.dtype,
    aligned: bool,
    given: torch.Tensor | None = None,
) -> None:
    if given is not None:
        decay, key = 0.0, 0
    _update_8bit_kernel[(len(map_B2),)](
        table_SC,
        map_B2,
        control_C,
        given,
        eps,
        decay,
        # As a signed number: it would be 64 bits wide otherwise, and the kernel compiled for either.
        signed(key),
        first,
        GRAD=grad_type,
        WEIGHT=kind(weight),
        ROUNDED=weight == torch.bfloat16,
        GIVEN=given is not None,
        ALIGNED=aligned,
        ROWS=LAUNCH.tile // GROUP,
        num_warps=LAUNCH.num_warps,
    )


def adamw_8bit(
    grads: Sequence[torch.Tensor | None],
    weights: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    exp_avg_scales: Sequence[torch.Tensor],
    exp_avg_sq_scales: Sequence[torch.Tensor],
    powers: torch.Tensor,
    *,
    lr: float,
    eps: float,
    weight_decay: float,
    clip: float | None,
    key: int,
    plan: AdamwPlan | None = None,
    given: torch.Tensor | None = None,
) -> torch.Tensor:
    """One step with 8-bit moments, in place; waits for nothing. What is not named here is as in `adamw_fp32`.

    Args:
        weights: bf16, rounded at random, or fp32; all of one type.
        exp_avgs: int8 codes. exp_avg_sqs: uint8 codes. exp_avg_scales, exp_avg_sq_scales: fp32, one for 256
            elements; all zeros at the start.
        key: of seed and step, from 0 to 2^32 - 1; equal keys draw equal random bits.
        given: as in `adamw_fp32`; key is not looked at either.

    Returns:
        As `adamw_fp32`.

    Raises:
        ValueError: as `adamw_fp32`, or a key out of range.
    """
    state = (weights, exp_avgs, exp_avg_sqs, exp_avg_scales, exp_avg_sq_scales)
    grad_type = _checked(grads, *state, key, powers=powers)
    check_given(given, powers)
    plan = fitting(plan, weights)
    with torch.cuda.device_of(powers):
        aligned = send(plan, grads, state)
        control_C = begin(plan, grad_type, aligned, powers, lr, clip, given)
        dtype, decay = weights[0].dtype, lr * weight_decay
        _update(plan.table_SC, plan.map_B2, control_C, eps, decay, key, 0, grad_type, dtype, aligned, given)
    return control_C


def update_8bit(
    grads: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    exp_avg_scales: Sequence[torch.Tensor],
    exp_avg_sq_scales: Sequence[torch.Tensor],
    control_C: torch.Tensor,
    *,
    lr: float,
    eps: float,
    weight_decay: float,
    key: int,
    first: int,
    given: torch.Tensor | None = None,
    noted: NotedPart | None = None,
) -> None:
    """The update of some tensors in a step whose control numbers are made, in place; waits for nothing.

    Args:
        control_C: of `adamw_norms.step_control`; where it says that the step is not taken nothing changes. lr: the one
            that was passed there. first: the number that weights[0] has among all tensors of the model, which its
            random bits depend on. noted: of `adamw_plan.noting_part`, where the launches are captured. What is not
            named here is as in `adamw_8bit`.

    Raises:
        ValueError: as `adamw_8bit`, or `first` is negative or no 32-bit number.
    """
    if not 0 <= first < 2**31:
        raise ValueError(f"first: {first} is outside 0 to 2^31 - 1; pass the number of weights[0] in the model")
    state = (weights, exp_avgs, exp_avg_sqs, exp_avg_scales, exp_avg_sq_scales)
    grad_type = _checked(grads, *state, key, control_C=control_C)
    check_given(given, control_C)
    part = noted or part_plan(weights)
    with torch.cuda.device_of(control_C):
        plan, table_SC, aligned = part_table(part, grads, state)
        dtype, decay = weights[0].dtype, lr * weight_decay
        _update(table_SC, plan.map_B2, control_C, eps, decay, key, first, grad_type, dtype, aligned, given)
