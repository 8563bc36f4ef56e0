"""The model of a benchmark: published shapes with random weights made on the device, or a real checkpoint. The same
weights for every arm, whoever makes the model.

Random weights are a function of a tensor's checkpoint name and shape alone: normal with a variance of 1 over the width
they are multiplied with, norms 1, biases 0. Every layer and every position then has its part in the loss and in its
gradient, by which arms are held against each other.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from elo_engine.checkpoint import CheckpointReader, open_checkpoint
from elo_engine.config import Recompute
from elo_engine.measure.setting import Setting
from elo_engine.model import names
from elo_engine.model.decoder import Decoder
from elo_engine.model.presets import PRESETS, preset_config
from elo_engine.model.shallow import shallow_names
from elo_engine.model.spec import ModelSpec, read_spec

if TYPE_CHECKING:
    from elo_engine.stream.store import Store

SEED = 42
STEPS_OF_TEXT = 16  # drawn once; the text repeats after that
_PIECE = 1 << 21


@dataclass(frozen=True)
class BenchModel:
    """Shapes, and where the weights come from."""

    name: str
    config: dict[str, Any]
    folder: Path | None = None  # None: random weights

    @property
    def spec(self) -> ModelSpec:
        """The shapes."""
        return read_spec(self.config)


def open_model(model: str) -> BenchModel:
    """A name of PRESETS, a checkpoint folder, or a hub id.

    Raises:
        UsageError, RefusedError, FailedError: no such model, not supported, or damaged.
    """
    if model in PRESETS:
        return BenchModel(model, preset_config(model))
    from elo_engine.checkpoint import resolve_model

    folder = resolve_model(model)
    return BenchModel(folder.name, open_checkpoint(folder).config, folder)


@torch.no_grad()
def fill(tensor: Tensor, name: str) -> Tensor:
    """Random weights of a checkpoint tensor, in place."""
    if name.endswith("bias"):
        return tensor.zero_()
    if tensor.ndim == 1:
        return tensor.fill_(1.0)
    generator = torch.Generator(tensor.device).manual_seed(zlib.crc32(name.encode()) + SEED)
    return tensor.normal_(0.0, tensor.shape[-1] ** -0.5, generator=generator)


def engine_model(
    model: BenchModel, layers: tuple[int, ...], *, shallow: bool, recompute: Recompute, device: torch.device,
    dtype: torch.dtype,
) -> Decoder:  # fmt: skip
    """This engine's shallow model of `layers`, or its whole model."""
    spec = model.spec
    wanted = shallow_names(spec, layers) if shallow else list(names.expected_shapes(spec))
    if model.folder is None:
        shapes = names.expected_shapes(spec)
        tensors = {name: fill(torch.empty(shapes[name], device=device, dtype=dtype), name) for name in wanted}
    else:
        with CheckpointReader(open_checkpoint(model.folder)) as reader:
            tensors = reader.read(wanted, device=str(device), dtype=dtype)
    present = layers if shallow else tuple(range(spec.layers))
    return Decoder(spec, tensors, present, train_outer=not shallow, recompute=recompute)


class _Drawn(dict[str, Tensor]):
    """Random weights of a whole model, each drawn on the device when it is taken: `engine_model`'s to the bit, which
    depend on whose generator draws them.
    """

    def __init__(self, spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self._shapes, self._device, self._dtype = names.expected_shapes(spec), device, dtype

    def pop(self, name: str, *default: object) -> Tensor:
        return fill(torch.empty(self._shapes[name], device=self._device, dtype=self._dtype), name)


def fill_store(model: BenchModel, store: Store) -> None:
    """The weights of `engine_model`'s whole model into a store, one after another."""
    if model.folder is None:
        store.fill(_Drawn(model.spec, store.device, store.dtype))
    else:
        store.load(open_checkpoint(model.folder))


def transformers_model(
    model: BenchModel, layers: tuple[int, ...], *, shallow: bool, device: torch.device, dtype: torch.dtype
) -> Any:
    """transformers' own model with the same weights; `shallow`: cut down to `layers`, everything else frozen."""
    from transformers import AutoConfig, AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention_of(device)}
    if model.folder is not None:
        made = AutoModelForCausalLM.from_pretrained(model.folder, **options).to(device)
    else:
        config = dict(model.config)
        present = layers if shallow else tuple(range(model.spec.layers))
        config["num_hidden_layers"] = len(present)
        with torch.device(device):
            made = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config), **options)
        for name, parameter in made.named_parameters():  # a tied head is listed once, as the embedding
            fill(parameter, _original(name, present))
    made.config.use_cache = False
    if shallow and model.folder is not None:
        kept = torch.nn.ModuleList([made.model.layers[index] for index in layers])
        for position, layer in enumerate(kept):
            layer.self_attn.layer_idx = position
        made.model.layers = kept
        made.config.num_hidden_layers = len(layers)
    if shallow:
        made.requires_grad_(False)
        made.model.layers.requires_grad_(True)
    return made


def _original(name: str, present: tuple[int, ...]) -> str:
    """A parameter's name in the whole model, of which only these layers are there."""
    parts = name.split(".")
    if parts[:2] == ["model", "layers"]:
        parts[2] = str(present[int(parts[2])])
    return ".".join(parts)


def attention_of(device: torch.device) -> str:
    """The fused attention that a transformers user has: flash-attn where it is installed, else torch's SDPA."""
    if device.type == "cuda":
        import importlib.util

        if importlib.util.find_spec("flash_attn") is not None:
            return "flash_attention_2"
    return "sdpa"


def random_rows(setting: Setting) -> tuple[Tensor, Tensor]:
    """ids and labels [rows, T] on the CPU for STEPS_OF_TEXT steps: every row one document of uniformly drawn tokens, a
    label for each.
    """
    generator = torch.Generator().manual_seed(SEED)
    rows = STEPS_OF_TEXT * setting.micro_batch * setting.micro_batches
    drawn = torch.randint(setting.spec.V, (rows, setting.sequence_length + 1), generator=generator)
    return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()


def checksum(tensor: Tensor) -> int:
    """A number made of every bit of a tensor and its place, so that changes do not cancel: piece by piece, since a
    copy of an 8B model's head in int64 would be 4 GiB.
    """
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = tensor.detach().reshape(-1)
    bits = flat.view(kinds[flat.element_size()])
    count = min(_PIECE, len(bits))  # of one sequence, of which a small tensor needs the beginning
    weights = torch.randint(1 << 40, (count,), generator=torch.Generator().manual_seed(SEED)).mul_(2).add_(1)
    weights = weights.to(tensor.device)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for piece in bits.split(_PIECE):
        total = total * 1_000_003 + (piece.to(torch.int64) * weights[: len(piece)]).sum()  # modulo 2^64
    return int(total)

