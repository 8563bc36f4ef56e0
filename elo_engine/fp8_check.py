"""What `pretrain.fp8` does to this model on this text, found before a step is trained with it: loss and gradients of
the run's first micro-batch, in bf16 and with products of 8-bit operands.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from elo_engine.config import RunConfig
from elo_engine.data import Mixture, RowBatch
from elo_engine.errors import RefusedError
from elo_engine.fp8_plan import fp8
from elo_engine.model import ops
from elo_engine.model.decoder import Decoder
from elo_engine.model.spec import ModelSpec
from elo_engine.run_dir import RunDir
from elo_engine.train.loop import to_batch

# Refused above these. The gradient: rounding a number to e4m3 is off by 2.6 % of it on average (root mean square of an
# even error of up to 2^-4), a product of two such operands by 3.7 %, and a gradient behind some ten products of two
# layers, head and back by 12 % if all erred independently; docs/fp8.md has 3 to 5 % with the head alone and 11 to 13 %
# with all. Half the gradient's length is four times that, and less than what a mistake makes: a scale applied twice or
# not at all is a factor of two or more. Half off still descends, at a cosine of 0.87.
GRADIENT_LIMIT = 0.5
# The loss: a logit is a sum whose terms are each off by 2^-3 at most and by 3.7 % on average, so its own error is some
# per cent of its size, and the loss's no more. Measured: 0.6 and 2.6 % where training begins.
LOSS_LIMIT = 0.1
_PIECE = 1 << 24  # elements of a gradient that are in fp32 at a time


@dataclass(frozen=True)
class Difference:
    """One gradient against another: |a - b| / |b|, and the cosine between them."""

    relative: float
    cosine: float


@dataclass(frozen=True)
class Check:
    """Losses in nats a token, and differences by part of the model: of each trained tensor, and of all as one."""

    loss_bf16: float
    loss_fp8: float
    parts: dict[str, Difference]

    @property
    def whole(self) -> Difference:
        return self.parts["all"]

    def faults(self) -> list[str]:
        """What is beyond the limits, in words."""
        found = []
        if not abs(self.loss_fp8 - self.loss_bf16) <= LOSS_LIMIT * abs(self.loss_bf16):  # NaN is beyond it too
            found.append(f"the loss is {self.loss_fp8:.4f} where bf16 has {self.loss_bf16:.4f} nats/token")
        worst = max(self.parts, key=lambda part: _order(self.parts[part].relative))
        if not self.parts[worst].relative <= GRADIENT_LIMIT:
            found.append(f"the gradient of {worst} is off by {self.parts[worst].relative:.2f} of its length")
        return found


def _order(value: float) -> float:
    return value if value == value else float("inf")


def refuse_without_fp8(config: RunConfig, spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> None:
    """RefusedError where `pretrain.fp8` cannot run: device, type or shapes. Nothing where it is not asked for."""
    kind = fp8(config)
    if kind != "none":
        ops.require_fp8(kind, device, dtype, fp8_sizes(kind, spec))


def fp8_sizes(kind: ops.Fp8, spec: ModelSpec) -> dict[str, int]:
    """Dimensions that products of this kind sum over, by name."""
    sizes = {"width": spec.D}
    if kind == "all":
        sizes |= {"MLP width": spec.F, "width of the query heads": spec.H * spec.E,
                  "width of the packed projection": (spec.H + 2 * spec.K) * spec.E}  # fmt: skip
    return sizes


def begin_fp8(run: RunDir, model: Decoder, mixture: Mixture) -> None:
    """Round the head, compare loss and gradients of the first micro-batch in both, say and record what was found, and
    leave the model to train as `pretrain.fp8` says. Nothing where that is none.

    Raises:
        RefusedError: they differ by more than rounding can explain.
    """
    kind = fp8(run.config)
    if kind == "none":
        return
    run.say(ops.describe_fp8(model.device))
    rows = mixture.rows(0, run.config.pretrain.rows_at_once)
    model.use_fp8(kind, to_batch(rows, model.device, model.host_embedding_VD), seed=run.config.seed)
    if any(run.folder("pretrain").glob("step-*")):
        return  # a run that goes on was checked when it began; the model's weights are still the source's here
    check = compare(model, rows)
    held = sum(tensor.nbytes for tensor in model.fp8_tensors)
    run.metric(
        {
            "event": "fp8 checked", "stage": "pretrain", "products": kind, "emulated": ops.fp8_emulated(),
            "head_bytes": held, "loss_bf16_nats": check.loss_bf16, "loss_fp8_nats": check.loss_fp8,
            "gradients": {part: vars(found) for part, found in check.parts.items()},
        }
    )  # fmt: skip
    worst = max((part for part in check.parts if part != "all"), key=lambda part: _order(check.parts[part].relative))
    run.say(
        f"fp8 ({kind}) on the first micro-batch: loss {check.loss_fp8:.4f} where bf16 has {check.loss_bf16:.4f} nats/"
        f"token; gradient off by {check.whole.relative:.3f} of its length, cosine {check.whole.cosine:.4f}; most in "
        f"{worst}, by {check.parts[worst].relative:.3f}"
    )
    faults = check.faults()
    if faults:
        raise RefusedError(
            f"pretrain.fp8: {kind}: {'; '.join(faults)}, more than rounding to 8 bits explains (limits: "
            f"{LOSS_LIMIT:.0%} of the loss, {GRADIENT_LIMIT:g} of a gradient's length). Use pretrain.fp8: "
            f"{'head or ' if kind == 'all' else ''}none, which is bf16"
        )


def compare(model: Decoder, rows: RowBatch) -> Check:
    """Both losses and all gradients of these rows. No optimizer may hold the model's leaves yet: its hooks would take
    the gradients. Those in bf16 wait on the host.
    """
    batch = to_batch(rows, model.device, model.host_embedding_VD)
    kind, count = model.fp8, max(1, rows.tokens_loss)
    losses, kept = [], list[Tensor]()
    parts: dict[str, Difference] = {}
    sums = torch.zeros(3, dtype=torch.float64)
    for precision in ("none", kind):
        model.fp8 = precision
        loss = model.loss_sum(batch) / count
        loss.backward()
        losses.append(loss.detach())
        for i, leaf in enumerate(model.leaves):
            assert leaf.tensor.grad is not None
            if precision == "none":
                kept.append(leaf.tensor.grad.to("cpu"))
            else:
                found = _sums(leaf.tensor.grad, kept[i])
                parts[_short(leaf.names)] = _difference(found)
                sums += found
            leaf.tensor.grad = None
    return Check(float(losses[0]), float(losses[1]), parts | {"all": _difference(sums)})


def _short(names: tuple[str, ...]) -> str:
    """`layers.0.self_attn.q_proj and 2 more` of the checkpoint's names."""
    first = names[0].removeprefix("model.").removesuffix(".weight")
    return first if len(names) == 1 else f"{first} and {len(names) - 1} more"


def _sums(found: Tensor, truth: Tensor) -> Tensor:
    """|found - truth|^2, |truth|^2 and |found|^2, piece by piece in fp32."""
    total = torch.zeros(3, dtype=torch.float64)
    for a, b in zip(found.flatten().split(_PIECE), truth.flatten().split(_PIECE), strict=True):
        a, b = a.float(), b.to(a.device).float()
        numbers = torch.stack(((a - b).square().sum(), b.square().sum(), a.square().sum()))
        total += numbers.to("cpu", torch.float64)
    return total


def _difference(sums: Tensor) -> Difference:
    apart, truth, ours = sums.tolist()
    if truth == 0.0:
        return Difference(0.0 if apart == 0.0 else float("inf"), 1.0 if apart == 0.0 else 0.0)
    # of |a - b|^2 = |a|^2 + |b|^2 - 2 a.b
    return Difference((apart / truth) ** 0.5, (ours + truth - apart) / (2 * (ours * truth) ** 0.5) if ours else 0.0)

