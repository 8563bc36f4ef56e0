"""What one optimizer step of the transformers arms allocates and frees: Llama of transformers 5 with SDPA under plain
autograd, in the order that a trace of it shows, with the Trainer's clipping and optimizer. Sizes in bytes.

Three things decide what autograd keeps of a layer: whether its weights learn, whether gradient flows into what entered
it, and whether adapters read its inputs.
"""

from __future__ import annotations

from elo_engine.measure import memory_transformers_head as head
from elo_engine.measure.ledger import Held, Ledger
from elo_engine.measure.memory_attention import sdpa_backward_bytes, sdpa_forward_bytes
from elo_engine.measure.memory_gradients import GRAD
from elo_engine.measure.memory_shapes import coded_bytes
from elo_engine.measure.memory_transformers_parts import ACT, Kind, TransformersParts
from elo_engine.measure.setting import SHALLOW, WHOLE_PEERS, Setting

_RNG_BYTES = 5056  # a CPU generator's state, which `checkpoint` keeps for every layer
_LEAST_CODED = 4096  # bitsandbytes keeps the moments of smaller tensors in fp32


class TransformersStep(TransformersParts):
    """One step, as entries of a ledger."""

    def __init__(self, setting: Setting, ledger: Ledger) -> None:
        super().__init__(setting, ledger)
        spec = self.spec
        shallow = setting.arm in SHALLOW
        self.indices = setting.layers if shallow else tuple(range(spec.layers))
        self.outer = setting.arm in WHOLE_PEERS  # embedding, final norm and head learn
        learning = set(setting.layers) if setting.arm == "outer_unfrozen" else set(self.indices)
        # With checkpointing transformers makes the embedding's output require a gradient even where it is frozen.
        flows = self.outer or setting.recompute == "layer"
        self.kinds: dict[int, Kind] = {}
        for index in self.indices:
            learns = index in learning and not self.lora
            self.kinds[index] = Kind(learns, flows, self.lora, learns or (self.lora and self.w == 4))
            flows = flows or self.kinds[index].active

    # -- what is there before the step

    def adapters(self) -> list[int]:
        """Elements of one layer's adapters, A and B of each projection."""
        r = self.setting.lora_rank
        return [r * side for part in self.parts.values() for side in (part.into, part.out)] if self.lora else []

    def standing(self) -> None:
        """Weights, adapters and moments."""
        spec, ledger, D = self.spec, self.ledger, self.spec.D
        embeddings = [spec.V * D] * (1 if spec.tied else 2)
        layer = [D, D] + [n for part in self.parts.values() for n in (part.size, part.biases) if n]
        # peft keeps adapters of bf16 models in fp32
        ledger.add("weights", self.w * (sum(embeddings) + D + len(self.indices) * sum(layer)))
        ledger.add("weights", 4 * len(self.indices) * sum(self.adapters()))
        learned: list[int] = []
        for kind in self.kinds.values():
            learned += (layer if kind.learns else []) + self.adapters()
        eight = self.setting.state == "8bit"
        moments = sum(
            coded_bytes(n) if eight and n >= _LEAST_CODED else 2 * n * (4 if eight or self.lora else self.w)
            for n in learned + ([D, *embeddings[1:]] if self.outer else [])
        )
        if self.outer:  # the Trainer has bitsandbytes keep the embedding's moments in fp32
            moments += 2 * embeddings[0] * (4 if eight else self.w)
        ledger.add("optimizer", moments)

    # -- a layer

    def forward_layer(self, kind: Kind, *, keep: bool, again: bool = False) -> tuple[dict[str, Held], Held | None]:
        """-> what is kept, and the output; `again`: the recomputation, which stops at the last input that is kept."""
        ledger, kept, lora = self.ledger, dict[str, Held](), kind.lora
        kept["normed1"] = self.norm(kept, 1, learns=kind.learns and keep, flows=kind.flows and keep)
        projected = {name: self.linear(kept, name, lora=lora) for name in "qkv"}
        kept["q"], kept["k"] = self.turn(self.NHE), self.turn(self.NKE)
        q, k, v = (projected[name] for name in "qkv")
        assert q is not None and k is not None and v is not None
        ledger.drop(q, k)
        kept["v"], kept["mixed"], kept["lse"] = v, ledger.add(ACT, self.NHE), ledger.add(ACT, self.lse)
        ledger.spike(ACT, sdpa_forward_bytes(self.setting))
        update = self.linear(kept, "o", lora=lora)
        assert update is not None
        self.forget(kept, ("q", "k", "v", "mixed", "lse"), unless=keep and kind.active)
        self.forget(kept, ("normed1",), unless=keep and kind.inputs)
        kept["sum"] = ledger.add(ACT, self.ND)
        ledger.drop(update)
        kept["normed2"] = self.norm(kept, 2, learns=kind.learns and keep, flows=kind.active and keep)
        saved = keep and kind.active
        for name in ("gate", "up"):
            made = self.linear(kept, name, lora=lora)
            assert made is not None
            kept[name] = made
            if name == "gate" and not self.liger:
                kept["silu"] = ledger.add(ACT, self.NF)
                self.forget(kept, ("gate",), unless=saved)
        kept["product"] = ledger.add(ACT, self.NF)
        self.forget(kept, ("gate", "silu", "up"), unless=saved)
        down = self.linear(kept, "down", lora=lora, stop=again)
        self.forget(kept, ("product",), unless=keep and kind.inputs)
        self.forget(kept, ("normed2",), unless=keep and kind.inputs)
        out = None if again else ledger.add(ACT, self.ND)
        if down is not None:
            ledger.drop(down)
        # bf16: the norm keeps its fp32 copy, not the sum (Liger's keeps the sum)
        self.forget(kept, ("sum",), unless=saved and (self.w == 4 or self.liger))
        if not keep:
            self.forget(kept, tuple(kept))
        return kept, out

    def backward_layer(self, index: int, kept: dict[str, Held] | None, hidden: Held, d_out: Held) -> None:
        """`d_out` is the residual's gradient all the way: it becomes the gradient of what entered, in place."""
        ledger, kind = self.ledger, self.kinds[index]
        early = None
        if kept is None:
            ledger.moment = f"recomputation of layer {index}"
            if kind.lora:  # the scaled gradient is there before anything kept is asked for
                early = ledger.add(ACT, self.ND)
            kept, _ = self.forward_layer(kind, keep=True, again=True)
        ledger.moment = f"backward of layer {index}"
        if early is not None:
            ledger.drop(early)
        as_it_is = ledger.add(ACT, 0)  # for the projections that read `d_out`: none of them frees it
        d_product = self.linear_backward(kept, "down", as_it_is, index=index, kind=kind)
        assert d_product is not None
        if self.liger:  # written over gate and up
            ledger.drop(d_product)
            d_gate, d_up = kept.pop("gate"), kept.pop("up")
        else:
            d_up, d_silu = ledger.add(ACT, self.NF), ledger.add(ACT, self.NF)
            ledger.drop(d_product, kept.pop("silu"), kept.pop("up"))
        from_up = self.linear_backward(kept, "up", d_up, index=index, kind=kind)
        if not self.liger:
            d_gate = ledger.add(ACT, self.NF)
            ledger.drop(d_silu, kept.pop("gate"))
        from_gate = self.linear_backward(kept, "gate", d_gate, index=index, kind=kind)
        d_normed = self.join(from_up, from_gate)
        assert d_normed is not None
        self.norm_backward(
            kept, 2, d_normed, index=index, learns=kind.learns, flows=True, hidden=kept.pop("sum", None), residual=True
        )
        d_mixed = self.linear_backward(kept, "o", ledger.add(ACT, 0), index=index, kind=kind)
        assert d_mixed is not None
        if not kind.flows:
            ledger.drop(d_out)
        d_q, d_k, d_v = (ledger.add(ACT, size) for size in (self.NHE, self.NKE, self.NKE))
        ledger.spike(ACT, sdpa_backward_bytes(self.setting))
        ledger.drop(d_mixed)
        self.forget(kept, ("q", "k", "v", "mixed", "lse"))
        d_k, d_q = self.turn_backward(d_k), self.turn_backward(d_q)
        from_v = self.linear_backward(kept, "v", d_v, index=index, kind=kind)
        from_k = self.linear_backward(kept, "k", self.flat(d_k), index=index, kind=kind)
        from_vk = self.join(from_v, from_k)
        from_q = self.linear_backward(kept, "q", self.flat(d_q), index=index, kind=kind)
        if from_q is not None and from_vk is not None:
            ledger.drop(from_q)
            self.norm_backward(
                kept, 1, from_vk, index=index, learns=kind.learns, flows=kind.flows,
                hidden=hidden if kind.flows else None, residual=True,
            )  # fmt: skip
        if hidden.live:
            ledger.drop(hidden)
        assert not kept, f"left over: {list(kept)}"

    # -- a micro-batch

    def micro_batch(self) -> None:
        """Forward and backward."""
        ledger, setting = self.ledger, self.setting
        batch = ledger.add(ACT, 3 * 8 * self.N + 2 * self.w * setting.sequence_length * self.spec.E)  # ids, tables
        masked = any(window < setting.sequence_length for window in self.spec.windows)
        tokens = setting.sequence_length * setting.N if masked else 0  # SDPA knows windows by a mask alone
        mask = ledger.add(ACT, tokens * (1 + self.w))  # bool, and in the scores' type
        casts = ledger.add(ACT, 2 * len(self.indices) * sum(self.adapters()) if self.autocast else 0)
        hidden = ledger.add(ACT, self.ND)
        saved: list[tuple[Held, dict[str, Held] | None]] = []
        again = setting.recompute == "layer"
        states = ledger.add(ACT, len(self.indices) * _RNG_BYTES if again and not self.cuda else 0)
        for index in self.indices:
            ledger.moment = f"forward of layer {index}"
            kind = self.kinds[index]
            kept, out = self.forward_layer(kind, keep=not again and kind.active)
            assert out is not None
            # fp32: the norm keeps what entered; bf16: its own copy of it
            saved.append((hidden, None if again else kept))
            if not again and not (kind.flows and (self.w == 4 or self.liger)):
                ledger.drop(hidden)
                saved[-1] = (ledger.add(ACT, 0), kept)
            hidden = out
        ledger.moment = "final norm"
        last: dict[str, Held] = {}
        normed = self.norm(last, 3, learns=self.outer, flows=True)
        keeps_hidden = self.w == 4 or self.liger
        if not keeps_hidden:
            ledger.drop(hidden)
        d_normed, tied = head.loss(setting, ledger, self, normed)
        ledger.moment = "backward of the final norm"
        d_out = self.norm_backward(
            last, 3, d_normed, index=-1, learns=self.outer, flows=True, hidden=hidden if keeps_hidden else None,
            residual=False,
        )  # fmt: skip
        assert d_out is not None
        for index, (entered, layer) in zip(reversed(self.indices), reversed(saved), strict=True):
            self.backward_layer(index, layer, entered, d_out)
        if self.outer:
            ledger.moment = "backward of the embedding"
            size = self.spec.V * self.spec.D
            own = None if tied is None else ledger.add(GRAD, self.w * size)
            self.gradient(-1, "embedding", size)  # of a tied one the sum, which is a third tensor
            if own is not None and tied is not None:
                ledger.drop(own, tied)
            self.gradients.settle()
        if d_out.live:
            ledger.drop(d_out)
        ledger.drop(batch, states, casts, mask)


def run_step(setting: Setting, ledger: Ledger) -> None:
    """Enter one steady optimizer step of arm (a), (b), (d), (e) or (x)."""
    step = TransformersStep(setting, ledger)
    step.standing()
    for _ in range(min(3, setting.micro_batches)):  # a third micro-batch finds what the second found
        step.micro_batch()
    ledger.moment = "optimizer step"  # norms, clipping and AdamW write in place
