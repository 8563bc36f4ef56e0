"""Sizes that the ledgers of both kinds of arms share, in elements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from elo_engine.measure.setting import SHALLOW, Setting
from elo_engine.model.spec import ModelSpec

SCALE_GROUP = 256  # parameters that share an 8-bit state's scale, in this engine and in bitsandbytes

# Weights of 24 bits are updated so many elements at a time (model/split_weights.py): the number in fp32, and 64-bit
# integers for the random bits with a temporary of theirs.
SPLIT_CHUNK, _SPLIT_BYTES = 256 * 16384, 20


ADAMW_TILE, TILES_PER_SUM = 2048, 8  # kernels/adamw_plan.py: a map entry (two int32) a tile, an fp32 sum for eight


def adamw_plan_bytes(leaves: Sequence[int]) -> int:
    """On a GPU, of what AdamW's kernels are launched by, of leaves of so many elements."""
    tiles = sum(-(-size // ADAMW_TILE) for size in leaves)
    return 8 * tiles + 4 * -(-tiles // TILES_PER_SUM)


# Of a step that is a CUDA graph (train/step_buffers.py): documents that a micro-batch has room for at least, and the
# step's own numbers.
FEWEST_DOCUMENTS, _NUMBERS = 16, 4


def padded_documents(setting: Setting) -> int:
    """Documents of a micro-batch that attention is told of, where each row is one; a graph's has empty ones too."""
    rows = setting.micro_batch
    return rows if not setting.graph else max(FEWEST_DOCUMENTS, 1 << (rows - 1).bit_length())


def step_buffer_bytes(setting: Setting) -> int:
    """What a step that is a CUDA graph is fed from: ids, labels, positions of all its tokens, bounds of documents, and
    the ids that the embedding's gradient has rows for where it learns.
    """
    if not setting.graph:
        return 0
    offsets = 4 * setting.micro_batches * (padded_documents(setting) + 1)
    distinct = 0 if setting.arm in SHALLOW else 8 * outer_rows(setting)
    return 3 * 8 * setting.tokens_per_step + offsets + 4 * _NUMBERS + distinct


def outer_rows(setting: Setting) -> int:
    """Rows of the embedding's gradient: a step has no more different ids than tokens, nor than the vocabulary. Without
    graphs an upper bound, which is counted.
    """
    return min(setting.spec.V, setting.tokens_per_step)


def split_spike(largest: int) -> int:
    """Bytes that the update of weights of 24 bits takes while it is made, by the elements of the largest leaf."""
    return _SPLIT_BYTES * min(largest, SPLIT_CHUNK)


@dataclass(frozen=True)
class Matrix:
    """A weight of a layer, with the bias beside it: `out` rows of `into` columns."""

    out: int
    into: int
    bias: bool = False

    @property
    def size(self) -> int:
        """Elements of the weight."""
        return self.out * self.into

    @property
    def biases(self) -> int:
        """Elements of the bias."""
        return self.out if self.bias else 0


def projections(spec: ModelSpec) -> dict[str, Matrix]:
    """The seven projections of a decoder layer under transformers' names."""
    D, F, q, kv = spec.D, spec.F, spec.H * spec.E, spec.K * spec.E
    attention, mlp = spec.qkv_bias, spec.mlp_bias
    return {
        "q": Matrix(q, D, attention),
        "k": Matrix(kv, D, attention),
        "v": Matrix(kv, D, attention),
        "o": Matrix(D, q, spec.output_bias),
        "gate": Matrix(F, D, mlp),
        "up": Matrix(F, D, mlp),
        "down": Matrix(D, F, mlp),
    }


def coded_bytes(size: int) -> int:
    """Two moments of 8 bits with their fp32 scales, of a tensor of `size` elements."""
    return 2 * size + 2 * 4 * -(-size // SCALE_GROUP)
