"""AdamW over all leaves of a model: which path makes the step, and the state that each path keeps.

fp32 state: Triton on a GPU; elsewhere torch's own fused AdamW, which is what the CPU has always run.
8-bit state: Triton on a GPU, `cpu_adamw` on a CPU, which is the definition `reference_adamw` bit for bit.

`adamw_step` is the whole step. Where the gradients come a layer at a time and a layer's weights are not always on the
device, the same step is made in parts: `leaf_norms` of each layer, `step_numbers` when all are known, `adamw_update` of
each layer whenever it is there, if need be in the middle of the next step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from elo_engine.model import cpu_adamw, reference_adamw, split_weights
from elo_engine.model.ops import choice


class StepResult(NamedTuple):
    """fp32 scalars on the device; reading one waits for the step."""

    norm: Tensor  # of all gradients, before clipping
    updated: Tensor  # 1, or 0 where the norm was not finite: then nothing was changed


@dataclass
class AdamwState:
    """Weights and moments, one entry a leaf.

    weights: fp32 masters, or with 8-bit moments and no masters the leaves themselves (bf16 or fp32).
    leaves: the model's bf16 copies of fp32 masters; None where there are none.
    exp_avgs, exp_avg_sqs: fp32, or int8 and uint8 codes; then scales holds the two lists of fp32 scales.
    powers: fp64 [beta1^t, beta2^t, t, beta1, beta2] after t steps.
    lows: int8, the lower bits of bf16 weights of 24 bits (`split_weights`), with 8-bit moments; None elsewhere.
    """

    weights: list[Tensor]
    leaves: list[Tensor] | None
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    scales: tuple[list[Tensor], list[Tensor]] | None
    powers: Tensor
    lows: list[Tensor] | None = None
    _plan: Any = field(default=None, repr=False)
    _noted: Any = field(default=None, repr=False)  # of `adamw_given.addresses_noted`

    @classmethod
    def zeros(
        cls,
        weights: list[Tensor],
        leaves: list[Tensor] | None,
        betas: tuple[float, float],
        *,
        bits: int,
        split: bool = False,
    ) -> AdamwState:
        """The state before the first step, with moments of 8 or of 32 bits; split: bf16 weights get 8 bits more."""
        powers = torch.tensor([1.0, 1.0, 0.0, *betas], dtype=torch.float64, device=weights[0].device)
        if bits == 8:
            made = [reference_adamw.empty_codes(weight) for weight in weights]
            m, v, m_scales, v_scales = ([four[i] for four in made] for i in range(4))
            lows = [torch.zeros_like(codes) for codes in m] if split else None
            return cls(weights, leaves, m, v, (m_scales, v_scales), powers, lows)
        first, second = ([torch.zeros_like(weight) for weight in weights] for _ in range(2))
        return cls(weights, leaves, first, second, None, powers)

    def set_count(self, count: int) -> None:
        """Stand after `count` steps."""
        _set_count(self.powers, count)


@dataclass(frozen=True)
class StepNumbers:
    """What one step does to every element, made once a step; under Triton what depends on the norm stays on the device.

    result: the norm of all gradients, and whether the step is taken.
    bits: of the moments. key: of the random rounding.
    control_C: Triton's vector of norm, whether it is taken, clip factor and bias corrections; None on other paths.
    host: the clip factor and what else depends on norm and count, by names of the path's own; {} where the step is not
        taken, and under Triton.
    given: as of `adamw_step`.
    """

    result: StepResult
    bits: Literal[8, 32]
    lr: float
    eps: float
    weight_decay: float
    key: int
    control_C: Tensor | None
    host: Mapping[str, float]
    given: Tensor | None = None


def _set_count(powers: Tensor, count: int) -> None:
    betas = powers[3:].tolist()
    powers[:3] = torch.tensor([*(beta**count for beta in betas), count], dtype=torch.float64)


def adamw_step(
    state: AdamwState,
    grads: Sequence[Tensor | None],
    *,
    lr: float,
    eps: float,
    weight_decay: float,
    clip: float | None,
    key: int = 0,
    given: Tensor | None = None,
) -> StepResult:
    """Clip by the global norm and update everything in place; under Triton nothing waits for the device.

    Args:
        grads: one a weight, contiguous, all fp32 or all bf16; None leaves a weight as it is. May be scaled in place.
        clip: the largest norm, None for no clipping. key: `reference_adamw.step_key`, of the random rounding.
        given: of `adamw_given.given_bits` on the device, under Triton alone: what is there takes the place of lr,
            weight_decay and key, so that a step that is captured and repeated sees its own.

    Returns:
        The norm, and whether it was finite. If not, nothing was changed.
    """
    lists = (state.weights, state.exp_avgs, state.exp_avg_sqs)
    options: dict[str, Any] = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "clip": clip}
    if state.lows is not None:
        assert given is None, "weights of 24 bits take their keys from the host"
        numbers = step_numbers(state.powers, _norms_there(grads), bits=8, key=key, **options)
        _update_split(state, grads, numbers, first=0)
        return numbers.result
    if choice.use_triton(state.powers):
        from elo_engine.kernels import adamw, adamw_8bit, adamw_plan

        state._plan = state._plan or adamw_plan.adamw_plan(state.weights)
        options |= {"plan": state._plan, "given": given}
        if state.scales is None:
            control_C = adamw.adamw_fp32(grads, *lists, state.leaves, state.powers, **options)
        else:
            control_C = adamw_8bit.adamw_8bit(grads, *lists, *state.scales, state.powers, key=key, **options)
            _copy_to_leaves(state)
        return StepResult(control_C[0], control_C[1])
    assert given is None, "only Triton's kernels read numbers from the device"
    if state.scales is not None:
        step = cpu_adamw.adamw_8bit if choice.use_cpu(state.powers) else reference_adamw.adamw_8bit
        result = StepResult(*step(grads, *lists, *state.scales, state.powers, key=key, **options))
        _copy_to_leaves(state)
        return result
    return _torch_step(state, grads, **options)


@torch.no_grad()
def leaf_norms(grads: Sequence[Tensor], state: AdamwState | None = None) -> list[Tensor]:
    """The norm of each leaf's gradient, as the step makes it on its way to the norm of all: scalars on the device.

    Nothing waits for the device, but under Triton the first call with tensors of new sizes, which sends their plan.

    Args:
        grads: contiguous, all fp32 or all bf16. state: of these leaves, where the step is captured.
    """
    if grads and choice.use_triton(grads[0]):
        from elo_engine.kernels import adamw_norms

        return list(adamw_norms.leaf_norms(grads, None if state is None else state._noted).unbind())
    return reference_adamw.leaf_norms(grads)


@torch.no_grad()
def step_numbers(
    powers: Tensor,
    norms: Sequence[Tensor],
    *,
    bits: Literal[8, 32],
    lr: float,
    eps: float,
    weight_decay: float,
    clip: float | None,
    key: int = 0,
    given: Tensor | None = None,
) -> StepNumbers:
    """What the step does to every element; advances `powers` unless the norm is not finite. Under Triton nothing waits
    for the device.

    Args:
        powers: of `AdamwState`, one vector for all leaves of the model.
        norms: `leaf_norms` of all leaves that have a gradient, in the order of the leaves, from however many calls.
        bits: of the moments. The others are as in `adamw_step`.
    """
    known: dict[str, Any] = {"bits": bits, "lr": lr, "eps": eps, "weight_decay": weight_decay, "key": key}
    if choice.use_triton(powers):
        from elo_engine.kernels import adamw_norms

        norms_S = torch.stack(list(norms)) if norms else powers.new_empty(0)
        control_C = adamw_norms.step_control(norms_S, powers, lr=lr, clip=clip, given=given)
        result = StepResult(control_C[0], control_C[1])
        return StepNumbers(result, control_C=control_C, host={}, given=given, **known)
    assert given is None, "only Triton's kernels read numbers from the device"
    if bits == 8:
        pair, host = reference_adamw.control(norms, powers, lr, clip)
        return StepNumbers(StepResult(*pair), control_C=None, host=host, **known)
    # What torch.nn.utils.get_total_norm does with the norms of a list.
    norm = torch.linalg.vector_norm(torch.stack(list(norms))) if norms else torch.tensor(0.0)
    result, host = _torch_control(norm, powers, clip)
    return StepNumbers(result, control_C=None, host=host, **known)


@torch.no_grad()
def adamw_update(state: AdamwState, grads: Sequence[Tensor], numbers: StepNumbers, *, first: int = 0) -> None:
    """Update some leaves in place, as `adamw_step` over all leaves does; nothing changes where the step is not taken.

    On the CPU every bit is the whole step's. Under Triton it is too where the norm does not clip; where it does, the
    norm was added up in another order and may differ in its last place. Nothing waits for the device, but as in
    `leaf_norms`.

    Args:
        state: of these leaves; its `powers` are neither read nor advanced, as `step_numbers` did both.
        grads: one a weight, contiguous, all fp32 or all bf16. May be scaled in place.
        first: the number of the first of these leaves in the model; the random bits of 8-bit state depend on it.

    Raises:
        ValueError: not one gradient for each weight, or numbers made for moments of other bits.
    """
    if len(grads) != len(state.weights):
        raise ValueError(f"grads: {len(grads)} for {len(state.weights)} weights; pass one for each")
    if (numbers.bits == 8) != (state.scales is not None):
        raise ValueError(f"numbers: made for moments of {numbers.bits} bits, and these are others; pass their bits")
    if state.lows is not None:
        _update_split(state, grads, numbers, first=first)
        return
    lists = (state.weights, state.exp_avgs, state.exp_avg_sqs)
    options: dict[str, Any] = {"lr": numbers.lr, "eps": numbers.eps, "weight_decay": numbers.weight_decay}
    if numbers.control_C is not None:
        from elo_engine.kernels import adamw, adamw_8bit

        options |= {"given": numbers.given, "noted": state._noted}
        if state.scales is None:
            adamw.update_fp32(grads, *lists, state.leaves, numbers.control_C, **options)
        else:
            key = numbers.key
            adamw_8bit.update_8bit(grads, *lists, *state.scales, numbers.control_C, key=key, first=first, **options)
            _copy_to_leaves(state)
    elif numbers.host and state.scales is not None:
        update = cpu_adamw.update_8bit if choice.use_cpu(state.powers) else reference_adamw.update_8bit
        decay, rest = numbers.lr * numbers.weight_decay, (*state.scales, numbers.host)
        update(grads, *lists, *rest, eps=numbers.eps, decay=decay, key=numbers.key, first=first)
        _copy_to_leaves(state)
    elif numbers.host:
        _torch_update([grad.float() for grad in grads], *lists, numbers.host, options)
        _copy_to_leaves(state)


def _torch_control(norm: Tensor, powers: Tensor, clip: float | None) -> tuple[StepResult, dict[str, float]]:
    """As `reference_adamw.control`, for torch's fused AdamW, from the norm of all; the host waits for it."""
    updated = torch.isfinite(norm)
    result = StepResult(norm, updated.float())
    if not updated:
        return result, {}
    value = float(norm)
    factor = clip / value if clip is not None and value > clip else 1.0
    count, beta1, beta2 = powers[2:].tolist()
    _set_count(powers, int(count) + 1)
    return result, {"factor": factor, "count": count, "beta1": beta1, "beta2": beta2}


def _torch_update(
    grads: list[Tensor],
    weights: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    host: Mapping[str, float],
    options: Mapping[str, float],
) -> None:
    """torch's fused AdamW, of fp32 gradients, which are scaled in place. options: lr, eps, weight_decay."""
    if host["factor"] != 1.0:
        torch._foreach_mul_(grads, host["factor"])
    torch_adamw(
        weights,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        [torch.tensor(host["count"], dtype=torch.float32, device=grad.device) for grad in grads],
        fused=True,
        amsgrad=False,
        maximize=False,
        beta1=host["beta1"],
        beta2=host["beta2"],
        lr=options["lr"],
        weight_decay=options["weight_decay"],
        eps=options["eps"],
    )


def _norms_there(grads: Sequence[Tensor | None]) -> list[Tensor]:
    return leaf_norms([grad for grad in grads if grad is not None])


@torch.no_grad()
def _update_split(state: AdamwState, grads: Sequence[Tensor | None], numbers: StepNumbers, *, first: int) -> None:
    """The update of weights of 24 bits: joined to fp32 a chunk at a time, updated there, rounded at random and split.
    Where the step is not taken on the device their bits come back as they were.
    """
    assert state.scales is not None and state.lows is not None
    assert numbers.given is None, "weights of 24 bits take their keys from the host"
    if numbers.control_C is None and not numbers.host:
        return
    chunk, group = split_weights.CHUNK, reference_adamw.GROUP
    for i, grad in enumerate(grads):
        if grad is None:
            continue
        m_scales, v_scales = state.scales[0][i], state.scales[1][i]
        flat = [x.view(-1) for x in (grad, state.weights[i], state.lows[i], state.exp_avgs[i], state.exp_avg_sqs[i])]
        for start in range(0, grad.numel(), chunk):
            g, leaf, low, m, v = (x[start : start + chunk] for x in flat)
            groups = slice(start // group, (start + chunk) // group)
            exact = torch.empty(len(g), dtype=torch.float32, device=g.device)
            split_weights.join_into(exact, leaf, low)
            part = AdamwState([exact], None, [m], [v], ([m_scales[groups]], [v_scales[groups]]), state.powers)
            key = split_weights.chunk_key(numbers.key, start // chunk)
            adamw_update(part, [g], replace(numbers, key=key), first=first + i)
            bits = split_weights.rounding_bits(key, first + i, len(g), g.device)
            split_weights.split_from(exact, leaf, low, bits)
            del exact, part, bits  # before the next ones are made


def _copy_to_leaves(state: AdamwState) -> None:
    if state.leaves is not None:
        for leaf, master in zip(state.leaves, state.weights, strict=True):
            leaf.copy_(master)


@torch.no_grad()
def _torch_step(
    state: AdamwState, grads: Sequence[Tensor | None], *, clip: float | None, **options: float
) -> StepResult:
    """torch's fused AdamW; the host waits for the norm."""
    there = [i for i, grad in enumerate(grads) if grad is not None]
    present = [grad.float() for grad in grads if grad is not None]
    result, host = _torch_control(torch.nn.utils.get_total_norm(present), state.powers, clip)
    if host:
        weights, m, v = ([part[i] for i in there] for part in (state.weights, state.exp_avgs, state.exp_avg_sqs))
        _torch_update(present, weights, m, v, host, options)
        _copy_to_leaves(state)
    return result
