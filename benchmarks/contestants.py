"""Which arms a comparison has, with which settings, and why one cannot run here.

The paper's setting by default: rows of 8192 tokens, micro-batches of 4 rows for ELO pretraining and of 1 for the whole
model. Every arm is fed the same number of rows a step (4), so that none pays for its optimizer more often than another.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field, replace
from typing import get_args

from elo_engine.benchmarks.models import BenchModel
from elo_engine.config import Recompute
from elo_engine.errors import UsageError
from elo_engine.measure.machine import host_room
from elo_engine.measure.memory_units import host_parts
from elo_engine.measure.meter import human_bytes
from elo_engine.measure.planner import STREAMED, fits, largest_micro_batch, least_recompute, predict_memory
from elo_engine.measure.setting import ARMS, GRAPHED, SHALLOW, ArmName, Setting
from elo_engine.model.ops import Fp8

LETTERS: dict[ArmName, str] = {
    "transformers_full": "a",
    "liger_full": "b",
    "engine_full": "c",
    "lora": "d",
    "outer_unfrozen": "e",
    "elo_pretrain": "f",
    "elo_align": "g",
    "elo_align_streamed": "s",
    "transformers_shallow": "x",
    "transformers_full_kept": "k",
}
LABELS: dict[ArmName, str] = {
    "transformers_full": "full CP, transformers Trainer",
    "liger_full": "full CP, Trainer with Liger",
    "engine_full": "full CP, this engine, checkpointed",
    "lora": "LoRA r16, Trainer with peft",
    "outer_unfrozen": "first and last layer unfrozen, Trainer",
    "elo_pretrain": "ELO pretraining, this engine",
    "elo_align": "alignment, this engine",
    "elo_align_streamed": "alignment, streamed, this engine",
    "transformers_shallow": "the same two layers, Trainer",
    "transformers_full_kept": "full CP, Trainer, memory kept",
}
BASELINES: tuple[ArmName, ...] = ("transformers_full", "transformers_full_kept", "liger_full", "engine_full")
SIDE: frozenset[ArmName] = frozenset({"lora", "outer_unfrozen", "transformers_shallow"})  # in no ratio
# What glibc is told for (k), as elo_engine/model/cpu_memory.py tells it for the engine.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "8589934592"}


# Rows' length and rows a step unless asked otherwise; on a CPU nothing larger ends five rounds within ten minutes.
DEFAULT_SIZE = {"cuda": (8192, 4), "cpu": (512, 2)}


@dataclass(frozen=True)
class Contestant:
    """An arm as it is run, or why it is not."""

    setting: Setting
    environment: dict[str, str] = field(default_factory=dict)
    why_not: str = ""

    @property
    def name(self) -> ArmName:
        """The arm."""
        return self.setting.arm


@dataclass(frozen=True)
class Size:
    """What all arms share."""

    device: str
    dtype: str
    sequence_length: int
    rows: int = 4  # a step
    elo_micro_batch: int = 4
    whole_micro_batch: int = 1
    state: str = "8bit"
    memory_bytes: int = 0  # of the device, for whether an arm needs recompute
    align_recompute: str = "auto"  # of (g): auto, the least that fits; none, selective or layer, whatever fits
    streamed_inputs: str = "auto"  # of (s): auto, on the device where they fit, else on the host; device or host
    fp8: str = "none"  # of (f), `pretrain.fp8`: none, head or all
    graph: str = "off"  # of the arms of GRAPHED, `pretrain.graph` and `align.graph`: off or on


def missing(arm: ArmName, size: Size) -> str:
    """Why an arm cannot run on this machine; empty where it can. Whether its memory is there depends on its setting:
    see `host_shortage`.
    """
    if arm == "liger_full":
        if size.device == "cpu":
            return "Liger's kernels are Triton kernels: they need a GPU"
        if importlib.util.find_spec("liger_kernel") is None:
            return "liger-kernel is not installed (pip install liger-kernel)"
    if arm == "transformers_full_kept" and size.device != "cpu":
        return "about the C library's memory, so for a CPU"
    if arm == "lora" and importlib.util.find_spec("peft") is None:
        return "peft is not installed (pip install peft)"
    trainer = arm.startswith(("transformers", "liger")) or arm in ("lora", "outer_unfrozen")
    if trainer and importlib.util.find_spec("accelerate") is None:
        return "the transformers Trainer needs accelerate (pip install accelerate)"
    eight = trainer and size.state == "8bit"
    if eight and not any(importlib.util.find_spec(name) for name in ("bitsandbytes", "torchao")):
        return "8-bit AdamW for transformers needs bitsandbytes or torchao (pip install bitsandbytes)"
    return ""


def choose(model: BenchModel, layers: tuple[int, ...], size: Size, wanted: tuple[ArmName, ...]) -> list[Contestant]:
    """The arms that were asked for, in the order of their letters.

    transformers' whole models are checkpointed, as the paper's setting needs; alignment and ELO pretraining in this
    engine are where their plan does not fit otherwise. Streamed alignment always runs its layers again.

    Raises:
        UsageError: rows of a step that are no whole number of micro-batches, or an unknown word for how (c), (f),
            (g) or (s) run.
    """
    for option, word, known in (
        ("--align-recompute", size.align_recompute, ("auto", *get_args(Recompute))),
        ("--streamed-inputs", size.streamed_inputs, ("auto", "device", "host")),
        ("--fp8", size.fp8, get_args(Fp8)),
        ("--graph", size.graph, ("off", "on")),
    ):
        if word not in known:
            raise UsageError(f"{option} {word!r}: it is one of {', '.join(known)}")
    for what, micro in (("--elo-micro-batch", size.elo_micro_batch), ("--micro-batch", size.whole_micro_batch)):
        if size.rows % micro:
            raise UsageError(f"{what} {micro}: the {size.rows} rows of a step (--rows) are no multiple of it")
    found = []
    for arm in sorted(wanted, key=lambda name: LETTERS[name]):
        micro = size.elo_micro_batch if arm in SHALLOW else size.whole_micro_batch
        setting = Setting(
            arm=arm, spec=model.spec, layers=layers, sequence_length=size.sequence_length, micro_batch=micro,
            micro_batches=size.rows // micro, dtype=size.dtype, state=size.state, device=size.device,  # type: ignore[arg-type]
            recompute="none" if arm in SHALLOW or arm == "elo_align" else "layer",
            fp8=size.fp8 if arm == "elo_pretrain" else "none",  # type: ignore[arg-type]
            graph=size.graph == "on" and arm in GRAPHED,
        )  # fmt: skip
        if arm == "elo_align" and size.align_recompute != "auto":
            setting = replace(setting, recompute=size.align_recompute)  # type: ignore[arg-type]
        elif arm in ("elo_align", "elo_pretrain"):
            setting = least_recompute(setting, lambda one: fits(one, size.memory_bytes))
        elif arm == STREAMED:
            inputs = size.streamed_inputs
            setting = with_inputs(setting, size.memory_bytes) if inputs == "auto" else _inputs(setting, inputs)
        environment = KEEP_MEMORY if arm == "transformers_full_kept" else {}
        found.append(Contestant(setting, environment, missing(arm, size) or host_shortage(setting)))
    return found


def _inputs(setting: Setting, where: str) -> Setting:
    return replace(setting, streaming=replace(setting.streaming, inputs=where))  # type: ignore[arg-type]


def with_inputs(setting: Setting, memory_bytes: int) -> Setting:
    """(s) with its layers' inputs on the device where that is predicted to fit there, else on the host; other arms as
    they are.
    """
    if setting.arm != STREAMED:
        return setting
    there = _inputs(setting, "device")
    return there if needed_bytes(there) <= memory_bytes else _inputs(setting, "host")


def most_rows(setting: Setting, memory_bytes: int) -> tuple[Setting, int]:
    """The most rows at once that fit the device; of (s) with its layers' inputs where more of them fit."""
    if setting.arm != STREAMED:
        return setting, largest_micro_batch(setting, memory_bytes)
    ways = [_inputs(setting, where) for where in ("device", "host")]
    return max(((way, largest_micro_batch(way, memory_bytes)) for way in ways), key=lambda found: found[1])


def host_bytes(setting: Setting) -> int:
    """What an arm keeps of its model on the host: (s) all of it, the others nothing."""
    return sum(host_parts(setting).values()) if setting.arm == STREAMED else 0


def host_shortage(setting: Setting) -> str:
    """Why what an arm keeps on the host does not fit there, in words; empty where it does."""
    needed = host_bytes(setting)
    if not needed:
        return ""
    room = host_room()
    if needed <= room.bytes:
        return ""
    return f"keeps {human_bytes(needed)} on the host, which has {human_bytes(room.bytes)} ({room.what})"


def needed_bytes(setting: Setting) -> int:
    """Of the device's memory, as predicted; a CPU's is also the host's."""
    return predict_memory(setting).peak_bytes + (host_bytes(setting) if setting.device == "cpu" else 0)


def default_arms(device: str) -> tuple[ArmName, ...]:
    """What is compared unless asked otherwise. On a CPU without (s): nothing is gained there by streaming from memory
    to memory, and the minutes are those of the other arms' rounds; `--arms` brings it.
    """
    return tuple(arm for arm in ARMS if device != "cpu" or arm != STREAMED)


def parse_arms(text: str) -> tuple[ArmName, ...]:
    """`a,f,g` or names -> arms.

    Raises:
        UsageError: no such arm.
    """
    by_letter = {letter: arm for arm, letter in LETTERS.items()}
    chosen = []
    for word in text.split(","):
        arm = by_letter.get(word.strip(), word.strip())
        if arm not in ARMS:
            known = ", ".join(f"{letter} ({name})" for name, letter in LETTERS.items())
            raise UsageError(f"--arms: {word!r} is no arm; there are {known}")
        chosen.append(arm)
    return tuple(dict.fromkeys(chosen))  # type: ignore[arg-type]


def together_fit(contestants: list[Contestant], memory_bytes: int) -> bool:
    """Whether all arms can be alive at the same time, taking turns step by step; 0.6 GB each for what is no tensor."""
    needs = [needed_bytes(one.setting) + 600_000_000 for one in contestants if not one.why_not]
    return sum(needs) < 0.85 * memory_bytes
