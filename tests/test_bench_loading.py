"""The loading benchmark on a tiny checkpoint: the arms load the same bytes, and what would falsify a figure is seen."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from elo_engine.benchmarks import bench_loading, loading_arms, loading_report, loading_table, synthetic
from elo_engine.benchmarks.compare import compare
from elo_engine.benchmarks.recording import read_record
from elo_engine.checkpoint import open_checkpoint
from elo_engine.errors import FailedError, RefusedError

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
IN_PROCESS = [
    arm for arm in loading_arms.BUILD if not arm.startswith(("ceiling", "safetensors_next"))
]  # the other safetensors needs a process that imports it first


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> bench_loading.Plan:
    folder = tmp_path_factory.mktemp("synthetic") / "tiny"
    synthetic.make_checkpoint(folder, synthetic.PRESETS["tiny"])
    return bench_loading.make_plan(folder)


@pytest.fixture
def job(plan: bench_loading.Plan) -> loading_arms.Job:
    return loading_arms.Job(plan.folder, plan.names, "cpu", plan.ranges, 2)


def truth(plan: bench_loading.Plan) -> str:
    """Checksum of the wanted tensors as safetensors reads them, one by one."""
    index = open_checkpoint(plan.folder)
    tensors = {}
    for name in plan.names:
        with safe_open(plan.folder / index.entry(name).shard, "pt") as file:
            tensors[name] = file.get_tensor(name).clone()
    return loading_arms.checksum(tensors, plan.names)


def test_the_checkpoint_lies_as_save_pretrained_writes_it(plan: bench_loading.Plan, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(plan.folder, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size=synthetic.PRESETS["tiny"].shard_bytes)
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert names == sorted(Path(path).name for path in plan.shards) and len(names) > 2
    for name in (*names, "model.safetensors.index.json"):
        assert (tmp_path / name).read_bytes() == (plan.folder / name).read_bytes(), name


def test_presets_have_the_sizes_they_promise() -> None:
    for preset, total, share in (("llama-2b", 4.0e9, 0.258), ("llama-3.1-8b", 16.06e9, 0.185)):
        shapes = synthetic.PRESETS[preset]
        sizes = {name: 2 * int(torch.Size(shape).numel()) for name, shape in shapes.tensors()}
        middle = tuple(f"model.layers.{layer}." for layer in range(1, shapes.layers - 1))
        detached = sum(size for name, size in sizes.items() if not name.startswith(middle))
        assert sum(sizes.values()) == pytest.approx(total, rel=0.005)
        assert detached / sum(sizes.values()) == pytest.approx(share, abs=0.001)


def test_weights_are_small_finite_and_not_all_the_same(plan: bench_loading.Plan) -> None:
    for path in plan.shards:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  (safe_open is no dict)
                tensor = file.get_tensor(name).float()
                low, high = (1.0, 2.0) if "norm" in name else (2**-7, 2**-6)
                assert bool(((tensor.abs() >= low) & (tensor.abs() < high)).all()), name
                assert len(tensor.unique()) > 30


def test_a_checkpoint_is_made_once_and_nothing_else_is_taken_for_it(plan: bench_loading.Plan, tmp_path: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in plan.folder.iterdir()}
    synthetic.make_checkpoint(plan.folder, synthetic.PRESETS["tiny"])
    assert {path.name: path.stat().st_mtime_ns for path in plan.folder.iterdir()} == before
    with pytest.raises(RefusedError, match="not this synthetic checkpoint"):
        synthetic.make_checkpoint(plan.folder, synthetic.PRESETS["tiny"], seed=1)
    with pytest.raises(RefusedError, match="not this synthetic checkpoint"):
        synthetic.make_checkpoint(tmp_path, synthetic.PRESETS["tiny"])


@pytest.mark.parametrize("arm", IN_PROCESS)
def test_every_arm_loads_the_same_bytes(
    arm: str, job: loading_arms.Job, plan: bench_loading.Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTSAFETENSORS_ODIRECT", "0")  # so that the arm's own setting does not outlive the test
    try:
        load = loading_arms.BUILD[arm](job)
    except ImportError as error:
        pytest.skip(f"not installed: {error.name}")
    result = loading_arms.measure(load, job)
    assert result["checksum"] == truth(plan)
    assert arm == "transformers" or result["mapped_bytes"] == 0, "its tensors are still in the file"
    assert result["seconds"] > 0


def test_tensors_still_in_the_file_are_seen(plan: bench_loading.Plan) -> None:
    with safe_open(plan.shards[0], "pt", backend="mmap") as file:
        lazy = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert loading_arms.mapped_bytes(lazy) == sum(tensor.numel() * 2 for tensor in lazy.values())
    assert loading_arms.mapped_bytes({name: tensor.clone() for name, tensor in lazy.items()}) == 0


def test_the_checksum_sees_a_flipped_bit_and_swapped_tensors() -> None:
    tensors = {"a": torch.zeros(5000).bfloat16(), "b": torch.ones(5000).bfloat16()}
    right = loading_arms.checksum(tensors, ("a", "b"))
    assert loading_arms.checksum({"a": tensors["b"], "b": tensors["a"]}, ("a", "b")) != right
    tensors["a"].view(torch.uint8)[7777] ^= 1
    assert loading_arms.checksum(tensors, ("b", "a")) != right
    rows = [{"arm": "engine", "checksum": right}, {"arm": "peer", "checksum": "x"}, {"arm": "ceiling", "checksum": ""}]
    bench_loading.check_same(rows)
    assert ["failed" in row for row in rows] == [False, True, False]


def test_ceilings_read_the_wanted_bytes(job: loading_arms.Job, plan: bench_loading.Plan) -> None:
    index = open_checkpoint(plan.folder)
    assert job.wanted_bytes == index.bytes_of(plan.names) < 0.9 * index.total_bytes
    for arm in ("ceiling_page_cache_1", "ceiling_page_cache_n"):
        result = loading_arms.measure(loading_arms.BUILD[arm](job), job)
        # The counters are read through files whose own few KB are counted too.
        assert 0 <= result["call_bytes"] - job.wanted_bytes < 20_000


def test_cold_and_warm_are_what_they_say(plan: bench_loading.Plan) -> None:
    assert bench_loading.make_warm(plan, whole=True) == 1.0
    try:
        bench_loading.make_cold(plan)
    except FailedError as error:
        pytest.skip(str(error))  # a filesystem in memory
    whole = [(path, 0, os.stat(path).st_size) for path in plan.shards]
    assert bench_loading.residency(whole) < 0.01
    assert bench_loading.make_warm(plan, whole=False) == 1.0
    assert bench_loading.residency(whole) < 1.0


def test_an_arm_that_hangs_is_given_up(plan: bench_loading.Plan, tmp_path: Path) -> None:
    child = bench_loading.Child("engine", tmp_path / "no-job", None, tmp_path / "log", timeout_s=0.05)
    result = bench_loading.run_once("engine", "warm", plan, child, bench_loading.Primed(0))
    assert result["failed"].startswith("ended with status -9")


def rows_of(seconds: dict[str, list[float]], state: str = "warm", **more: Any) -> list[dict[str, Any]]:
    base = {
        "state": state, "call_bytes": 1000, "disk_bytes": 0, "peak_rss_bytes": 0, "peak_gpu_bytes": None,
        "mapped_bytes": 0,
    }  # fmt: skip
    return [
        base | {"arm": arm, "round": number, "seconds": value} | more
        for arm, values in seconds.items()
        for number, value in enumerate(values)
    ]


def test_verdicts_follow_the_ratios_of_the_rounds() -> None:
    # The machine is ten times slower in the second round: only ratios by round show that the peer takes half as long.
    rows = rows_of({"engine": [1.0, 10.0, 1.0], "peer": [0.5, 5.0, 0.5], "transformers": [6.0, 60.0, 6.0]})
    rows += [{"arm": "gone", "state": "warm", "round": 0, "failed": "not available: x | y"}]
    figures = loading_report.summarise(rows, ["engine", "peer", "transformers", "gone"], 1000)["warm"]
    assert figures["peer"]["over_engine"] == {"median": 0.5, "p10": 0.5, "p90": 0.5, "count": 3}
    text = "\n".join(loading_report.verdicts("warm", figures))
    assert "yes: the engine reads 1.000" in text
    assert "yes: the whole model (transformers) takes 6.00" in text
    assert "**no**: no peer is faster" in text and "faster than the engine: peer" in text
    assert "| gone | not measured: not available: x / y |" in loading_report.table(figures)
    # The slowest part of the way bounds it: the link here, and of the two ways out of the page cache the faster one.
    parts = {"engine": [1.0], "ceiling_page_cache_1": [0.95], "ceiling_page_cache_n": [0.3], "ceiling_link": [0.8]}
    figures = loading_report.summarise(rows_of(parts), list(parts), 1000)["warm"]
    last = loading_report.verdicts("warm", figures, "cuda:0")[-1]
    assert "**no**: the engine reaches 80 % of the slowest part" in last
    assert not any("slowest" in line for line in loading_report.verdicts("warm", figures, "cpu"))
    much = loading_report.summarise(rows_of({"engine": [1.0]}, call_bytes=1021), ["engine"], 1000)["warm"]
    assert loading_report.verdicts("warm", much)[0].startswith("warm: **no**: the engine reads 1.021")


def test_an_arm_that_there_is_not_is_refused() -> None:
    with pytest.raises(RefusedError, match="no such arm: nobody"):
        bench_loading.choose_arms(["engine", "nobody"], "cpu", None)


def measured(
    plan: bench_loading.Plan, monkeypatch: pytest.MonkeyPatch, *more: str, command: list[str] | None = None
) -> None:
    # The arms are processes of their own and find the package where this one does.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(BENCHMARKS.parent), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = ["--rounds", "1", "--states", "warm", "--arms", "engine", "safetensors_pread"]
    bench_loading.main(["--model", str(plan.folder), *options, *more], command)


def test_the_program_measures_and_keeps_a_record(
    plan: bench_loading.Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A record as every benchmark's: sealed, append-only, with tables of its own, comparable with another."""
    records = tmp_path / "records"
    measured(plan, monkeypatch, "--records", str(records), command=["elo", "bench", "loading", "--model", "x"])
    shown = capsys.readouterr().out
    (path,) = records.iterdir()
    kept = read_record(path)
    assert kept.theme == "loading" and kept.config and kept.config["command"][:3] == ["elo", "bench", "loading"]
    results, rows = (kept.result or {})["results"], kept.raw()["measurements"]
    assert [(row["arm"], row["resident_before"]) for row in rows].count(("engine", 1.0)) == 1
    assert {row["checksum"] for row in rows} == {truth(plan)}
    assert results["wanted_bytes"] == plan.wanted_bytes and (kept.environment or {})["cpu_cores"]
    assert {row["arm"]: row["seconds"] for row in results["measurements"]} == {r["arm"]: r["seconds"] for r in rows}
    assert "| safetensors_pread | " in shown and "Warm:" in shown and "Cold:" not in shown
    assert str(plan.folder) not in "".join(file.read_text() for file in path.iterdir())
    assert any("warm engine" in line for line in compare(path, path))
    measured(plan, monkeypatch, "--no-record", "--records", str(records))
    assert list(records.iterdir()) == [path]


def result_of(seconds: dict[str, list[float]]) -> dict[str, Any]:
    described = {
        "model": "tiny", "device": "cpu", "device_name": "Imaginary CPU", "peers": {"safetensors": "0.8"}, "rounds": 2,
        "seed": 0, "ceiling_threads": 2, "memory_primed": True, "filesystem": "ext4", "shards": 1,
        "checkpoint_bytes": 4000, "wanted_bytes": 1000, "tensors": 3, "ranges": 1,
    }  # fmt: skip
    rows = [*rows_of(seconds), *rows_of(seconds, "cold")]
    rows.append({"arm": "gone", "state": "warm", "round": 0, "failed": "not installed"})
    return loading_table.make_result(described, loading_report.summarise(rows, [*seconds, "gone"], 1000), rows)


def test_a_result_that_does_not_fit_is_not_kept() -> None:
    made = result_of({"engine": [1.0, 2.0]})["results"]
    rows, summary = made["measurements"], made["summary"]
    described = {name: value for name, value in made.items() if name not in ("summary", "measurements")}
    for field, wrong in (("wanted_bytes", 1.5), ("device_name", None), ("colour", "red")):
        with pytest.raises(FailedError, match=f"does not fit its schema: {field}"):
            loading_table.make_result(described | {field: wrong}, summary, rows)
    with pytest.raises(FailedError, match=r"measurements\.0\.state"):
        loading_table.make_result(described, summary, [rows[0] | {"state": "tepid"}])


def test_the_tables_and_the_picture_of_a_result(tmp_path: Path) -> None:
    result = result_of({"engine": [1.0, 2.0], "peer": [2.0, 4.0], "ceiling_disk": [0.5, 1.0]})
    text = "\n".join(loading_table.loading_tables(result))
    assert "3 tensors in 1 ranges" in text and "Imaginary CPU" in text and "Cold:" in text and "Warm:" in text
    assert "| peer | 3.000" in text and "2.00 (2.00 to 2.00)" in text and "not measured: not installed" in text
    assert "primed" in text and loading_table.has_picture(result)
    early = {"schema": 1, "theme": "loading", "results": {"model": "tiny"}}
    assert loading_table.loading_tables(early) == [] and not loading_table.has_picture(early)
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    loading_table.draw_loading(figure, result)
    figure.savefig(tmp_path / "loading.png")
    panels = figure.get_axes()
    assert [axis.get_title(loc="left") for axis in panels] == ["cold", "warm"]
    assert [tick.get_text() for tick in panels[0].get_yticklabels()] == ["peer", "engine", "ceiling_disk"]
