"""A checkpoint of two shards with every odd kind of tensor in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor


def write_folder(folder: Path, shards: dict[str, dict[str, Tensor]]) -> None:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for shard, tensors in shards.items():
        save_file(tensors, folder / shard)
    weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    """12 layers of bf16 with a norm each, an embedding, and one of every odd kind."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    found = {f"layers.{i}.weight": normal(40 + i, 101).bfloat16() for i in range(12)}  # about a slot each
    found |= {f"layers.{i}.norm": normal(24).bfloat16() for i in range(12)}
    found |= {
        "embed": normal(1000, 24).bfloat16(),
        "wide": normal(70, 101),
        "half": normal(5, 3).half(),
        "double": normal(3).double(),
        "ids": torch.arange(9),
        "mask": torch.tensor([True, False, True]),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "float8": normal(10).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "infinite": torch.tensor([float("inf"), float("nan"), -0.0]),
    }
    return found


@pytest.fixture
def folder(tmp_path: Path, tensors: dict[str, Tensor]) -> Path:
    names = sorted(tensors)
    first, second = names[::2], names[1::2]
    write_folder(
        tmp_path / "model",
        {
            "x-1.safetensors": {n: tensors[n] for n in first},
            "x-2.safetensors": {n: tensors[n] for n in second},
        },
    )
    return tmp_path / "model"


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert (tensor.dtype, tensor.shape) == (wanted[name].dtype, wanted[name].shape), name
        assert tensor.is_contiguous() and raw(tensor) == raw(wanted[name]), name
