"""Visits one after another, each process started ahead of its turn. What a process does before it needs the device
(waiting.py) is done while the one before it makes its model and warms up; it never overlaps with a timed step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from elo_engine.benchmarks.contestants import Contestant
from elo_engine.benchmarks.processes import ArmFailed, ArmProcess
from elo_engine.measure.setting import ArmName


class Ahead:
    """Hands out the visits' processes. Usable as a context; leaving it ends the one that still waits.

    `start` makes an arm's process, with `wait` in its SPEC.
    """

    def __init__(self, start: Callable[[Contestant], ArmProcess]) -> None:
        self._start = start
        self._next: ArmProcess | None = None
        self._never: set[ArmName] = set()  # arms whose imports make a context on the GPU

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *error: object) -> None:
        self._drop()

    @contextmanager
    def visit(self, one: Contestant, following: Contestant | None) -> Iterator[ArmProcess]:
        """The process of a visit, told to go; ended when the block is left. That of the `following` visit (None: there
        is none) is started.

        Raises:
            ArmFailed: it died while it waited.
        """
        process = self._next
        if process is not None and process.contestant is one:
            self._next = None
        else:
            self._drop()
            process = self._start(one)
        with process:
            process.go()
            if following is not None and following.name not in self._never:
                self._next = self._start(following)
            yield process

    def settle(self) -> None:
        """Before timed steps: return when the process of the following visit stands still. One that died is said in
        its own visit; one that has a context on the GPU is ended, and that arm is started in its turn from then on.
        """
        if self._next is None:
            return
        with suppress(ArmFailed):
            if self._next.ready()["on_device"]:
                self._never.add(self._next.contestant.name)
                self._drop()

    def _drop(self) -> None:
        if self._next is not None:
            self._next.kill()
            self._next = None
