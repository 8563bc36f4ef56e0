"""Bytes over the link between host and GPU in one optimizer step of a whole bf16 model, for four ways of training one
that is larger than the GPU. Counted from the shapes, with the least time that computing and copying can take; nothing
here was measured.

* layer-major, lazy: this engine's `update: lazy`. Every layer comes twice a step, whatever the number of micro-batches:
  with its 8-bit state and its waiting gradient for update and forward pass, and with its weights for the backward pass.
* layer-major, at once: `update: at_once`. The state comes with the backward pass, and no gradient waits.
* per micro-batch: the usual order (as MegaTrain has it), in which every micro-batch takes all layers through the GPU
  twice and sends every layer's gradient to the host, where AdamW adds them up and steps.
* ZeRO-Offload, stage 2 (Ren et al. 2021, arXiv 2101.06840): the whole bf16 model stays on the GPU; gradients go to the
  host in bf16, once a step, AdamW steps there in fp32, and bf16 weights come back.

Time is a bound: in every phase the longest of computing, copying down and copying up, which run side by side. AdamW's
time is left out, on the GPU (small) as on the host, where it reads and writes 28 bytes or more a parameter; the bounds
of the last two ways are therefore too good by that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, inf
from typing import Literal, get_args

from elo_engine.measure.cards import Card, find_card
from elo_engine.measure.flops import arm_flops
from elo_engine.measure.memory_shapes import SCALE_GROUP
from elo_engine.measure.planner import STREAMED
from elo_engine.measure.setting import Setting
from elo_engine.model.spec import ModelSpec

Way = Literal["layer-major, lazy", "layer-major, at once", "per micro-batch", "ZeRO-Offload, stage 2"]
WAYS: tuple[Way, ...] = get_args(Way)

WEIGHT = GRADIENT = 2  # bytes of a parameter in bf16
STATE = 2 + 2 * 4 / SCALE_GROUP  # two 8-bit moments with their fp32 scales

# One way, by the standard, as the cards have them.
LINKS = {
    "pcie-4-x8": find_card("rtx-4060-ti-8gb").link_bytes_per_s,
    "pcie-4-x16": find_card("rtx-4090").link_bytes_per_s,
    "pcie-5-x16": find_card("h200").link_bytes_per_s,
}
LINK_SHARE = 0.8  # of the standard's rate that large copies from registered memory reach: an assumption


@dataclass(frozen=True)
class Phase:
    """A part of a step in which computing, copies down (host to GPU) and copies up run side by side.

    Attributes:
        flops: per token. down, up: bytes. times: how often it comes in a step, its tokens shared out among them.
    """

    name: str
    flops: float
    down: float
    up: float
    times: int = 1

    def seconds(self, tokens: float, flop_per_s: float, link_bytes_per_s: float) -> float:
        """All of them in a step of so many tokens."""
        computing = tokens * self.flops / flop_per_s
        return max(computing, self.times * max(self.down, self.up) / link_bytes_per_s)

    def hidden_from(self, flop_per_s: float, link_bytes_per_s: float) -> float:
        """Tokens of one of them from which on computing takes as long as the copies; infinite where it computes
        nothing.
        """
        copying = max(self.down, self.up) / link_bytes_per_s
        return 0.0 if copying == 0 else copying * flop_per_s / self.flops if self.flops else inf


@dataclass(frozen=True)
class Traffic:
    """One way of taking an optimizer step.

    Attributes:
        tokens: of a step. device_bytes: weights that the GPU must hold at one time, without anything else.
    """

    way: Way
    tokens: int
    phases: tuple[Phase, ...]
    device_bytes: int

    @property
    def down(self) -> float:
        """Bytes from host to GPU in a step."""
        return sum(phase.down * phase.times for phase in self.phases)

    @property
    def up(self) -> float:
        """Bytes from GPU to host in a step."""
        return sum(phase.up * phase.times for phase in self.phases)

    def seconds(self, flop_per_s: float, link_bytes_per_s: float) -> float:
        """The least that a step takes."""
        return sum(phase.seconds(self.tokens, flop_per_s, link_bytes_per_s) for phase in self.phases)

    def hidden_from(self, flop_per_s: float, link_bytes_per_s: float) -> float:
        """Tokens that go through the layers between two arrivals of a layer, so of a step or of a micro-batch, from
        which on the layers' copies cost no time.
        """
        of_layers = [phase for phase in self.phases if phase.name != "head"]
        return max(phase.hidden_from(flop_per_s, link_bytes_per_s) for phase in of_layers)


def layer_flops(spec: ModelSpec, T: int) -> tuple[float, float, float]:
    """Operations per token of all layers forward, of all layers run again and backward, and of the head; as the
    streamed engine executes them.
    """
    setting = Setting(arm=STREAMED, spec=spec, layers=(), sequence_length=T, micro_batch=1)
    flops = arm_flops(setting)
    forward = flops.model.linear / 3 + flops.model.attention / 3.5  # the backward pass: 2 and 2.5 times the forward
    return forward, flops.executed.linear + flops.executed.attention - forward, flops.executed.head


def step_traffic(way: Way, spec: ModelSpec, T: int, tokens: int, micro_batches: int) -> Traffic:
    """One step of `tokens` tokens in rows of T; `micro_batches` matters to the way `per micro-batch` alone. What enters
    the layers stays on the GPU.
    """
    forward, backward, head = layer_flops(spec, T)
    layers, matrix = spec.layers * spec.layer_parameters, spec.V * spec.D
    last = spec.D + (0 if spec.tied else matrix)
    kept = WEIGHT + STATE
    again = WEIGHT * matrix if spec.tied else 0  # the embedding once more, as the head
    unit = WEIGHT * max(2 * spec.layer_parameters, matrix + (spec.D if spec.tied else 0))
    k = micro_batches if way == "per micro-batch" else 1
    phases: tuple[Phase, ...]
    if way == "layer-major, lazy":
        # the tied matrix's gradient waits as the head's, comes back to meet the embedding's, and goes again
        phases = (
            Phase("forward", forward, (kept + GRADIENT) * (layers + matrix), kept * (layers + matrix)),
            Phase("head", head, (kept + GRADIENT) * last + again, (kept + GRADIENT) * last + again),
            Phase("backward", backward, WEIGHT * layers + again, GRADIENT * (layers + matrix)),
        )
    elif way == "layer-major, at once":
        phases = (
            Phase("forward", forward, WEIGHT * (layers + matrix), 0),
            Phase("head", head, kept * last + again, kept * last),
            Phase("backward", backward, kept * (layers + matrix), kept * (layers + matrix)),
        )
    elif way == "per micro-batch":
        phases = (
            Phase("forward", forward, WEIGHT * (layers + matrix), 0, k),
            Phase("head", head, WEIGHT * last + again, GRADIENT * (last + (matrix if spec.tied else 0)), k),
            Phase("backward", backward, WEIGHT * layers, GRADIENT * (layers + (0 if spec.tied else matrix)), k),
        )
    else:
        everything = spec.parameters
        phases = (
            Phase("forward", forward, 0, 0),
            Phase("head", head, 0, GRADIENT * last),
            Phase("backward", backward, 0, GRADIENT * (everything - last)),
            Phase("weights", 0.0, WEIGHT * everything, 0),  # after the host's AdamW, before the next step
        )
        unit = WEIGHT * everything
    return Traffic(way, tokens, phases, unit)


def ways_of(spec: ModelSpec, T: int, tokens: int, micro_batch_tokens: int) -> Sequence[Traffic]:
    """All ways of one step, cut into micro-batches of so many tokens."""
    return [step_traffic(way, spec, T, tokens, ceil(tokens / micro_batch_tokens)) for way in WAYS]


def fits(traffic: Traffic, card: Card) -> bool:
    """Whether the card has room for the weights that must be there; more is needed beside them."""
    return traffic.device_bytes < card.memory_bytes
