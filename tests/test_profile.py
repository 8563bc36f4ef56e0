"""`elo profile`: what it writes, that the parts add up, and that the step is the one that training takes."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from elo_engine import cli
from elo_engine.config import make_config
from elo_engine.corpora import make_mixture
from elo_engine.errors import FailedError
from elo_engine.measure.breakdown import PARTS, StepTrace, memory_timeline, time_by_part, top_rows
from elo_engine.measure.profiler import new_folder
from elo_engine.measure.roofline import Ceilings, NamedWork, Work, attention_pairs, measure_ceilings, op_work
from elo_engine.model import cpu_native
from elo_engine.profile import StageName, native_ranges, open_subject, profile_subject, take_step
from elo_engine.train.loop import Hooks, Progress, train
from elo_engine.train.resident import ResidentEngine

ONE = Ceilings(1e9, 1e9, 1e9)  # FLOP/s and bytes/s


def tree_of(checkpoint: Path, shards: dict[str, str], output: Path) -> dict[str, Any]:
    return {
        "model": str(checkpoint),
        "output": str(output),
        "device": "cpu",
        "dtype": "fp32",
        "data": {"shards": {"ja": shards["ja-train"], "en": shards["en-train"]}, "sequence_length": 32},
        "pretrain": {"tokens": 1280, "tokens_per_step": 128, "micro_batch": 2, "optimizer": {"lr": 3e-3}},
        "align": {
            "tokens": 1280, "tokens_per_step": 128, "micro_batch": 2, "recompute": "layer", "optimizer": {"lr": 1e-3},
        },
    }


def profile(*arguments: object) -> tuple[int, str]:
    """`elo profile ...` in this process: exit status and what it printed."""
    result = CliRunner().invoke(cli.app, ["profile", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def config_file(tied: Path, shards: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    import yaml

    folder = tmp_path_factory.mktemp("profile")
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree_of(tied, shards, folder / "run")), encoding="utf-8")
    return path


@pytest.fixture(scope="module", params=["pretrain", "align"])
def profiled(request: pytest.FixtureRequest, config_file: Path) -> tuple[str, Path, dict[str, Any]]:
    """Stage, folder and `profile.json` of one call for each stage; nobody names a folder for the first."""
    stage = str(request.param)
    folder = config_file.parent / f"run-profile-{stage}"
    flags = ["--stage", "align", "--out", folder] if stage == "align" else []
    status, shown = profile(config_file, *flags)
    assert status == 0, shown
    assert f"written to {folder}" in shown and "gaps" in shown
    return stage, folder, json.loads((folder / "profile.json").read_text())


Profiled = tuple[str, Path, dict[str, Any]]


def read_trace(folder: Path) -> list[dict[str, Any]]:
    with gzip.open(folder / "trace.json.gz", "rt", encoding="utf-8") as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return events


def test_every_file_is_there_and_nothing_else(profiled: Profiled) -> None:
    _, folder, _ = profiled
    expected = {"trace.json.gz", "profile.json", "profile.md", "time.png", "memory.png", "memory_timeline.json"}
    pytest.importorskip("matplotlib")
    assert {path.name for path in folder.iterdir()} == expected
    assert not (folder.parent / "run").exists(), "a profile is no run"
    text = (folder / "profile.md").read_text()
    assert all(name in text for name in (*PARTS, "GFLOP/s", "micro-batches a step: 2", "time.png"))


def test_the_parts_sum_to_the_step(profiled: Profiled) -> None:
    _, _, report = profiled
    parts = {entry["part"]: entry["ms"] for entry in report["parts"]}
    assert tuple(parts) == PARTS
    assert sum(parts.values()) == pytest.approx(report["step_ms"], rel=1e-6)
    assert sum(entry["share"] for entry in report["parts"]) == pytest.approx(1.0)
    assert all(parts[name] > 0 for name in ("data", "forward", "head", "backward", "optimizer", "gaps"))
    assert 0 < report["head_backward_ms"] < parts["head"]


def test_self_times_sum_to_the_time_in_ops(profiled: Profiled) -> None:
    _, _, report = profiled
    parts = {entry["part"]: entry["ms"] for entry in report["parts"]}
    inside = sum(row["ms"] for row in report["kernels"])
    computing = sum(parts[name] for name in ("forward", "head", "backward", "optimizer", "other"))
    assert computing * 0.999 <= inside <= (computing + parts["data"]) * 1.001  # rows are read outside of torch


def test_the_trace_has_the_parts_and_the_native_ops(profiled: Profiled) -> None:
    _, folder, report = profiled
    names = {event.get("name") for event in read_trace(folder)}
    assert {f"elo::{name}" for name in ("step", "data", "forward", "head", "backward", "optimizer")} <= names
    if cpu_native.HAS_CSRC:
        native = {"csrc::attention_forward", "csrc::attention_backward"}
        assert native <= names
        assert native <= {row["name"] for row in report["kernels"]}


def test_the_timeline_begins_with_the_weights_and_ends_with_the_gradients(profiled: Profiled) -> None:
    """Exact: what the step leaves behind is one gradient a trained weight. Beside them the loss's graph holds, until
    the loss is dropped, the rotary tables of the last micro-batch, 2 x 64 x 4 numbers, and there are a few scalars.
    """
    stage, folder, report = profiled
    base, events = report["memory"]["base_bytes"], json.loads((folder / "memory_timeline.json").read_text())["events"]
    layer = 48 * (48 + 16 + 16) + 48 * 48 + 3 * 48 * 80 + 2 * 48
    outer, layers = 320 * 48 + 48, 2 if stage == "pretrain" else 4
    trained = 4 * (layers * layer + (0 if stage == "pretrain" else outer))
    weights = 4 * (layers * layer + outer)
    assert base["weights"] == weights
    assert 2 * trained <= base["optimizer state"] <= 2 * trained + 1024
    assert events[0][1] == sum(base.values())
    assert 0 <= events[-1][1] - events[0][1] - trained < 4 * 2 * 64 * 4 + 64
    held = [event[1] for event in events]
    assert report["memory"]["peak_bytes"] == max(held) > weights + trained
    assert all(after[1] - before[1] == after[2] for before, after in pairwise(events))


def test_the_flops_of_the_rows_are_those_of_the_model(profiled: Profiled) -> None:
    """Of the layers' products, and of the head's 4 D V or 6 D V for each token with a loss."""
    stage, _, report = profiled
    if not cpu_native.HAS_CSRC:
        pytest.skip("without the extension the attention is torch's")
    rows = {row["name"]: row for row in report["kernels"]}
    products = sum(row["flops"] for name, row in rows.items() if name.startswith("aten::") and row["flops"])
    tokens, labelled = (report["conditions"][name] for name in ("tokens a step", "of them with a loss"))
    assert tokens == 128 and 100 < labelled <= 128
    matrices = 48 * (48 + 16 + 16) + 48 * 48 + 3 * 48 * 80
    if stage == "pretrain":
        expected = tokens * (6 * 2 * matrices - 2 * 48 * 80) + labelled * 4 * 48 * 320
    else:  # recompute: layer, of which the down projection is not run again
        expected = tokens * (8 * 4 * matrices - 4 * 2 * 48 * 80) + labelled * 6 * 48 * 320
    assert products == pytest.approx(expected, rel=1e-9)
    forward, backward = (rows[f"csrc::attention_{way}"]["flops"] for way in ("forward", "backward"))
    assert backward / forward == pytest.approx(2.5 if stage == "pretrain" else 1.25)


def test_shares_of_the_roofline_are_possible(profiled: Profiled) -> None:
    """Bytes can come from cache, above the rate of memory; products cannot beat the machine's best by more than the
    noise of two short measurements.
    """
    _, _, report = profiled
    shares = {row["name"]: row["roofline_share"] for row in report["kernels"] if row["roofline_share"] is not None}
    assert len(shares) >= 5 and all(share > 0 for share in shares.values())
    with_flops = [row for row in report["kernels"] if row["flops"]]
    assert len(with_flops) >= 2 and all(0 < row["roofline_share"] <= 1.2 for row in with_flops)


@pytest.mark.parametrize(("stage", "state"), [("pretrain", "fp32"), ("align", "8bit")])
def test_a_profiled_step_is_a_step_of_training(
    stage: StageName, state: str, tied: Path, shards: dict[str, str], tmp_path: Path
) -> None:
    """Two steps and a profiled third change the weights, bit for bit, as three steps of the loop do."""
    tree = tree_of(tied, shards, tmp_path / "run")
    tree[stage]["optimizer"]["state"] = state
    config = make_config(tree)
    ours, theirs = open_subject(config, stage), open_subject(config, stage)
    before = {name: weight.clone() for name, weight in theirs.optimizer.weights().items()}
    losses: list[float] = []
    progress = Progress()
    hooks = Hooks(
        on_step=lambda _, metrics: losses.append(metrics["loss_nats"]), should_stop=lambda: progress.step == 3
    )
    finished = train(
        ResidentEngine(theirs.model, theirs.optimizer, theirs.section.micro_batch),
        make_mixture(config, tied, 320), theirs.section,
        steps=config.steps(stage), sequence_length=32, progress=progress, hooks=hooks,
    )  # fmt: skip
    assert not finished and progress.step == 3
    (tmp_path / "out").mkdir()
    report = profile_subject(ours, 2, tmp_path / "out")
    assert report["loss_nats"] == losses[-1]
    after = ours.optimizer.weights()
    for name, weight in theirs.optimizer.weights().items():
        assert torch.equal(weight, after[name]), name
        assert not torch.equal(weight, before[name]), name
    take_step(ours, 3)
    assert any(not torch.equal(weight, after[name]) for name, weight in theirs.optimizer.weights().items())


def test_shapes_without_a_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "profile"
    flags = ["--shapes", "llama-3.1-8b-mini", "--sequence-length", 8, "--micro-batch", 2, "--warmup", 1, "--out", out]
    status, shown = profile(*flags, "device=cpu", "pretrain.optimizer.state=8bit", "pretrain.tokens_per_step=32")
    assert status == 0, shown
    facts = json.loads((out / "profile.json").read_text())["conditions"]
    assert (facts["sequence length"], facts["micro-batch"], facts["micro-batches a step"]) == (8, 2, 2)
    assert facts["optimizer state"] == "8bit" and "2 of 32 layers" in facts["model"]


def test_what_is_refused(config_file: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    status, shown = profile(config_file, "--out", there)
    assert status == 3 and "nothing is written over" in shown and list(there.iterdir()) == []
    for arguments, expected in (
        (["--shapes", "llama-9"], "llama-3.1-8b"),
        ([config_file, "--shapes", "smollm2-135m"], "not both"),
        ([config_file, "--stage", "detach"], "use pretrain or align"),
        ([], "--shapes"),
        ([config_file, "--micro-batch", 5], "micro_batch 5 is more than"),
        ([tmp_path / "none.yaml"], "no such configuration file"),
    ):
        status, shown = profile(*arguments)
        assert status == 2 and expected in shown, shown
    assert list(tmp_path.iterdir()) == [there]


def test_shapes_that_do_not_fit_are_refused_before_weights_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer's input alone has 1.2 TiB here, which fits no machine; a weight that is made ends the test."""

    def made(*_: object) -> torch.Tensor:
        raise AssertionError("a weight was made")

    monkeypatch.setattr("elo_engine.profile._random_weight", made)
    flags = ["--sequence-length", 8192, "--micro-batch", 10_000, "--out", tmp_path / "profile", "device=cpu"]
    for stage in ("pretrain", "align"):
        status, shown = profile("--shapes", "llama-3.1-8b", "--stage", stage, *flags)
        assert status == 3, shown
        assert f"--shapes llama-3.1-8b: {stage} does not fit" in shown and "micro_batch=" in shown
    assert list(tmp_path.iterdir()) == []


def test_a_profile_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FailedError), new_folder(tmp_path / "profile") as folder:
        (folder / "trace.json.gz").write_bytes(b"half")
        raise FailedError("stopped")
    assert list(tmp_path.iterdir()) == []


def test_the_native_ops_lose_their_ranges_again() -> None:
    before = cpu_native.__dict__["_csrc"]
    with pytest.raises(FailedError), native_ranges():
        assert before is None or cpu_native.__dict__["_csrc"] is not before
        raise FailedError("stopped")
    assert cpu_native.__dict__["_csrc"] is before


def event(name: str, ts: float, dur: float, cat: str = "cpu_op", tid: int = 1, **args: Any) -> dict[str, Any]:
    return {
        "ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid,
        "args": {key.replace("_", " "): value for key, value in args.items()},
    }  # fmt: skip


def step_of_a_gpu() -> list[dict[str, Any]]:
    """100 us: data to 10, forward to 30, head to 40, backward to 60 (the head's to 45), optimizer waits to 100."""
    parts = [("step", 0, 100), ("data", 0, 10), ("forward", 10, 20), ("head", 30, 10), ("backward", 40, 20)]
    parts += [("optimizer", 60, 40), ("hidden_gradient", 45, 0.1)]
    events = [event(f"elo::{name}", ts, dur, "user_annotation") for name, ts, dur in parts]
    launches = {1: 12, 2: 14, 3: 35, 4: 42, 5: 50, 6: 62}
    events += [event("cudaLaunchKernel", ts, 1, "cuda_runtime", correlation=n) for n, ts in launches.items()]
    dims = {"Input_Dims": [[100, 10], [10, 100]], "Input_type": ["float", "float"]}
    events.append(event("aten::mm", 11, 4, External_id=7, **dims))
    for n, name, ts, dur, more in (
        (1, "gemm", 15, 20, {"External_id": 7}),  # launched in the forward pass, runs into the head's time
        (2, "splitk", 35, 5, {"External_id": 7}),
        (3, "loss", 38, 7, {}),  # 2 us of it beside another kernel
        (4, "scale", 45, 1, {}),
        (5, "flash_bwd_dq_dk_dv", 55, 20, {}),
        (6, "adamw", 80, 15, {}),
    ):
        events.append(event(name, ts, dur, "kernel", tid=7, correlation=n, **more))
    return events


def test_kernels_belong_to_the_part_that_launched_them() -> None:
    found = time_by_part(StepTrace(step_of_a_gpu()))
    assert found == pytest.approx(
        {
            "data": 10, "forward": 25, "head": 5, "head_backward": 1, "backward": 20, "optimizer": 15, "other": 0,
            "gaps": 5 + 9 + 5 + 5,
        }
    )  # fmt: skip
    assert sum(found.values()) == pytest.approx(100)


def test_a_kernel_has_the_work_of_its_op_once() -> None:
    named = [NamedWork("flash_bwd", Work(flops=10_000.0))]
    rows = {row.name: row.record(100.0) for row in top_rows(StepTrace(step_of_a_gpu()), ONE, named)}
    assert rows["gemm"]["flops"] == 2 * 100 * 10 * 100 and rows["splitk"]["flops"] is None
    assert rows["gemm"]["roofline_share"] == pytest.approx(200_000 / 1e9 / 20e-6)
    assert rows["flash_bwd_dq_dk_dv"]["roofline_share"] == pytest.approx(10e-6 / 20e-6)
    assert rows["adamw"]["roofline_share"] is None and list(rows["adamw"]["ms_by_part"]) == ["optimizer"]
    assert list(rows)[:2] == ["gemm", "flash_bwd_dq_dk_dv"] and rows["gemm"]["share"] == pytest.approx(0.2)


def test_self_time_and_work_of_nested_ops_count_once() -> None:
    dims = {"Input_Dims": [[1000], []], "Input_type": ["float", "Scalar"], "Input_Strides": [[1], []]}
    events = [
        event("elo::step", 0, 20, "user_annotation"),
        event("elo::forward", 0, 20, "user_annotation"),
        event("aten::zero_", 2, 10, **dims),
        event("aten::fill_", 4, 5, **dims),
        event("csrc::frozen_head", 12, 6, "user_annotation"),
        event("aten::zero_", 2, 4, tid=2, **dims),  # at the same time, in another thread
    ]
    trace = StepTrace(events)
    nothing = dict.fromkeys((*PARTS, "head_backward"), 0.0)
    assert time_by_part(trace) == pytest.approx({**nothing, "forward": 16, "gaps": 4})
    rows = {row.name: row for row in top_rows(trace, ONE, [])}
    assert (rows["aten::zero_"].us, rows["aten::zero_"].bytes, rows["aten::zero_"].counted_us) == (9, 4000, 4)
    assert (rows["aten::fill_"].us, rows["aten::fill_"].bytes) == (5, 4000)
    assert rows["csrc::frozen_head"].us == 6


def test_memory_of_the_other_device_is_left_out() -> None:
    events = [event("elo::step", 0, 20, "user_annotation"), event("elo::head", 5, 10, "user_annotation")]
    for ts, size, kind in ((6, 512, 1), (7, 64, 0), (9, -512, 1)):
        events.append({"name": "[memory]", "ts": ts, "args": {"Bytes": size, "Device Type": kind}})
    timeline = memory_timeline(StepTrace(events), 1000, cuda=True)
    assert [entry[1:3] for entry in timeline] == [(1000, 0), (1512, 512), (1000, -512), (1000, 0)]
    assert timeline[1][3] == "head" and timeline[-1][0] == pytest.approx(0.02)
    assert [entry[1] for entry in memory_timeline(StepTrace(events), 0, cuda=False)] == [0, 64, 64]


def test_a_trace_without_the_step_is_said() -> None:
    with pytest.raises(FailedError, match="elo::step"):
        StepTrace(step_of_a_gpu()[1:])


def test_the_ceiling_is_that_of_the_faster_products() -> None:
    """bf16 on a processor without such units is slower than fp32 by orders of magnitude, and no ceiling."""
    found = measure_ceilings(torch.device("cpu"), torch.bfloat16, rounds=1)
    fp32 = measure_ceilings(torch.device("cpu"), torch.float32)
    assert found.matmul_flop_per_s > fp32.matmul_flop_per_s / 4
    assert found.record()["matmul_dtype"] in ("float32", "bfloat16")


@pytest.mark.parametrize("window", [None, 1, 3, 50])
def test_attention_pairs_against_a_mask(window: int | None) -> None:
    starts = [0, 5, 6, 20]
    segment = torch.repeat_interleave(torch.arange(3), torch.tensor([5, 1, 14]))
    behind = torch.arange(20)[:, None] - torch.arange(20)
    seen = (segment[:, None] == segment) & (behind >= 0) & (behind < (window or 99))
    assert attention_pairs(starts, window) == int(seen.sum())


def recorded(run: Callable[[], object], name: str) -> Work | None:
    """The work that is read from what torch's profiler says of an op."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    with torch_profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        run()
    found = [entry for entry in profiler.events() or [] if entry.name == name]
    types = ["float" if shape else "Scalar" for shape in found[0].input_shapes]
    return op_work(name, {"Input Dims": found[0].input_shapes, "Input type": types})


def test_work_of_torch_ops() -> None:
    left, right, total = torch.ones(8, 5), torch.ones(5, 6), torch.ones(8, 6)
    assert recorded(lambda: torch.mm(left, right, out=total), "aten::mm") == Work(480.0, 4.0 * (40 + 30 + 48))
    assert recorded(lambda: total.addmm_(left, right), "aten::addmm_") == Work(480.0, 4.0 * (40 + 30 + 96))
    assert recorded(lambda: torch.mul(total, total, out=total), "aten::mul") == Work(0.0, 4.0 * 3 * 48)
    assert recorded(lambda: total.mul_(2.0), "aten::mul_") == Work(0.0, 4.0 * 2 * 48)
    assert recorded(lambda: total.copy_(torch.ones(8, 6)), "aten::copy_") == Work(0.0, 4.0 * 2 * 48)
    row = {"Input Dims": [[8, 6], [8, 6]], "Input Strides": [[6, 1], [0, 1]], "Input type": ["c10::BFloat16"] * 2}
    assert op_work("aten::mul", row) == Work(0.0, 2.0 * (48 + 6 + 48))  # six numbers, expanded to eight rows
    assert op_work("aten::cat", row) is None and op_work("_NormLinear", row) is None
