"""A stage's figures come from its records alone, whatever happened to the run in between."""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any

import pytest
import torch

from elo_engine.summary import read_steps, stage_summary


def step(
    number: int, seconds: float, *, warm: bool = True, updated: bool = True, stage: str = "align"
) -> dict[str, Any]:
    return {
        "stage": stage, "step": number, "step_s": seconds, "loss_nats": 5.0 - number, "warm": warm,
        "updated": updated,
        "tokens_total": 100 * number, "tokens_loss": 90 * number,
    }  # fmt: skip


def write(run: Path, records: list[dict[str, Any]], torn: str = "") -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + torn)


def test_steps_done_again_count_once_and_set_up_is_left_out_of_the_speed(tmp_path: Path) -> None:
    first = [step(1, 9.0, warm=False), step(2, 2.0), step(3, 2.0)]
    ran = [{"event": "stage ran", "stage": "align", "step": 2, "peak_bytes": 70, "peak_what": "peak"}]
    again = [step(3, 8.0, warm=False), step(4, 4.0, updated=False)]
    ran_again = [{"event": "stage ran", "stage": "align", "step": 4, "peak_bytes": 50, "peak_what": "peak"}]
    write(tmp_path, [step(1, 1.0, stage="pretrain"), *first, *ran, *again, *ran_again])
    found = stage_summary(tmp_path, "align")
    assert (found["steps"], found["steps_skipped"], found["tokens_total"]) == (4, 1, 400)
    assert found["seconds"] == 9.0 + 2.0 + 8.0 + 4.0, "the lost third step is not counted, the one that replaced it is"
    assert found["step_s"]["median"] == 3.0 and found["tokens_per_s"] == pytest.approx(100 / 3.0)
    assert found["peak_bytes"] == 70 and found["loss_first_nats"] == 4.0 and found["loss_last_nats"] == 1.0
    assert [record["stage"] for record in read_steps(tmp_path)] == ["pretrain"] + ["align"] * 4


def test_the_memory_kept_is_that_of_the_largest_part(tmp_path: Path) -> None:
    parts = [
        {"event": "stage ran", "stage": "align", "step": 1, "peak_bytes": peak, "peak_what": "peak", **more}
        for peak, more in ((60, {}), (70, {"memory": {"predicted_bytes": 65}}), (50, {"memory": {}}))
    ]
    write(tmp_path, [step(1, 1.0), *parts])
    assert stage_summary(tmp_path, "align")["memory"] == {"predicted_bytes": 65}
    write(tmp_path, [step(1, 1.0), parts[0]])
    assert stage_summary(tmp_path, "align")["memory"] is None, "of a run that an earlier version began"


def test_a_torn_line_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, [step(1, 1.0)], torn='{"stage": "align", "st')
    assert stage_summary(tmp_path, "align")["steps"] == 1


def test_a_stage_without_steps_has_no_summary(tmp_path: Path) -> None:
    assert stage_summary(tmp_path, "align") == {}
    write(tmp_path, [step(1, 1.0, stage="pretrain")])
    assert stage_summary(tmp_path, "align") == {}


def test_the_peak_of_a_stretch_leaves_out_what_it_is_told_to() -> None:
    """512 MiB count where they are touched outside the block, and not inside it."""
    from elo_engine.measure.meter import peak_memory

    def touch(size: int) -> None:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for _ in range(size >> 20):
            memory.write(b"x" * (1 << 20))
        memory.close()

    touch(512 << 20)  # what the first time alone takes is taken
    with peak_memory(torch.device("cpu")) as counted:
        touch(512 << 20)
    with peak_memory(torch.device("cpu")) as left_out:
        touch(16 << 20)
        with left_out.without():
            touch(512 << 20)
        touch(16 << 20)
    assert counted.what == left_out.what == "peak resident memory"
    assert counted.bytes - left_out.bytes > 256 << 20
