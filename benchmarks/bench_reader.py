"""File to memory of the detached tensors of a small checkpoint, from the page cache: the engine's ways of reading and
safetensors' own. The comparison with the peers, cold and warm, is bench_loading.py's.

Floor: the wanted bytes, read once and written once, at the run's copy rate.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from elo_engine.benchmarks.contest import Contest, Run, pytest_benchmark
from elo_engine.benchmarks.synthetic import Shapes, make_checkpoint
from elo_engine.checkpoint import CheckpointReader, open_checkpoint
from elo_engine.model.shallow import shallow_names
from elo_engine.model.spec import read_spec

SHAPES = Shapes(layers=16, V=16384, D=1024, F=3072, H=16, K=4, E=64, shard_bytes=200_000_000)  # 0.44 GB


@functools.cache
def _checkpoint() -> tuple[Any, Path]:
    """Made once a process, gone with it."""
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "checkpoint"
    make_checkpoint(path, SHAPES)
    return folder, path


def _wanted(path: Path) -> list[str]:
    spec = read_spec(open_checkpoint(path).config)
    return shallow_names(spec, (0, spec.layers - 1))


def _make(device: torch.device) -> tuple[Path, list[str], torch.device]:
    path = _checkpoint()[1]
    for file in path.glob("*.safetensors"):
        file.read_bytes()  # warm
    return path, _wanted(path), device


def _safetensors(inputs: Any) -> Run:
    from safetensors import safe_open

    path, names, device = inputs
    index = open_checkpoint(path)

    def run() -> object:
        # cloned: a lazy mapping has read nothing yet
        tensors = {}
        for name in names:
            with safe_open(path / index.entry(name).shard, "pt", device=str(device)) as file:
                tensors[name] = file.get_tensor(name).clone()
        return tensors

    return run


def _engine(method: str) -> Callable[[Any], Run]:
    def build(inputs: Any) -> Run:
        path, names, device = inputs
        index = open_checkpoint(path)

        def run() -> object:
            with CheckpointReader(index, method=method) as reader:  # type: ignore[arg-type]
                return reader.read(names, device=str(device))

        return run

    return build


def _contest(device: str) -> Contest:
    S = SHAPES
    layer = S.D * S.E * (2 * S.H + 2 * S.K) + 3 * S.D * S.F + 2 * S.D
    wanted = 2 * (2 * layer + 2 * S.V * S.D + S.D)
    arms: dict[str, Callable[[Any], Run]] = {
        "safetensors": _safetensors, "engine": _engine("auto"), "engine, mapped": _engine("mmap"),
    }  # fmt: skip
    return Contest("detached tensors, warm", f"{wanted / 1e6:.0f} MB of 0.44 GB", _make, arms, 0.0, 2 * wanted, device)


CONTESTS = [_contest("cpu"), _contest("cuda")]

test_reader = pytest_benchmark(CONTESTS)
