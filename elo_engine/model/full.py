"""The whole model: every layer, everything learns. For alignment, for the full continual pretraining baseline, for
evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch

from elo_engine.checkpoint import CheckpointIndex, CheckpointReader
from elo_engine.config import Recompute
from elo_engine.errors import FailedError
from elo_engine.model import names
from elo_engine.model.decoder import Decoder
from elo_engine.model.spec import ModelSpec


def check_shapes(index: CheckpointIndex, spec: ModelSpec, wanted: Iterable[str]) -> None:
    """Hold the checkpoint's tensors against what the configuration says they are.

    Raises:
        FailedError: a tensor is missing, its shape is not the one config.json implies, or a layer has one that
            config.json does not call for.
    """
    expected = names.expected_shapes(spec)
    _refuse_unexpected(index, expected)
    for name in wanted:
        entry = index.entries.get(name)
        if entry is None:
            raise FailedError(
                f"{index.folder}: tensor {name!r} is missing although config.json ({spec.family}, {spec.layers} "
                "layers, "
                f"{'tied' if spec.tied else 'untied'} head) calls for it; the checkpoint and its config.json do "
                "not belong together"
            )
        if entry.shape != expected[name]:
            raise FailedError(
                f"{index.folder}: tensor {name!r} has shape {list(entry.shape)} and config.json implies "
                f"{list(expected[name])}; the checkpoint and its config.json do not belong together"
            )


# Of the layers, what older checkpoints hold beside the weights and nothing reads: it follows from config.json.
_DERIVED = ("rotary_emb.inv_freq",)


def _refuse_unexpected(index: CheckpointIndex, expected: Mapping[str, object]) -> None:
    """A weight of a layer that the configuration does not tell of would be left out of the maths without a word."""
    for name in index.entries:
        if name.startswith(names.LAYERS) and name not in expected and not name.endswith(_DERIVED):
            raise FailedError(
                f"{index.folder}: tensor {name!r} is in the checkpoint although config.json does not call for it; it "
                "would change the model's maths. The checkpoint and its config.json do not belong together"
            )


def load_full(
    index: CheckpointIndex,
    spec: ModelSpec,
    *,
    device: torch.device,
    dtype: torch.dtype,
    train: bool = True,
    recompute: Recompute = "none",
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Decoder, int]:
    """Read the whole checkpoint; `train=False` makes a model without gradients. Returns it and the bytes taken."""
    wanted = list(names.expected_shapes(spec))
    check_shapes(index, spec, wanted)
    with CheckpointReader(index) as reader:
        tensors = reader.read(wanted, device=str(device), dtype=dtype, progress=progress)
        taken = reader.bytes_read
    layers = tuple(range(spec.layers))
    model = Decoder(spec, tensors, layers, train_outer=train, train_layers=train, recompute=recompute)
    return model, taken
