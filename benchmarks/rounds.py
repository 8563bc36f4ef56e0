"""The order of things: which arm steps when. Where all arms fit into memory together they live throughout and take
turns step by step; else each turn is a visit, a fresh process that warms up and runs a few steps, started ahead
(ahead.py). The order of the arms is drawn anew each round.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elo_engine.benchmarks.ahead import Ahead
from elo_engine.benchmarks.contestants import SIDE, Contestant
from elo_engine.benchmarks.evidence import require_engagement
from elo_engine.benchmarks.graph_arms import warmup_steps
from elo_engine.benchmarks.processes import ArmFailed, ArmProcess, spec_of
from elo_engine.errors import FailedError
from elo_engine.measure.setting import ArmName

Say = Callable[[str], None]


@dataclass
class Taken:
    """All that was measured of one arm."""

    described: dict[str, Any] = field(default_factory=dict)
    # of every step of the first process, warm-up included
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)  # of the gradient, before clipping
    last: dict[str, Any] = field(default_factory=dict)  # peaks; evidence
    tensor_peak_bytes: int | None = None
    energy_j: list[float] = field(default_factory=list)  # of the timed steps
    failed: str = ""
    turn_s: float = 0.0  # the longest turn


@dataclass
class Run:
    """All that was measured. `rounds`: arm -> seconds and losses of its timed steps, one entry a round."""

    taken: dict[ArmName, Taken]
    rounds: list[dict[ArmName, dict[str, list[float]]]]
    warmup_steps: int
    together: bool
    interrupted: bool = False
    refused: str = ""  # an arm does something else than it claims


@dataclass(frozen=True)
class Schedule:
    """How long to measure.

    Attributes:
        rounds: at most this many. seconds: no round is begun that would end later, if it takes as long as the longest
            so far; the first one is run in any case.
        side_rounds: of the arms that no ratio needs: three, or one where every turn is a visit.
        warmup: untimed steps of a process, of one with graphs beside those that are launched. steps: timed steps of a
            visit.
    """

    rounds: int
    seconds: float
    warmup: int = 2
    steps: int = 3


def run(
    contestants: list[Contestant], model: str, lr: float, schedule: Schedule, *, together: bool, scratch: Path, say: Say
) -> Run:
    """Measure; arms that fail leave the rounds. Ctrl-C ends the rounds, and what was measured until then is kept."""
    there = [one for one in contestants if not one.why_not]
    result = Run({one.name: Taken() for one in there}, [], schedule.warmup, together)
    turns = _Together(there, model, lr, schedule, result, scratch) if together else _Visits(
        there, model, lr, schedule, result, scratch
    )  # fmt: skip
    try:
        with turns.alive(say):
            try:
                _take_turns(turns, schedule, result, there, say)
            except KeyboardInterrupt:
                result.interrupted = True
            turns.end()
    except KeyboardInterrupt:  # before the first round, or again
        result.interrupted = True
    except FailedError as error:
        result.refused = str(error)
    return result


def _take_turns(turns: _Visits, schedule: Schedule, result: Run, there: list[Contestant], say: Say) -> None:
    began, order = turns.began, random.Random(0)
    side_rounds = 3 if result.together else 1

    def draw(number: int) -> list[Contestant]:
        present = [one for one in there if one.name not in SIDE or number < side_rounds]
        return order.sample(present, len(present)) if number < schedule.rounds else []

    after = draw(0)
    while len(result.rounds) < schedule.rounds:
        number = len(result.rounds)
        present, after = after, draw(number + 1)
        left = schedule.seconds - (time.monotonic() - began)
        costs = [result.taken[one.name].turn_s for one in present]
        if number and left < 1.1 * sum(costs):
            break
        start = time.monotonic()
        this: dict[ArmName, dict[str, list[float]]] = {}
        for place, one in enumerate(present):
            taken = result.taken[one.name]
            if taken.failed:
                continue
            turn_began = time.monotonic()
            # perhaps of a round that is not begun: then its process is ended
            coming = [later for later in (*present[place + 1 :], *after) if not result.taken[later.name].failed]
            try:
                this[one.name] = turns.turn(one, coming[0] if coming else None)
            except KeyboardInterrupt:
                if not result.rounds and this:  # of a first round what there is: no other has it
                    result.rounds.append(this)
                raise
            except ArmFailed as error:
                taken.failed, taken.turn_s = str(error), 0.0
                say(f"{one.name}: {taken.failed}")
                continue
            taken.turn_s = max(taken.turn_s, time.monotonic() - turn_began)
        result.rounds.append(this)
        took, spent = time.monotonic() - start, time.monotonic() - began
        more = min(schedule.rounds - number - 1, int(max(0.0, schedule.seconds - spent) / max(took, 1e-3)))
        say(f"round {number + 1} took {took:.0f} s; about {more} more, {more * took:.0f} s")


class _Visits:
    """Fresh processes, one at a time."""

    def __init__(
        self, there: list[Contestant], model: str, lr: float, schedule: Schedule, result: Run, scratch: Path
    ) -> None:
        self.there, self.model, self.lr = there, model, lr
        self.schedule, self.result, self.scratch = schedule, result, scratch
        self.began = time.monotonic()

    @contextmanager
    def alive(self, say: Say) -> Iterator[None]:
        self.say = say

        def start(one: Contestant) -> ArmProcess:
            return ArmProcess(one, spec_of(one, self.model, self.lr, wait=True), self.scratch)

        with Ahead(start) as self.ahead:
            yield

    def warm(self, process: ArmProcess) -> list[dict[str, Any]]:
        """The untimed steps."""
        count = warmup_steps(process.contestant.setting, self.schedule.warmup)
        return [process.step("trace" if number == 1 else "step") for number in range(count)]

    def turn(self, one: Contestant, following: Contestant | None = None) -> dict[str, list[float]]:
        taken = self.result.taken[one.name]
        first = not taken.last
        with self.ahead.visit(one, following) as process:
            taken.described = process.described()
            warm = self.warm(process)
            self.ahead.settle()
            timed = [process.step() for _ in range(self.schedule.steps)]
            _require_repeated(one, timed)
            last = process.finish()
        require_engagement(one.setting, last["evidence"])
        if first:
            taken.losses = [answer["loss"] for answer in (*warm, *timed)]
            taken.norms = [answer["gradient_norm"] for answer in (*warm, *timed)]
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
                    warm = self.warm(process)
                except ArmFailed as error:
                    taken.failed = str(error)
                    self.say(f"{one.name}: {taken.failed}")
                    continue
                taken.losses = [answer["loss"] for answer in warm]
                taken.norms = [answer["gradient_norm"] for answer in warm]
                _note(taken, warm, [])
                self.say(f"{one.name}: ready")
            yield

    def turn(self, one: Contestant, following: Contestant | None = None) -> dict[str, list[float]]:
        answer = self.processes[one.name].step()
        _require_repeated(one, [answer])
        taken = self.result.taken[one.name]
        taken.losses.append(answer["loss"])
        taken.norms.append(answer["gradient_norm"])
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
                continue
            require_engagement(process.contestant.setting, taken.last["evidence"])


def _require_repeated(one: Contestant, timed: list[dict[str, Any]]) -> None:
    """Raises ArmFailed where a step was timed that an arm with graphs launched kernel by kernel, or captured first."""
    others = {answer.get("way", "launched") for answer in timed} - {"repeated"}
    if one.setting.graph and others:
        raise ArmFailed(f"a timed step was {' or '.join(sorted(others))}, where all should repeat a graph")


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
