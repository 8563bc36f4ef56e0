"""The average of several patches of one base, out of core: memory does not depend on sizes or on how many there are.

Averaging the last snapshots of a training run is the usual use. The average is of values, not of bytes:
sum_k w_k (base ^ patch_k), in fp64, cast once to the checkpoint's dtype, and stored as a patch of the base again.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from elo_engine.checkpoint.header import TensorEntry
from elo_engine.checkpoint.index import CheckpointIndex
from elo_engine.checkpoint.patch import find_state
from elo_engine.checkpoint.patch_file import PatchFile
from elo_engine.checkpoint.patch_writer import (
    CHUNK_BYTES,
    Bytes,
    PatchStats,
    Progress,
    refuse_output,
    silent,
    whole_checkpoint,
    write_patch,
)
from elo_engine.errors import FailedError, RefusedError, UsageError

WEIGHT_SLACK = 1e-6  # what weights written with six digits may miss 1 by; the rest is divided out


def average_patches(
    base: Path,
    patches: Sequence[Path],
    out: Path,
    weights: Sequence[float] | None = None,
    progress: Progress = silent,
) -> PatchStats:
    """Write to the new file `out` the average of the checkpoints that `patches` make of `base`.

    weights: one a patch, finite, with sum 1; equal ones by default. A tensor that only some patches change counts
    with the base's value for the others. Where all versions have the same bits, these are kept.

    Raises UsageError: weights that do not fit. RefusedError: patches of another base, `base` is not it, a tensor
    that is not of floats and differs, `out` exists. FailedError: damaged patches, an average that is not finite.
    """
    shares = _check_weights(weights, len(patches))
    index = whole_checkpoint(base, progress)
    refuse_output(out, [index.folder])
    with ExitStack() as stack:
        opened = [stack.enter_context(PatchFile(path)) for path in patches]
        _refuse_different_bases(opened)
        state = find_state(index, opened[0], progress)
        if not state.base:
            why = "the patch is already in it" if state.patched else state.why
            raise RefusedError(f"{base}: is not the base of {opened[0].path}: {why}.")
        for patch in opened:
            _check_tensors(index, patch, opened)
        return write_patch(index, _Average(opened, shares), out, progress)


def _check_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    if count == 0:
        raise UsageError("no patch to average: give at least one.")
    if weights is None:
        return [1 / count] * count
    if len(weights) != count:
        raise UsageError(f"{len(weights)} weights for {count} patches: give one weight a patch.")
    if not all(math.isfinite(weight) for weight in weights):
        raise UsageError(f"weights {list(weights)} are not all finite numbers.")
    total = math.fsum(weights)
    if abs(total - 1) > WEIGHT_SLACK * (1 + 1e-9):
        raise UsageError(f"weights {list(weights)} sum to {total:.9g}, not to 1.")
    return [weight / total for weight in weights]


def _refuse_different_bases(patches: list[PatchFile]) -> None:
    first = patches[0]
    for patch in patches[1:]:
        same = patch.contents.base == first.contents.base and {
            name: (hashes.size, hashes.before) for name, hashes in patch.contents.shards.items()
        } == {name: (hashes.size, hashes.before) for name, hashes in first.contents.shards.items()}
        if not same:
            raise RefusedError(
                f"{patch.path}: was made from another base than {first.path}. Only patches of one base can be averaged."
            )
        for name in first.entries.keys() & patch.entries.keys():
            if patch.contents.tensors[name].before != first.contents.tensors[name].before:
                raise RefusedError(f"{patch.path}: tensor {name!r} had other bytes in its base than in {first.path}'s.")


def _check_tensors(index: CheckpointIndex, patch: PatchFile, patches: list[PatchFile]) -> None:
    for name, stored in patch.entries.items():
        entry, hashes = index.entries.get(name), patch.contents.tensors[name]
        if entry is None or entry.shape != stored.shape or entry.dtype != hashes.dtype:
            raise RefusedError(f"{patch.path}: tensor {name!r} is not one of {index.folder} in dtype and shape.")
        if not entry.torch_dtype.is_floating_point:
            results = {p.contents.tensors[name].after if name in p.entries else hashes.before for p in patches}
            if len(results) > 1:
                raise RefusedError(
                    f"{patch.path}: tensor {name!r} is {entry.dtype} and differs between the patches; only floats have "
                    "an average."
                )


class _Average:
    """The averaged checkpoint, as what `write_patch` asks for its bytes; each chunk is computed when asked for."""

    def __init__(self, patches: list[PatchFile], weights: list[float]) -> None:
        self._patches, self._weights = patches, weights
        self._buffer = np.empty(CHUNK_BYTES, np.uint8)
        self._digests = [hashlib.sha256() for _ in patches]

    def chunk(self, entry: TensorEntry, offset: int, before: Bytes) -> Bytes:
        """Raises FailedError: a damaged patch, an average that is not finite."""
        if not any(entry.name in patch.entries for patch in self._patches):
            return before
        dtype, bits = entry.torch_dtype, np.dtype(f"u{entry.torch_dtype.itemsize}")
        first: Bytes | None = None
        average = torch.zeros(len(before) // dtype.itemsize, dtype=torch.float64)
        for number, weight in enumerate(self._weights):
            version = self._version(number, entry, offset, before)
            if first is None:
                first, same = version.copy(), np.ones(len(average), np.bool_)
            same &= version.view(bits) == first.view(bits)
            if dtype.is_floating_point:
                average.add_(torch.from_numpy(version).view(dtype).to(torch.float64), alpha=weight)
        assert first is not None
        if same.all():
            return first
        rounded = average.to(dtype)
        # Cast up again for the test, which the 8-bit floats do not have.
        wrong = ~(torch.isfinite(rounded.to(torch.float64)).numpy() | same)
        if wrong.any():
            position = int(np.argmax(wrong))
            raise FailedError(
                f"tensor {entry.name!r}: the average {average[position].item()} at position "
                f"{offset // dtype.itemsize + position} is not finite as {entry.dtype}. Leave out the patch with it."
            )
        values = rounded.view(torch.uint8).numpy().view(bits)
        return np.where(same, first.view(bits), values).view(np.uint8)

    def _version(self, number: int, entry: TensorEntry, offset: int, before: Bytes) -> Bytes:
        """The bytes that one patch makes of the base's; where it does not change the tensor, a copy of those."""
        piece = self._buffer[: len(before)]
        patch, digest = self._patches[number], self._digests[number]
        if entry.name not in patch.entries:
            piece[:] = before
            return piece
        patch.read(entry.name, piece.data, offset)
        digest = hashlib.sha256() if offset == 0 else digest
        digest.update(piece.data)
        self._digests[number] = digest
        if offset + len(before) == entry.nbytes:
            patch.check_payload(entry.name, digest.hexdigest())
        return np.bitwise_xor(piece, before, out=piece)

    def check(self) -> None:
        """FailedError when a patch changed meanwhile."""
        for patch in self._patches:
            patch.check()
