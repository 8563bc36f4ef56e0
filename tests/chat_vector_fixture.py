"""Three small checkpoints whose sum is asked for, alike in their tensors and unlike in their shards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from elo_engine.model.names import EMBEDDING

from .checkpoint_fixture import INDEX

LAYER, NORM = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"


def make_model(
    folder: Path,
    seed: int,
    dtype: torch.dtype = torch.float32,
    *,
    shards: int = 1,
    edit: Callable[[dict[str, Tensor]], Any] = lambda tensors: None,
    tied: bool = True,
) -> Path:
    """Tensors of a few sizes in `shards` files, with zeros of both signs, subnormals and huge values among them."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        EMBEDDING: torch.randn(40, 24, generator=generator),
        NORM: torch.randn(24, generator=generator),
        LAYER: torch.randn(600, 257, generator=generator) * torch.logspace(-30, 30, 257),
        "model.layers.1.mlp.up_proj.weight": torch.randn(3, 5, 7, generator=generator),
        "model.layers.1.bias": torch.zeros(0),
    }
    tensors[LAYER].view(-1)[:6] = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 3e38, -3e38])
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    edit(tensors)
    folder.mkdir(parents=True)
    parts: list[dict[str, Tensor]] = [{} for _ in range(shards)]
    for number, (name, tensor) in enumerate(tensors.items()):
        parts[number % shards][name] = tensor
    if shards == 1:
        save_file(parts[0], folder / "model.safetensors", {"format": "pt"})
    else:
        for number, part in enumerate(parts):
            save_file(part, folder / f"part-{number}.safetensors", {"format": "pt"})
        where = {name: f"part-{number}.safetensors" for number, part in enumerate(parts) for name in part}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": tied}))
    return folder


def write_tokenizer(folder: Path, vocabulary: dict[str, int], note: str = "") -> None:
    content = {"version": note, "model": {"vocab": vocabulary}, "added_tokens": [{"content": "</s>", "id": 9}]}
    (folder / "tokenizer.json").write_text(json.dumps(content))


def weights(folder: Path) -> dict[str, Tensor]:
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and tensor.shape == other[name].shape
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]
        assert torch.equal(tensor.view(bits), other[name].view(bits)), name


@pytest.fixture
def three(tmp_path: Path) -> tuple[str, str, str]:
    """Base, instruct and target as the command takes them; unlike in their shards."""
    base = make_model(tmp_path / "base", 1, edit=calm)
    instruct = make_model(tmp_path / "instruct", 2, shards=3, edit=calm)
    target = make_model(tmp_path / "target", 3, shards=2, edit=calm)
    return str(base), str(instruct), str(target)


def calm(tensors: dict[str, Tensor]) -> None:
    """Without the huge values, whose sums are not finite."""
    generator = torch.Generator().manual_seed(int(tensors[EMBEDDING].double().sum() * 1e6))
    tensors[LAYER] = torch.randn(600, 257, generator=generator).to(tensors[LAYER].dtype)


def thirds(tensors: dict[str, Tensor]) -> None:
    """Calm, with values that take every bit of the dtype."""
    calm(tensors)
    tensors.update({name: tensor / 3 for name, tensor in tensors.items()})
