"""A decoder with some or all of its layers: the one model class, of which the shallow and the whole model are two
fillings.

Weights are leaves in the compute dtype, packed as `names.layer_parts` says. Which of them learn is fixed when the
model is made: the shallow model's embedding, final norm and head are frozen (paper section 3.2), the whole model
learns everything.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from elo_engine.model import names, ops
from elo_engine.model.layers import LayerWeights, Packing, RopeTable, decoder_layer
from elo_engine.model.spec import ModelSpec


@dataclass(frozen=True)
class Batch:
    """A micro-batch on the device: ids_N and labels_N (int64, -100 = no loss), positions and document bounds."""

    ids_N: Tensor
    labels_N: Tensor
    packing: Packing
    longest: int  # one more than the largest position


@dataclass(frozen=True)
class Leaf:
    """A trainable tensor and the checkpoint tensors stacked in it along dimension 0."""

    tensor: Tensor
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    def split(self, packed: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Views of a tensor of this leaf's shape (weight, gradient, moment) under the checkpoint's names."""
        start = 0
        for name, shape in zip(self.names, self.shapes, strict=True):
            yield name, packed[start : start + shape[0]]
            start += shape[0]


class Decoder:
    """Embedding -> decoder layers -> final norm -> head.

    Args:
        tensors: checkpoint names to tensors, in the compute dtype, on one device.
        layers: original indices of the layers that are present, in order.
        train_outer: whether embedding, final norm and head learn too (the whole model) or are frozen (the shallow one).
        train_layers: False freezes the layers as well, for evaluation.
    """

    def __init__(
        self,
        spec: ModelSpec,
        tensors: dict[str, Tensor],
        layers: tuple[int, ...],
        *,
        train_outer: bool,
        train_layers: bool = True,
        recompute: bool = False,
    ) -> None:
        self.spec = spec
        self.layer_indices = layers
        self.recompute = recompute
        self.leaves: list[Leaf] = []
        self.layers: list[LayerWeights] = []
        for index in layers:
            weights: LayerWeights = {}
            for part in names.layer_parts(spec):
                full = tuple(names.layer_prefix(index) + name for name in part.names)
                pieces = [
                    tensors.pop(name) for name in full
                ]  # taken out, so that packing never holds two copies of all
                packed = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
                weights[part.key] = self._leaf(packed, full, part.shapes, train_layers)
            self.layers.append(weights)
        V, D = spec.V, spec.D
        self.embedding_VD = self._leaf(tensors[names.EMBEDDING], (names.EMBEDDING,), ((V, D),), train_outer)
        self.norm_D = self._leaf(tensors[names.FINAL_NORM], (names.FINAL_NORM,), ((D,),), train_outer)
        self.head_VD = (
            self.embedding_VD if spec.tied else self._leaf(tensors[names.HEAD], (names.HEAD,), ((V, D),), train_outer)
        )
        self.device = self.embedding_VD.device
        self.dtype = self.embedding_VD.dtype
        self._rope = RopeTable(spec, self.device)

    def _leaf(self, tensor: Tensor, full: tuple[str, ...], shapes: tuple[tuple[int, ...], ...], train: bool) -> Tensor:
        leaf = tensor.detach().requires_grad_(train)
        if train:
            self.leaves.append(Leaf(leaf, full, shapes))
        return leaf

    def trainable(self) -> dict[str, Tensor]:
        """Checkpoint names of what learns -> views of the weights."""
        return {name: view for leaf in self.leaves for name, view in leaf.split(leaf.tensor.detach())}

    def frozen(self) -> dict[str, Tensor]:
        """Checkpoint names of what is present and does not learn -> tensors."""
        outer = {names.EMBEDDING: self.embedding_VD, names.FINAL_NORM: self.norm_D}
        if not self.spec.tied:
            outer[names.HEAD] = self.head_VD
        kept = {name: tensor for name, tensor in outer.items() if not tensor.requires_grad}
        for index, weights in zip(self.layer_indices, self.layers, strict=True):
            for part in names.layer_parts(self.spec):
                if not weights[part.key].requires_grad:
                    leaf = Leaf(
                        weights[part.key], tuple(names.layer_prefix(index) + n for n in part.names), part.shapes
                    )
                    kept.update(leaf.split(leaf.tensor))
        return kept

    def hidden_states(self, batch: Batch) -> Tensor:
        """Final-norm output [N, D] for every token."""
        rope = self._rope.gather(batch.packing.positions_N, batch.longest)
        hidden_ND = F.embedding(batch.ids_N, self.embedding_VD)
        for weights in self.layers:
            if self.recompute and torch.is_grad_enabled():
                hidden_ND = checkpoint(
                    decoder_layer, self.spec, weights, hidden_ND, rope, batch.packing, use_reentrant=False
                )
            else:
                hidden_ND = decoder_layer(self.spec, weights, hidden_ND, rope, batch.packing)
        return ops.rms_norm(hidden_ND, self.norm_D, self.spec.norm_eps)

    def loss_sum(self, batch: Batch) -> Tensor:
        """Sum of the cross-entropies in nats over the tokens with a label: fp32 scalar, to be divided by the step's
        count.
        """
        return ops.linear_cross_entropy(self.hidden_states(batch), self.head_VD, batch.labels_N)

    @torch.no_grad()
    def token_losses(self, batch: Batch) -> Tensor:
        """Cross-entropy of every token in nats, fp32 [N], 0 where there is no label."""
        return ops.token_losses(self.hidden_states(batch), self.head_VD, batch.labels_N)

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """All logits [N, V] in the compute dtype: for tests and small inputs only."""
        return F.linear(self.hidden_states(batch), self.head_VD)
