"""Steps as CUDA graphs and launched kernel by kernel, taking turns in one process, of ELO pretraining and of one run
with whole-model steps among shallow ones: `python -m elo_engine.benchmarks.graph_turns OUT.json`.

Two engines of the same weights are fed the same rows, documents of some 700 tokens. A turn is a run of steps as
training makes them: a step's numbers are read when the next one is launched, and the time from one reading to the next
is the step's, so that what the host does beside a busy device costs nothing, as in training. Of whole-model steps among
shallow ones, `in turns`, three shallow steps and a whole-model one that moves the bridge, as the demo has them, are
timed as one.

Predicted (docs/step.md): 1.4 times as fast at one row of 2048 of SmolLM2-135M, within 1 % at four rows of 8192, 3.5
times in turns.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from elo_engine.benchmarks.card_report import Cases, refusing
from elo_engine.benchmarks.first_step import engine_of, setting_for
from elo_engine.benchmarks.in_turns import Steps, engine_in_turns, rows_each, setting_in_turns, steps_in_turns, steps_of
from elo_engine.data import RowBatch
from elo_engine.data.rows import NO_LABEL, flat_starts
from elo_engine.errors import FailedError, RefusedError
from elo_engine.measure.environment import choose_device
from elo_engine.measure.machine import device_room
from elo_engine.measure.planner import predict_memory
from elo_engine.measure.roofline import synchronize
from elo_engine.measure.setting import Setting
from elo_engine.model import ops

DOCUMENT, LONGEST = 700, 3000  # tokens: the mean, and the most
BATCHES = 8  # steps of a turn, each of other rows, so that the number of documents changes as in training
FEWEST_TURNS, MOST_TURNS = 3, 40
# Relative difference of the two engines' losses after equally many steps. Attention adds the queries' gradient up in
# the order of arrival, so they part in bf16 a little. Of random text all steps have about the same loss, so the last of
# a turn, whose loss is compared and whose time is not, has fewer labels: a graph that reads another step's is off by
# UNLABELLED.
SAME_LOSS, UNLABELLED = 1e-2, 1 / 16


@dataclass(frozen=True)
class Case:
    """Sizes: `rows` at once of `length` tokens, `micro_batches` of them a step; in turns those of shallow steps."""

    name: str
    model: str
    length: int
    rows: int
    micro_batches: int
    in_turns: bool = False

    def setting(self, device: torch.device) -> Setting:
        """With this device's dtype and state; in turns with the demo's."""
        alone = setting_for(self.model, self.length, device, self.rows, self.micro_batches)
        return setting_in_turns(alone) if self.in_turns else alone


CASES = (
    Case("smollm2-135m small", "smollm2-135m", 2048, 1, 1),
    Case("smollm2-135m in turns", "smollm2-135m", 512, 3, 1, in_turns=True),
    Case("smollm2-135m usual", "smollm2-135m", 8192, 4, 2),
    Case("llama-3.2-1b small", "llama-3.2-1b", 512, 1, 1),
    Case("llama-3.2-1b usual", "llama-3.2-1b", 8192, 4, 2),
)


def with_graphs(setting: Setting) -> Setting:
    """The same steps as graphs."""
    turns = setting.turns
    return replace(setting, graph=True, turns=None if turns is None else replace(turns, graph=True))


def document_rows(setting: Setting, number: int) -> RowBatch:
    """Rows of what is timed as a step, cut into documents."""
    T, count = setting.sequence_length, sum(rows_each(setting))
    chance = np.random.default_rng(number)
    starts_BT = np.zeros((count, T), bool)
    for row in starts_BT:
        at = 0
        while at < T:
            row[at] = True
            at += int(np.clip(chance.exponential(DOCUMENT), 8, LONGEST))
    starts = flat_starts(starts_BT)
    positions = np.concatenate([np.arange(size) for size in np.diff(starts)]).reshape(count, T)
    ids = chance.integers(0, setting.spec.V, (count, T))
    return RowBatch(ids, np.roll(ids, -1, 1), positions, starts, ("random",) * count)


def rows_of_turn(setting: Setting) -> list[RowBatch]:
    """Rows of the steps of a turn; UNLABELLED of the last one's labels are none, in turns of each of its steps'."""
    batches = [document_rows(setting, step) for step in range(BATCHES)]
    for first, last in pairwise(accumulate(rows_each(setting), initial=0)):
        labels_N = batches[-1].labels_BT[first:last].reshape(-1)
        labels_N[: round(UNLABELLED * len(labels_N))] = NO_LABEL
    return batches


def run_steps(
    step: Steps, batches: Sequence[RowBatch], device: torch.device, *, first: bool
) -> tuple[list[float], float]:
    """One turn -> seconds of its steps, and the last step's loss. The first step and the last are not among them: none
    is launched before the one, and none behind the other, so that of a step that waits for the host little is left.
    """
    synchronize(device)
    read, before = list[float](), None
    for number, rows in enumerate(batches):
        launched = step(rows, first and number == 0)
        if before is not None:
            assert before.updated, "a step on random weights was not made"  # waits until that step is done
            read.append(time.perf_counter())
        before = launched
    assert before is not None and before.updated
    return [after - now for now, after in pairwise(read)], float(before.loss_sum)


def take_turns(
    engines: dict[str, Steps], batches: Sequence[RowBatch], device: torch.device, seconds: float,
    warm: Callable[[str], None] = lambda name: None,
) -> dict[str, list[float]]:  # fmt: skip
    """Turns in shuffled order for so many seconds, FEWEST_TURNS at least -> seconds of each engine's steps. Before that
    two turns each, in which kernels are compiled and graphs captured; `warm` is called after them.

    Raises:
        FailedError: after equally many steps on the same rows the engines' losses differ.
    """
    losses, took = {}, {name: list[float]() for name in engines}
    for name, step in engines.items():
        for number in range(2):
            run_steps(step, batches, device, first=number == 0)
        warm(name)
    order, began = random.Random(0), time.monotonic()
    for turn in range(MOST_TURNS):
        if turn >= FEWEST_TURNS and time.monotonic() - began > seconds:
            break
        for name in order.sample(sorted(engines), len(engines)):
            more, losses[name] = run_steps(engines[name], batches, device, first=False)
            took[name] += more
        low, high = min(losses.values()), max(losses.values())
        if not high - low <= SAME_LOSS * abs(low):
            raise FailedError(f"after turn {turn + 1} on the same rows the losses are {losses}: not the same training")
    return took


def figures(name: str, took: dict[str, list[float]]) -> dict[str, float]:
    """Milliseconds and ratios of a case."""
    found = {}
    for kind, seconds in took.items():
        tenths = statistics.quantiles(seconds, n=10)
        found |= {
            f"{name}, {kind}, ms": 1e3 * tenths[4], f"{name}, {kind}, p90/p50": tenths[8] / tenths[4],
            f"{name}, {kind}, steps": float(len(seconds)),
        }  # fmt: skip
    ratio = found[f"{name}, launched, ms"] / found[f"{name}, graph, ms"]
    return found | {f"{name}, launched over graph": ratio}


def engines_of(setting: Setting, model: str, device: torch.device) -> tuple[dict[str, Steps], Callable[[str], None]]:
    """Both engines, each with a model of its own, and the check that graphs were captured."""
    from elo_engine.train.graphed import CudaCaptures, GraphedEngine, Graphing

    how = Graphing(CudaCaptures(device), print, must=True)
    if setting.turns is not None:
        plain = engine_in_turns(setting, model, device)
        both = engine_in_turns(setting, model, device, (how, how.beside(print, True, "align.graph")))
        made = {"launched": steps_in_turns(plain, setting), "graph": steps_in_turns(both, setting)}
        return made, must_be_captured([both.shallow, both.whole])
    launched = engine_of(setting, model, device)
    other = engine_of(setting, model, device)
    graphed = GraphedEngine(other.model, other.optimizer, setting.micro_batch, how)
    return {"launched": steps_of(launched), "graph": steps_of(graphed)}, must_be_captured([graphed])


def must_be_captured(engines: Sequence[Any]) -> Callable[[str], None]:
    """What is called after `graph` has warmed up. It raises FailedError where one of its engines has no graph."""

    def captured(name: str) -> None:
        if name == "graph" and not all(engine._graphs for engine in engines):
            raise FailedError("no step of a kind was captured: the engine with graphs launched all of them")

    return captured


def measure(case: Case, device: torch.device, seconds: float) -> dict[str, float]:
    """One case.

    Raises:
        RefusedError: padded packing is not to be had, or both engines do not fit. FailedError: as `take_turns` does.
    """
    setting = case.setting(device)
    why = ops.why_not_padded(torch.bfloat16, setting.spec.E, setting.spec.softcap)
    need = predict_memory(setting).peak_bytes + predict_memory(with_graphs(setting)).peak_bytes
    if why is None and need > device_room(device).bytes:
        why = f"both engines need {need / 2**30:.1f} GiB"
    if why is not None:
        raise RefusedError(why)
    engines, captured = engines_of(setting, case.model, device)
    return figures(case.name, take_turns(engines, rows_of_turn(setting), device, seconds, captured))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    given = parser.parse_args()
    cases = Cases(given.out)
    with refusing():
        device = choose_device(given.device)
        if device.type != "cuda":
            raise RefusedError(f"CUDA graphs are of GPUs, and this is a {device.type}")
        device = torch.device("cuda", torch.cuda.current_device())
        ops.configure("auto", device)
        until = time.monotonic() + 60 * given.minutes
        for number, case in enumerate(CASES):
            with cases.case(case.name, f"{case.name}, launched over graph"):
                # half of a case's time for its turns: making the models and capturing takes some, too
                seconds = max(1.0, 0.5 * (until - time.monotonic()) / (len(CASES) - number))
                cases.figures |= measure(case, device, seconds)
            gc.collect()
            torch.cuda.empty_cache()
        cases.require()


if __name__ == "__main__":
    main()
