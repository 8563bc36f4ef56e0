"""The order of things: which arm steps when. Where all arms fit into memory together they live throughout and take
turns step by step; else each turn is a visit, a fresh process that warms up and runs a few steps. The order of the
arms is drawn anew each round.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elo_engine.benchmarks.contestants import Contestant
from elo_engine.benchmarks.evidence import require_engagement
from elo_engine.benchmarks.processes import ArmFailed, ArmProcess, spec_of
from elo_engine.measure.setting import ArmName

Say = Callable[[str], None]


@dataclass
class Taken:
    """All that was measured of one arm."""

    described: dict[str, Any] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)  # of every step of the first process, warm-up included
    last: dict[str, Any] = field(default_factory=dict)  # peaks; evidence
    tensor_peak_bytes: int | None = None
    energy_j: list[float] = field(default_factory=list)  # of the timed steps
    failed: str = ""


@dataclass
class Run:
    """All that was measured. `rounds`: arm -> seconds and losses of its timed steps, one entry a round."""

    taken: dict[ArmName, Taken]
    rounds: list[dict[ArmName, dict[str, list[float]]]]
    warmup_steps: int
    together: bool
    interrupted: bool = False


@dataclass(frozen=True)
class Schedule:
    """How long to measure.

    Attributes:
        rounds: at most this many. seconds: no round is begun that would end later, if it takes as long as the longest
            so far; the first two are run in any case.
        warmup: untimed steps of a process. steps: timed steps of a visit.
    """

    rounds: int
    seconds: float
    warmup: int = 2
    steps: int = 3


def run(
    contestants: list[Contestant], model: str, lr: float, schedule: Schedule, *, together: bool, scratch: Path, say: Say
) -> Run:
    """Measure; arms that fail leave the rounds, those that went before them stay out of the ratios.

    Raises:
        FailedError: an arm that does something else than it claims.
    """
    there = [one for one in contestants if not one.why_not]
    result = Run({one.name: Taken() for one in there}, [], schedule.warmup, together)
    turns = _Together(there, model, lr, schedule, result, scratch) if together else _Visits(
        there, model, lr, schedule, result, scratch
    )  # fmt: skip
    began, longest, order = time.monotonic(), 0.0, random.Random(0)
    try:
        with turns.alive(say):
            while len(result.rounds) < schedule.rounds:
                left = schedule.seconds - (time.monotonic() - began)
                if len(result.rounds) >= 2 and left < longest * 1.1:
                    break
                start = time.monotonic()
                this: dict[ArmName, dict[str, list[float]]] = {}
                for one in order.sample(there, len(there)):
                    taken = result.taken[one.name]
                    if taken.failed:
                        continue
                    try:
                        this[one.name] = turns.turn(one)
                    except ArmFailed as error:
                        taken.failed = str(error)
                        say(f"{one.name}: {taken.failed}")
                result.rounds.append(this)
                longest = max(longest, time.monotonic() - start)
                spent = time.monotonic() - began
                more = min(schedule.rounds - len(result.rounds), int(max(0.0, schedule.seconds - spent) / longest))
                say(f"round {len(result.rounds)} took {longest:.0f} s; about {more} more, {more * longest:.0f} s")
            turns.end()
    except KeyboardInterrupt:
        result.interrupted = True
    for one in there:
        found = result.taken[one.name]
        if not found.failed and found.last:
            require_engagement(one.setting, found.last["evidence"])
    return result


class _Visits:
    """Fresh processes, one at a time."""

    def __init__(
        self, there: list[Contestant], model: str, lr: float, schedule: Schedule, result: Run, scratch: Path
    ) -> None:
        self.there, self.model, self.lr = there, model, lr
        self.schedule, self.result, self.scratch = schedule, result, scratch

    @contextmanager
    def alive(self, say: Say) -> Iterator[None]:
        self.say = say
        yield

    def turn(self, one: Contestant) -> dict[str, list[float]]:
        taken = self.result.taken[one.name]
        first = not taken.last
        with ArmProcess(one, spec_of(one, self.model, self.lr), self.scratch) as process:
            taken.described = process.described()
            warm = [process.step("trace" if number == 1 else "step") for number in range(self.schedule.warmup)]
            timed = [process.step() for _ in range(self.schedule.steps)]
            last = process.finish()
        if first:
            taken.losses = [answer["loss"] for answer in (*warm, *timed)]
        _note(taken, warm, timed)
        taken.last = _larger(taken.last, last)
        self.say(f"  {one.name}: {min(answer['seconds'] for answer in timed):.3f} s a step")
        return {"seconds": [a["seconds"] for a in timed], "losses": [a["loss"] for a in timed]}

    def end(self) -> None:
        """Every visit ended its own process."""


class _Together(_Visits):
    """One process an arm, alive throughout; a turn is one step."""

    @contextmanager
    def alive(self, say: Say) -> Iterator[None]:
        self.say = say
        with ExitStack() as stack:
            # all at once: what they do until they are ready is importing
            self.processes = {
                one.name: stack.enter_context(ArmProcess(one, spec_of(one, self.model, self.lr), self.scratch))
                for one in self.there
            }
            for process in self.processes.values():
                with suppress(ArmFailed):  # said again below
                    process.described()
            for one in self.there:
                taken, process = self.result.taken[one.name], self.processes[one.name]
                try:
                    taken.described = process.described()
                    warm = [process.step("trace" if number == 1 else "step") for number in range(self.schedule.warmup)]
                except ArmFailed as error:
                    taken.failed = str(error)
                    self.say(f"{one.name}: {taken.failed}")
                    continue
                taken.losses = [answer["loss"] for answer in warm]
                _note(taken, warm, [])
                self.say(f"{one.name}: ready")
            yield

    def turn(self, one: Contestant) -> dict[str, list[float]]:
        answer = self.processes[one.name].step()
        taken = self.result.taken[one.name]
        taken.losses.append(answer["loss"])
        _note(taken, [], [answer])
        return {"seconds": [answer["seconds"]], "losses": [answer["loss"]]}

    def end(self) -> None:
        for name, process in self.processes.items():
            taken = self.result.taken[name]
            if taken.failed:
                continue
            try:
                taken.last = process.finish()
            except ArmFailed as error:
                taken.failed = str(error)


def _note(taken: Taken, warm: list[dict[str, Any]], timed: list[dict[str, Any]]) -> None:
    for answer in warm:
        if "tensor_peak_bytes" in answer:
            taken.tensor_peak_bytes = max(taken.tensor_peak_bytes or 0, answer["tensor_peak_bytes"])
    taken.energy_j += [answer["energy_j"] for answer in timed if answer.get("energy_j") is not None]


def _larger(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The later visit's evidence with the larger peaks of both."""
    found = dict(now)
    for key, value in before.items():
        if key.endswith("_bytes") and value is not None:
            found[key] = max(value, now[key])
    return found
