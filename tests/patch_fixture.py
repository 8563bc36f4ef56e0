"""A base, a changed checkpoint and the patch between them, for the tests of patches."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from elo_engine.checkpoint import diff_checkpoints, open_checkpoint

from .checkpoint_fixture import TRAVELLING, make_source

CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "layers.0.weight": lambda t: t * 2,
    "layers.11.norm": lambda t: t.index_fill(0, torch.tensor([5]), float("nan")),  # bytes are moved, not judged
    "float8": lambda t: -t,
    "ids": lambda t: t + 1,
}


def edit(folder: Path, changes: dict[str, Callable[[Tensor], Tensor]]) -> None:
    """Change tensors of a checkpoint where they lie, without another byte of the shard."""
    index = open_checkpoint(folder)
    for name, change in changes.items():
        entry = index.entry(name)
        path = folder / entry.shard
        tensor = load_file(path)[name]
        data = bytearray(path.read_bytes())
        # a path of its own rather than the code under test: new values, in the tensor's dtype, at its offsets
        dtype = tensor.dtype
        new = (change(tensor.float()) if dtype.is_floating_point else change(tensor)).to(dtype)
        data[entry.begin : entry.end] = new.contiguous().view(torch.uint8).numpy().tobytes()
        path.write_bytes(data)


def make_changed(base: Path, folder: Path) -> Path:
    """A copy of the base with `CHANGES` in it."""
    shutil.copytree(base, folder)
    edit(folder, CHANGES)
    return folder


def same_weights(one: Path, other: Path) -> bool:
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in TRAVELLING)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    make_source(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def changed(base: Path, tmp_path: Path) -> Path:
    return make_changed(base, tmp_path / "changed")


@pytest.fixture
def patch(base: Path, changed: Path, tmp_path: Path) -> Path:
    diff_checkpoints(base, changed, tmp_path / "p.safetensors")
    return tmp_path / "p.safetensors"
