"""`elo bench memory` without a GPU: what is run in which order, what tensors get of a cap, and what becomes of arms
that do not end well.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from elo_engine.benchmarks import memory
from elo_engine.benchmarks.memory import Options
from elo_engine.benchmarks.processes import ArmFailed
from elo_engine.errors import Interrupted
from elo_engine.measure.cards import CONTEXT_BYTES
from elo_engine.measure.components import REST
from elo_engine.measure.machine import Room
from elo_engine.measure.planner import fits, largest_micro_batch, predict_memory
from elo_engine.measure.setting import ArmName, Setting

GIB = 2**30
PREDICTED = Options("llama-3.1-8b", "cuda", predict_only=True)
SMALL = Options(
    "llama-3.1-8b-mini", "cpu", dtype="fp32", sequence_lengths=(32, 16), micro_batches=(2, 1),
    caps=(100 * 2**20,), arms=("engine_full", "elo_pretrain", "elo_align"),
)  # fmt: skip
HOLDS = {"weights": 300, "gradients": 200, "optimizer": 400}  # of a process of which nothing is known
Tried = list[tuple[ArmName, int, int, int | None]]  # arm, rows, tokens of a row, bytes that tensors may take


def of(arm: ArmName, options: Options = PREDICTED) -> Setting:
    (found,) = memory.settings_of(replace(options, arms=(arm,)))
    return found


def quiet(line: str) -> None:
    """Nothing is said."""


class StandIn:
    """In place of a process: remembers what it was to run, and ends as `ends` has it for that arm."""

    ends: ClassVar[dict[str, BaseException]]
    tried: ClassVar[Tried]

    def __init__(self, contestant: Any, spec: dict[str, Any], scratch: Path) -> None:
        self.arm = spec["arm"]
        self.tried.append((self.arm, spec["micro_batch"], spec["sequence_length"], spec["cap_bytes"]))

    def __enter__(self) -> StandIn:
        return self

    def __exit__(self, *error: object) -> None: ...

    def described(self) -> None: ...

    def step(self, command: str = "step") -> dict[str, Any]:
        if self.arm in self.ends:
            raise self.ends[self.arm]
        return {"tensor_peak_bytes": 1000}

    def finish(self) -> dict[str, Any]:
        return {"peak_allocated_bytes": 2000, "evidence": {"held": HOLDS}}


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    monkeypatch.setattr(StandIn, "ends", {}, raising=False)
    monkeypatch.setattr(StandIn, "tried", [], raising=False)
    monkeypatch.setattr(memory, "ArmProcess", StandIn)
    return StandIn


@pytest.fixture
def on_a_gpu(stand_in: type[StandIn], monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    """A card with 20 GiB free, as far as the order of things is concerned; no process is started."""
    monkeypatch.setattr(memory, "settings_of", lambda options: settings_on_cuda(options))
    monkeypatch.setattr(memory, "choose_device", lambda wanted: None)
    monkeypatch.setattr(memory, "device_room", lambda device: Room(20 * GIB, "of a card"))
    monkeypatch.setattr(memory, "device_name", lambda kind: "a card")
    monkeypatch.setattr(memory, "missing", lambda arm, size: "")
    monkeypatch.setattr(memory, "size_of", lambda options: None)
    return stand_in


def settings_on_cuda(options: Options, settings_of: Any = memory.settings_of) -> list[Setting]:
    found: list[Setting] = settings_of(replace(options, predict_only=True, device="cuda"))
    return found


def test_the_grid_begins_with_small_points_and_has_every_arm_at_each() -> None:
    found = list(memory.grid(memory.settings_of(SMALL), (32, 16), SMALL))
    sizes = [(setting.sequence_length, setting.micro_batch) for setting in found]
    assert sizes[::3] == [(16, 1), (32, 1), (16, 2), (32, 2)]
    assert [setting.N for setting in found] == sorted(setting.N for setting in found)
    for at in range(0, len(found), 3):
        assert tuple(setting.arm for setting in found[at : at + 3]) == SMALL.arms
        assert len(set(sizes[at : at + 3])) == 1


def test_tensors_get_a_cap_without_the_context_of_cuda() -> None:
    """Two caps that differ by a byte: a row fits the one, with what CUDA takes, and not the other."""
    row = replace(of("elo_pretrain"), sequence_length=2048)
    need = predict_memory(row).peak_bytes + CONTEXT_BYTES
    found = memory.frontier([row], (2048,), (need, need - 1, CONTEXT_BYTES // 2))
    assert [cap["largest"] for cap in found] == [{"2048": 1}, {"2048": 0}, {"2048": 0}]
    assert [cap["cap_bytes"] for cap in found] == [need, need - 1, CONTEXT_BYTES // 2]  # the card's size is its label
    on_cpu = replace(of("engine_full", SMALL), sequence_length=2048)
    exact = predict_memory(on_cpu).peak_bytes
    found = memory.frontier([on_cpu], (2048,), (exact, exact - 1))
    assert [cap["largest"] for cap in found] == [{"2048": 1}, {"2048": 0}]


def test_only_this_engine_is_recomputed_and_only_where_nothing_fits_without() -> None:
    plain = replace(of("elo_pretrain"), sequence_length=8192)
    first, again = replace(plain, recompute="selective"), replace(plain, recompute="layer")
    need, some, less = (predict_memory(setting).peak_bytes + CONTEXT_BYTES for setting in (plain, first, again))
    assert less < some < need
    assert memory.with_recompute(plain, need) == (plain, 1)
    for cap, expected in ((need - 1, first), (some - 1, again)):
        chosen, rows = memory.with_recompute(plain, cap)
        assert chosen == expected and rows == largest_micro_batch(expected, cap - CONTEXT_BYTES) >= 1
    assert memory.with_recompute(plain, less - 1) == (again, 0)
    other = replace(of("transformers_full"), sequence_length=8192, recompute="none")
    assert memory.with_recompute(other, 8 * GIB) == (other, 0)


def test_prediction_alone_starts_no_process(stand_in: type[StandIn]) -> None:
    options = replace(PREDICTED, sequence_lengths=(2048,), micro_batches=(1,), caps=(24 * GIB,))
    result, interrupted = memory.measure(options, quiet)
    assert stand_in.tried == [] and not interrupted and result["device"] == {"type": "cuda", "name": "not run"}
    assert {point["status"] for point in result["points"]} == {"not run"}
    assert [point["arm"] for point in result["points"]] == list(memory.MEASURED)
    assert [cap["arm"] for cap in result["caps"]] == list(memory.MEASURED)
    for point in result["points"]:
        assert point["predicted_bytes"] == sum(point["predicted"].values()) > 0 and point["measured_bytes"] is None


def test_a_process_that_fails_is_its_point_and_no_other(stand_in: type[StandIn]) -> None:
    stand_in.ends["engine_full"] = ArmFailed("ended with status 1: an illegal memory access", out_of_memory=False)
    stand_in.ends["elo_align"] = ArmFailed("the allocator said no", out_of_memory=True)
    said: list[str] = []
    result, interrupted = memory.measure(SMALL, said.append)
    assert not interrupted and len(result["points"]) == 12
    for point in result["points"]:
        status = {"engine_full": "failed", "elo_align": "out of memory", "elo_pretrain": "ran"}[point["arm"]]
        assert point["status"] == status
        assert (point["measured_bytes"], point["measured_what"]) == (
            (1000, "traced tensor bytes") if status == "ran" else (None, None)
        )
        assert (point.get("components") is None) == (status != "ran")
        if status == "ran":
            assert point["components"]["measured"] == HOLDS | {REST: 100}
            assert sum(point["components"]["predicted"].values()) == point["predicted_bytes"]
        assert point.get("why") == ("ended with status 1: an illegal memory access" if status == "failed" else None)
    assert len(said) == 4 and all("engine_full" in line and "illegal memory access" in line for line in said)


def test_a_checkpoint_that_is_gone_is_said_by_the_process_itself(tmp_path: Path, arms_fork: None) -> None:
    """A real process, which ends with an error that is not about memory."""
    found = memory.measure_point(of("elo_pretrain", SMALL), str(tmp_path / "in-memory-of"), None, tmp_path)
    assert found["status"] == "failed" and "in-memory-of" in found["why"]


def test_ctrl_c_keeps_what_was_measured(stand_in: type[StandIn], tmp_path: Path) -> None:
    stand_in.ends["elo_align"] = KeyboardInterrupt()
    result, path, interrupted = memory.run_command(SMALL, tmp_path, ["elo", "bench", "memory"])
    assert interrupted and path is not None
    assert [point["status"] for point in result["points"]] == ["ran", "ran", *["not run"] * 10]
    assert [point["arm"] for point in result["points"]] == list(SMALL.arms) * 4
    assert json.loads((path / "result.json").read_text())["points"] == result["points"]


def test_ctrl_c_before_the_first_point_keeps_nothing(stand_in: type[StandIn], tmp_path: Path) -> None:
    stand_in.ends["engine_full"] = KeyboardInterrupt()
    with pytest.raises(Interrupted, match="nothing is kept"):
        memory.run_command(SMALL, tmp_path, ["elo", "bench", "memory"])
    assert list(tmp_path.iterdir()) == []


def test_on_a_gpu_the_frontier_comes_first_and_the_grid_has_no_cap(on_a_gpu: type[StandIn]) -> None:
    options = Options(
        "llama-3.1-8b", sequence_lengths=(4096, 2048), micro_batches=(1,), caps=(16 * GIB, 24 * GIB, 12 * GIB),
        arms=("lora", "elo_pretrain", "elo_align"),
    )  # fmt: skip
    on_a_gpu.ends["lora"] = ArmFailed("out of memory", out_of_memory=True)
    result, _ = memory.measure(options, quiet)
    capped = [tried for tried in on_a_gpu.tried if tried[3] is not None]
    assert on_a_gpu.tried[: len(capped)] == capped, "the grid ran before the frontier, or in it"
    assert {T for _, _, T, _ in capped} == {4096}
    small, large = 12 * GIB - CONTEXT_BYTES, 16 * GIB - CONTEXT_BYTES  # 24 GiB are not free on this card
    caps = [cap for *_, cap in capped]
    assert caps == sorted(caps) and set(caps) <= {small, large}
    assert capped[0][0] == "elo_pretrain" and next(one for one in capped if one[3] == large)[0] == "elo_pretrain"
    predicted = {(entry["cap_bytes"], entry["arm"]): entry["largest"]["4096"] for entry in result["caps"]}
    assert {(cap + CONTEXT_BYTES, arm): rows for arm, rows, _, cap in capped} == {
        key: rows for key, rows in predicted.items() if rows and key[0] <= 20 * GIB
    }
    grid = [point for point in result["points"] if "cap_bytes" not in point]
    assert len(grid) == 6 and len(result["points"]) == 6 + len(capped)
    for setting, point in zip(memory.grid(settings_on_cuda(options), (4096, 2048), options), grid, strict=True):
        assert (point["status"] == "not run") != fits(setting, 20 * GIB - CONTEXT_BYTES), point["arm"]
    labels = {point["cap_bytes"] for point in result["points"] if "cap_bytes" in point}
    assert labels == {cap + CONTEXT_BYTES for cap in caps}


def test_the_frontier_leaves_half_of_the_minutes_to_the_grid(
    on_a_gpu: type[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every reading of the clock is one minute later."""
    minutes = iter(range(1000))
    monkeypatch.setattr(memory, "time", SimpleNamespace(monotonic=lambda: 60.0 * next(minutes)))
    options = Options(
        "smollm2-135m", sequence_lengths=(128,), micro_batches=(1,), caps=(3 * GIB, 4 * GIB), minutes=8.0,
    )  # fmt: skip
    result, _ = memory.measure(options, quiet)
    assert [cap for *_, cap in on_a_gpu.tried] == [*[3 * GIB - CONTEXT_BYTES] * 4, *[None] * 3]
    grid = [point["status"] for point in result["points"] if "cap_bytes" not in point]
    assert grid == ["ran"] * 3 + ["not run"] * (len(memory.MEASURED) - 3)


def test_streamed_layers_keep_their_inputs_where_more_rows_fit() -> None:
    """On a small card nothing but (s) takes the whole 8B model, and with its layers' inputs on the host more rows."""
    streamed = replace(of("elo_align_streamed"), sequence_length=4096)
    chosen, rows = memory.with_recompute(streamed, 12 * GIB)
    inputs = replace(streamed.streaming, inputs="device")
    assert chosen.streaming.inputs == "host"
    assert rows > largest_micro_batch(replace(streamed, streaming=inputs), 12 * GIB - CONTEXT_BYTES)
    assert memory.with_recompute(replace(of("elo_align"), sequence_length=4096), 12 * GIB)[1] == 0
    assert memory.point(chosen)["inputs"] == "host" and "inputs" not in memory.point(of("elo_align"))
