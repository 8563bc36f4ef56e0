"""Floating-point operations that the method must do, counted from the shapes.

Counted: the GEMMs of the layers, causal attention (forward 2, backward 2.5 times its two products), the head. Not
counted: norms, activations, the embedding lookup, the optimizer, the gradient of a frozen head, dX below the first
trained layer. One multiply-add is two operations. Attention takes every row as one document of T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from elo_engine.model.spec import ModelSpec


@dataclass(frozen=True)
class TokenFlops:
    """Operations per token of forward and backward, by part."""

    linear: float
    attention: float
    head: float

    @property
    def total(self) -> float:
        return self.linear + self.attention + self.head


def _layer_matrices(spec: ModelSpec) -> int:
    return spec.D * spec.E * (2 * spec.H + 2 * spec.K) + 3 * spec.D * spec.F


def _attention_forward(spec: ModelSpec, T: int) -> float:
    """Per token and layer: two products over the (T + 1) / 2 tokens that a causal query sees on average."""
    seen = (T + 1) / 2
    if spec.window is not None and spec.window < T:
        w = spec.window
        seen = (w * (w + 1) / 2 + (T - w) * w) / T
    return 2 * 2 * spec.H * spec.E * seen


def full_step(spec: ModelSpec, T: int, *, recompute: bool = False) -> TokenFlops:
    """Whole-model training (alignment, full continual pretraining); `recompute`: each layer's forward pass runs
    twice.
    """
    passes = 4 if recompute else 3
    attention = _attention_forward(spec, T) * (4.5 if recompute else 3.5)
    return TokenFlops(
        linear=2.0 * passes * spec.layers * _layer_matrices(spec),
        attention=spec.layers * attention,
        head=6.0 * spec.D * spec.V,
    )


def shallow_step(spec: ModelSpec, layers: int, T: int) -> TokenFlops:
    """ELO pretraining of `layers` detached layers: the frozen head needs logits and dX alone, and nothing is needed
    below the first layer's query, key and value projection.
    """
    below_first = 2.0 * spec.D * spec.E * (spec.H + 2 * spec.K)
    return TokenFlops(
        linear=6.0 * layers * _layer_matrices(spec) - below_first,
        attention=layers * _attention_forward(spec, T) * 3.5,
        head=4.0 * spec.D * spec.V,
    )


def ideal_speedup(spec: ModelSpec, layers: int, T: int, pretrain_share: float) -> float:
    """Pipeline speedup over full continual pretraining if every operation took the same time."""
    ratio = shallow_step(spec, layers, T).total / full_step(spec, T).total
    return 1.0 / (pretrain_share * ratio + (1.0 - pretrain_share))
