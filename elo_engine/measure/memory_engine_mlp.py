"""The MLP of a layer: two nodes, of which the second keeps [gate | up], or under `recompute: selective` one node that
keeps the residual stream alone, `model/ops/gated_mlp.py`. Sizes in bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from elo_engine.measure.ledger import Held

if TYPE_CHECKING:
    from elo_engine.measure.memory_engine import EngineStep

ACT = "activations"


def forward_selective(step: EngineStep, update: Held) -> tuple[Held, Held]:
    """From what attention adds -> the residual stream, which is kept, and the MLP's output; `update` is let go of."""
    ledger, before = step.ledger, step.spec.norms != "post"
    if before:
        total = ledger.add(ACT, step.ND)
        normed, rstd = step.norm()
    else:
        total, update = update, ledger.add(ACT, 0)
        normed, rstd = ledger.add(ACT, 0), ledger.add(ACT, 0)
    gate_up = step.fp8.out(2 * step.NF, step.spec.D)
    ledger.drop(normed)
    product = ledger.add(ACT, step.NF)
    down = step.fp8.out(step.ND, step.spec.F)
    ledger.drop(product, gate_up, rstd, update)
    return total, down


def backward(
    step: EngineStep, index: int, kept: dict[str, Held], d_down: Held, pass_by: Callable[[Held], None]
) -> Held:
    """-> gradient of the residual stream. `d_down`: of the MLP's output where that is not the layer's."""
    ledger, p = step.ledger, step.parts
    # down projection and SwiGLU
    d_product, d_packed = ledger.add(ACT, step.NF), ledger.add(ACT, 2 * step.NF)
    active = ledger.add(ACT, 0 if step.cuda else step.NF)  # the kernel writes it over d_product
    if not step.cuda:
        ledger.spike(ACT, step.NF)
    step.gradient(index, "down", p["down"].size + p["down"].biases)
    step.fp8.backward(step.spec.D, step.spec.F)
    ledger.drop(d_product, active, d_down)
    pass_by(kept.pop("gate_up"))
    step.gradients.settle()
    # the second norm with gate and up
    size = 2 * (p["gate"].size + p["gate"].biases)
    if step.spec.norms == "post":
        step.gradient(index, "gate_up", size)
        step.fp8.backward(2 * step.spec.F, step.spec.D)
        through, residual = ledger.add(ACT, step.ND), ledger.add(ACT, step.ND)
        ledger.drop(through, d_packed)
    else:
        residual = step.norm_linear_backward(index, "gate_up", size)
        ledger.drop(d_packed, kept.pop("rstd2"))
    return residual


def backward_again(step: EngineStep, index: int, d_down: Held) -> Held:
    """`backward` where [gate | up] is made again."""
    ledger, p = step.ledger, step.parts
    post = step.spec.norms == "post"
    normed, rstd = (ledger.add(ACT, 0), ledger.add(ACT, 0)) if post else step.norm()
    gate_up, d_product = step.fp8.out(2 * step.NF, step.spec.D), ledger.add(ACT, step.NF)
    # on a GPU the gradient of [gate | up] takes its place, and act(gate) * up that of its own
    d_packed = ledger.add(ACT, 0 if step.cuda else 2 * step.NF)
    active = ledger.add(ACT, 0 if step.cuda else step.NF)
    if not step.cuda:
        ledger.spike(ACT, step.NF)
        ledger.drop(gate_up)
    step.gradient(index, "down", p["down"].size + p["down"].biases)
    step.fp8.backward(step.spec.D, step.spec.F)
    ledger.drop(d_product, active)
    step.gradient(index, "gate_up", 2 * (p["gate"].size + p["gate"].biases))
    ledger.drop(normed)
    d_hidden = ledger.add(ACT, step.ND)
    step.fp8.backward(2 * step.spec.F, step.spec.D)
    if not post:
        d_normed, d_hidden = d_hidden, step.norm_backward()
        step.gradient(index, "norm of gate_up", step.spec.D)
        ledger.drop(d_normed)
    ledger.drop(d_packed, rstd, d_down, *([gate_up] if step.cuda else []))
    step.gradients.settle()
    if post:  # added to what passes by
        through, d_hidden = d_hidden, ledger.add(ACT, step.ND)
        ledger.drop(through)
    return d_hidden
