"""What one optimizer step of this engine allocates and frees, in the order of `train/loop.py`, for every path of
`model/ops`: the CPU's (`cpu_*.py` with the C++ extension) and the GPU's (Triton, flash attention).

Suffixes as in the shape legend; all sizes here are bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from elo_engine.measure import memory_engine_head as head
from elo_engine.measure import memory_engine_mlp as mlp
from elo_engine.measure.ledger import Held, Ledger
from elo_engine.measure.memory_attention import copies_bytes, flash_backward_bytes, kept_bytes, padded_bytes
from elo_engine.measure.memory_fp8 import Fp8Products, head_bytes
from elo_engine.measure.memory_gradients import GRAD, Gradients, OuterSums
from elo_engine.measure.memory_rotary import gathered_bytes, rows_bytes, table_bytes, turn_bytes
from elo_engine.measure.memory_shapes import adamw_plan_bytes, coded_bytes, projections, split_spike, step_buffer_bytes
from elo_engine.measure.setting import SHALLOW, Setting

ACT = "activations"


@dataclass
class SavedLayer:
    """What a layer's forward pass leaves for its backward pass; without `rest` the layer is run again."""

    hidden: Held  # what entered
    rest: dict[str, Held] | None


class EngineStep:
    """One step, as entries of a ledger."""

    def __init__(self, setting: Setting, ledger: Ledger) -> None:
        spec = setting.spec
        self.setting, self.spec, self.ledger = setting, spec, ledger
        self.cuda, self.w, N = setting.device == "cuda", setting.width, setting.N
        self.shallow = setting.arm in SHALLOW
        self.indices = setting.layers if self.shallow else tuple(range(spec.layers))
        self.N, self.ND, self.NF = N, N * spec.D * self.w, N * spec.F * self.w
        self.NHE, self.NKE = N * spec.H * spec.E * self.w, N * spec.K * spec.E * self.w
        self.NC = self.NHE + 2 * self.NKE
        self.wide_ND = 4 * N * spec.D  # in fp32
        self.parts, self.fp8, at_once = projections(spec), Fp8Products(setting, ledger), setting.one_gradient_summed
        self.gradients = Gradients(ledger, widens=self.w == 2, copies=not self.cuda, at_once=at_once)
        self.outer = None if self.shallow else OuterSums(setting, ledger)
        self._graph = ledger.add(ACT, 0)

    # -- what is there before the step

    def leaves(self) -> list[int]:
        """Elements of every tensor that learns, packed as in memory."""
        p, D = self.parts, self.spec.D
        packed = p["q"].size + p["k"].size + p["v"].size
        layer = [*self.spec.norm_sizes, packed, p["o"].size, 2 * p["gate"].size, p["down"].size]
        biases = [p["q"].biases + 2 * p["k"].biases, p["o"].biases, 2 * p["gate"].biases, p["down"].biases]
        layer += [size for size in biases if size]
        outer = [] if self.shallow else [self.spec.V * D, D] + ([] if self.spec.tied else [self.spec.V * D])
        return layer * len(self.indices) + outer

    def standing(self) -> None:
        """Weights, masters and moments."""
        spec, ledger, leaves = self.spec, self.ledger, self.leaves()
        outer = spec.V * spec.D * (1 if spec.tied or self.setting.host_embedding else 2) + spec.D
        bridges = self.setting.bridges * (spec.D + 1) * spec.D
        ledger.add("weights", self.w * (outer + len(self.indices) * spec.layer_parameters + bridges))
        if self.setting.state == "8bit":
            ledger.add("optimizer", sum(coded_bytes(size) for size in leaves))
        else:
            ledger.add("optimizer", sum(leaves) * 8)
        ledger.add("optimizer", sum(leaves) * self.setting.master_bytes)
        if self.cuda:
            ledger.add("optimizer", adamw_plan_bytes(leaves))
        ledger.add(ACT, table_bytes(self.setting) + step_buffer_bytes(self.setting))
        ledger.add("weights", head_bytes(self.setting))

    def gradient(self, layer: int, name: str, size: int) -> None:
        """The gradient of a leaf of `size` elements, in the weights' type."""
        self.gradients.arrive(f"{layer} {name}", self.w * size)

    # -- the norm

    def norm(self) -> tuple[Held, Held]:
        """-> normed [N, D], one fp32 number a row."""
        ledger = self.ledger
        if self.cuda:
            return ledger.add(ACT, self.ND), ledger.add(ACT, 4 * self.N)
        wide = ledger.add(ACT, self.wide_ND if self.w == 2 else 0)
        ledger.spike(ACT, self.wide_ND)  # the products under the row sums
        rstd, normed = ledger.add(ACT, 4 * self.N), ledger.add(ACT, self.wide_ND)
        if self.w == 2:
            narrow = ledger.add(ACT, self.ND)
            ledger.drop(normed)
            normed = narrow
        ledger.drop(wide)
        return normed, rstd

    def norm_backward(self) -> Held:
        """-> gradient of the input; the gradient of the output is its caller's."""
        ledger = self.ledger
        if self.cuda:
            return ledger.add(ACT, self.ND)
        unit, wide = ledger.add(ACT, self.wide_ND), ledger.add(ACT, self.wide_ND if self.w == 2 else 0)
        ledger.spike(ACT, self.wide_ND)  # products under gamma's gradient
        d_unit = ledger.add(ACT, self.wide_ND)
        ledger.spike(ACT, self.wide_ND)  # products under the row sums; in bf16 the residual's gradient in fp32
        if self.w == 2:
            narrow = ledger.add(ACT, self.ND)
            ledger.drop(d_unit)
            d_unit = narrow
        ledger.drop(unit, wide)
        return d_unit

    # -- a layer

    def forward_layer(self, index: int, *, graph: bool) -> tuple[dict[str, Held], Held]:
        """-> what is saved, nothing without a graph, and the output."""
        ledger = self.ledger
        if self.setting.recompute == "selective":
            kept, update = self.until_mlp(index)
            kept["sum"], down = mlp.forward_selective(self, update)
        else:
            kept = self.until_down(index)
            if not graph:  # the rest takes these two alone
                ledger.drop(*(kept.pop(name) for name in [*kept] if name not in ("sum", "gate_up")))
            product = ledger.add(ACT, self.NF)
            down = self.fp8.out(self.ND, self.spec.F)
            ledger.drop(product)
        if self.spec.norms != "pre":  # the residual is added to what the norm makes
            kept["down"], (out, kept["rstd4"]) = down, self.norm()
        else:
            out = ledger.add(ACT, self.ND)
            ledger.drop(down)
        if not graph:
            ledger.drop(*(kept.pop(name) for name in [*kept]))
        return kept, out

    def until_down(self, index: int) -> dict[str, Held]:
        """The layer without its last product. -> what is saved."""
        ledger, before = self.ledger, self.spec.norms != "post"
        kept, update = self.until_mlp(index)
        if before:
            kept["sum"] = ledger.add(ACT, self.ND)
        else:
            kept["sum"], update = update, ledger.add(ACT, 0)
        normed = ledger.add(ACT, 0)
        if before:
            normed, kept["rstd2"] = self.norm()
        kept["gate_up"] = self.fp8.out(2 * self.NF, self.spec.D)
        ledger.drop(normed, update)
        return kept

    def run_again(self, index: int) -> dict[str, Held]:
        """What a recomputation runs: all before the MLP, which its own node makes in the backward pass; where a norm
        after the MLP needs its value, all but the last product. -> what is saved.
        """
        if self.spec.norms != "pre":
            return self.until_down(index)
        kept, update = self.until_mlp(index)
        kept["sum"] = self.ledger.add(ACT, self.ND)
        self.ledger.drop(update)
        return kept

    def until_mlp(self, index: int) -> tuple[dict[str, Held], Held]:
        """Attention. -> what is saved, and what is added to the residual stream."""
        ledger, kept, before = self.ledger, dict[str, Held](), self.spec.norms != "post"
        normed = ledger.add(ACT, 0)
        if before:
            normed, kept["rstd1"] = self.norm()
        kept["qkv"] = self.fp8.out(self.NC, self.spec.D)
        ledger.drop(normed)
        if self.spec.head_norms is not None:
            self.head_norms(kept)
        ledger.spike(ACT, turn_bytes(self.setting, index, back=False))
        kept["lse"], padded = (ledger.add(ACT, size(self.setting, index)) for size in (kept_bytes, padded_bytes))
        ledger.spike(ACT, copies_bytes(self.setting, index, backward=False))
        kept["mixed"] = ledger.add(ACT, self.NHE)
        update = self.fp8.out(self.ND, self.spec.H * self.spec.E)
        ledger.drop(kept["qkv"] if padded.bytes else padded)
        kept["qkv"] = padded if padded.bytes else kept["qkv"]
        if self.spec.norms != "pre":
            kept["update"], (update, kept["rstd3"]) = update, self.norm()
        return kept, update

    def head_norms(self, kept: dict[str, Held]) -> None:
        """Query and key heads normed: what they were is kept beside what they are. One kernel on a GPU for heads by
        themselves; else copies of the heads, normed, and put together again.
        """
        ledger, spec, heads = self.ledger, self.spec, self.NHE + self.NKE
        if self.cuda and spec.head_norms == "head":
            kept["unnormed"], kept["qkv"] = kept["qkv"], ledger.add(ACT, self.NC)
            return
        groups = spec.H + spec.K if spec.head_norms == "head" else 2
        kept["unnormed"], kept["rstd5"] = ledger.add(ACT, heads), ledger.add(ACT, 4 * self.N * groups)
        ledger.spike(ACT, heads * (4 // self.w) * (1 if self.w == 4 else 2))
        normed = ledger.add(ACT, heads)
        made = ledger.add(ACT, self.NC)
        ledger.drop(normed, kept["qkv"])
        kept["qkv"] = made

    def head_norms_backward(self, index: int, kept: dict[str, Held]) -> None:
        """From the gradient of the normed heads to that of what they were."""
        ledger, heads = self.ledger, (self.NHE + self.NKE) * (1 if self.cuda else 4 // self.w)
        with ledger.during(ACT, 2 * heads):
            ledger.spike(ACT, heads)
        self.gradient(index, "norms of heads", sum(self.spec.norm_sizes[-2:]))
        ledger.drop(kept.pop("unnormed"), *([kept.pop("rstd5")] if "rstd5" in kept else []))

    def norm_out_backward(self, index: int, kept: dict[str, Held], *names: str) -> Held:
        """Of a norm at the end of half a layer -> gradient of what it normed."""
        found = self.norm_backward()
        self.gradient(index, f"norm of {names[0]}", self.spec.D)
        self.ledger.drop(*(kept.pop(name) for name in names))
        return found

    def backward_layer(self, index: int, saved: SavedLayer, d_out: Held, *, below: bool) -> Held | None:
        """-> gradient of what entered; None where nothing below learns."""
        ledger, p = self.ledger, self.parts
        kept, lasting = saved.rest, [saved.hidden]
        if kept is None:
            ledger.moment = f"recomputation of layer {index}"
            kept = self.run_again(index)
            # `layer_gradient` and autograd, its caller, have names for these until the layer is through
            lasting += [d_out, kept["sum"], *([kept["gate_up"]] if "gate_up" in kept else [])]
        ledger.moment = f"backward of layer {index}"

        def pass_by(held: Held) -> None:
            if held not in lasting:
                ledger.drop(held)

        post = self.spec.norms != "pre"
        if post and "down" not in kept:  # run again: the product too
            kept["down"], kept["rstd4"] = ledger.add(ACT, self.ND), ledger.add(ACT, 4 * self.N)
        d_down = self.norm_out_backward(index, kept, "down", "rstd4") if post else ledger.add(ACT, 0)
        if "gate_up" in kept:
            residual = mlp.backward(self, index, kept, d_down, pass_by)
        else:
            residual = mlp.backward_again(self, index, d_down)
        pass_by(d_out)
        pass_by(kept.pop("sum"))
        self.gradients.settle()
        # output projection and attention
        d_update = self.norm_out_backward(index, kept, "update", "rstd3") if post else ledger.add(ACT, 0)
        d_mixed = ledger.add(ACT, self.NHE)
        self.gradient(index, "output", p["o"].size + p["o"].biases)
        self.fp8.backward(self.spec.D, self.spec.H * self.spec.E)
        ledger.drop(d_update)
        self.gradients.settle()
        if not below:
            ledger.drop(residual)
        d_qkv = self.attention_backward(index, kept, d_mixed)
        ledger.spike(ACT, turn_bytes(self.setting, index, back=True))
        if self.spec.head_norms is not None:
            self.head_norms_backward(index, kept)
        # the first norm with the packed projection
        packed = sum(p[name].size + p[name].biases for name in "qkv")
        if self.spec.norms == "post":
            self.gradient(index, "qkv", packed)
            self.fp8.backward(packed // self.spec.D, self.spec.D)
            d_hidden, rstd = ledger.add(ACT, self.ND if below else 0), ledger.add(ACT, 0)
        else:
            d_hidden = self.norm_linear_backward(index, "qkv", packed) if below else self.below_nothing(index, packed)
            rstd = kept.pop("rstd1")
        ledger.drop(d_qkv, rstd, d_hidden, *lasting)  # d_hidden: added into the residual's gradient
        self.gradients.settle()
        assert not kept
        return residual if below else None

    def norm_linear_backward(self, index: int, name: str, size: int) -> Held:
        """Backward of norm and projection as one node, `size` elements: -> gradient of the hidden state."""
        ledger = self.ledger
        normed, rstd = self.norm()
        self.gradient(index, name, size)
        ledger.drop(normed, rstd)
        d_normed = ledger.add(ACT, self.ND)
        self.fp8.backward(size // self.spec.D, self.spec.D)
        d_hidden = self.norm_backward()
        self.gradient(index, f"norm of {name}", self.spec.D)
        ledger.drop(d_normed)
        return d_hidden

    def below_nothing(self, index: int, size: int) -> Held:
        """The same where nothing below learns: M = d_out^T x_hat, from which both gradients come."""
        ledger = self.ledger
        unit, rstd = self.norm()
        wide = 4 if self.cuda else self.w
        scaled = ledger.add(GRAD, wide * size)
        self.fp8.backward(size // self.spec.D, self.spec.D)
        ledger.drop(unit, rstd)
        # gamma's gradient: weight and M in fp32 where they are not, and their products
        copies = 4 * size * ((self.w == 2) + (wide == 2))
        with ledger.during(ACT, copies):
            ledger.spike(ACT, 4 * size)
        if wide == self.w:
            ledger.drop(scaled)
            self.gradient(index, "qkv", size)
        else:
            self.gradient(index, "qkv", size)
            ledger.drop(scaled)
        self.gradient(index, "norm of qkv", self.spec.D)
        return ledger.add(ACT, 0)

    def attention_backward(self, index: int, kept: dict[str, Held], d_mixed: Held) -> Held:
        """-> gradient of the packed projection."""
        ledger, spec = self.ledger, self.spec
        sums = 4 * spec.H * self.N  # on the CPU, a number a row
        copies = copies_bytes(self.setting, index, backward=True)
        ledger.spike(ACT, copies + sums if copies else 0)  # before there is a gradient in bf16
        parts = [ledger.add(ACT, self.NHE), ledger.add(ACT, self.NKE), ledger.add(ACT, self.NKE)]
        ledger.spike(ACT, flash_backward_bytes(self.setting) if self.cuda else sums)
        ledger.drop(d_mixed, *(kept.pop(name) for name in ("qkv", "mixed", "lse")))
        d_qkv = ledger.add(ACT, self.NC)
        ledger.drop(*parts)
        return d_qkv

    # -- a bridge

    def across(self, index: int, hidden: Held) -> Held:
        """What enters layer `index` (of all layers: the final norm), or its gradient on the way back: where a bridge is
        before it another one, which saves nothing of the first.
        """
        before = max((present for present in self.indices if present < index), default=-1)
        if not self.setting.bridges or before == index - 1:
            return hidden
        self.ledger.moment = f"bridge to layer {index}" if index < self.spec.layers else "bridge to the final norm"
        out = self.ledger.add(ACT, self.ND)
        self.ledger.drop(hidden)
        return out

    # -- a micro-batch and the step

    def micro_batch(self) -> None:
        """Forward and backward."""
        ledger = self.ledger
        # ids, positions and rotary tables by token live with the graph, and that until the next loss replaces this one
        tables = gathered_bytes(self.setting, self.indices) + rows_bytes(self.setting)
        tokens = 0 if self.setting.graph else 8 * self.N  # of a graph they are the step's, and stay
        graph, labels = ledger.add(ACT, 2 * tokens + tables), ledger.add(ACT, tokens)
        hidden, saved = ledger.add(ACT, self.ND), list[SavedLayer]()
        again = self.setting.recompute == "layer"
        for index in self.indices:
            hidden = self.across(index, hidden)
            ledger.moment = f"forward of layer {index}"
            kept, out = self.forward_layer(index, graph=not again)
            saved.append(SavedLayer(hidden, None if again else kept))
            hidden = out
        hidden = self.across(self.spec.layers, hidden)
        ledger.moment = "final norm"
        normed, rstd = self.norm()
        ledger.moment = "loss"
        if self.outer is not None:
            self.outer.begin()
        d_hidden = head.forward(self.setting, ledger, learns=not self.shallow)
        ledger.drop(normed, labels, self._graph)
        self._graph = graph
        ledger.moment = "backward of the loss"
        d_normed = ledger.add(ACT, self.ND)  # scaled by one over the tokens of the step
        if not self.cuda and self.w == 2:  # torch multiplies two types on the CPU by way of fp32 copies
            ledger.spike(ACT, 2 * self.wide_ND)
        ledger.drop(d_hidden)
        ledger.moment = "backward of the final norm"
        d_norm = self.norm_backward()
        if not self.shallow:
            self.gradient(-1, "norm", self.spec.D)
        ledger.drop(d_normed, hidden, rstd)
        self.gradients.settle()
        d_out: Held | None = self.across(self.spec.layers, d_norm)
        for at in reversed(range(len(saved))):
            assert d_out is not None
            d_out = self.backward_layer(self.indices[at], saved[at], d_out, below=at > 0 or not self.shallow)
            if at > 0 and d_out is not None:
                d_out = self.across(self.indices[at], d_out)
        if d_out is not None and self.outer is not None:
            ledger.moment = "backward of the embedding"
            self.outer.add_rows()
            ledger.drop(d_out)

    def update(self) -> None:
        """AdamW writes in place. On the CPU torch's takes fp32 copies of bf16 gradients, and the norm before the 8-bit
        one makes such copies one by one.
        """
        ledger, setting = self.ledger, self.setting
        if self.outer is not None:
            ledger.moment = "gradients of embedding and head"
            self.outer.finish()
        ledger.moment = "optimizer step"
        if not self.cuda and self.w == 2 and setting.micro_batches == 1 and not setting.one_gradient_summed:
            ledger.spike(GRAD, 4 * (sum if setting.state == "fp32" else max)(self.leaves()))
        if setting.master_bytes == 1:
            ledger.spike("optimizer", split_spike(max(self.leaves())))


def run_step(setting: Setting, ledger: Ledger) -> None:
    """Enter one steady optimizer step of arm (c), (f) or (g)."""
    step = EngineStep(setting, ledger)
    step.standing()
    for _ in range(min(3, setting.micro_batches)):  # a third micro-batch finds what the second found
        step.micro_batch()
    step.update()
