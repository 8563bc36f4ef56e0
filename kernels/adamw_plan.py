"""What every launch of AdamW shares on the host: the table of addresses, the map of blocks, and the checks.

A kernel finds its tensor through the table, [S, COLUMNS] int64: elements, then addresses in the order of the launcher.
The map from block to tensor and tile depends on the sizes alone, so it is made once; a new gradient sends the table
again, 64 bytes a tensor from pinned memory, and nobody waits. A step in parts (adamw_norms.py) calls with other tensors
each time, of few different sizes: its `PartPlan` is kept by sizes and holds nothing that a launch writes.

Shapes: S tensors, B blocks, P partial sums, C control numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
import triton
import triton.language as tl

from .arguments import check_device, check_float

GROUP = 256  # elements that share a scale
COLUMNS = 8  # int64 numbers a tensor has in the table: elements, then addresses in the order of the launcher
CONTROL = 8  # fp32 numbers that one step's kernels share; the first two are the launchers' result
GIVEN = 3  # int32 numbers that a step whose launches are repeated finds on the device: `given_bits`
MOST_ELEMENTS = 2**32 - 1  # the hash counts elements in 32 bits


@dataclass(frozen=True)
class AdamwLaunch:
    """Launch numbers; the update is bound by memory. Not yet timed on a card.

    tile: 2048 elements over num_warps: 8 are 8 elements a thread: one 16-byte load of bf16, two of fp32, and of
        codes 8 bytes a thread, which still are 256 in a row for a warp. A group of 256 is one warp's, so its largest
        magnitude needs no shared memory. The 8-bit update of bf16 weights takes at most 64 registers.
    fp32_warps: 16, for the update of fp32 state: 4 elements a thread are one 16-byte load of fp32 and 32 to 54
        registers. 8 elements a thread spill 16 bytes on sm_80 to sm_89 and on sm_120, and pass through shared memory.
    tiles_per_sum: 8. Two layers of Llama-3.1-8B then have 26,600 partial sums, which one program adds in 7 rounds;
        one sum a tile would be 52 rounds.
    sums_per_round: 4096 over fold_warps: 8, 16 a thread.
    """

    tile: int = 2048
    num_warps: int = 8
    fp32_warps: int = 16
    tiles_per_sum: int = 8
    sums_per_round: int = 4096
    fold_warps: int = 8


LAUNCH = AdamwLaunch()


@dataclass
class AdamwPlan:
    """What depends on the tensors' sizes alone, and the addresses that were sent last; make it once and keep it.

    sizes: elements of each tensor. map_B2: tensor and tile of each block, int32. sums_P: the partial sums.
    noted: addresses are kept in `sent` and not sent; see `noting`.
    """

    sizes: tuple[int, ...]
    map_B2: torch.Tensor
    sums_P: torch.Tensor
    sent: list[list[int]] = field(default_factory=list)
    table_SC: torch.Tensor | None = None
    noted: bool = False


@dataclass(frozen=True)
class PartPlan:
    """What depends on the sizes alone, for a step in parts. No partial sum is of two tensors: a tensor's last one may
    count tiles that lie beyond its end, and kernels do nothing there.

    sizes, map_B2: as in `AdamwPlan`, 8 bytes for 2048 elements. bounds_S1: the first partial sum of each tensor, then
    their number, int32. sums: their number.
    """

    sizes: tuple[int, ...]
    map_B2: torch.Tensor
    bounds_S1: torch.Tensor
    sums: int


def _tiles(sizes: tuple[int, ...]) -> torch.Tensor:
    if not any(sizes):
        raise ValueError(f"adamw: {len(sizes)} tensors with no elements; there is nothing to update, do not call it")
    if max(sizes) > MOST_ELEMENTS:
        raise ValueError(f"adamw: a tensor of {max(sizes)} elements exceeds {MOST_ELEMENTS}; pass it in two halves")
    return torch.tensor([triton.cdiv(size, LAUNCH.tile) for size in sizes])


def _map(tiles_S: torch.Tensor) -> torch.Tensor:
    tensor_B = torch.arange(len(tiles_S)).repeat_interleave(tiles_S)
    first_S = tiles_S.cumsum(0) - tiles_S
    return torch.stack((tensor_B, torch.arange(len(tensor_B)) - first_S[tensor_B]), dim=1).int()


def adamw_plan(tensors: Sequence[torch.Tensor]) -> AdamwPlan:
    """The plan for tensors of these sizes on their device.

    Raises:
        ValueError: no tensors, no elements, or a tensor of more than 2^32 - 1.
    """
    sizes = tuple(tensor.numel() for tensor in tensors)
    map_B2 = _map(_tiles(sizes))
    device = tensors[0].device
    sums_P = torch.empty(triton.cdiv(len(map_B2), LAUNCH.tiles_per_sum), dtype=torch.float32, device=device)
    return AdamwPlan(sizes, map_B2.to(device), sums_P)


def part_plan(tensors: Sequence[torch.Tensor]) -> PartPlan:
    """The plan of some tensors by their sizes and device; sizes that were asked for lately have theirs already, new
    ones are copied to the device and waited for.

    Raises:
        ValueError: as `adamw_plan`.
    """
    sizes = tuple(tensor.numel() for tensor in tensors)
    return _part_plan(sizes, tensors[0].device if tensors else torch.device("cpu"))


@lru_cache(maxsize=16)  # layers, embedding and head differ, one layer and the next do not
def _part_plan(sizes: tuple[int, ...], device: torch.device) -> PartPlan:
    each = LAUNCH.tiles_per_sum
    sums_S = (_tiles(sizes) + each - 1) // each
    bounds_S1 = torch.cat((torch.zeros(1, dtype=torch.int64), sums_S.cumsum(0)))
    return PartPlan(sizes, _map(sums_S * each).to(device), bounds_S1.int().to(device), int(bounds_S1[-1]))


def noting(plan: AdamwPlan) -> AdamwPlan:
    """A plan of the same tensors for launches that are captured, with a table of its own that has no addresses yet.

    Captured, the copy of a table would read the host's memory whenever it is repeated, and that is the host's again by
    then. So addresses are only noted, and `deliver` sends them once, after the capture.
    """
    table_SC = torch.empty((len(plan.sizes), COLUMNS), dtype=torch.int64, device=plan.map_B2.device)
    return AdamwPlan(plan.sizes, plan.map_B2, plan.sums_P, table_SC=table_SC, noted=True)


@dataclass
class NotedPart:
    """Of tensors whose step in parts is captured: their plan, which is kept for as long as launches read it, and a
    table of their own; see `noting`.
    """

    plan: PartPlan
    table_SC: torch.Tensor
    sent: list[list[int]] = field(default_factory=list)


def noting_part(tensors: Sequence[torch.Tensor]) -> NotedPart:
    """For a step in parts of these tensors. Both are made here, outside of the capture: what is allocated inside is
    memory that another graph may compute in.

    Raises:
        ValueError: as `adamw_plan`.
    """
    plan = part_plan(tensors)
    table_SC = torch.empty((len(plan.sizes), COLUMNS), dtype=torch.int64, device=plan.map_B2.device)
    return NotedPart(plan, table_SC)


def deliver(plan: AdamwPlan | NotedPart) -> None:
    """Send the addresses that were noted; waits for nothing."""
    assert plan.sent and plan.table_SC is not None, "nothing was launched with this plan"
    plan.table_SC.copy_(_host_table(plan.sent, plan.table_SC.device), non_blocking=True)


def signed(number: int) -> int:
    """The 32 bits of a number below 2^32 as an int32 has them."""
    return number - 2**32 if number >= 2**31 else number


def given_bits(lr: float, weight_decay: float, key: int) -> torch.Tensor:
    """int32 [GIVEN] on the host: the bits of lr and of lr * weight_decay in fp32, rounded as a launch rounds them, and
    of the key.
    """
    rates = torch.tensor([lr, lr * weight_decay], dtype=torch.float32).view(torch.int32)
    return torch.cat((rates, torch.tensor([signed(key)], dtype=torch.int32)))


def check_given(given: torch.Tensor | None, beside: torch.Tensor) -> None:
    """ValueError unless it is None, or made of `given_bits` and on the device of the other tensor."""
    if given is None:
        return
    if given.shape != (GIVEN,) or given.dtype != torch.int32 or not given.is_contiguous():
        raise ValueError(f"given: {tuple(given.shape)} of {given.dtype}; pass the numbers that given_bits made")
    if given.device != beside.device:
        check_device(given=given, powers=beside)


def adamw_powers(betas: tuple[float, float], device: torch.device | str) -> torch.Tensor:
    """The fp64 vector [beta1^t, beta2^t, t, beta1, beta2] before the first step; the steps advance it."""
    return torch.tensor([1.0, 1.0, 0.0, *betas], dtype=torch.float64, device=device)


def check_lists(
    named: dict[str, Sequence[torch.Tensor]], types: dict[str, torch.dtype], **beside: torch.Tensor
) -> None:
    """Every list and `weights`: as many tensors, contiguous, of the right size and type, on the device of the one
    tensor `beside` them, which is checked by its name.
    """
    weights = named["weights"]
    ((_, one),) = beside.items()
    for name, tensors in named.items():
        if len(tensors) != len(weights):
            raise ValueError(f"{name}: {len(tensors)} tensors for {len(weights)} weights; pass one for each")
        for i, (tensor, weight) in enumerate(zip(tensors, weights, strict=True)):
            label, want = f"{name}[{i}]", types.get(name)
            if want is not None and tensor.dtype != want:
                raise ValueError(f"{label}: dtype {tensor.dtype}; pass {want}")
            count = triton.cdiv(weight.numel(), GROUP) if name.endswith("scales") else weight.numel()
            if tensor.numel() != count:
                raise ValueError(f"{label}: {tensor.numel()} elements where weights[{i}] needs {count}")
            if not tensor.is_contiguous():
                raise ValueError(
                    f"{label}: strides {tensor.stride()}; it must be contiguous, pass {label}.contiguous()"
                )
            if tensor.device != one.device:
                check_device(**beside, **{label: tensor})
    check_vectors(**beside)


def check_vectors(**vectors: torch.Tensor) -> None:
    """The vectors that launches share, by their names, are what they were made as; all on one device that a kernel
    reaches.
    """
    made = {"powers": ((5,), torch.float64, "adamw_powers"), "control_C": ((CONTROL,), torch.float32, "step_control")}
    for name, vector in vectors.items():
        shape, dtype, maker = made.get(name, (vector.shape, vector.dtype, ""))
        if vector.shape != shape or vector.dtype != dtype:
            raise ValueError(f"{name}: {tuple(vector.shape)} of {vector.dtype}; pass the vector that {maker} made")
    check_device(**vectors)


def gradients(
    grads: Sequence[torch.Tensor | None], weights: Sequence[torch.Tensor]
) -> tuple[dict[str, Sequence[torch.Tensor]], torch.dtype]:
    """The gradients as a list to check, a weight standing for what has none, and their common type."""
    if len(grads) != len(weights):
        raise ValueError(f"grads: {len(grads)} for {len(weights)} weights; pass one for each, None where none arrived")
    kinds = sorted({str(grad.dtype) for grad in grads if grad is not None})
    if len(kinds) > 1:
        raise ValueError(f"grads: {kinds} in one call; convert all of them to one type")
    for i, grad in enumerate(grads):
        if grad is not None:
            check_float(f"grads[{i}]", grad)
    dtype = next((grad.dtype for grad in grads if grad is not None), torch.float32)
    return {"grads": [w if g is None else g for g, w in zip(grads, weights, strict=True)]}, dtype


def send(plan: AdamwPlan, grads: Sequence[torch.Tensor | None], lists: Sequence[Sequence[torch.Tensor]]) -> bool:
    """Put the addresses into the plan's table if one has changed; True if all is divisible by 16.

    A tensor without a gradient is sent as one of no elements.
    """
    rows = _rows(plan.sizes, grads, lists)
    if plan.noted:
        plan.sent = rows
    elif rows != plan.sent or plan.table_SC is None:
        plan.table_SC = _table(rows, plan.map_B2.device)
        plan.sent = rows
    return _aligned(rows)


def part_table(
    part: PartPlan | NotedPart, grads: Sequence[torch.Tensor | None], lists: Sequence[Sequence[torch.Tensor]]
) -> tuple[PartPlan, torch.Tensor, bool]:
    """The plan; a table of these addresses, sent anew, since another stream may read the last one, or noted; True if
    all is divisible by 16. The norms of a step note its gradients, the update these and the rest, in one table.
    """
    plan = part.plan if isinstance(part, NotedPart) else part
    rows = _rows(plan.sizes, grads, lists)
    if not isinstance(part, NotedPart):
        return plan, _table(rows, plan.map_B2.device), _aligned(rows)
    before = [row[:2] for row in part.sent]
    assert before in ([], [row[:2] for row in rows]), "gradients have moved between their norms and the update"
    part.sent = rows
    return plan, part.table_SC, _aligned(rows)


def _rows(
    sizes: tuple[int, ...], grads: Sequence[torch.Tensor | None], lists: Sequence[Sequence[torch.Tensor]]
) -> list[list[int]]:
    rows = []
    for i, grad in enumerate(grads):
        row = [0, 0] if grad is None else [sizes[i], grad.data_ptr()]
        row += [tensors[i].data_ptr() for tensors in lists]
        rows.append(row + [0] * (COLUMNS - len(row)))
    return rows


def _host_table(rows: list[list[int]], device: torch.device) -> torch.Tensor:
    # torch gives pinned memory out again only when the copy that reads it is done.
    return torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda")


def _table(rows: list[list[int]], device: torch.device) -> torch.Tensor:
    return _host_table(rows, device).to(device, non_blocking=True)


def _aligned(rows: list[list[int]]) -> bool:
    return all(number % 16 == 0 for row in rows for number in row)


def kind(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of bf16 or fp32."""
    return tl.bfloat16 if dtype == torch.bfloat16 else tl.float32


def fitting(plan: AdamwPlan | None, weights: Sequence[torch.Tensor]) -> AdamwPlan:
    """The plan that was given, or a new one.

    Raises:
        ValueError: it was made for other sizes.
    """
    if plan is None:
        return adamw_plan(weights)
    if plan.sizes != tuple(weight.numel() for weight in weights):
        raise ValueError("plan: made for tensors of other sizes; make one with adamw_plan(weights)")
    return plan
