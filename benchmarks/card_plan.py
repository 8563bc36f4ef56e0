"""What `elo bench card` runs on a given card, in which order and at which sizes: what matters most comes first, and
models are those whose arms are predicted to fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from elo_engine.benchmarks.bench_ops import STEMS
from elo_engine.benchmarks.card_process import Part
from elo_engine.benchmarks.card_table import GRAPH
from elo_engine.benchmarks.contestants import Size, choose, needed_bytes, parse_arms
from elo_engine.benchmarks.models import open_model
from elo_engine.errors import UsageError
from elo_engine.measure.cards import CONTEXT_BYTES

GROUPS = ("correct", "speedup", "graph", "memory", "bias", "kernels", "compile")
MODELS = ("llama-3.1-8b", "llama-3.2-1b", "smollm2-135m")  # the first whose arms fit is the one that is compared
LENGTH, ROWS = 8192, 4
ARMS = "a,c,f,g"
# Whose pretraining is also measured with its steps as CUDA graphs: the smallest, where launches are most of a step. Of
# Llama-3.2-1B nothing is expected (docs/step.md), the graphs' own part has it at this size, and the ten minutes end
# before the last parts as it is.
WITH_GRAPHS = MODELS[-1]
TINY, TINY_LENGTH = "llama-3.1-8b-mini", 32
BENCH = ("elo_engine", "bench")
OWN = "elo_engine.benchmarks."
FIRST_STEP_LEAST_S = 20.0
CAP = "8"  # GiB; tensors get what CUDA leaves of it, 7.9 GB


@dataclass(frozen=True)
class Machine:
    """What the parts run on, as a process of its own found it.

    Attributes:
        name: of the card, as its maker calls it. card: as cards.py does; "" where that does not know it.
        free_bytes: of its memory, before anything runs.
    """

    device: str
    name: str
    card: str
    free_bytes: int

    @property
    def room(self) -> int:
        """Bytes that tensors of a part may take, beside what CUDA takes in it and in the process that measures it."""
        return max(0, self.free_bytes - 2 * CONTEXT_BYTES)


def parse_groups(text: str | None) -> tuple[str, ...]:
    """`correct,speedup` -> groups in the order in which they are run; all for None.

    Raises:
        UsageError: no such group.
    """
    words = [word.strip() for word in text.split(",")] if text else list(GROUPS)
    if unknown := sorted(set(words) - set(GROUPS)):
        raise UsageError(f"--only: no such part: {', '.join(unknown)}; there are {', '.join(GROUPS)}")
    return tuple(group for group in GROUPS if group in words)


def headline(machine: Machine, scale: str) -> str | None:
    """The largest model of which full continual pretraining, ELO pretraining and alignment are all predicted to fit."""
    if scale == "tiny":
        return TINY
    return next((model for model in MODELS if elo_rows(model, machine, ARMS) is not None), None)


@cache  # asked of a model and a machine again and again, and a second or two of the card's time
def elo_rows(
    model: str, machine: Machine, arms: str = "f", fp8: str = "none", graph: str = "off"
) -> int | None:
    """Rows at once of ELO pretraining with which all of these arms fit: the most of 4, 2 and 1 that it takes without
    recomputation, else the most at all; None: not one row.
    """
    opened, again = open_model(model), None
    for rows in (4, 2, 1):
        size = Size(
            machine.device, "bf16", LENGTH, rows=ROWS, elo_micro_batch=rows, memory_bytes=machine.room, fp8=fp8,
            graph=graph,
        )  # fmt: skip
        chosen = [one.setting for one in choose(opened, (0, opened.spec.layers - 1), size, parse_arms(arms))]
        if all(needed_bytes(setting) <= machine.room for setting in chosen):
            if all(setting.recompute == "none" for setting in chosen if setting.arm == "elo_pretrain"):
                return rows
            again = again or rows
    return again


def plan(machine: Machine, scale: str, groups: tuple[str, ...]) -> list[Part]:
    """The parts of these groups, in order."""
    made = _tiny() if scale == "tiny" else _full(machine)
    return [part for part in made if part.group in groups]


def _bench(*words: str) -> tuple[str, ...]:
    return (*BENCH, *words, "--records", "{records}")


def _tests() -> Part:
    return Part("correct", "correct", (f"{OWN}card_tests", "{out}"), 150, 20)


def _first_step(model: str, *words: str) -> Part:
    """With a cache of Triton's that is empty, and a folder of its own for what torch would keep."""
    return Part(
        f"compile {model}", "compile", (f"{OWN}first_step", "{out}", "--model", model, *words), 120,
        FIRST_STEP_LEAST_S,
        {"TRITON_CACHE_DIR": "{scratch}"},
    )  # fmt: skip


def _full(machine: Machine) -> Iterator[Part]:
    yield _tests()
    yield from _speedups(machine)
    yield Part("graph", "graph", (f"{OWN}graph_turns", "{out}", "--minutes", "{minutes}"), 75, 25)
    yield from _memory(machine)
    yield Part("bias", "bias", (f"{OWN}fp8_bias", "{out}"), 60, 15)
    for stem in STEMS:
        # a contest has its rounds in milliseconds; torch.compile, Liger and the others take seconds to be ready
        words = _bench("kernels", stem, "--rounds", "5")
        yield Part(f"kernels {stem}", "kernels", words, 60, 20, leaves_s=FIRST_STEP_LEAST_S)
    model = next((model for model in MODELS if elo_rows(model, machine) is not None), MODELS[-1])
    yield _first_step(model, "--sequence-length", str(LENGTH))


def _speedups(machine: Machine) -> Iterator[Part]:
    size = ("--device", machine.device, "--dtype", "bf16", "--sequence-length", str(LENGTH), "--rows", str(ROWS),
            "--state", "8bit", "--minutes", "{minutes}")  # fmt: skip
    chosen = headline(machine, "full")
    if chosen is None:
        none = f"no model of {', '.join(MODELS)} has arms {ARMS} that fit {machine.room / 2**30:.1f} GiB"
        yield Part("speedup", "speedup", (), 0, 0, why_not=none)
    else:
        rows = str(elo_rows(chosen, machine, ARMS))
        command = _bench("speedup", "--model", chosen, "--arms", ARMS, "--elo-micro-batch", rows, *size)
        yield Part(f"speedup {chosen}", "speedup", command, 240, 60)
    # Alone, so that it stays alive and has many steps for a p90; each way of multiplying against the others.
    wanted = [(MODELS[0], fp8, "off") for fp8 in ("none", "head", "all")]
    wanted += [(model, "none", "off") for model in MODELS[1:]] + [(WITH_GRAPHS, "none", "on")]
    for model, fp8, graph in wanted:
        found = elo_rows(model, machine, fp8=fp8, graph=graph)
        name = f"pretrain {model}" + (f", fp8 {fp8}" if fp8 != "none" else "") + (f", {GRAPH}" if graph == "on" else "")
        why = f"not one row of {LENGTH} tokens fits {machine.room / 2**30:.1f} GiB" if found is None else ""
        command = _bench("speedup", "--model", model, "--arms", "f", "--fp8", fp8, "--graph", graph, "--rounds",
                         "40", "--elo-micro-batch", str(found), *size)  # fmt: skip
        yield Part(name, "speedup", command, 60, 20, why_not=why)


def _memory(machine: Machine) -> Iterator[Part]:
    """One row of the 8B's ELO pretraining; a card that has no more than the cap shows without one that it fits."""
    yield Part(
        f"memory {MODELS[0]}", "memory",
        _bench("memory", "--model", MODELS[0], "--device", machine.device, "--dtype", "bf16", "--arms", "f", "--state",
               "8bit", "--sequence-lengths", str(LENGTH), "--micro-batches", "1", "--caps", CAP, "--minutes",
               "{minutes}"), 75, 25,
    )  # fmt: skip


def _tiny() -> Iterator[Part]:
    """Every part at a small size on a CPU: it shows that the parts run, and its figures say nothing."""
    size = ("--device", "cpu", "--sequence-length", str(TINY_LENGTH), "--state", "fp32", "--minutes", "{minutes}")
    yield _tests()
    yield Part(
        f"speedup {TINY}", "speedup",
        _bench("speedup", "--model", TINY, "--arms", ARMS, "--rounds", "1", "--rows", "1", "--dtype", "fp32",
               *size), 240, 10,
    )  # fmt: skip
    for fp8 in ("none", "head", "all"):
        command = _bench("speedup", "--model", TINY, "--arms", "f", "--fp8", fp8, "--rounds", "3", "--dtype", "bf16",
                         *size)  # fmt: skip
        yield Part(f"pretrain {TINY}" + (f", fp8 {fp8}" if fp8 != "none" else ""), "speedup", command, 120, 10)
    words = ("speedup", "--model", TINY, "--arms", "f", "--graph", "on", "--dtype", "bf16", *size)
    yield Part(f"pretrain {TINY}, {GRAPH}", "speedup", _bench(*words), 60, 10)
    yield Part("graph", "graph", (f"{OWN}graph_turns", "{out}", "--minutes", "0.1", "--device", "cpu"), 60, 10)
    yield Part(
        f"memory {TINY}", "memory",
        _bench("memory", "--model", TINY, "--device", "cpu", "--dtype", "fp32", "--arms", "f", "--sequence-lengths",
               str(TINY_LENGTH), "--micro-batches", "1", "--caps", CAP, "--minutes", "{minutes}"), 120, 10,
    )  # fmt: skip
    yield Part("bias", "bias", (f"{OWN}fp8_bias", "{out}", "--device", "cpu"), 60, 10)
    yield Part("kernels swiglu", "kernels", _bench("kernels", "swiglu", "--rounds", "1"), 120, 10)
    yield _first_step(TINY, "--sequence-length", str(TINY_LENGTH), "--device", "cpu")


def conditions(machine: Machine, scale: str, minutes: float) -> dict[str, Any]:
    """What a run on this machine was, for its record."""
    return {"device": {"type": machine.device, "name": machine.name}, "card": machine.card, "scale": scale,
            "minutes": minutes, "headline": headline(machine, scale), "free_bytes": machine.free_bytes}  # fmt: skip
