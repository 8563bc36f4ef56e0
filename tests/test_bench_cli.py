"""`elo bench` through the command line: a comparison kept as a record, memory predicted and measured, contests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from elo_engine.benchmarks.recording import read_record
from elo_engine.benchmarks.reporting import faults

Elo = Callable[..., tuple[int, str]]


def test_speedup_of_a_checkpoint_keeps_a_record(elo: Elo, tied: Path, tmp_path: Path, arms_fork: None) -> None:
    """Arms in processes of their own, the engagement check, the ratios and the record, on a tiny real checkpoint;
    streamed alignment beside the resident one.
    """
    status, said = elo(
        "bench", "speedup", "--model", str(tied), "--device", "cpu", "--sequence-length", "16", "--arms", "f,g,s,c",
        "--rounds", "3", "--minutes", "2", "--records", str(tmp_path), "--align-recompute", "layer",
    )  # fmt: skip
    assert status == 0, said
    (record,) = tmp_path.iterdir()
    result = json.loads((record / "result.json").read_text())
    assert {name: arm["status"] for name, arm in result["arms"].items()} == {
        "engine_full": "ran", "elo_pretrain": "ran", "elo_align": "ran", "elo_align_streamed": "ran"
    }  # fmt: skip
    found = result["pipeline_speedup"]["engine_full"]
    assert found["low"] <= found["median"] <= found["high"] and found["ideal"] > 1
    for arm in result["arms"].values():
        memory = arm["memory"]
        assert memory["tensor_peak_bytes"] <= memory["predicted_bytes"]
    assert len(json.loads((record / "raw.json").read_text())["rounds"]) == 3
    assert "pipeline over" in said
    assert any("whole model: 3 arms start at a loss" in check for check in result["checks"])
    streamed, arm = result["streamed"], result["arms"]["elo_align_streamed"]
    assert streamed["over_resident"]["resident"] == "elo_align" and streamed["pipeline"]["engine_full"]["ideal"] > 1
    assert arm["options"]["streaming"] == {
        "store": "memory", "inputs": "device", "update": "lazy", "vocabulary": "whole"
    }
    assert arm["memory"]["tensor_peak_bytes"] <= arm["memory"]["predicted_bytes"]
    assert arm["memory"]["components"]["predicted"]["weights"] < result["arms"]["elo_align"]["memory"][
        "components"]["predicted"]["weights"]  # fmt: skip
    assert "pipeline with (s) over" in said and "(s) takes" in said
    assert faults(read_record(record)) == []
    over = streamed["over_resident"] | {"median": 2 * streamed["over_resident"]["median"]}
    wrong = read_record(record)
    assert wrong.result is not None
    wrong.result["streamed"]["over_resident"] = over
    assert "elo_align_streamed over elo_align is" in faults(wrong)[0]
    assert "(s) keeps the model in host memory, layers' inputs on the device" in (record / "README.md").read_text()


def test_memory_is_predicted_without_a_device(elo: Elo, tmp_path: Path) -> None:
    status, said = elo(
        "bench", "memory", "--model", "llama-3.1-8b", "--device", "cuda", "--predict-only", "--caps", "8,24",
        "--sequence-lengths", "8192", "--micro-batches", "1", "--records", str(tmp_path),
    )  # fmt: skip
    assert status == 0, said
    (record,) = tmp_path.iterdir()
    result = json.loads((record / "result.json").read_text())
    largest = {(cap["cap_bytes"] >> 30, cap["arm"]): cap["largest"]["8192"] for cap in result["caps"]}
    assert largest[8, "elo_pretrain"] >= 1 and largest[24, "engine_full"] == 0
    assert largest[24, "elo_pretrain"] > largest[8, "elo_pretrain"]
    assert largest[24, "elo_align_streamed"] >= 1, "a whole 8B model with a few layers on a card of 24 GiB"
    assert {point["status"] for point in result["points"]} == {"not run"}


def test_memory_measured_lies_within_the_prediction(elo: Elo, tmp_path: Path, arms_fork: None) -> None:
    """What tensors take at most, which is the same in a process that was forked."""
    status, said = elo(
        "bench", "memory", "--model", "llama-3.1-8b-mini", "--device", "cpu", "--arms", "f,s", "--sequence-lengths",
        "64", "--micro-batches", "2", "--records", str(tmp_path),
    )  # fmt: skip
    assert status == 0, said
    (record,) = tmp_path.iterdir()
    points = {point["arm"]: point for point in json.loads((record / "result.json").read_text())["points"]}
    assert points.keys() == {"elo_pretrain", "elo_align_streamed"}
    for point in points.values():
        assert point["status"] == "ran"
        assert point["measured_bytes"] <= point["predicted_bytes"] <= 1.08 * point["measured_bytes"]
    assert points["elo_align_streamed"]["inputs"] == "device" and "elo_align_streamed, inputs on the device" in said


def test_loss_against_seconds_is_of_the_whole_model_alone(
    elo: Elo, run_tree: dict[str, Any], write_config: Callable[[dict[str, Any]], Path], tmp_path: Path
) -> None:
    """Both lines begin at the same base model at second 0; while the layers are apart, the model that putting them back
    would give is scored.
    """
    records, runs = tmp_path / "records", tmp_path / "both"
    status, said = elo(
        "bench", "loss", str(write_config(run_tree)), "--every", "1", "--records", str(records), "--runs", str(runs)
    )
    assert status == 0, said
    (record,) = records.iterdir()
    pipeline, full = (line["points"] for line in json.loads((record / "result.json").read_text())["series"])
    languages = set(run_tree["evaluate"]["shards"])
    starts = [{p["language"]: p["loss_nats"] for p in line if p["stage"] == "base"} for line in (pipeline, full)]
    assert starts[0] == starts[1] and set(starts[0]) == languages
    pretrained = json.loads((runs / "elo" / "results.json").read_text())["stages"]["pretrain"]
    between = [p for p in pipeline if 0 < p["tokens"] < pretrained["tokens_total"]]
    steps = pretrained["tokens_total"] // run_tree["pretrain"]["tokens_per_step"]
    assert len(between) == (steps - 1) * len(languages) and {p["stage"] for p in between} == {"pretraining"}
    last = {p["language"]: p["loss_nats"] for p in between[-len(languages) :]}
    after = {p["language"]: p["loss_nats"] for p in pipeline if p["stage"] == "reattached"}
    assert all(abs(last[name] - after[name]) < 0.5 for name in languages), "a step apart, not another model"
    assert {p["stage"] for p in pipeline} >= {"base", "reattached", "aligned"}
    seconds = [p["seconds"] for p in full]
    assert seconds == sorted(seconds) and seconds[-1] > 0


def test_kernels_keeps_every_turn(elo: Elo, tmp_path: Path) -> None:
    status, said = elo("bench", "kernels", "rotary", "--rounds", "2", "--records", str(tmp_path))
    assert status == 0, said
    (record,) = tmp_path.iterdir()
    result = json.loads((record / "result.json").read_text())
    assert result["contests"] and all(len(c["arms"]["engine"]["raw_ms"]) == 2 for c in result["contests"])


def test_the_loader_runs_under_pytest_benchmark(elo: Elo) -> None:
    status, said = elo("bench", "loading", "--pytest")
    assert status == 0, said


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("speedup", "--model", "no-such-model"), "no-such-model"),
        (("speedup", "--model", "smollm2-135m", "--arms", "q"), "'q' is no arm"),
        (("speedup", "--model", "llama-3.1-8b-mini", "--align-recompute", "some"), "--align-recompute 'some'"),
        (("speedup", "--model", "llama-3.1-8b-mini", "--graph", "auto"), "--graph 'auto': it is one of off, on"),
        (("memory", "--model", "smollm2-135m", "--caps", "eight"), "--caps 'eight'"),
        (("memory", "--model", "smollm2-135m", "--micro-batches", "0"), "above 0"),
        (("kernels", "softmax"), "no such op: softmax"),
        (("compare", "nowhere", "here"), "nowhere"),
    ],
)
def test_bad_usage_exits_2_and_leaves_nothing(elo: Elo, tmp_path: Path, command: tuple[str, ...], said: str) -> None:
    records = () if command[0] == "compare" else ("--records", str(tmp_path / "records"))
    status, text = elo("bench", *command, *records)
    assert status == 2 and said in text, text
    assert not (tmp_path / "records").exists()
