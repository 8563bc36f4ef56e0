"""Visits started ahead, mostly real processes of a tiny model on a CPU: in order, off the timed steps, none left."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_speedup import setting

from elo_engine.benchmarks import waiting
from elo_engine.benchmarks.ahead import Ahead
from elo_engine.benchmarks.contestants import Contestant
from elo_engine.benchmarks.evidence import require_engagement
from elo_engine.benchmarks.processes import ArmFailed, ArmProcess, spec_of
from elo_engine.measure.setting import ArmName
from elo_engine.model.spec import read_spec

Started = list[ArmProcess]


@pytest.fixture
def arms(tied: Path) -> dict[str, Contestant]:
    from elo_engine.checkpoint import open_checkpoint

    spec = read_spec(open_checkpoint(tied).config)
    names: tuple[ArmName, ...] = ("elo_pretrain", "elo_align")
    made = {name: replace(setting(name), spec=spec, sequence_length=16, recompute="none") for name in names}
    return {name: Contestant(one, environment={"OMP_NUM_THREADS": "1"}) for name, one in made.items()}


@pytest.fixture
def started() -> Started:
    return []


@pytest.fixture
def ahead(tied: Path, tmp_path: Path, started: Started) -> Iterator[Ahead]:
    def start(one: Contestant) -> ArmProcess:
        started.append(ArmProcess(one, spec_of(one, str(tied), 1e-4, wait=True), tmp_path))
        return started[-1]

    with Ahead(start) as made:
        yield made
    assert all(process.process.poll() is not None for process in started), "a process is left over"


def visit(ahead: Ahead, one: Contestant, following: Contestant | None) -> dict[str, Any]:
    """As the harness does it; moments by the monotonic clock."""
    moments: dict[str, Any] = {"go": time.monotonic()}
    with ahead.visit(one, following) as process:
        moments |= {"started": time.monotonic(), "ready": process.ready()}
        described = process.described()
        moments["model"] = time.monotonic()
        process.step()
        ahead.settle()
        moments["timed"] = time.monotonic()
        moments["loss"] = process.step()["loss"]
        last = process.finish()
    assert "optimizer" in described
    require_engagement(one.setting, last["evidence"])
    return moments


def test_the_next_process_imports_before_the_timed_steps_and_while_the_model_is_made(
    ahead: Ahead, arms: dict[str, Contestant], started: Started
) -> None:
    first, second = arms["elo_pretrain"], arms["elo_align"]
    now, after = visit(ahead, first, second), visit(ahead, second, None)
    assert [process.contestant for process in started] == [first, second]
    imports = after["ready"]
    assert now["go"] <= now["started"] <= imports["began_s"] < imports["ready_s"]
    assert now["started"] < now["model"], "it began while the model was made"
    assert imports["ready_s"] <= now["timed"], "it stood still before the first timed step"
    assert not imports["on_device"]


def test_one_that_dies_while_it_waits_fails_in_its_own_visit(
    ahead: Ahead, arms: dict[str, Contestant], started: Started
) -> None:
    first, second = arms["elo_pretrain"], arms["elo_align"]
    with ahead.visit(first, second) as process:
        process.described()
        os.kill(started[1].process.pid, signal.SIGKILL)
        ahead.settle()
        assert process.step()["loss"] > 0, "the present arm has nothing to do with it"
    began = time.monotonic()
    with pytest.raises(ArmFailed, match="killed by the system"), ahead.visit(second, first):
        raise AssertionError("it is dead")
    assert time.monotonic() - began < 10 and len(started) == 2, "no hang, and none was started after it"


def test_one_that_cannot_import_says_what_it_said(tmp_path: Path) -> None:
    one = Contestant(setting("transformers_full"))  # whose model says which modules it needs
    with ArmProcess(one, spec_of(one, str(tmp_path / "nowhere"), 1e-4, wait=True), tmp_path) as process:
        for _ in range(2):
            with pytest.raises(ArmFailed, match="nowhere"):
                process.go()


def test_ctrl_c_in_a_visit_ends_both(ahead: Ahead, arms: dict[str, Contestant], started: Started) -> None:
    with pytest.raises(KeyboardInterrupt), ahead, ahead.visit(arms["elo_pretrain"], arms["elo_align"]):
        assert [process.process.poll() for process in started] == [None, None]
        raise KeyboardInterrupt
    assert None not in [process.process.poll() for process in started] and len(started) == 2


def test_a_process_whose_harness_is_gone_ends_by_itself(
    arms: dict[str, Contestant], tied: Path, tmp_path: Path
) -> None:
    one = arms["elo_pretrain"]
    with ArmProcess(one, spec_of(one, str(tied), 1e-4, wait=True), tmp_path) as process:
        assert process.ready()["ready_s"] <= time.monotonic()
        pipe = process.process.stdin
        assert pipe is not None
        pipe.close()
        assert process.process.wait(timeout=30) == 0


class Scripted:
    """A process that says what a test wants."""

    def __init__(self, one: Contestant, on_device: bool) -> None:
        self.contestant, self.on_device, self.ended = one, on_device, False

    def __enter__(self) -> Scripted:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def ready(self) -> dict[str, Any]:
        return {"on_device": self.on_device}

    def go(self) -> None:
        assert not self.ended

    def kill(self) -> None:
        self.ended = True


def test_one_that_is_on_the_gpu_already_is_ended_and_not_started_ahead_again() -> None:
    one, other = Contestant(setting("elo_pretrain")), Contestant(setting("transformers_full"))
    made: list[Scripted] = []

    def start(contestant: Contestant) -> Any:
        made.append(Scripted(contestant, on_device=contestant is other))
        return made[-1]

    with Ahead(start) as ahead:
        with ahead.visit(one, other):
            ahead.settle()
            assert made[1].ended, "its context would take memory and time of the arm that is measured"
        for now, after in ((other, one), (one, other), (other, None)):
            with ahead.visit(now, after):
                ahead.settle()
    assert [process.contestant for process in made] == [one, other, other, one, other]
    assert all(process.ended for process in made)


def test_an_order_that_changes_ends_the_one_that_waits() -> None:
    first, second, third = (Contestant(setting(arm)) for arm in ("elo_pretrain", "transformers_full", "elo_align"))
    made: list[Scripted] = []

    def start(contestant: Contestant) -> Any:
        made.append(Scripted(contestant, on_device=False))
        return made[-1]

    with Ahead(start) as ahead, contextlib.ExitStack() as stack:
        stack.enter_context(ahead.visit(first, second))
        stack.enter_context(ahead.visit(third, None))
        assert [process.ended for process in made] == [False, True, False]


def test_an_arm_imports_what_it_needs_and_no_more() -> None:
    """More would be in its resident memory, which is a result."""
    spec = {"arm": "elo_pretrain", "device": "cpu", "model": "llama-3.1-8b-mini"}
    assert not any("transformers" in name or "triton" in name for name in waiting.modules(spec))
    found = waiting.modules(spec | {"arm": "transformers_full"})
    assert "transformers.models.llama.modeling_llama" in found and not any("liger" in name for name in found)
