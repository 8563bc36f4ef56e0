"""Floating-point operations counted from the shapes: what a method must compute, and what an arm executes.

Counted: the GEMMs of the layers, causal attention (forward 2, backward 2.5 times its two products), the head. Each
bridge of ELO pretraining: one product by a square matrix forward, one backward unless nothing below learns. Not
counted: norms, activations, the embedding lookup, the optimizer, the gradient of a frozen head, dX below the first
trained layer. One multiply-add is two operations. Attention takes every row as one document of T tokens.

`arm_flops` counts each arm twice. `model` is the work of the method, the numerator of MFU: the same whether a layer's
forward pass runs once or twice. `executed` is what the software runs, found with torch's own counter on transformers
5.23, peft 0.21 and this engine (tests/test_flops.py), with these differences from the textbook's "checkpointing is one
more forward pass":
* torch's non-reentrant checkpoint stops a recomputation once the last saved tensor is there again. A layer of
  transformers ends in `down_proj`, which saves its input before it multiplies, so that product is not run again. With
  adapters the layer ends in the B of `down_proj`'s adapter, and it is that small product which is not.
* This engine does not run that product again either: `layers.layer_gradient` takes its gradient without its value.
* `recompute: selective` makes one product of a layer again, gate and up: 4 D F a token.
* Below the first trained layer autograd forms dX of the query, key and value projections, because the norm before them
  has a weight that learns; the engine forms none. Adapters alone need none.
* With checkpointing switched on, transformers makes the embedding's output require a gradient, whatever learns: the
  backward pass then goes through every layer down to the embedding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from elo_engine.config import Recompute
from elo_engine.measure.setting import ENGINE, SHALLOW, Setting
from elo_engine.model.spec import ModelSpec

_NONE_AND_LAYER: tuple[Recompute, ...] = ("none", "layer")


@dataclass(frozen=True)
class TokenFlops:
    """Operations per token of forward and backward, by part."""

    linear: float
    attention: float
    head: float

    @property
    def total(self) -> float:
        return self.linear + self.attention + self.head


@dataclass(frozen=True)
class ArmFlops:
    """Operations per token of one arm: what its method must compute, and what the arm executes."""

    model: TokenFlops
    executed: TokenFlops


@dataclass(frozen=True)
class IdealSpeedups:
    """Pipeline speedups over full continual pretraining in transformers, if every operation took the same time."""

    over_plain: float  # full continual pretraining that recomputes nothing
    over_checkpointed: float  # with gradient checkpointing, as one card needs


def _layer_matrices(spec: ModelSpec) -> int:
    return spec.D * spec.E * (2 * spec.H + 2 * spec.K) + 3 * spec.D * spec.F


def _below_first(spec: ModelSpec) -> float:
    """dX of the first trained layer's query, key and value projections."""
    return 2.0 * spec.D * spec.E * (spec.H + 2 * spec.K)


def tokens_seen(spec: ModelSpec, T: int, layer: int = 0) -> float:
    """Tokens that a causal query of a layer sees on average in a document of T, itself included."""
    w = spec.kind(layer).window
    if w is not None and w < T:
        return (w * (w + 1) / 2 + (T - w) * w) / T
    return (T + 1) / 2


def _attention_forward(spec: ModelSpec, T: int, layers: Iterable[int]) -> float:
    """Per token, of all these layers: two products over the tokens that a query sees on average."""
    return sum(2 * 2 * spec.H * spec.E * tokens_seen(spec, T, layer) for layer in layers)


def full_step(spec: ModelSpec, T: int, *, recompute: bool = False) -> TokenFlops:
    """Whole-model training (alignment, full continual pretraining); `recompute`: each layer's forward pass runs
    twice.
    """
    passes = 4 if recompute else 3
    attention = _attention_forward(spec, T, range(spec.layers)) * (4.5 if recompute else 3.5)
    return TokenFlops(
        linear=2.0 * passes * spec.layers * _layer_matrices(spec),
        attention=attention,
        head=6.0 * spec.D * spec.V,
    )


def shallow_step(spec: ModelSpec, layers: Sequence[int], T: int) -> TokenFlops:
    """ELO pretraining of these detached layers: the frozen head needs logits and dX alone, and nothing is needed
    below the first layer's query, key and value projection.
    """
    return TokenFlops(
        linear=6.0 * len(layers) * _layer_matrices(spec) - _below_first(spec),
        attention=_attention_forward(spec, T, layers) * 3.5,
        head=4.0 * spec.D * spec.V,
    )


def bridge_step(setting: Setting) -> float:
    """The frozen maps in place of missing layers: 4 D^2 a token each, half of that between embedding and first layer.
    """
    below = setting.bridges > 0 and min(setting.layers) > 0
    return (4.0 * setting.bridges - 2.0 * below) * setting.spec.D**2


def calibration_flops(setting: Setting, tokens: int) -> float:
    """Operations of fitting the bridges to so many tokens: the base model's forward pass up to the end of the last gap,
    and the sums of products of the states at either end of each, in fp64. Solving is left out.
    """
    spec = setting.spec
    last = 1 + max(set(range(spec.layers)) - set(setting.layers))
    forward = 2.0 * last * _layer_matrices(spec) + _attention_forward(spec, setting.sequence_length, range(last))
    return tokens * (forward + 4.0 * setting.bridges * spec.D**2)


def ideal_speedup(
    spec: ModelSpec, layers: Sequence[int], T: int, pretrain_share: float, bridges: float = 0.0
) -> float:
    """Pipeline speedup over full continual pretraining if every operation took the same time.

    bridges: operations a token of the shallow model's bridges, of `bridge_step`.
    """
    ratio = (shallow_step(spec, layers, T).total + bridges) / full_step(spec, T).total
    return 1.0 / (pretrain_share * ratio + (1.0 - pretrain_share))


def arm_flops(setting: Setting) -> ArmFlops:
    """Both counts of an arm, per token of its sequence length."""
    spec, T = setting.spec, setting.sequence_length
    if setting.arm == "lora":
        return _lora(setting)
    if setting.arm == "outer_unfrozen":
        return _outer_unfrozen(setting)
    if setting.arm in SHALLOW:
        model, present = shallow_step(spec, setting.layers, T), setting.layers
        model = replace(model, linear=model.linear + bridge_step(setting))
        formed = 0.0 if setting.arm in ENGINE else _below_first(spec)
    else:
        model, present, formed = full_step(spec, T), tuple(range(spec.layers)), 0.0
    again = _run_again(setting, present)
    # a head in slices makes its logits twice: for the losses, then for their gradients
    sliced = setting.arm == "elo_align_streamed" and setting.streaming.vocabulary == "sliced"
    twice = 2.0 * spec.D * spec.V * sliced
    return ArmFlops(
        model, TokenFlops(model.linear + formed + again.linear, model.attention + again.attention, model.head + twice)
    )


def _run_again(setting: Setting, layers: Sequence[int]) -> TokenFlops:
    """The recomputed forward passes of these layers; see the top of this file for what is left out of them."""
    spec, streamed = setting.spec, setting.arm == "elo_align_streamed"
    if setting.recompute == "none" and not streamed:
        return TokenFlops(0.0, 0.0, 0.0)
    if setting.recompute == "selective" and not streamed:
        return TokenFlops(len(layers) * 4.0 * spec.D * spec.F, 0.0, 0.0)
    # a norm after the product needs its value, whoever runs the layer again
    down = spec.D * spec.F if spec.norms == "pre" else 0
    return TokenFlops(
        len(layers) * 2.0 * (_layer_matrices(spec) - down),
        _attention_forward(spec, setting.sequence_length, layers),
        0.0,
    )


def _outer_unfrozen(setting: Setting) -> ArmFlops:
    """Forward through the whole model; backward down to the lowest layer that learns, through frozen ones with dX
    alone. The head is frozen.
    """
    spec = setting.spec
    everything = tuple(range(spec.layers))
    matrices, T = _layer_matrices(spec), setting.sequence_length
    head = 4.0 * spec.D * spec.V

    def step(reached: int) -> TokenFlops:  # layers that a gradient passes
        linear = 2.0 * matrices * (spec.layers + reached + len(setting.layers))
        through = everything[spec.layers - reached :]
        forward, backward = _attention_forward(spec, T, everything), 2.5 * _attention_forward(spec, T, through)
        return TokenFlops(linear, forward + backward, head)

    needed = step(spec.layers - min(setting.layers))
    done, again = step(spec.layers) if setting.recompute != "none" else needed, _run_again(setting, everything)
    return ArmFlops(
        replace(needed, linear=needed.linear - _below_first(spec)),
        TokenFlops(done.linear + again.linear, done.attention + again.attention, head),
    )


def _lora(setting: Setting) -> ArmFlops:
    """Adapters of rank r on all seven projections; everything else is frozen, so it needs dX alone."""
    spec, r = setting.spec, setting.lora_rank
    q, kv = spec.H * spec.E, spec.K * spec.E
    ends = (spec.D + q) + 2 * (spec.D + kv) + (q + spec.D) + 3 * (spec.D + spec.F)  # inputs and outputs of all seven
    matrices, adapters = float(_layer_matrices(spec)), float(r * ends)
    unneeded = _below_first(spec) + 2.0 * 3 * r * spec.D  # dX of the first layer's projections and of their A
    linear = spec.layers * (4.0 * matrices + 6.0 * adapters)
    attention = _attention_forward(spec, setting.sequence_length, range(spec.layers))
    head = 4.0 * spec.D * spec.V
    model = TokenFlops(linear - unneeded, 3.5 * attention, head)
    if setting.recompute == "none":
        return ArmFlops(model, model)
    ends_saved = 2.0 * r * spec.D if spec.norms == "pre" else 0.0
    again = spec.layers * (2.0 * (matrices + adapters) - ends_saved)
    return ArmFlops(model, TokenFlops(linear + again, 4.5 * attention, head))


def ideal_speedups(pretrain: Setting, align: Setting, pretrain_share: float) -> IdealSpeedups:
    """What the operations that are executed allow: T(full) / (share T(pretrain) + (1 - share) T(align)).

    pretrain_share: of the tokens, those of ELO pretraining (the paper: 0.9).
    """
    ours = pretrain_share * arm_flops(pretrain).executed.total
    ours += (1.0 - pretrain_share) * arm_flops(align).executed.total
    plain, checkpointed = (
        arm_flops(replace(align, arm="transformers_full", recompute=recompute)).executed.total / ours
        for recompute in _NONE_AND_LAYER
    )
    return IdealSpeedups(plain, checkpointed)
