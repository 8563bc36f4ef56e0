"""AdamW with 8-bit state on the CPU: C++ where it was built and the tensors fit it, else its twin `reference_adamw`.

Both give the same bits, so it does not matter to a run which of them made a step, or on which instruction set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from elo_engine.model import cpu_native, reference_adamw


@torch.no_grad()
def adamw_8bit(
    grads: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    exp_avg_scales: Sequence[Tensor],
    exp_avg_sq_scales: Sequence[Tensor],
    powers: Tensor,
    *,
    lr: float,
    eps: float,
    weight_decay: float,
    clip: float | None,
    key: int,
) -> Tensor:
    """One step in place; arguments and result as of `reference_adamw.adamw_8bit`. The norm is torch's for both."""
    state = (weights, exp_avgs, exp_avg_sqs, exp_avg_scales, exp_avg_sq_scales)
    if not cpu_native.fits_adamw(grads, weights):
        return reference_adamw.adamw_8bit(
            grads, *state, powers, lr=lr, eps=eps, weight_decay=weight_decay, clip=clip, key=key
        )
    result, numbers = reference_adamw.control(reference_adamw.leaf_norms(grads), powers, lr, clip)
    if numbers:
        cpu_native.adamw_8bit(grads, *state, numbers, eps=eps, decay=lr * weight_decay, key=key)
    return result


@torch.no_grad()
def update_8bit(
    grads: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    exp_avg_scales: Sequence[Tensor],
    exp_avg_sq_scales: Sequence[Tensor],
    numbers: Mapping[str, float],
    *,
    eps: float,
    decay: float,
    key: int,
    first: int = 0,
) -> None:
    """The update of some tensors in place; arguments as of `reference_adamw.update_8bit`."""
    update = cpu_native.adamw_8bit if cpu_native.fits_adamw(grads, weights) else reference_adamw.update_8bit
    state = (weights, exp_avgs, exp_avg_sqs, exp_avg_scales, exp_avg_sq_scales)
    update(grads, *state, numbers, eps=eps, decay=decay, key=key, first=first)
