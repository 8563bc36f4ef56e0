"""What is measured and predicted: one arm of the comparison at one size. Named by letters in the reports, as here:

(a) transformers_full, (b) liger_full, (c) engine_full, (d) lora, (e) outer_unfrozen, (f) elo_pretrain, (g) elo_align,
(s) elo_align_streamed, which is (g) with a few layers on the device and the rest on the host, and (x)
transformers_shallow, which is (f) made of transformers' parts. On a CPU (k) transformers_full_kept is (a) in a process
whose C library keeps freed memory, as the engine tells its own to (elo_engine/model/cpu_memory.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Literal, get_args

from elo_engine.config import Recompute
from elo_engine.model.spec import ModelSpec

ArmName = Literal[
    "transformers_full",
    "liger_full",
    "engine_full",
    "lora",
    "outer_unfrozen",
    "elo_pretrain",
    "elo_align",
    "elo_align_streamed",
    "transformers_shallow",
    "transformers_full_kept",
]
ARMS: tuple[ArmName, ...] = get_args(ArmName)

SHALLOW: frozenset[ArmName] = frozenset({"elo_pretrain", "transformers_shallow"})  # without the middle layers
# everything learns, in transformers
WHOLE_PEERS: frozenset[ArmName] = frozenset({"transformers_full", "transformers_full_kept", "liger_full"})
ENGINE: frozenset[ArmName] = frozenset({"engine_full", "elo_pretrain", "elo_align", "elo_align_streamed"})
GRAPHED: frozenset[ArmName] = ENGINE - {"elo_align_streamed"}  # whose steps can be CUDA graphs


@dataclass(frozen=True)
class Streaming:
    """How (s) keeps what is not on the device; see `elo_engine.config.StreamConfig`."""

    store: Literal["memory", "disk"] = "memory"
    inputs: Literal["device", "host"] = "device"
    update: Literal["lazy", "at_once"] = "lazy"
    vocabulary: Literal["whole", "sliced"] = "whole"


_GROUP = 256  # moments to a scale: a slice holds whole groups


def vocabulary_slices(spec: ModelSpec) -> list[tuple[int, int]]:
    """The rows, first and after the last, of each slice of an embedding or head under `vocabulary: sliced`: equal
    slices, as few as hold no more than a decoder layer does.
    """
    step = _GROUP // gcd(spec.D, _GROUP)
    most = max(step, spec.layer_parameters // spec.D // step * step)
    count = -(-spec.V // most)
    rows = -(-spec.V // (count * step)) * step
    return [(begin, min(spec.V, begin + rows)) for begin in range(0, spec.V, rows)]


@dataclass(frozen=True)
class Processes:
    """Of a run: how many there are, one a device, and how many of them share the memory of one host."""

    count: int = 1
    on_host: int = 1


ALONE = Processes()


@dataclass(frozen=True)
class ShallowTurns:
    """The shallow steps that take turns with those of (g) in one run (`align.when: interleaved`); as in `Setting`."""

    layers: tuple[int, ...]
    micro_batch: int
    micro_batches: int
    recompute: Recompute
    bridges: int
    graph: bool = False


@dataclass(frozen=True)
class Setting:
    """One arm at one size.

    Attributes:
        layers: the detached layers (elo_pretrain, transformers_shallow) or the unfrozen ones (outer_unfrozen); the
            other arms train every layer, and `lora` every layer's adapters.
        sequence_length, micro_batch, micro_batches: T tokens a row, B rows at once, and how often a step.
        dtype: of the weights and of the arithmetic; in bf16 the engine keeps fp32 masters with `state` fp32, the
            others train bf16 weights as they are.
        state: moments of 8 bits, or in fp32 (in transformers' arms: in the weights' own type).
        master: this engine's, beside bf16 weights with 8-bit moments; see `elo_engine.config.OptimizerConfig`.
        recompute: layer: gradient checkpointing, layer by layer; selective: of each layer the MLP's first product, in
            this engine's resident arms alone.
        lora_rank: r of arm (d), on all seven projections of a layer.
        bridges: gaps between, before and behind the detached layers that have an affine map (elo_pretrain): all or 0.
        host_embedding: elo_pretrain's frozen embedding is in the host's memory and not in a GPU's.
        graph: a step of elo_pretrain, elo_align or engine_full is a CUDA graph, fed from buffers that hold a whole
            step's tokens; in turns with others it keeps its memory.
        fp8: elo_pretrain's products of 8-bit operands: the head's, or the layers' too.
        processes: of the run; `micro_batch`, `micro_batches` and all bytes of the device are of one of them.
        sharded: the model of elo_align is spread over them (`model/sharded.py`); else each has the whole of it.
        streaming: of arm (s), whose layers are always run again, whatever `recompute` says.
    """

    arm: ArmName
    spec: ModelSpec
    layers: tuple[int, ...]
    sequence_length: int
    micro_batch: int
    micro_batches: int = 1
    dtype: Literal["bf16", "fp32"] = "bf16"
    state: Literal["fp32", "8bit"] = "8bit"
    recompute: Recompute = "none"
    device: Literal["cpu", "cuda"] = "cuda"
    lora_rank: int = 16
    streaming: Streaming = Streaming()
    master: Literal["none", "24", "32"] = "none"
    bridges: int = 0
    turns: ShallowTurns | None = None
    host_embedding: bool = False
    graph: bool = False
    fp8: Literal["none", "head", "all"] = "none"
    processes: Processes = ALONE
    sharded: bool = False

    def __post_init__(self) -> None:
        assert self.recompute in get_args(Recompute), f"recompute {self.recompute!r} is not of {get_args(Recompute)}"
        assert self.recompute != "selective" or self.arm in ENGINE, f"{self.arm} runs whole layers again, or none"

    @property
    def master_bytes(self) -> int:
        """Bytes beside a weight of this engine that hold its master, or the lower bits of one."""
        if self.dtype == "fp32":
            return 0
        return 4 if self.state == "fp32" else {"none": 0, "24": 1, "32": 4}[self.master]

    @property
    def width(self) -> int:
        """Bytes of a weight."""
        return 2 if self.dtype == "bf16" else 4

    @property
    def N(self) -> int:
        """Tokens of a micro-batch."""
        return self.sequence_length * self.micro_batch

    @property
    def tokens_per_step(self) -> int:
        """Positions that one optimizer step is fed, of one process."""
        return self.N * self.micro_batches

    @property
    def one_gradient_summed(self) -> bool:
        """Whether the gradients of a single micro-batch are summed over processes, for which bf16 ones become fp32."""
        return self.processes.count > 1 and self.micro_batches == 1
