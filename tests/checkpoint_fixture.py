"""A small real checkpoint, and a look at everything about a folder that must not change."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from elo_engine.checkpoint.writer import SYSCALLS

INDEX = "model.safetensors.index.json"


def make_source(folder: Path) -> None:
    """Two shards of bf16 and odd dtypes, an index, a tokenizer and files that must not travel."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(3)
    shards: dict[str, dict[str, Tensor]] = {"s-1.safetensors": {}, "s-2.safetensors": {}}
    for i in range(12):
        shard = shards[f"s-{1 + i % 2}.safetensors"]
        shard[f"layers.{i}.weight"] = torch.randn(8, 12, generator=generator).bfloat16()
        shard[f"layers.{i}.norm"] = torch.randn(12, generator=generator)
    shards["s-1.safetensors"] |= {
        "half": torch.ones(5).half(),
        "float8": torch.ones(6).to(torch.float8_e4m3fn),
    }
    shards["s-2.safetensors"] |= {"ids": torch.arange(4), "empty": torch.zeros(0, 3)}
    for name, tensors in shards.items():
        save_file(tensors, folder / name, {"format": "pt"})
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2))
    (folder / "config.json").write_text('{"model_type":  "llama"}\n')
    (folder / "tokenizer.json").write_bytes(b'{"version": "1.0"}\r\n')
    (folder / "LICENSE").write_text("free")
    (folder / "README.md").write_text("the card of another model")
    (folder / "training_args.bin").write_bytes(b"\x80\x02")


TRAVELLING = {"LICENSE", "config.json", INDEX, "s-1.safetensors", "s-2.safetensors", "tokenizer.json"}


def state(folder: Path) -> dict[str, tuple[bytes, int, int, int]]:
    """Bytes, time, inode and mode of every file: what must not change in a source."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.stat()
        found[path.name] = (path.read_bytes(), status.st_mtime_ns, status.st_ino, status.st_mode)
    return found


def changed_layers() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(11)
    return {f"layers.{i}.weight": torch.randn(8, 12, generator=generator) for i in (0, 11)}


def leftovers(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if ".tmp-" in name]


def fail_on_call(monkeypatch: pytest.MonkeyPatch, name: str, number: int, code: int) -> list[int]:
    """From now on the `number`-th call (from 0) of a system call fails; returns the count of all calls."""
    real, calls = getattr(SYSCALLS, name), [0]

    def call(*arguments: object) -> object:
        calls[0] += 1
        if calls[0] == number + 1:
            raise OSError(code, os.strerror(code))
        return real(*arguments)

    monkeypatch.setattr(SYSCALLS, name, call)
    return calls
