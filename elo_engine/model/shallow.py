"""The shallow model of ELO pretraining: the detached layers between the frozen embedding and the frozen norm and
head.

Paper section 3.2: the output of one detached layer is the input of the next; the layers between them are not loaded
at all, or a bridge takes their place (`bridge.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from elo_engine.checkpoint import CheckpointIndex, CheckpointReader
from elo_engine.config import Recompute
from elo_engine.model import names
from elo_engine.model.bridge import Bridge, Gap
from elo_engine.model.decoder import Decoder
from elo_engine.model.full import check_shapes
from elo_engine.model.spec import ModelSpec


def shallow_names(spec: ModelSpec, layers: tuple[int, ...]) -> list[str]:
    """Checkpoint names of everything the shallow model holds."""
    return names.outer_names(spec) + [name for index in layers for name in names.layer_names(spec, index)]


def load_shallow(
    index: CheckpointIndex,
    spec: ModelSpec,
    layers: tuple[int, ...],
    *,
    device: torch.device,
    dtype: torch.dtype,
    recompute: Recompute = "none",
    bridges: Mapping[Gap, Bridge] | None = None,
    progress: Callable[[int, int], None] | None = None,
    host_embedding: bool = False,
) -> tuple[Decoder, int]:
    """Read only the detached tensors and make the shallow model, with `bridges` at its gaps; returns it and the bytes
    taken from the checkpoint.

    Args:
        host_embedding: the embedding stays in host memory, and the device gets the rows of a micro-batch's tokens.

    Raises:
        FailedError: a tensor that the spec needs is missing or has another shape.
    """
    wanted = shallow_names(spec, layers)
    check_shapes(index, spec, wanted)
    with CheckpointReader(index) as reader:
        there = [name for name in wanted if not (host_embedding and name == names.EMBEDDING)]
        tensors: dict[str, Any] = reader.read(there, device=str(device), dtype=dtype, progress=progress)
        if host_embedding:
            tensors |= reader.read([names.EMBEDDING], dtype=dtype)
        taken = reader.bytes_read
    return Decoder(spec, tensors, layers, train_outer=False, recompute=recompute, bridges=bridges), taken
