"""Held-out losses of a whole model with a few of its layers on the device: embedding, each layer, final norm and head,
each for all batches of a group before the next one comes.

The weights come from a checkpoint on disk, read by one thread a unit ahead of the computation, or from the store of a
`StreamedEngine`. In either case two layers are on the device at most: the one in use and the one that comes. The
operations on each batch and their order are those of `Decoder.token_losses`, so the losses are the same.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from elo_engine.checkpoint import CheckpointIndex
from elo_engine.measure.machine import device_room
from elo_engine.measure.meter import human_bytes
from elo_engine.model import names, ops
from elo_engine.model.decoder import Batch, Decoder, embedding_rows
from elo_engine.model.layers import LayerWeights, RopeTable, decoder_layer, final_norm, scale_embedded
from elo_engine.model.spec import ModelSpec
from elo_engine.stream.reading import CheckpointWeights
from elo_engine.stream.vocabulary import Vocabulary

if TYPE_CHECKING:
    from elo_engine.stream.engine import StreamedEngine

# Tokens of a group, which takes the model through the device once. Enough for the computation to hide the reading: an
# RTX 4090 takes 0.2 s for 64k tokens through a layer of Llama-3.1-8B (3.2 ms per 1k, PERFORMANCE.md section 4), which
# a disk of 2 GB/s takes for its 436 MB; a CPU is at least ten times slower.
GROUP_TOKENS = {"cuda": 65536, "cpu": 8192}
_HIDDEN_SHARE = 4  # the hidden states of a group take at most one over this of what is free
_LOGITS_BYTES = 1 << 30  # the head's loss makes logits in pieces, of this much at most


class Units(Protocol):
    """The weights of one pass over the model, asked for in this order, each once; they are there inside the block.

    vocabulary: how embedding and head come where they come in slices; `embedding` is not asked for then, and `last` is
    the final norm alone.
    """

    @property
    def vocabulary(self) -> Vocabulary | None: ...

    def embedding(self) -> AbstractContextManager[dict[str, Tensor]]:
        """Key `embedding`."""

    def layer(self, number: int) -> AbstractContextManager[LayerWeights]:
        """Of a decoder layer."""

    def last(self) -> AbstractContextManager[dict[str, Tensor]]:
        """Keys `norm` and `head`."""


class Weights(Protocol):
    """Where the weights of a whole model come from."""

    spec: ModelSpec
    device: torch.device
    dtype: torch.dtype

    @property
    def outer_comes(self) -> bool:
        """Whether embedding and head come to the device, each whole."""

    def sweep(self) -> AbstractContextManager[Units]:
        """One pass over the model. Whatever ends the block, nothing of it is under way after it."""


class LayerMajorScorer:
    """Scores groups of batches in layer-major order; see `evaluate.GroupScorer`."""

    def __init__(self, weights: Weights) -> None:
        self.weights, self.spec = weights, weights.spec
        self._rope = RopeTable(self.spec, weights.device)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.weights.device

    @property
    def tokens_at_once(self) -> int:
        """Tokens of a group: enough to hide the reading, as far as their hidden states fit what is free now."""
        fitting = free_bytes(self.device) // _HIDDEN_SHARE // (self.spec.D * self.weights.dtype.itemsize)
        return max(1, min(GROUP_TOKENS[self.device.type], fitting))

    @torch.no_grad()
    def losses_of(self, batches: Sequence[Batch], progress: Callable[[float], None]) -> list[Tensor]:
        """Cross-entropy of every token of each batch in nats, fp32 [N], 0 where there is no label.

        progress: called with the share of the work that is done; what it raises ends the pass.

        Raises:
            FailedError: the checkpoint cannot be read, or was changed.
        """
        spec, parts = self.spec, (self.spec.layers + 1) * len(batches)
        ropes = [self._rope.gather(batch.packing, batch.longest) for batch in batches]
        with self.weights.sweep() as units:
            slices = units.vocabulary
            if slices is not None:
                rows_of = slices.embed(torch.cat([batch.ids_N for batch in batches]).cpu(), lambda: None)
                hidden = [scale_embedded(spec, rows_of(batch.ids_N)) for batch in batches]
                del rows_of
            else:
                with _only_inside(units.embedding()) as weights:
                    table_VD = weights["embedding"]
                    hidden = [scale_embedded(spec, embedding_rows(batch.ids_N, table_VD)) for batch in batches]
                    del table_VD
            for number in range(spec.layers):
                with _only_inside(units.layer(number)) as weights:
                    for m, (batch, rope) in enumerate(zip(batches, ropes, strict=True)):
                        hidden[m] = decoder_layer(spec, number, weights, hidden[m], rope, batch.packing)
                        progress((number * len(batches) + m + 1) / parts)
            with _only_inside(units.last()) as weights:
                return self._losses(units, weights, hidden, batches, progress)

    def _losses(
        self, units: Units, weights: dict[str, Tensor], hidden: list[Tensor], batches: Sequence[Batch],
        progress: Callable[[float], None],
    ) -> list[Tensor]:  # fmt: skip
        """Of what leaves the last layer; `weights`: the final norm, and the head where it comes whole."""
        before, parts = self.spec.layers * len(batches), (self.spec.layers + 1) * len(batches)

        def normed_ND(m: int) -> Tensor:
            return final_norm(self.spec, hidden[m], weights["norm"])

        if units.vocabulary is not None:
            share = 1 / len(units.vocabulary.head)
            each, labels = itertools.count(before + share, share), [batch.labels_N for batch in batches]
            made = units.vocabulary.losses(normed_ND, labels, lambda: progress(min(1.0, next(each) / parts)))
            return [loss.losses_N() for loss in made]
        losses = []
        for m, batch in enumerate(batches):
            cap = self.spec.head_softcap
            losses.append(ops.token_losses(normed_ND(m), weights["head"], batch.labels_N, softcap=cap))
            progress((before + m + 1) / parts)
        return losses


@contextmanager
def _only_inside(block: AbstractContextManager[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """A unit whose tensors go with the end of the block, while the name of the dictionary stays."""
    with block as weights:
        try:
            yield weights
        finally:
            weights.clear()


# -- a checkpoint on disk


def checkpoint_scorer(
    index: CheckpointIndex, spec: ModelSpec, *, device: torch.device, dtype: torch.dtype
) -> LayerMajorScorer:
    """The model as it is on disk. Raises FailedError when the checkpoint does not fit its configuration."""
    return LayerMajorScorer(CheckpointWeights(index, spec, device, dtype))


def whole_model_scorer(index: CheckpointIndex, model: Decoder) -> LayerMajorScorer:
    """The whole model that reattaching `model` to its checkpoint would give, now: its layers as they are at each pass
    and its frozen embedding, norm and head, which are not read again, around the layers of `index`. `why_not` says
    whether that is possible.
    """
    layers = dict(zip(model.layer_indices, model.layers, strict=True))
    outer = {"embedding": model.embedding_VD, "norm": model.norm_D, "head": model.head_VD}
    return LayerMajorScorer(
        CheckpointWeights(index, model.spec, model.device, model.dtype, layers=layers, outer=outer)
    )


def why_not(scorer: LayerMajorScorer, tokens: int) -> str:
    """Why this model should not be scored in batches of `tokens` beside what the device holds now; "" where it can be.

    A checkpoint of a hub that is not there yet is one reason: scoring would fetch it.
    """
    weights = scorer.weights
    missing = weights.missing_bytes if isinstance(weights, CheckpointWeights) else 0
    if missing:
        return f"{human_bytes(missing)} of the model's other layers have not been fetched"
    need, room = streamed_bytes(scorer, tokens), free_bytes(scorer.device)
    if need > room:
        return f"it takes {human_bytes(need)} on the {scorer.device.type} and {human_bytes(room)} are free"
    return ""


# -- the store of a streamed engine


class StoreWeights:
    """The model of a `StreamedEngine`, as it is after its last step."""

    def __init__(self, engine: StreamedEngine) -> None:
        self._engine = engine
        self.spec, self.device, self.dtype = engine.spec, engine.device, engine.dtype
        self.outer_comes = not engine.store.sliced

    @contextmanager
    def sweep(self) -> Iterator[_StoreUnits]:
        """See `Weights`.

        Raises:
            FailedError: a step of `update: at_once` broke off half-way.
        """
        self._engine.flush()
        try:
            yield _StoreUnits(self._engine)
        finally:
            self._engine.device_units.forget()


class _StoreUnits:
    """Units in use, brought as the training brings them."""

    def __init__(self, engine: StreamedEngine) -> None:
        self._store, self._units = engine.store, engine.device_units
        self.vocabulary = Vocabulary(self._store, self._units) if self._store.sliced else None

    @contextmanager
    def embedding(self) -> Iterator[dict[str, Tensor]]:
        """See `Units`."""
        with self._units.outer(self._store.embedding) as present:
            self._units.soon(0)
            yield {"embedding": present.weights["embedding"].detach()}

    @contextmanager
    def layer(self, number: int) -> Iterator[LayerWeights]:
        """See `Units`."""
        with self._units.layer(number) as present:
            self._units.soon(number + 1 if number + 1 < self._store.layers else None)
            yield {key: leaf.detach() for key, leaf in present.weights.items()}

    @contextmanager
    def last(self) -> Iterator[dict[str, Tensor]]:
        """See `Units`."""
        vocabulary, number = self.vocabulary, self._store.last
        with self._units.outer(number if vocabulary is None else vocabulary.norm) as last:
            weights = {key: leaf.detach() for key, leaf in last.weights.items()}
            if vocabulary is not None or not self._store.spec.tied:
                yield weights
                return
            with self._units.outer(self._store.embedding) as embedding:
                yield weights | {"head": embedding.weights["embedding"].detach()}


def store_scorer(engine: StreamedEngine) -> LayerMajorScorer:
    """The model that a streamed engine trains, between its steps: updates that wait are made first."""
    return LayerMajorScorer(StoreWeights(engine))


# -- memory


def free_bytes(device: torch.device) -> int:
    """What the device can still give: also what torch keeps of a GPU without using it."""
    kept = 0
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return device_room(device).bytes + kept


def batch_bytes(spec: ModelSpec, tokens: int) -> int:
    """At most what a batch of so many tokens takes besides the weights: the activations of a layer as if they were all
    kept, in fp32, or the logits.
    """
    activations = 4 * tokens * (3 * spec.F + 3 * (spec.H + 2 * spec.K) * spec.E + 6 * spec.D)
    return activations + min(_LOGITS_BYTES, 4 * tokens * spec.V)


def streamed_bytes(scorer: LayerMajorScorer, tokens: int) -> int:
    """At most what a pass takes of the device besides what is there already: the two largest units that follow each
    other, and a batch.
    """
    spec, width, weights = scorer.spec, scorer.weights.dtype.itemsize, scorer.weights
    layer = width * layer_elements(spec)
    outer = width * spec.V * spec.D if weights.outer_comes else 0
    return layer + max(layer, outer) + batch_bytes(spec, tokens) + 2 * tokens * spec.D * width


def whole_bytes(spec: ModelSpec, dtype: torch.dtype) -> int:
    """The weights of the whole model."""
    return dtype.itemsize * sum(map(math.prod, names.expected_shapes(spec).values()))


def layer_elements(spec: ModelSpec) -> int:
    """Weights of one decoder layer."""
    return sum(math.prod(shape) for part in names.layer_parts(spec) for shape in part.shapes)
