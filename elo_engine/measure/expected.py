"""What a stage should take besides memory on its device: seconds, disk, host memory; and what it took against that.

Seconds are operations over a rate. A card's published peak times `PEAK_SHARE`, or a matmul rate measured on this
machine times `MATMUL_SHARE`: both shares are assumptions, not measurements of this engine, and the time of the
optimizer, evaluation, reading and snapshots is not in them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from elo_engine.measure.cards import Card
from elo_engine.measure.components import PeakWhat, by_component
from elo_engine.measure.flops import arm_flops
from elo_engine.measure.machine import resident_bytes
from elo_engine.measure.memory_streamed import standing_bytes
from elo_engine.measure.memory_units import host_parts, loading_bytes, store_bytes
from elo_engine.measure.planner import STREAMED, MemoryPlan, between_turns, predict_memory, shallow_of, sums_bytes
from elo_engine.measure.setting import SHALLOW, Setting

# Training 7 to 8 billion parameters is published at some 0.27 of the peak on an H100 (MegaTrain, 272 TFLOP/s) and at
# about half of it on an RTX 4090 (torchtune, 1650 tokens/s): 0.4 lies between. Matmuls alone reach 0.8 of the peak
# (H200, 790 of 989 TFLOP/s), so half of a measured matmul rate is the same assumption.
PEAK_SHARE, MATMUL_SHARE = 0.4, 0.5
# Products of 8-bit operands against those of bf16, with the passes that round: published peaks are twice as high, and
# 1.6 is an assumption, not a measurement (docs/fp8.md).
FP8_GAIN = 1.6

READING_BYTES = 64 << 20  # the ring that checkpoints are read through, and a slot for each of its threads
# What a training process on a CPU holds besides its tensors: code that torch loads with the first optimizer step, and
# gaps that freed blocks leave in the heap. Resident memory was 102, 155, 192 and 342 MiB above the predicted tensors in
# four stages of a model with D 512 and 8 layers (fp32, one thread, glibc), whose activations and loss workspace were
# some 90, 167, 289 and 700 MiB; these two numbers lie above all four.
LIBRARIES_BYTES, GAPS_SHARE = 128 << 20, 0.35

GROUP = 256  # moments of 8 bits that share an fp32 scale


@dataclass(frozen=True)
class Rate:
    """Operations per second that a plan counts on: a measured or published rate, and the share of it assumed."""

    flop_per_s: float
    share: float
    what: str
    only_bf16: bool = False
    fp8: bool | None = None  # whether the device multiplies 8-bit floats, where that is known

    def seconds(self, flops: float) -> float:
        """Of so many operations."""
        return flops / (self.flop_per_s * self.share)

    def to_json(self) -> dict[str, Any]:
        """For `plan.json`."""
        return {"flop_per_s": self.flop_per_s, "assumed_share": self.share, "what": self.what}


def card_rate(card: Card) -> Rate:
    """Of a card's published dense bf16 peak."""
    return Rate(
        card.flop_per_s,
        PEAK_SHARE,
        f"{card.name}'s published bf16 peak of {card.flop_per_s / 1e12:.4g} TFLOP/s",
        only_bf16=True,
        fp8=card.fp8,
    )


def measured_rate(device: torch.device, dtype: torch.dtype) -> Rate:
    """Of large matmuls on this machine, now; takes a second or two."""
    from elo_engine.measure.roofline import measure_ceilings

    rate = measure_ceilings(device, dtype, rounds=3).matmul_flop_per_s
    kind = str(dtype).removeprefix("torch.")
    return Rate(rate, MATMUL_SHARE, f"large {kind} matmuls measured here at {rate / 1e9:,.0f} GFLOP/s")


def stage_memory(setting: Setting) -> MemoryPlan:
    """`predict_memory` of a step of at most three micro-batches, which take as much as any more: the first makes the
    gradients, the second widens them, and all others add to those.
    """
    return predict_memory(setting)


def trainable_parameters(setting: Setting) -> int:
    """What an arm of this engine trains: the detached layers, or everything."""
    spec = setting.spec
    return len(setting.layers) * spec.layer_parameters if setting.arm in SHALLOW else spec.parameters


def snapshot_bytes(setting: Setting) -> int:
    """Weights and moments that a snapshot of a stage holds: fp32 masters and moments, or the weights as they are (those
    with masters, of whatever bits, in fp32), two codes and two scales for 256 of each; interleaved the sums that the
    bridge is fitted to.
    """
    weight = 4 if setting.master_bytes else setting.width
    each = 12.0 if setting.state == "fp32" else weight + 2 + 2 * 4 / GROUP
    return int(trainable_parameters(setting) * each) + sums_bytes(setting)


def stage_seconds(setting: Setting, steps: int, rate: Rate) -> float:
    """Of all steps of a stage, forward and backward alone; products of 8-bit operands are `FP8_GAIN` times as fast."""
    flops = arm_flops(setting).executed
    fast = {"none": 0.0, "head": flops.head, "all": flops.head + flops.linear}[setting.fp8]
    work = flops.total - fast * (1.0 - 1.0 / FP8_GAIN)
    return rate.seconds(work * setting.tokens_per_step * steps)


def snapshot_host_bytes(setting: Setting) -> int:
    """Host memory that saving a snapshot takes beside the training state.

    From a GPU all of it is copied; what is on the host already, as a streamed model is, is written from where it lies,
    but weights of 24 bits are joined to fp32 numbers.
    """
    if setting.sharded or (setting.device == "cuda" and setting.arm != STREAMED):
        return snapshot_bytes(setting)  # shares are collected, by one of the processes
    if setting.device == "cuda" and setting.turns is not None:  # the detached layers are there
        return snapshot_bytes(shallow_of(setting, setting.turns)) + snapshot_host_bytes(replace(setting, turns=None))
    return 4 * trainable_parameters(setting) if setting.master_bytes == 1 else 0


def host_by_part(setting: Setting, memory: MemoryPlan) -> dict[str, int]:
    """Host memory of a stage at its highest moment by part, on top of a process that has torch loaded.

    On a CPU that is the step itself, or a snapshot taken after it: weights, gradients and optimizer state are there
    then, activations are not. Of several processes it is all that share the host, of which one writes snapshots. What
    a streamed model keeps on a disk is not in it: the system takes back what it holds of a file.
    """
    there = setting.processes.on_host
    found, saving = {"reading": there * READING_BYTES}, snapshot_host_bytes(setting)
    standing = loading = 0
    if setting.arm == STREAMED:
        if setting.streaming.store == "memory":
            found |= host_parts(setting)
        standing = standing_bytes(setting) + sum(between_turns(setting).values())
        loading = loading_bytes(setting)
    if setting.host_embedding:
        found["embedding"] = there * setting.spec.V * setting.spec.D * setting.width
    if setting.device == "cuda":
        return found | {"snapshot": max(saving, loading)}
    parts = memory.components
    if setting.arm != STREAMED:
        gradients = 4 * trainable_parameters(setting)  # in bf16 with one micro-batch half of that
        gradients //= setting.processes.count if setting.sharded else 1
        standing = parts["weights"] + parts["optimizer"] + gradients
    gaps = int(GAPS_SHARE * (parts["activations"] + parts["loss workspace"]))
    step = memory.peak_bytes + gaps
    highest = max(step, standing + max(saving, loading))
    if there > 1:
        found["steps of other processes"] = (there - 1) * max(step, standing)
    return found | {"libraries": there * LIBRARIES_BYTES, "step or snapshot": highest}


def host_bytes(setting: Setting, memory: MemoryPlan) -> int:
    """The sum of `host_by_part`."""
    return sum(host_by_part(setting, memory).values())


def store_disk_bytes(setting: Setting) -> int:
    """Disk that a streamed model takes while it is trained, in files without a name."""
    if setting.arm != STREAMED or setting.streaming.store == "memory":
        return 0
    return store_bytes(setting) + host_parts(setting)["layers' inputs"]


def device_bytes(setting: Setting, memory: MemoryPlan) -> int:
    """What must be free on the device for a stage: on a GPU its tensors, on a CPU all that the process will hold."""
    return memory.peak_bytes if setting.device == "cuda" else host_bytes(setting, memory)


@dataclass(frozen=True)
class Needs:
    """Bytes that a stage must find; on a CPU `device` and `host` are the same memory and the same number."""

    memory: MemoryPlan
    device: int
    host: int
    disk: int

    @classmethod
    def of(cls, setting: Setting) -> Needs:
        """Of a stage at this setting."""
        memory = stage_memory(setting)
        return cls(memory, device_bytes(setting, memory), host_bytes(setting, memory), store_disk_bytes(setting))


@dataclass(frozen=True)
class StageMemory:
    """What was predicted for a stage, and what the process held before it loaded the model."""

    predicted: MemoryPlan
    before_bytes: int
    device: str

    @classmethod
    def now(cls, predicted: MemoryPlan, device: torch.device) -> StageMemory:
        """Before the model is loaded."""
        held = torch.cuda.memory_allocated(device) if device.type == "cuda" else resident_bytes()
        return cls(predicted, held, device.type)

    def against(
        self, peak_bytes: int, setting: Setting | None = None, held: dict[str, int] | None = None
    ) -> dict[str, Any]:
        """The prediction by component, the peak of the stage above what was held before, and their ratio; with what the
        stage `held` (of `components.held_bytes`), both sides in four parts that can be compared.
        """
        measured = max(0, peak_bytes - self.before_bytes)
        compared = (
            "peak allocated GPU memory, less what was allocated before the model was loaded"
            if self.device == "cuda"
            else "peak resident memory, less that of the process before the model was loaded; the prediction counts "
            "tensors alone, so what libraries load and snapshots clone is on the measured side only"
        )
        predicted = self.predicted.peak_bytes
        parts: dict[str, Any] = {}
        if setting is not None and held:
            peak: PeakWhat = "allocated" if self.device == "cuda" else "resident"
            parts = {"components": by_component(setting, predicted, held, measured, peak)}
        return parts | {
            "predicted_bytes": predicted,
            "predicted_components": self.predicted.components,
            "predicted_moment": self.predicted.moment,
            "before_bytes": self.before_bytes,
            "measured_bytes": measured,
            "measured_over_predicted": measured / predicted,
            "compared": compared,
        }
