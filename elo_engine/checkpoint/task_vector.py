"""target + weight x (instruct - base) over three checkpoints: one streaming pass, memory that does not depend on sizes.

A difference of two checkpoints is a task vector (task arithmetic: Ilharco et al., arXiv 2212.04089; for chat: Chat
Vector, Huang et al., arXiv 2310.04799). Each tensor of the target is asked for piece by piece by the writer, and a
piece is computed when it is asked for: read from the three, added in fp32 (fp64 where one of them is fp64), rounded
once to the target's dtype. Where tensors are in which shards may differ between the three.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elo_engine.checkpoint.header import TensorEntry
from elo_engine.checkpoint.index import CheckpointIndex
from elo_engine.checkpoint.patch_writer import refuse_output
from elo_engine.checkpoint.pieces import Pieces, ShardReader
from elo_engine.checkpoint.publish import preflight_space, publish
from elo_engine.checkpoint.writer import Progress, RewriteStats, rewrite_checkpoint, space_needed
from elo_engine.errors import RefusedError

ADDABLE = ("F16", "BF16", "F32", "F64")  # the 8-bit floats are quantised values, whose scales are other tensors
_CHUNK_ITEMS = 1 << 17  # in fp32 0.5 MiB a side: the three, the sum and the masks stay in the second-level cache


@dataclass(frozen=True)
class Three:
    """The checkpoints of one sum. `base` and `target` may be the same one."""

    base: CheckpointIndex
    instruct: CheckpointIndex
    target: CheckpointIndex

    def roles(self) -> tuple[tuple[str, CheckpointIndex], ...]:
        """With the names that messages give them."""
        return ("BASE", self.base), ("INSTRUCT", self.instruct), ("TARGET", self.target)


def add_task_vector(
    three: Three,
    out: Path,
    weight: float,
    *,
    same_as: Mapping[str, str],
    files: Mapping[str, str],
    progress: Progress | None = None,
    extra: dict[str, Any] | None = None,
) -> RewriteStats:
    """Publish target + weight x (instruct - base) as the new folder `out`; the sources are only read.

    weight: any finite number; with 0 the weights are the target's byte for byte. same_as: {tensor of the target: the
    one whose sum it gets as well}, for a tied head that is stored a second time; all others must be in all three with
    one shape. files: {name: text} of further small files. progress(done, total) counts bytes of the output's shards.

    Raises RefusedError (`out` exists or lies in a source, too little space, a tensor that is not of floats, a sum that
    is not finite) and FailedError (a source that changed meanwhile, I/O errors).
    """
    target = three.target
    refuse_output(out, [index.folder for _, index in three.roles()])
    with ExitStack() as stack:
        readers: dict[Path, ShardReader] = {}
        for _, index in three.roles():
            if index.folder not in readers:
                readers[index.folder] = stack.enter_context(ShardReader(index))
        # once for all pieces: new memory for each would have to be mapped in page by page
        rooms = [torch.empty(8 * _CHUNK_ITEMS, dtype=torch.uint8) for _ in range(3)]
        sums: dict[str, Pieces] = {}
        for name in target.entries if weight else ():
            entries = [index.entry(same_as.get(name, name)) for _, index in three.roles()]
            sides = zip((readers[index.folder] for _, index in three.roles()), entries, rooms, strict=True)
            sums[name] = _Sum([_Side(*side) for side in sides], weight)
        preflight_space(out, space_needed(target, sums, out))
        with publish(out, extra=extra) as folder:
            stats = rewrite_checkpoint(target, sums, folder, progress)
            for name, text in files.items():
                (folder / name).write_text(text, encoding="utf-8")
            for reader in readers.values():  # before anything is visible: two versions of a source never mix
                reader.check()
    return stats


def require_addable(three: Three, name: str) -> None:
    """RefusedError unless the tensor is of plain floats in all three."""
    for role, index in three.roles():
        entry = index.entry(name)
        if entry.dtype not in ADDABLE:
            raise RefusedError(
                f"{index.folder / entry.shard}: tensor {name!r} of {role} is {entry.dtype}, and only tensors of "
                f"{', '.join(ADDABLE)} can be added: integers and 8-bit floats are quantised or count something. Use "
                "the unquantised checkpoint."
            )


@dataclass(frozen=True)
class _Side:
    """One tensor of one of the three, and the memory that its chunks are read into."""

    reader: ShardReader
    entry: TensorEntry
    room: Tensor

    def read(self, first: int, count: int) -> Tensor:
        """Elements first .. first + count; the next call writes over them."""
        dtype = self.entry.torch_dtype
        raw = self.room[: count * dtype.itemsize]
        self.reader.read(self.entry.shard, raw.numpy().data, self.entry.begin + first * dtype.itemsize)
        return raw.view(dtype)


class _Sum:
    """One tensor of the sum, as what the writer asks for its pieces.

    What does not differ is kept as it is, bit for bit: where target == base and the weight is 1, the sum is instruct's
    value and not instruct + 0, which would turn -0 into 0; where instruct == base it is the target's. So base +
    1 x (instruct - base) is instruct byte for byte in any dtype, as every dtype here goes to the wider one and back
    without a change. Elsewhere the sum is instruct + (target - base) for the weight 1, so that no rounding of
    instruct - base comes between, and target + weight x (instruct - base) otherwise.
    """

    def __init__(self, sides: list[_Side], weight: float) -> None:
        """sides: of base, instruct and target."""
        self._sides, self._target, self._weight = sides, sides[-1], weight
        self.shape, self.dtype = self._target.entry.shape, self._target.entry.torch_dtype
        self._wide = torch.float64 if any(side.entry.dtype == "F64" for side in sides) else torch.float32

    def piece(self, first: int, count: int) -> Tensor:
        """See `Pieces`. Raises RefusedError: a sum that is not finite; FailedError: a source changed or is damaged."""
        out = torch.empty(count, dtype=self.dtype)
        for done in range(0, count, _CHUNK_ITEMS):
            items = min(_CHUNK_ITEMS, count - done)
            base, instruct, target = (side.read(first + done, items).to(self._wide) for side in self._sides)
            part = out[done : done + items]
            part.copy_(self._add(base, instruct, target))
            finite = torch.isfinite(part)
            if not bool(finite.all()):
                at = int(torch.argmin(finite.to(torch.uint8)))
                self._refuse(first + done + at, base[at].item(), instruct[at].item(), target[at].item())
        return out

    def _add(self, base: Tensor, instruct: Tensor, target: Tensor) -> Tensor:
        learned_nothing = instruct == base
        if self._weight != 1:
            return torch.where(learned_nothing, target, (instruct - base).mul_(self._weight).add_(target))
        sums = torch.where(learned_nothing, target, (target - base).add_(instruct))
        return torch.where(target == base, instruct, sums)

    def _refuse(self, position: int, base: float, instruct: float, target: float) -> None:
        entry, folder = self._target.entry, self._target.reader.index.folder
        raise RefusedError(
            f"{folder / entry.shard}: tensor {entry.name!r}: TARGET {target:g} + {self._weight:g} x (INSTRUCT "
            f"{instruct:g} - BASE {base:g}) at position {position} is not finite as {entry.dtype}. Nothing was "
            "written: give a weight nearer to 0, or another checkpoint where one of the three is not finite itself."
        )
