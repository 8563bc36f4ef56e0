"""AdamW over all leaves of a model: which path makes the step, and the state that each path keeps.

fp32 state: Triton on a GPU; elsewhere torch's own fused AdamW, which is what the CPU has always run.
8-bit state: Triton on a GPU, `cpu_adamw` on a CPU, which is the definition `reference_adamw` bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from elo_engine.model import cpu_adamw, reference_adamw
from elo_engine.model.ops import choice


class StepResult(NamedTuple):
    """fp32 scalars on the device; reading one waits for the step."""

    norm: Tensor  # of all gradients, before clipping
    updated: Tensor  # 1, or 0 where the norm was not finite: then nothing was changed


@dataclass
class AdamwState:
    """Weights and moments, one entry a leaf.

    weights: fp32 masters, or with 8-bit moments the leaves themselves (bf16 or fp32).
    leaves: the model's bf16 copies of fp32 masters; None where there are none.
    exp_avgs, exp_avg_sqs: fp32, or int8 and uint8 codes; then scales holds the two lists of fp32 scales.
    powers: fp64 [beta1^t, beta2^t, t, beta1, beta2] after t steps.
    """

    weights: list[Tensor]
    leaves: list[Tensor] | None
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    scales: tuple[list[Tensor], list[Tensor]] | None
    powers: Tensor
    _plan: Any = field(default=None, repr=False)

    @classmethod
    def zeros(
        cls, weights: list[Tensor], leaves: list[Tensor] | None, betas: tuple[float, float], *, bits: int
    ) -> AdamwState:
        """The state before the first step, with moments of 8 or of 32 bits."""
        powers = torch.tensor([1.0, 1.0, 0.0, *betas], dtype=torch.float64, device=weights[0].device)
        if bits == 8:
            made = [reference_adamw.empty_codes(weight) for weight in weights]
            m, v, m_scales, v_scales = ([four[i] for four in made] for i in range(4))
            return cls(weights, None, m, v, (m_scales, v_scales), powers)
        first, second = ([torch.zeros_like(weight) for weight in weights] for _ in range(2))
        return cls(weights, leaves, first, second, None, powers)

    def set_count(self, count: int) -> None:
        """Stand after `count` steps."""
        betas = self.powers[3:].tolist()
        self.powers[:3] = torch.tensor([*(beta**count for beta in betas), count], dtype=torch.float64)


def adamw_step(
    state: AdamwState,
    grads: Sequence[Tensor | None],
    *,
    lr: float,
    eps: float,
    weight_decay: float,
    clip: float | None,
    key: int = 0,
) -> StepResult:
    """Clip by the global norm and update everything in place; under Triton nothing waits for the device.

    Args:
        grads: one a weight, contiguous, all fp32 or all bf16; None leaves a weight as it is. May be scaled in place.
        clip: the largest norm, None for no clipping. key: `reference_adamw.step_key`, of the random rounding.

    Returns:
        The norm, and whether it was finite. If not, nothing was changed.
    """
    lists = (state.weights, state.exp_avgs, state.exp_avg_sqs)
    options: dict[str, Any] = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "clip": clip}
    if choice.use_triton(state.powers):
        from elo_engine.kernels import adamw, adamw_8bit, adamw_plan

        state._plan = state._plan or adamw_plan.adamw_plan(state.weights)
        if state.scales is None:
            control_C = adamw.adamw_fp32(grads, *lists, state.leaves, state.powers, plan=state._plan, **options)
        else:
            control_C = adamw_8bit.adamw_8bit(
                grads, *lists, *state.scales, state.powers, key=key, plan=state._plan, **options
            )
        return StepResult(control_C[0], control_C[1])
    if state.scales is not None:
        step = cpu_adamw.adamw_8bit if choice.use_cpu(state.powers) else reference_adamw.adamw_8bit
        return StepResult(*step(grads, *lists, *state.scales, state.powers, key=key, **options))
    return _torch_step(state, grads, **options)


@torch.no_grad()
def _torch_step(
    state: AdamwState, grads: Sequence[Tensor | None], *, lr: float, eps: float, weight_decay: float, clip: float | None
) -> StepResult:
    """torch's fused AdamW; the host waits for the norm."""
    there = [i for i, grad in enumerate(grads) if grad is not None]
    present = [grad.float() for grad in grads if grad is not None]
    norm = torch.nn.utils.get_total_norm(present)
    updated = torch.isfinite(norm)
    if not updated:
        return StepResult(norm, updated.float())
    value = float(norm)
    if clip is not None and value > clip:
        torch._foreach_mul_(present, clip / value)
    count, beta1, beta2 = state.powers[2:].tolist()
    torch_adamw(
        [state.weights[i] for i in there],
        present,
        [state.exp_avgs[i] for i in there],
        [state.exp_avg_sqs[i] for i in there],
        [],
        [torch.tensor(count, dtype=torch.float32, device=norm.device) for _ in there],
        fused=True,
        amsgrad=False,
        maximize=False,
        beta1=beta1,
        beta2=beta2,
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
    )
    state.set_count(int(count) + 1)
    if state.leaves is not None:
        for leaf, master in zip(state.leaves, state.weights, strict=True):
            leaf.copy_(master)
    return StepResult(norm, updated.float())
