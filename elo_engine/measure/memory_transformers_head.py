"""What the loss of transformers' arms allocates: all logits in fp32 under autograd, or Liger's chunks. In bytes."""

from __future__ import annotations

from typing import Protocol

from elo_engine.measure.ledger import Held, Ledger
from elo_engine.measure.memory_gradients import Gradients
from elo_engine.measure.setting import Setting

LOSS, ACT, GRAD = "loss workspace", "activations", "gradients"


class _Step(Protocol):
    outer: bool
    liger: bool
    gradients: Gradients


def loss(setting: Setting, ledger: Ledger, step: _Step, normed: Held) -> tuple[Held, Held | None]:
    """Forward and backward of head and loss: -> gradient of the final norm's output, and a tied head's gradient that
    waits for the embedding's.
    """
    spec, w = setting.spec, setting.width
    size, ND = spec.V * spec.D, setting.N * spec.D * w
    ledger.moment = "loss"
    tied = None
    if step.liger:
        d_normed, d_head = ledger.add(ACT, ND), ledger.add(LOSS, w * size)
        ledger.spike(LOSS, liger_chunk(setting.N, spec.V, spec.D) * spec.V * w + 4 * setting.N)
        ledger.drop(normed, d_head)
        tied = _head_gradient(spec.tied, ledger, step, size, w)
        step.gradients.settle()
        return d_normed, tied
    wide_NV = 4 * setting.N * spec.V
    logits = ledger.add(LOSS, setting.N * spec.V * w)
    wide = ledger.add(LOSS, wide_NV if w == 2 else 0)
    softmax = ledger.add(LOSS, wide_NV)
    ledger.drop(wide)
    if w == 2 and setting.device == "cuda":  # accelerate hands the logits out in fp32
        ledger.spike(LOSS, wide_NV)
    if not step.outer:
        ledger.drop(normed)
    ledger.drop(logits)
    ledger.moment = "backward of the loss"
    d_softmax = ledger.add(LOSS, wide_NV)
    d_logits = ledger.add(LOSS, wide_NV)
    ledger.drop(d_softmax, softmax)
    if w == 2:
        narrow = ledger.add(LOSS, setting.N * spec.V * w)
        ledger.drop(d_logits)
        d_logits = narrow
    if step.outer:
        tied = _head_gradient(spec.tied, ledger, step, size, w)
    d_normed = ledger.add(ACT, ND)
    ledger.drop(d_logits)
    if step.outer:
        ledger.drop(normed)
    step.gradients.settle()
    return d_normed, tied


def _head_gradient(tied: bool, ledger: Ledger, step: _Step, size: int, w: int) -> Held | None:
    if tied:
        return ledger.add(GRAD, w * size)
    step.gradients.arrive("head", w * size)
    return None


def liger_chunk(N: int, V: int, D: int) -> int:
    """Rows of logits at a time, as liger_kernel's fused_linear_cross_entropy_forward has them (0.6 and 0.7)."""
    factor = -(-V // D)
    return min(N, 1 << (-(-N // factor) - 1).bit_length())
