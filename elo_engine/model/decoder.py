"""A decoder with some or all of its layers: the one model class, of which the shallow and the whole model are two
fillings.

Weights are leaves in the compute dtype, packed as `names.layer_parts` says. Which of them learn is fixed when the
model is made: the shallow model's embedding, final norm and head are frozen (paper section 3.2), the whole model
learns everything.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from elo_engine.config import Recompute
from elo_engine.model import names, ops
from elo_engine.model.bridge import Bridge, Gap, Observer, gaps
from elo_engine.model.layers import (
    LayerWeights,
    Packing,
    Ropes,
    RopeTable,
    decoder_layer,
    final_norm,
    layer_gradient,
    scale_embedded,
)  # fmt: skip
from elo_engine.model.outer import OuterGradients, embed
from elo_engine.model.spec import ModelSpec


@dataclass(frozen=True)
class Batch:
    """A micro-batch on the device: ids_N and labels_N (int64, -100 = no loss), positions and document bounds."""

    ids_N: Tensor
    labels_N: Tensor
    packing: Packing
    longest: int  # one more than the largest position
    embedded_ND: Tensor | None = None  # the embedding's rows of ids_N, where the embedding is not on the device


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


def embedding_rows(ids_N: Tensor, embedding_VD: Tensor) -> Tensor:
    """[N] -> [N, D] on the ids' device; it waits where the embedding is on another."""
    return F.embedding(ids_N.to(embedding_VD.device), embedding_VD).to(ids_N.device)


class Decoder:
    """Embedding -> decoder layers -> final norm -> head.

    Args:
        tensors: checkpoint names to tensors, in the compute dtype, on one device.
        layers: original indices of the layers that are present, in order.
        train_outer: whether embedding, final norm and head learn too (the whole model) or are frozen (the shallow one).
        train_layers: False freezes the layers as well, for evaluation.
        recompute: what of a layer is made again in the backward pass instead of kept; see `run_layer`.
        bridges: stand in for the layers that are missing at these gaps, each cast to the tensors' dtype and device;
            at a gap without one, what leaves a layer enters the next as it is.

    Attributes:
        observers: by layer, called with the hidden state [N, D] that enters it (of `spec.layers`: the final norm), in
            the forward pass of `loss_sum` and `hidden_states`, once a micro-batch and without gradients. Evaluation
            (`token_losses`, `logits`) is not observed: what is learned must not depend on held-out text.
        fp8: which products of training multiply 8-bit operands, of `use_fp8`; evaluation's never do.
    """

    def __init__(
        self,
        spec: ModelSpec,
        tensors: dict[str, Tensor],
        layers: tuple[int, ...],
        *,
        train_outer: bool,
        train_layers: bool = True,
        recompute: Recompute = "none",
        bridges: Mapping[Gap, Bridge] | None = None,
    ) -> None:
        assert recompute in get_args(Recompute), f"recompute is one of {get_args(Recompute)}, not {recompute!r}"
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
        self.device = self.norm_D.device  # the frozen embedding may be on the host
        self.dtype = self.embedding_VD.dtype
        self._rope = RopeTable(spec, self.device)
        self._outer: OuterGradients | None = None
        self._set_bridges(bridges or {})
        self.observers: dict[int, Observer] = {}
        self.fp8: ops.Fp8 = "none"
        self._fp8_head: ops.Fp8Head | None = None

    @torch.no_grad()
    def use_fp8(self, fp8: ops.Fp8, batch: Batch | None = None, *, seed: int = 0) -> None:
        """Train with 8-bit operands in the products of the head, which must be frozen, or of all.

        batch: text as it will be trained on, by which the head's outliers are chosen; else by the head alone. seed: as
        of `ops.Fp8Head`.
        """
        assert fp8 == "none" or not self.head_VD.requires_grad, "a head that learns is not what was rounded"
        if fp8 != "none" and self._fp8_head is None:
            hidden_ND = None if batch is None else self.hidden_states(batch)
            self._fp8_head = ops.Fp8Head(self.head_VD, self.spec.head_softcap, hidden_ND, seed=seed)
        self.fp8 = fp8

    def round_fp8(self, step: int) -> None:
        """Before a step is trained: round the head for it; nothing where its products are of bf16."""
        if self.fp8 != "none" and self._fp8_head is not None:
            self._fp8_head.round(step)

    @property
    def fp8_tensors(self) -> list[Tensor]:
        """The head in 8 bits, both layouts, their scales, and what they were made with."""
        return [] if self._fp8_head is None else self._fp8_head.tensors

    def _set_bridges(self, bridges: Mapping[Gap, Bridge]) -> None:
        at = self.layer_indices
        assert set(bridges) <= set(gaps(self.spec.layers, at)), f"bridges at {list(bridges)}, of {at}"
        self._bridges = {gap: bridge.to(self.device, self.dtype) for gap, bridge in bridges.items()}
        self._bridge_into = {gap[1]: bridge for gap, bridge in self._bridges.items()}

    def _leaf(self, tensor: Tensor, full: tuple[str, ...], shapes: tuple[tuple[int, ...], ...], train: bool) -> Tensor:
        leaf = tensor.detach().requires_grad_(train)
        if train:
            self.leaves.append(Leaf(leaf, full, shapes))
        return leaf

    @property
    def host_embedding_VD(self) -> Tensor | None:
        """The embedding, where it is not on the device; `Batch.embedded_ND` brings its rows."""
        return None if self.embedding_VD.device == self.device else self.embedding_VD

    def shallow(
        self, layers: tuple[int, ...], *, recompute: Recompute = "none", bridges: Mapping[Gap, Bridge] | None = None
    ) -> Decoder:
        """The shallow model of ELO pretraining made of these very tensors: its layers learn for both models, embedding,
        final norm and head are those of this model as they are, frozen.
        """
        part = copy.copy(self)
        part.layer_indices, part.recompute = layers, recompute
        part.layers = [self.layers[self.layer_indices.index(index)] for index in layers]
        inside = {id(tensor) for weights in part.layers for tensor in weights.values()}
        part.leaves = [leaf for leaf in self.leaves if id(leaf.tensor) in inside]
        part.embedding_VD, part.norm_D = self.embedding_VD.detach(), self.norm_D.detach()
        part.head_VD = part.embedding_VD if self.spec.tied else self.head_VD.detach()
        part.observers, part._outer = {}, None
        part._set_bridges(bridges or {})
        return part

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

    @property
    def bridge_tensors(self) -> list[Tensor]:
        """Of all bridges: frozen weights that no checkpoint has."""
        return [t for bridge in self._bridges.values() for t in (bridge.matrix_DD, bridge.bias_D)]

    @torch.no_grad()
    def replace_bridges(self, bridges: Mapping[Gap, Bridge]) -> None:
        """Take the values of other bridges at the same gaps, in place; not between a forward pass and its backward."""
        assert set(bridges) == set(self._bridges), f"bridges at {list(bridges)}, of {list(self._bridges)}"
        for gap, bridge in bridges.items():
            self._bridges[gap].copy_(bridge)

    def begin_step(self, ids: Tensor, *, distinct: bool = False) -> None:
        """Collect the gradients of embedding and head outside autograd from here on, for one optimizer step that is fed
        these token ids, as `TokenRows` takes them; `outer_gradients` hands them out and ends it. Nothing where the
        outer weights are frozen, or where the definitions compute (`kernels: reference`).
        """
        if self.embedding_VD.requires_grad and not ops.use_reference():
            self._outer = OuterGradients(self.embedding_VD, self.head_VD, ids, distinct=distinct)

    def outer_gradients(self, scale: float | Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Embedding and head, each with its gradient of the step in fp32; none where autograd has them, or nobody.

        scale: what the losses were multiplied with before the backward pass.
        """
        outer, self._outer = self._outer, None
        return iter(()) if outer is None else outer.finish(scale)

    def drop_step(self) -> None:
        """A step is given up: what was collected of it is let go."""
        self._outer = None

    def hidden_states(self, batch: Batch) -> Tensor:
        """Final-norm output [N, D] for every token."""
        ropes = self._rope.gather(batch.packing, batch.longest)
        outer = self._outer if torch.is_grad_enabled() else None
        if batch.embedded_ND is not None:
            hidden_ND = batch.embedded_ND
        elif outer is None:
            hidden_ND = embedding_rows(batch.ids_N, self.embedding_VD)
        else:
            hidden_ND = embed(batch.ids_N, self.embedding_VD, outer)
        hidden_ND = scale_embedded(self.spec, hidden_ND)
        fp8 = self.fp8 == "all" and torch.is_grad_enabled()
        for index, weights in zip(self.layer_indices, self.layers, strict=True):
            hidden_ND = self._enter(index, hidden_ND)
            hidden_ND = run_layer(self.recompute, self.spec, index, weights, hidden_ND, ropes, batch.packing, fp8=fp8)
        hidden_ND = self._enter(self.spec.layers, hidden_ND)
        return final_norm(self.spec, hidden_ND, self.norm_D)

    def _enter(self, layer: int, hidden_ND: Tensor) -> Tensor:
        """What enters a layer, or of `spec.layers` the final norm: across the gap before it, if there is a bridge."""
        bridge, observer = self._bridge_into.get(layer), self.observers.get(layer)
        if bridge is not None:
            hidden_ND = bridge(hidden_ND)
        if observer is not None:
            with torch.no_grad():
                observer(hidden_ND.detach())
        return hidden_ND

    @contextmanager
    def _unobserved(self) -> Iterator[None]:
        observers, self.observers = self.observers, {}
        try:
            yield
        finally:
            self.observers = observers

    def loss_sum(self, batch: Batch) -> Tensor:
        """Sum of the cross-entropies in nats over the tokens with a label: fp32 scalar, to be divided by the step's
        count.
        """
        return self.head_loss(self.hidden_states(batch), batch.labels_N)

    def head_loss(self, hidden_ND: Tensor, labels_N: Tensor) -> Tensor:
        """`loss_sum` of the final norm's output."""
        if self.fp8 != "none" and torch.is_grad_enabled():
            assert self._fp8_head is not None
            return ops.linear_cross_entropy_fp8(
                hidden_ND, self.head_VD, self._fp8_head, labels_N, softcap=self.spec.head_softcap
            )
        head_sum_VD = None if self._outer is None or not torch.is_grad_enabled() else self._outer.head_sum_VD
        return ops.linear_cross_entropy(
            hidden_ND, self.head_VD, labels_N, softcap=self.spec.head_softcap, d_head_sum_VD=head_sum_VD
        )

    @torch.no_grad()
    def token_losses(self, batch: Batch) -> Tensor:
        """Cross-entropy of every token in nats, fp32 [N], 0 where there is no label."""
        with self._unobserved():
            return ops.token_losses(
                self.hidden_states(batch), self.head_VD, batch.labels_N, softcap=self.spec.head_softcap
            )

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """All logits [N, V] in the compute dtype: for tests and small inputs only."""
        with self._unobserved():
            logits_NV, cap = F.linear(self.hidden_states(batch), self.head_VD), self.spec.head_softcap
            return logits_NV if cap is None else cap * torch.tanh(logits_NV / cap)


def run_layer(
    recompute: Recompute, spec: ModelSpec, index: int, weights: LayerWeights, hidden_ND: Tensor, ropes: Ropes,
    packing: Packing, *, fp8: bool = False,
) -> Tensor:  # fmt: skip
    """`decoder_layer`, which for the backward pass keeps all that it needs (none), all but the output of the MLP's
    first product (selective), or its input alone (layer); the same bits each way.
    """
    if recompute == "none" or not torch.is_grad_enabled():
        return decoder_layer(spec, index, weights, hidden_ND, ropes, packing, fp8=fp8)
    if recompute == "selective":
        return decoder_layer(spec, index, weights, hidden_ND, ropes, packing, selective=True, fp8=fp8)
    return _RunAgain.apply(hidden_ND, weights["output"], spec, index, weights, ropes, packing, fp8)  # type: ignore[no-any-return]


class _RunAgain(torch.autograd.Function):
    """A layer that keeps its input alone and is run again in the backward pass; its weights get their gradients then.

    `anchor` is a weight of the layer: where no hidden state needs a gradient it tells autograd that this node does.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, anchor: Tensor, spec: ModelSpec, index: int, weights: LayerWeights,
        ropes: Ropes, packing: Packing, fp8: bool,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(hidden_ND)
        ctx.layer = spec, index, weights, ropes, packing
        ctx.fp8 = fp8
        return decoder_layer(spec, index, weights, hidden_ND, ropes, packing, fp8=fp8)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (hidden_ND,) = ctx.saved_tensors
        spec, index, weights, ropes, packing = ctx.layer
        d_hidden_ND = layer_gradient(
            spec, index, weights, hidden_ND, ropes, packing, grads[0], need_d_hidden=ctx.needs_input_grad[0],
            fp8=ctx.fp8,
        )  # fmt: skip
        return d_hidden_ND, *[None] * 7
