"""The parts of a Llama layer in transformers 5 under plain autograd: what norm, projection (with peft's adapters),
rotary embedding and their backward passes allocate and free, as a trace of them shows. With Liger its kernels instead,
read from its source. Sizes in bytes, suffixes as in the shape legend.
"""

from __future__ import annotations

from dataclasses import dataclass

from elo_engine.measure.ledger import Held, Ledger
from elo_engine.measure.memory_gradients import Gradients
from elo_engine.measure.memory_shapes import projections
from elo_engine.measure.setting import Setting

ACT = "activations"
_READ_LAST = {"down": ("product",), "gate": ("normed2",), "q": ("normed1",)}  # who reads an input last in the backward


@dataclass
class Kind:
    """How a layer takes part: its weights learn, gradient flows into its input, it carries adapters; `inputs`: the
    projections' inputs are kept (adapters of bf16 models keep casts of them instead).
    """

    learns: bool
    flows: bool
    lora: bool
    inputs: bool

    @property
    def active(self) -> bool:
        """Whether autograd runs through it at all."""
        return self.learns or self.flows or self.lora


class TransformersParts:
    """What a layer is made of, as entries of a ledger."""

    def __init__(self, setting: Setting, ledger: Ledger) -> None:
        spec = setting.spec
        self.setting, self.spec, self.ledger = setting, spec, ledger
        self.cuda, self.w, N = setting.device == "cuda", setting.width, setting.N
        self.N, self.ND, self.NF, self.wide_ND = N, N * spec.D * self.w, N * spec.F * self.w, 4 * N * spec.D
        self.NHE, self.NKE = N * spec.H * spec.E * self.w, N * spec.K * spec.E * self.w
        self.lse = 4 * N * spec.H
        self.parts = projections(spec)
        # In bf16 the Trainer trains under autocast on a GPU; without it adapters compute in their own fp32.
        self.autocast = self.cuda and self.w == 2
        self.adapter_w = 2 if self.autocast else 4
        self.liger, self.lora = setting.arm == "liger_full", setting.arm == "lora"
        self.gradients = Gradients(ledger, widens=False)

    def gradient(self, layer: int, name: str, size: int, width: int | None = None) -> None:
        """The gradient of a tensor of `size` elements, and the end of the node that makes it unless it is settled
        later.
        """
        self.gradients.arrive(f"{layer} {name}", (width or self.w) * size)

    # -- the norm

    def norm(self, kept: dict[str, Held], number: int, *, learns: bool, flows: bool) -> Held:
        """-> the output; kept are the input in fp32, where that is a copy, and the unit rows."""
        ledger = self.ledger
        if self.liger:
            kept[f"rstd{number}"] = ledger.add(ACT, 4 * self.N)
            return ledger.add(ACT, self.ND)
        wide = ledger.add(ACT, self.wide_ND if self.w == 2 else 0)
        ledger.spike(ACT, self.wide_ND)  # squares
        rows = ledger.add(ACT, 2 * 4 * self.N)
        unit = ledger.add(ACT, self.wide_ND)
        if flows:
            kept[f"wide{number}"], kept[f"rows{number}"] = wide, rows
        else:
            ledger.drop(wide, rows)
        if self.w == 2:
            narrow = ledger.add(ACT, self.ND)
            out = ledger.add(ACT, self.ND)
            ledger.drop(unit)
            unit = narrow
        else:
            out = ledger.add(ACT, self.ND)
        if learns:
            kept[f"unit{number}"] = unit
        else:
            ledger.drop(unit)
        return out

    def norm_backward(
        self, kept: dict[str, Held], number: int, d_out: Held, *, index: int, learns: bool, flows: bool,
        hidden: Held | None, residual: bool,
    ) -> Held | None:  # fmt: skip
        """-> gradient of the input, None where it was added into the residual's. `hidden` is freed on the way."""
        ledger = self.ledger
        if self.liger:  # in place, on the output's gradient
            self.gradient(index, f"norm{number}", self.spec.D)
            ledger.drop(kept.pop(f"rstd{number}"), *([hidden] if hidden else []), *([d_out] if residual else []))
            self.gradients.settle()
            return None if residual else d_out
        d_unit = ledger.add(ACT, self.ND) if flows else None
        if learns:
            ledger.spike(ACT, self.ND)
            self.gradient(index, f"norm{number}", self.spec.D)
            ledger.drop(kept.pop(f"unit{number}"))
        ledger.drop(d_out)
        self.gradients.settle()
        if d_unit is None:
            return None
        if self.w == 2:
            wide = ledger.add(ACT, self.wide_ND)
            ledger.drop(d_unit)
            d_unit = wide
        under_sum, direct = ledger.add(ACT, self.wide_ND), ledger.add(ACT, self.wide_ND)
        ledger.drop(under_sum, d_unit)
        if residual and self.w == 4:
            ledger.drop(direct)
        # mean and square: the spread gradient, a power, and their products
        spread, power, product, squared = (ledger.add(ACT, self.wide_ND) for _ in range(4))
        ledger.drop(product, power, spread, kept.pop(f"wide{number}"), kept.pop(f"rows{number}"))
        if hidden is not None:
            ledger.drop(hidden)
        ledger.drop(squared)
        if self.w == 2:
            narrow = ledger.add(ACT, self.ND)
            ledger.drop(direct)
            direct = narrow
            if residual:
                ledger.drop(direct)
        return None if residual else direct

    # -- a projection

    def linear(self, kept: dict[str, Held], name: str, *, lora: bool, stop: bool = False) -> Held | None:
        """-> the output, [N, out]; `stop`: a recomputation ends here, as soon as its inputs are kept."""
        ledger, part, r = self.ledger, self.parts[name], self.setting.lora_rank
        out_bytes = self.N * part.out * self.w
        if not lora:
            return None if stop else ledger.add(ACT, out_bytes)
        base = ledger.add(ACT, out_bytes)
        wide = ledger.add(ACT, 4 * self.N * part.into if self.w == 2 else 0)  # peft casts to the adapters' fp32
        if self.w == 2 and not self.autocast:
            kept[f"{name}.x"], wide = wide, ledger.add(ACT, 0)
        elif self.w == 2:  # and autocast back again: its copy is what the adapter's product keeps
            kept[f"{name}.x"] = ledger.add(ACT, self.N * part.into * self.w)
        kept[f"{name}.a"] = ledger.add(ACT, self.N * r * self.adapter_w)
        if stop:
            ledger.drop(base, wide)
            return None
        update = ledger.add(ACT, self.N * part.out * self.adapter_w)
        scaled = ledger.add(ACT, update.bytes)
        ledger.drop(update)
        cast = ledger.add(ACT, update.bytes if self.adapter_w != self.w else 0)  # an addition of two types on the CPU
        out = ledger.add(ACT, update.bytes)
        ledger.drop(scaled, base, cast)
        if self.adapter_w != self.w:
            narrow = ledger.add(ACT, out_bytes)
            ledger.drop(out)
            out = narrow
        ledger.drop(wide)
        return out

    def linear_backward(self, kept: dict[str, Held], name: str, d_out: Held, *, index: int, kind: Kind) -> Held | None:
        """Frees the output's gradient; -> gradient of the input, None where nothing below learns."""
        ledger, part, r = self.ledger, self.parts[name], self.setting.lora_rank
        read = _READ_LAST.get(name, ())  # the input, where no other node keeps it any more
        below = kind.flows or name not in "qkv" or (kind.learns and not self.lora)
        into_bytes = self.N * part.into * self.w
        if not kind.lora:
            if kind.learns:
                self.gradient(index, name, part.size + part.biases)
            d_in = ledger.add(ACT, into_bytes) if below else None
            ledger.drop(d_out)
            self.forget(kept, read)
            self.gradients.settle()
            return d_in
        wide = ledger.add(ACT, self.N * part.out * 4 if self.adapter_w != self.w else 0)
        scaled = ledger.add(ACT, self.N * part.out * self.adapter_w)
        self.gradient(index, f"{name}.B", r * part.out, 4)
        d_a = ledger.add(ACT, self.N * r * self.adapter_w)
        ledger.drop(scaled, kept.pop(f"{name}.a"))
        self.gradients.settle()
        self.gradient(index, f"{name}.A", r * part.into, 4)
        through = ledger.add(ACT, self.N * part.into * self.adapter_w if below else 0)
        ledger.drop(d_a)
        if self.w == 2:
            ledger.drop(kept.pop(f"{name}.x"))
        self.forget(kept, read)
        self.gradients.settle()
        if not below:
            ledger.drop(d_out, wide, through)
            return None
        if self.w == 2:  # back through the casts
            if self.autocast:
                cast = ledger.add(ACT, 4 * self.N * part.into)
                ledger.drop(through)
                through = cast
            cast = ledger.add(ACT, into_bytes)
            ledger.drop(through)
            through = cast
        ledger.drop(wide)
        direct = ledger.add(ACT, into_bytes)
        ledger.drop(d_out)
        d_in = ledger.add(ACT, into_bytes)
        ledger.drop(direct, through)
        return d_in

    def join(self, *parts: Held | None) -> Held | None:
        """Gradients that meet: the first two make a third, the next are added into it."""
        there = [part for part in parts if part is not None]
        if len(there) < 2:
            return there[0] if there else None
        total = self.ledger.add(ACT, there[0].bytes)
        self.ledger.drop(*there)
        return total

    # -- rotary

    def turn(self, size: int) -> Held:
        """x cos + rotate_half(x) sin -> a new tensor of `size` bytes."""
        ledger = self.ledger
        if self.liger:  # in place on a contiguous copy
            return ledger.add(ACT, size)
        with_cos = ledger.add(ACT, size)
        with ledger.during(ACT, size // 2):
            half = ledger.add(ACT, size)
        with_sin = ledger.add(ACT, size)
        ledger.drop(half)
        turned = ledger.add(ACT, size)
        ledger.drop(with_cos, with_sin)
        return turned

    def turn_backward(self, d_turned: Held) -> Held:
        """Frees the output's gradient; -> the input's."""
        ledger, size = self.ledger, d_turned.bytes
        if self.liger:
            return d_turned
        with_sin = ledger.add(ACT, size)
        with ledger.during(ACT, size // 2):
            sliced = ledger.add(ACT, size)
        ledger.spike(ACT, size)
        ledger.drop(with_sin)
        ledger.spike(ACT, size)
        ledger.drop(d_turned)
        return sliced

    def forget(self, kept: dict[str, Held], names: tuple[str, ...], *, unless: bool = False) -> None:
        """Drop these, unless somebody keeps them."""
        if not unless:
            self.ledger.drop(*(kept.pop(name) for name in names if name in kept))

    def flat(self, d_heads: Held) -> Held:
        """Heads go back beside each other: a copy."""
        flat = self.ledger.add(ACT, d_heads.bytes)
        self.ledger.drop(d_heads)
        return flat
