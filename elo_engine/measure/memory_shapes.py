"""Sizes that the ledgers of both kinds of arms share, in elements."""

from __future__ import annotations

from dataclasses import dataclass

from elo_engine.model.spec import ModelSpec

SCALE_GROUP = 256  # parameters that share an 8-bit state's scale, in this engine and in bitsandbytes

# Weights of 24 bits are updated so many elements at a time (model/split_weights.py): the number in fp32, and 64-bit
# integers for the random bits with a temporary of theirs.
SPLIT_CHUNK, _SPLIT_BYTES = 256 * 16384, 20


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
