"""The processes of one run, one a device, as `torchrun` starts them: who this one is, and how they keep together.

Alone, which is the usual case, everything here answers at once and nothing of torch.distributed is touched. What is
told from process to process is JSON; tensors go by collectives. All processes make the same calls in the same order.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from elo_engine.data import RowBatch
from elo_engine.errors import Elsewhere, FailedError, UsageError
from elo_engine.measure.setting import Processes

T = TypeVar("T")

# Processes wait for rank 0 while it evaluates or writes a model, which can take long; one that is dead is noticed by
# torchrun, which stops the others, and not by this.
PATIENCE = timedelta(hours=6)


def rank() -> int:
    """Of this process, from 0; 0 writes everything that a run writes."""
    return dist.get_rank() if _joined() else 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if _joined() else 1


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def wanted_size(environment: Mapping[str, str] = os.environ) -> int:
    """How many processes torchrun started; 1 without it. UsageError: WORLD_SIZE is no count."""
    told = environment.get("WORLD_SIZE", "1")
    if not told.isdecimal() or int(told) < 1:
        raise UsageError(f"WORLD_SIZE is {told!r}; torchrun sets it, so start with torchrun or unset it")
    return int(told)


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Inside the block the processes that torchrun started are one group, and each has its own GPU where there is one.

    Args:
        device: auto, cpu or cuda, as the configuration has it.

    Raises:
        UsageError: an environment that is not torchrun's. FailedError: more processes than GPUs, or the others cannot
            be reached.
    """
    if wanted_size() == 1 or _joined():
        yield
        return
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UsageError(
            f"WORLD_SIZE is {wanted_size()} and {', '.join(missing)} is not set; start with torchrun, as "
            "docs/distributed.md shows, or unset WORLD_SIZE"
        )
    backend = "gloo"
    if device != "cpu" and torch.cuda.is_available():
        here, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if here >= there:
            raise FailedError(
                f"process {here} of this machine has no GPU, there are {there}; start torchrun with "
                f"--nproc-per-node {there}"
            )
        torch.cuda.set_device(here)
        backend = "cpu:gloo,cuda:nccl"
    try:
        dist.init_process_group(backend, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise FailedError(
            f"the {wanted_size()} processes cannot reach each other ({str(error).splitlines()[0]}); check torchrun's "
            "arguments and the network between the machines"
        ) from error
    try:
        yield
        agreed(False)  # nobody lets go while another still talks
    finally:
        gc.collect()  # shares of a model hold the group
        dist.destroy_process_group()


def _tell(value: Any) -> Any:
    """Rank 0's value, everywhere."""
    text = json.dumps(value).encode() if rank() == 0 else b""
    length = torch.tensor([len(text)])
    dist.broadcast(length, 0)
    content = torch.zeros(int(length), dtype=torch.uint8)
    if rank() == 0:
        content.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    dist.broadcast(content, 0)
    return json.loads(bytes(content.tolist()))


def first(work: Callable[[], T]) -> T:
    """Rank 0 does it while the others wait; its result, which JSON must hold, is everyone's, and so is its error.

    Raises:
        Elsewhere: on the others, when rank 0's work failed. On rank 0 what the work raised.
    """
    if size() == 1:
        return work()
    if rank() == 0:
        try:
            result = work()
        except BaseException as error:
            status = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_status", 1)
            _tell({"error": str(error), "exit_status": status})
            raise
        _tell({"result": result})
        return result
    heard = _tell(None)
    if "error" in heard:
        raise Elsewhere(heard["error"], heard["exit_status"])
    return heard["result"]  # type: ignore[no-any-return]


def first_then_others(work: Callable[[], T]) -> T:
    """Rank 0 does it, then all others do: what the first makes on the disk, the others find there. Raises as `first`,
    and what the work raises.
    """
    mine: list[T] = []

    def leads() -> None:
        mine.append(work())

    first(leads)
    return mine[0] if mine else work()


def agreed(flag: bool) -> bool:
    """Whether any process says so; the same answer for all."""
    if size() == 1:
        return flag
    any_N = torch.tensor([int(flag)], dtype=torch.int32)
    dist.all_reduce(any_N, dist.ReduceOp.MAX)
    return bool(any_N)


def begin_sum(tensor: Tensor) -> dist.Work:
    """`add_up` of one tensor, of which the result must be waited for; only where there are several processes."""
    return dist.all_reduce(tensor, async_op=True)  # type: ignore[no-any-return]


def add_up(tensors: Sequence[Tensor]) -> None:
    """Each tensor becomes the sum over the processes, the same bits everywhere, in place."""
    if size() > 1:
        for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
            work.wait()


def largest(tensor: Tensor) -> None:
    """The tensor becomes the elementwise largest of the processes, in place."""
    if size() > 1:
        dist.all_reduce(tensor, dist.ReduceOp.MAX)


def require_equal(tensors: Sequence[Tensor], what: str) -> None:
    """Hold the bits of tensors that must be the same everywhere against rank 0's.

    Raises:
        FailedError: they differ, on every process; a network, a memory or a library that adds differently.
    """
    if size() == 1:
        return
    sums = [_fingerprint(tensor) for tensor in tensors]
    mine_N = torch.stack(sums).cpu()
    reference_N = mine_N.clone()
    dist.broadcast(reference_N, 0)
    if agreed(not torch.equal(mine_N, reference_N)):
        raise FailedError(
            f"{what} differ between the processes although all made the same steps; nothing of this step was saved. "
            "Continue from the last snapshot with --resume auto; if it happens again, look for a faulty device"
        )


def _fingerprint(tensor: Tensor) -> Tensor:
    """A sum over the bits in which each weighs by its place, int64: two that are exchanged are seen too."""
    flat = tensor.detach().reshape(-1).view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])
    weights = torch.arange(1, 252, 2, device=flat.device)  # odd: no bit is lost modulo 2^64
    total = flat.new_zeros((), dtype=torch.int64)
    for start in range(0, flat.numel(), 126 << 16):  # so that little is widened at once
        piece = flat[start : start + (126 << 16)].long()
        whole = piece[: piece.numel() // 126 * 126].view(-1, 126)
        total += (whole.sum(0) * weights).sum() + piece[whole.numel() :].sum() + 3 * total
    return total


def require_whole_shares(rows: int, what: str, processes: int) -> None:
    """UsageError: the rows of a step cannot be shared evenly."""
    if rows % processes:
        raise UsageError(
            f"{what}: {rows} rows a step do not divide by {processes} processes; set tokens_per_step to a multiple of "
            f"{processes} rows, so that every process has the same work"
        )


def require_whole_leaves(state: str, processes: int) -> None:
    """UsageError: an optimizer state that is of whole leaves, of a model in shares."""
    if state != "fp32":
        raise UsageError(
            f"align.optimizer.state: {state} is for whole leaves, and the model is in shares of {processes} processes; "
            "set align.optimizer.state: fp32, or align.engine: resident"
        )


def counted(count: int | None = None) -> Processes:
    """How many there are, or will be, and how many of them on this machine, as torchrun says."""
    count = size() if count is None else count
    told = os.environ.get("LOCAL_WORLD_SIZE", "")
    return Processes(count, min(count, int(told)) if told.isdecimal() and int(told) else count)


def share(rows: RowBatch) -> RowBatch:
    """This process's rows of a step: as many for each, rank by rank in the order of the mixture."""
    if size() == 1:
        return rows
    count = len(rows.ids_BT) // size()
    return rows.part(rank() * count, (rank() + 1) * count)
