"""The order of turns: visits and side by side, arms that fail, arms that lie, Ctrl-C. Processes are scripted here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import pytest

from elo_engine.benchmarks import evidence, rounds
from elo_engine.benchmarks.contestants import Contestant
from elo_engine.benchmarks.processes import ArmFailed
from elo_engine.measure.setting import SHALLOW, ArmName, Setting
from elo_engine.model.presets import preset_spec

ARMS: tuple[ArmName, ...] = ("transformers_full", "lora", "elo_pretrain", "elo_align")
SPEC = preset_spec("llama-3.1-8b-mini")


def setting(arm: ArmName) -> Setting:
    shallow = arm in SHALLOW
    made = Setting(
        arm=arm, spec=SPEC, layers=(0, 31), sequence_length=32, micro_batch=2, dtype="fp32", state="fp32", device="cpu"
    )
    return made if shallow else replace(made, micro_batch=1, micro_batches=2, recompute="layer")


class Scripted:
    """Stands where an arm's process would: the real one is started in the tests above and in test_bench_cli.py."""

    made: ClassVar[list[Scripted]] = []
    said: ClassVar[list[tuple[str, Scripted]]] = []
    fails: ClassVar[tuple[str, int]] = ("", 0)  # arm, and the visit in which it does

    def __init__(self, contestant: Contestant, spec: dict[str, Any], scratch: Path) -> None:
        self.contestant, self.steps, self.ended = contestant, 0, False
        self.visit = sum(other.contestant.name == contestant.name for other in self.made)
        self.waits = spec["wait"]
        self.made.append(self)
        self.said.append(("made", self))

    def __enter__(self) -> Scripted:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def kill(self) -> None:
        self.ended = True

    def ready(self) -> dict[str, Any]:
        self.said.append(("stands still", self))
        return {"on_device": False}

    def go(self) -> None:
        assert self.waits

    def described(self) -> dict[str, Any]:
        return {"optimizer": "AdamW"}

    def step(self, command: str = "step") -> dict[str, Any]:
        self.steps += 1
        self.said.append((f"step {self.steps}", self))
        if self.fails == (self.contestant.name, self.visit):
            raise ArmFailed("out of memory: no", True)
        if self.fails == ("Ctrl-C", self.visit):
            raise KeyboardInterrupt
        return {"seconds": 1.0, "loss": 5.0, "gradient_norm": 1.0, "energy_j": None}

    def finish(self) -> dict[str, Any]:
        made = self.contestant.setting
        tokens = self.steps * made.tokens_per_step
        depth = len(made.layers) if made.arm in SHALLOW else made.spec.layers
        found = {
            "steps": self.steps, "tokens": tokens - (self.fails == ("lies", self.visit)), "labelled": tokens,
            "shortest_row": 32, "longest_row": 32, "changed": [], "unchanged": [],
            "layer_runs": self.steps * made.micro_batches * depth * (2 if made.recompute == "layer" else 1),
            "gradients": {"all": evidence.expected_parameters(made)},
        }  # fmt: skip
        return {"evidence": found, "peak_allocated_bytes": 100 - self.visit, "host_peak_bytes": 1}


def visits(monkeypatch: pytest.MonkeyPatch, fails: tuple[str, int], together: bool = False) -> rounds.Run:
    monkeypatch.setattr(Scripted, "made", [])
    monkeypatch.setattr(Scripted, "said", [])
    monkeypatch.setattr(Scripted, "fails", fails)
    monkeypatch.setattr(rounds, "ArmProcess", Scripted)
    present = [Contestant(setting(arm)) for arm in ARMS]
    schedule = rounds.Schedule(rounds=3, seconds=60.0, warmup=2, steps=2)
    run = rounds.run(present, "tiny", 1e-4, schedule, together=together, scratch=Path(), say=lambda line: None)
    assert all(process.ended for process in Scripted.made)
    return run


def test_a_visit_is_a_fresh_process_with_its_own_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    run = visits(monkeypatch, ("", 0))
    assert [len(turn["elo_pretrain"]["seconds"]) for turn in run.rounds] == [2, 2, 2]
    assert ["lora" in turn for turn in run.rounds] == [True, False, False], "in no ratio, so visited once"
    assert run.taken["elo_align"].last["peak_allocated_bytes"] == 100, "the larger one of all visits"
    assert not run.refused and not run.interrupted


def test_the_next_visit_is_started_ahead_and_stands_still_while_steps_are_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two steps warm up here and two are timed; across rounds as within one, and after the last visit none waits."""
    visits(monkeypatch, ("", 0))
    assert len(Scripted.made) == 3 * len(ARMS) - 2, "lora is visited once"
    said = Scripted.said
    for now, after in pairwise(Scripted.made):
        made, still = said.index(("made", after)), said.index(("stands still", after))
        assert made < said.index(("step 1", now)) and said.index(("step 2", now)) < still < said.index(("step 3", now))


def test_an_arm_that_fails_in_its_second_visit_is_a_row_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    run = visits(monkeypatch, ("transformers_full", 1))
    assert run.taken["transformers_full"].failed == "out of memory: no"
    assert [sorted(turn) for turn in run.rounds][1:] == [["elo_align", "elo_pretrain"]] * 2


def test_an_arm_that_lies_in_its_second_visit_ends_the_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    run = visits(monkeypatch, ("lies", 1))
    assert "is not what it claims" in run.refused and len(run.rounds) == 1


@pytest.mark.parametrize("together", [False, True])
def test_ctrl_c_keeps_the_rounds_that_are_whole(monkeypatch: pytest.MonkeyPatch, together: bool) -> None:
    if together:  # the third round: two steps warm up, and each round is one more
        monkeypatch.setattr(Scripted, "step", interrupted_at(Scripted.step, 5))
        run = visits(monkeypatch, ("", 0), together=True)
        assert all(taken.last for taken in run.taken.values()), "their evidence is asked for all the same"
    else:
        run = visits(monkeypatch, ("Ctrl-C", 2))
    assert run.interrupted and len(run.rounds) == 2


def test_ctrl_c_in_the_first_round_keeps_the_visits_that_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other round has them, and a run that is ended at its limit would otherwise have measured nothing."""
    step = Scripted.step

    def raising(self: Scripted, command: str = "step") -> Any:
        if len({process.contestant.name for process in Scripted.made if process.steps}) == 3:
            raise KeyboardInterrupt
        return step(self, command)

    monkeypatch.setattr(Scripted, "step", raising)
    run = visits(monkeypatch, ("", 0))
    assert run.interrupted and [len(turn) for turn in run.rounds] == [2]
    assert sum(bool(taken.last) for taken in run.taken.values()) == 2


def interrupted_at(step: Callable[..., Any], count: int) -> Callable[..., Any]:
    def raising(self: Scripted, command: str = "step") -> Any:
        if self.steps + 1 == count:
            raise KeyboardInterrupt
        return step(self, command)

    return raising
