"""The whole model over several processes by FSDP2 (torch's `fully_shard`; ZeRO stage 3, arXiv 1910.02054).

Each process keeps its share of the rows of every weight, in fp32: these are the masters. A layer's weights are gathered
in the compute dtype before it runs, forward and backward, and let go after; gradients are summed in fp32 and each
process keeps its share of them. Embedding, final norm and head form the outermost group and stay gathered for a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from elo_engine.checkpoint import CheckpointIndex, CheckpointReader
from elo_engine.config import Recompute
from elo_engine.errors import RefusedError
from elo_engine.model import names, ops
from elo_engine.model.decoder import Batch, Leaf, run_layer
from elo_engine.model.full import check_shapes
from elo_engine.model.layers import Packing, Ropes, RopeTable, final_norm, scale_embedded
from elo_engine.model.spec import ModelSpec

Read = Callable[[list[str]], dict[str, Tensor]]


class _Layer(nn.Module):
    """One decoder layer, its weights packed as `names.layer_parts` says."""

    def __init__(self, spec: ModelSpec, index: int, tensors: dict[str, Tensor], recompute: Recompute) -> None:
        super().__init__()
        self._spec, self._index, self._recompute = spec, index, recompute
        self.of: dict[str, tuple[str, ...]] = {}
        self.shapes: dict[str, tuple[tuple[int, ...], ...]] = {}
        for part in names.layer_parts(spec):
            full = tuple(names.layer_prefix(index) + name for name in part.names)
            pieces = [tensors.pop(name) for name in full]
            self.register_parameter(part.key, nn.Parameter(torch.cat(pieces) if len(pieces) > 1 else pieces[0]))
            self.of[part.key], self.shapes[part.key] = full, part.shapes

    def forward(self, hidden_ND: Tensor, ropes: Ropes, packing: Packing) -> Tensor:
        """[N, D] -> [N, D]."""
        weights = {key: cast(Tensor, getattr(self, key)) for key in self.of}
        return run_layer(self._recompute, self._spec, self._index, weights, hidden_ND, ropes, packing)


class ShardedModel(nn.Module):
    """This process's share of the whole model; all processes make it, and call it, together.

    Args:
        read: names to tensors in fp32 on the device, asked once for each layer and for what is around them, so that no
            process ever holds more than its share and one layer.
        dtype: in which it computes. recompute: as of `Decoder`.

    Raises:
        RefusedError: a torch whose `fully_shard` cannot sum without a mean.
    """

    def __init__(
        self, spec: ModelSpec, read: Read, *, device: torch.device, dtype: torch.dtype, recompute: Recompute
    ) -> None:
        super().__init__()
        self.spec, self.device, self.dtype = spec, device, dtype
        self._rope = RopeTable(spec, device)
        mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
        whole = dtype == torch.float32
        policy = MixedPrecisionPolicy(
            param_dtype=None if whole else dtype, reduce_dtype=None if whole else torch.float32,
            cast_forward_inputs=False,
        )  # fmt: skip
        self.layers = nn.ModuleList()
        for index in range(spec.layers):
            wanted = [names.layer_prefix(index) + name for part in names.layer_parts(spec) for name in part.names]
            layer = _Layer(spec, index, read(wanted), recompute)
            fully_shard(layer, mesh=mesh, mp_policy=policy)
            self.layers.append(layer)
        outer = [names.EMBEDDING, names.FINAL_NORM] + ([] if spec.tied else [names.HEAD])
        tensors = read(outer)
        self.embedding_VD = nn.Parameter(tensors[names.EMBEDDING])
        self.norm_D = nn.Parameter(tensors[names.FINAL_NORM])
        if not spec.tied:
            self.head_VD = nn.Parameter(tensors[names.HEAD])
        fully_shard(self, mesh=mesh, mp_policy=policy)
        for module in self.modules():
            if isinstance(module, FSDPModule):
                _sum(module)

    def forward(self, batch: Batch, per_token: bool = False) -> Tensor:
        """The sum of this process's losses in nats, fp32 []; per_token: each, fp32 [N], 0 where there is no label."""
        embedding_VD = self.embedding_VD
        ropes = self._rope.gather(batch.packing, batch.longest)
        hidden_ND = scale_embedded(self.spec, F.embedding(batch.ids_N, embedding_VD))
        for layer in self.layers:
            hidden_ND = layer(hidden_ND, ropes, batch.packing)
        hidden_ND = final_norm(self.spec, hidden_ND, self.norm_D)
        head_VD = embedding_VD if self.spec.tied else self.head_VD
        loss = ops.token_losses if per_token else ops.linear_cross_entropy
        return loss(hidden_ND, head_VD, batch.labels_N, softcap=self.spec.head_softcap)

    @property
    def tokens_at_once(self) -> int:
        """Batch by batch: a layer is gathered for each, and a signal is looked for between them."""
        return 1

    @torch.no_grad()
    def losses_of(self, batches: Sequence[Batch], progress: Callable[[float], None]) -> list[Tensor]:
        """Cross-entropy of every token of each batch in nats, fp32 [N], 0 where there is no label; all processes score
        the same batches together. progress: called with the share that is done.
        """
        found = []
        for number, batch in enumerate(batches, 1):
            found.append(cast(Tensor, self(batch, per_token=True)))
            progress(number / len(batches))
        return found

    @property
    def leaves(self) -> Iterator[tuple[Leaf, DTensor]]:
        """In `Decoder`'s order: what is stacked in each weight, with this process's rows of it; and the weight."""

        def leaf(weight: Any, full: tuple[str, ...], shapes: tuple[tuple[int, ...], ...]) -> tuple[Leaf, DTensor]:
            assert isinstance(weight, DTensor)
            return Leaf(weight.to_local().detach(), full, shapes), weight

        spec = self.spec
        for layer in self.layers:
            assert isinstance(layer, _Layer)
            for key, full in layer.of.items():
                yield leaf(getattr(layer, key), full, layer.shapes[key])
        yield leaf(self.embedding_VD, (names.EMBEDDING,), ((spec.V, spec.D),))
        yield leaf(self.norm_D, (names.FINAL_NORM,), ((spec.D,),))
        if not spec.tied:
            yield leaf(self.head_VD, (names.HEAD,), ((spec.V, spec.D),))


def _sum(module: FSDPModule) -> None:
    """Gradients are to be sums over the processes: losses are divided by the loss tokens of all of them already."""
    if not hasattr(module, "set_force_sum_reduction_for_comms"):
        raise RefusedError(
            f"torch {torch.__version__}: its fully_shard cannot sum gradients without a mean; use torch 2.9 or newer, "
            "or align.engine: resident, which keeps the whole model in every process"
        )
    module.set_force_sum_reduction_for_comms(True)
    module.set_gradient_divide_factor(1.0)


def load_sharded(
    index: CheckpointIndex,
    spec: ModelSpec,
    *,
    device: torch.device,
    dtype: torch.dtype,
    recompute: Recompute,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[ShardedModel, int]:
    """Read a whole checkpoint layer by layer, each process keeping its share. Returns it and the bytes taken."""
    wanted = list(names.expected_shapes(spec))
    check_shapes(index, spec, wanted)
    total, taken = index.bytes_of(wanted), 0

    def read(part: list[str]) -> dict[str, Tensor]:
        nonlocal taken
        with CheckpointReader(index) as reader:
            tensors = reader.read(part, device=str(device), dtype=torch.float32)
            taken += reader.bytes_read
        if progress is not None:
            progress(min(taken, total), total)
        return tensors

    return ShardedModel(spec, read, device=device, dtype=dtype, recompute=recompute), taken
