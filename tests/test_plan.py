"""`elo plan` and what a run keeps of it: the numbers, the levers, every refusal, prediction against measurement."""

from __future__ import annotations

import json
import re
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Forked
from plan_fixture import unmade_run

from elo_engine import plan
from elo_engine.checkpoint import mover, writer
from elo_engine.checkpoint.patch_file import safetensors_header
from elo_engine.config import OptimizerConfig
from elo_engine.measure import expected
from elo_engine.measure.cards import CONTEXT_BYTES, find_card
from elo_engine.measure.flops import arm_flops
from elo_engine.measure.machine import Room, host_room
from elo_engine.measure.planner import predict_memory
from elo_engine.measure.setting import ARMS, Setting
from elo_engine.model import names
from elo_engine.model.decoder import Decoder
from elo_engine.model.presets import preset_config, preset_spec
from elo_engine.model.spec import ModelSpec, read_spec
from elo_engine.train.optim import MasterAdamW

Elo = Callable[..., tuple[int, str]]
Write = Callable[..., Path]
Tree = dict[str, Any]
GPU_HERE = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
EIGHT_BIT = ("pretrain.optimizer.state=8bit", "align.optimizer.state=8bit")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The defaults with nothing left to choose, for shapes by name: neither model nor shards are there."""
    return unmade_run(tmp_path, "pretrain: {recompute: none}\nalign: {recompute: layer}\n")


def planned(elo: Elo, *arguments: object, status: int = 0) -> dict[str, Any]:
    got, shown = elo("plan", *arguments, "--json")
    assert got == status, shown
    found, _ = json.JSONDecoder().raw_decode(shown)
    return found  # type: ignore[no-any-return]


def test_a_plan_of_published_shapes_for_a_card(config: Path, elo: Elo) -> None:
    found = planned(elo, config, *EIGHT_BIT, "--shapes", "llama-3.1-8b", "--gpu", "H200")
    assert found["model"]["parameters"] == 8_030_261_248 and found["dtype"] == "bfloat16"
    spec = preset_spec("llama-3.1-8b")
    for stage, arm, size, recompute in (("pretrain", "elo_pretrain", 4, "none"), ("align", "elo_align", 1, "layer")):
        part = found[stage]
        rest: dict[str, Any] = {"recompute": recompute}
        setting = Setting(arm, spec, (0, 31), 8192, size, 32 // size, **rest)  # type: ignore[arg-type]
        assert part["memory"] == predict_memory(setting).to_json()
        assert sum(part["memory"]["components"].values()) == part["memory"]["peak_bytes"] == part["device_bytes"]
        flops = arm_flops(setting)
        assert part["flops_per_token"] == flops.model.total
        assert part["flops_per_token_executed"] == flops.executed.total
        steps = {"pretrain": 3433, "align": 381}[stage]
        assert part["steps"] == steps and part["fits"]
        work = steps * 262_144 * flops.executed.total
        assert part["seconds"] == pytest.approx(work / (find_card("h200").flop_per_s * expected.PEAK_SHARE))
    assert found["room"]["device"]["bytes"] == 141 * 10**9 - CONTEXT_BYTES and found["room"]["disk"] is None
    assert found["ideal_pipeline_speedup"] == pytest.approx(5.32, abs=0.01)
    assert found["refusals"] == [] and found["disk"]["model"] == 2 * spec.parameters


def test_what_cannot_fit_is_refused_with_levers_that_save_what_they_say(config: Path, elo: Elo) -> None:
    forced = ("pretrain.micro_batch=4", "align.recompute=none", "align.engine=resident")
    here = (config, *forced, "--shapes", "llama-3.1-8b", "--gpu", "16GB")
    status, shown = elo("plan", *here)
    assert status == 3 and "Traceback" not in shown, shown
    lines = [line for line in shown.splitlines() if "does not fit" in line]
    assert len(lines) == 2
    said = dict(zip(("pretrain", "align"), lines, strict=True))
    found = planned(elo, *here, status=3)
    assert not found["pretrain"]["fits"] and not found["align"]["fits"]
    for stage in ("pretrain", "align"):
        part = found[stage]
        levers = part["advice"]["levers"]
        assert len(levers) >= 3
        assert [lever["saves_bytes"] for lever in levers] == sorted((x["saves_bytes"] for x in levers), reverse=True)
        for number, lever in enumerate(levers):
            changed = planned(elo, *here, lever["override"], status=3)
            assert part["device_bytes"] - changed[stage]["device_bytes"] == lever["saves_bytes"] > 0, lever
            assert (f"{lever['override']} saves" in said[stage]) == (number < 3), lever
    together = found["pretrain"]["advice"]["fits_with"]
    fitting = planned(elo, *here, *together, status=3)["pretrain"]
    assert fitting["fits"] and fitting["device_bytes"] == found["pretrain"]["advice"]["bytes_with"]
    assert f"With {' '.join(together)} it fits" in shown
    together = found["align"]["advice"]["fits_with"]
    assert "align.engine=streamed" in together and planned(elo, *here, *together, status=3)["align"]["fits"]
    for text in ("pretrain does not fit", "align does not fit", "on 16GB, less", "the run folder can be moved"):
        assert text in shown, text


def test_a_combination_that_leaves_the_lesson_alone_comes_first(config: Path, elo: Elo) -> None:
    """Two overrides that cost time and precision are named, although training one layer less alone would do."""
    here = (
        config, "pretrain.micro_batch=2", "align.stream.vocabulary=whole", "--shapes", "llama-3.1-8b", "--gpu", "11GB"
    )
    advice = planned(elo, *here, status=3)["pretrain"]["advice"]
    assert advice["levers"][0]["override"] == "detach.layers=[last]"
    assert planned(elo, *here, "detach.layers=[last]", status=3)["pretrain"]["fits"]
    assert set(advice["fits_with"]) == {"pretrain.optimizer.state=8bit", "pretrain.micro_batch=1"}


def test_fewer_layers_and_a_narrower_type_are_levers_too(config: Path, elo: Elo) -> None:
    here = (config, "dtype=fp32", "detach.layers=[0-3]", "--shapes", "llama-3.2-1b", "--gpu", "1GB")
    part = planned(elo, *here, status=3)["pretrain"]
    named = {lever["override"] for lever in part["advice"]["levers"]}
    assert {"dtype=bf16", "detach.layers=[first,last]", "data.sequence_length=4096"} <= named
    assert part["seconds"] is None
    assert planned(elo, *here, "dtype=bf16", status=3)["pretrain"]["seconds"] is None, "an amount has no rate"
    slow = planned(elo, *here[:-1], "h200")
    assert slow["rate"] is None, "a card's bf16 rate says nothing of fp32"


def test_host_memory_is_refused(config: Path, elo: Elo) -> None:
    here = (config, *EIGHT_BIT, "--shapes", "llama-3.1-8b", "--gpu", "h200")
    found = planned(elo, *here, "--host", "64GB")
    assert found["align"]["host_bytes"] > found["align"]["snapshot_bytes"] > 30e9
    status, shown = elo("plan", *here, "--host", "24GB")
    assert status == 3 and "align does not fit: with reading and saving snapshots" in shown
    assert "of host memory" in shown and "--host 24GB" in shown and "pretrain does not fit" not in shown


def test_the_host_of_a_plan_for_a_cpu_is_its_device(config: Path, elo: Elo) -> None:
    here = (config, "device=cpu", "dtype=fp32", "data.sequence_length=1024", "--shapes", "smollm2-135m")
    found = planned(elo, *here, "--host", "64GB")
    assert found["room"]["device"] == found["room"]["host"] and found["pretrain"]["fits"]
    part = found["pretrain"]
    assert part["device_bytes"] == part["host_bytes"] > part["memory"]["peak_bytes"] + expected.READING_BYTES
    status, shown = elo("plan", *here, "--host", "1GB")
    assert status == 3 and "besides for the process, reading and snapshots" in shown
    assert "align.micro_batch" not in shown, "it is 1 already"


def test_disk_is_refused(config: Path, elo: Elo) -> None:
    few = ("snapshot.every=1", "snapshot.keep=100000")
    here = (config, "device=cpu", "--shapes", "llama-3.1-8b", "--host", "4000GB")
    status, shown = elo("plan", *here, *few)
    assert status == 3 and "of disk and there are" in shown and "snapshot.keep=1 saves" in shown
    assert "does not fit" not in shown, "it is the disk alone"


@pytest.mark.parametrize(
    ("arguments", "status", "fragment"),
    [
        (("--gpu", "rtx-9999"), 2, "'rtx-9999' is not one of the cards"),
        (("--gpu", "24"), 2, "'24' is not an amount of memory"),
        (("--gpu", "0GB"), 2, "'0GB' is not an amount"),
        (("--gpu", "h200", "--host", "much"), 2, "'much' is not an amount"),
        (("--gpu", "h200", "--measure"), 2, "--gpu h200 is another"),
        (("--gpu", "h200", "pretrain.micro_batches=1"), 2, "micro_batch"),
        (("--gpu", "h200", "detach.layers=[99]"), 2, "layer 99 does not exist"),
        pytest.param(("--gpu", "auto"), 3, "no GPU here to plan for (--gpu auto)", marks=GPU_HERE),
        pytest.param(("device=cuda",), 3, "--gpu rtx-4090", marks=GPU_HERE),
    ],
)
def test_bad_arguments(arguments: tuple[str, ...], status: int, fragment: str, config: Path, elo: Elo) -> None:
    got, shown = elo("plan", config, *arguments, "--shapes", "llama-3.2-1b")
    assert (got, fragment in shown) == (status, True), shown
    assert "Traceback" not in shown


def test_bad_models(config: Path, tied: Path, tmp_path: Path, elo: Elo) -> None:
    status, shown = elo("plan", config, "--shapes", "llama-9")
    assert status == 2 and "llama-3.1-8b-mini" in shown
    assert elo("plan", tmp_path / "no.yaml")[0] == 2
    status, shown = elo("plan", config, f"model={tmp_path / 'gone'}")
    assert status == 2 and "gone" in shown
    folder = shutil.copytree(tied, tmp_path / "model")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "mamba"}))
    status, shown = elo("plan", config, f"model={folder}")
    assert status == 3 and "'mamba'" in shown


def test_tables_say_what_is_assumed(config: Path, elo: Elo) -> None:
    status, shown = elo("plan", config, *EIGHT_BIT, "kernels=reference", "--shapes", "smollm2-135m", "--gpu", "h200")
    assert status == 0
    for text in ("loss workspace", "GFLOP a token, executed", "reattached", "an assumption", "over checkpointed"):
        assert text in shown, text
    assert "warning: kernels: reference" in shown
    shown = elo("plan", config, "--shapes", "smollm2-135m", "data.sequence_length=16384", "--gpu", "80GB")[1]
    assert "time: not expected" in shown and "16384 is more than the 8192 positions" in shown


def test_a_rate_is_measured(config: Path, elo: Elo) -> None:
    small = ("data.sequence_length=256", "pretrain.tokens_per_step=1024", "align.tokens_per_step=1024")
    found = planned(elo, config, "device=cpu", *small, "--shapes", "smollm2-135m", "--measure")
    rate = found["rate"]
    assert rate["assumed_share"] == expected.MATMUL_SHARE and 1e9 < rate["flop_per_s"] < 1e14
    part = found["pretrain"]
    work = part["steps"] * 1024 * part["flops_per_token_executed"]
    assert part["seconds"] == pytest.approx(work / (rate["flop_per_s"] * rate["assumed_share"]))


def test_a_run_keeps_its_plan_and_holds_the_measurement_against_it(
    run_tree: Tree, write_config: Write, elo: Elo
) -> None:
    config = write_config(run_tree)
    before = planned(elo, config)
    status, shown = elo("run", config, "--dry-run")
    assert status == 0 and "peak memory" in shown and "does not fit" not in shown
    assert not Path(run_tree["output"]).exists()
    status, shown = elo("run", config)
    assert status == 0, shown
    run = Path(run_tree["output"])
    kept = json.loads((run / "plan.json").read_text())
    for stage in ("pretrain", "align"):
        for found in (kept, before):
            found[stage].pop("engine", None)  # says how much is free, which changes from one moment to the next
        assert kept[stage] == before[stage]
    stages = json.loads((run / "results.json").read_text())["stages"]
    report = (run / "report.md").read_text()
    for stage in ("pretrain", "align"):
        memory, before_it = stages[stage]["memory"], kept[stage]["memory"]
        assert memory["predicted_components"] == before_it["components"]
        assert memory["predicted_bytes"] == before_it["peak_bytes"]
        assert memory["predicted_moment"] == before_it["moment"]
        assert memory["measured_bytes"] == stages[stage]["peak_bytes"] - memory["before_bytes"] > 0
        ratio = memory["measured_bytes"] / memory["predicted_bytes"]
        assert memory["measured_over_predicted"] == pytest.approx(ratio)
        assert f"predicted ({ratio:.2f}x)" in report
        assert "resident" in memory["compared"] or torch.cuda.is_available()
    assert planned(elo, run)["pretrain"]["memory"] == kept["pretrain"]["memory"], "a run folder is a configuration"


def test_a_dry_run_refuses_what_a_plan_refuses(run_tree: Tree, write_config: Write, elo: Elo) -> None:
    """With the same words; a stage by itself is refused for itself alone, as when it begins."""
    rows = 10**7  # 32 tokens each, all at once: no machine has the memory
    run_tree["align"] |= {"tokens": 32 * rows, "tokens_per_step": 32 * rows, "micro_batch": rows}
    config = write_config(run_tree)
    status, shown = elo("plan", config)
    (refusal,) = (line for line in shown.splitlines() if "does not fit" in line)
    assert status == 3 and refusal.startswith("error: align does not fit")
    words = refusal.partition("; there are ")[0]  # what is free changes from one moment to the next
    for verb, expected_status in (("run", 3), ("align", 3), ("pretrain", 0)):
        status, shown = elo(verb, config, "--dry-run")
        said = [line for line in shown.splitlines() if "does not fit" in line]
        assert status == expected_status and "ideal pipeline speedup" in shown and len(said) == 1, shown
        assert said[0].startswith(words if status else words.replace("error:", "warning:"))
    assert not Path(run_tree["output"]).exists()


def test_a_memory_limit_below_the_plan_is_refused_before_the_model_is_read(
    run_tree: Tree, write_config: Write, tied: Path, tmp_path: Path, forked: Forked
) -> None:
    """An embedding of 0.8 GB, a hole in a file, under an address space limit 0.5 GiB above what the imports take."""
    folder = Path(shutil.copytree(tied, tmp_path / "model"))
    settings = json.loads((folder / "config.json").read_text()) | {"vocab_size": 1 << 22}
    (folder / "config.json").write_text(json.dumps(settings))
    shapes = names.expected_shapes(read_spec(settings))
    sizes = [(name, "F32", shape, 4 * torch.Size(shape).numel()) for name, shape in shapes.items()]
    header = safetensors_header(sizes, {})
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(size for _, _, _, size in sizes))
    run_tree["model"] = str(folder)
    path = write_config(run_tree)
    code = (
        "import re, resource, sys; from pathlib import Path; import elo_engine.pipeline; from elo_engine import cli; "
        "now = 1024 * int(re.search(r'VmSize:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]); "
        "resource.setrlimit(resource.RLIMIT_AS, (now + 2**29,) * 2); "
        f"sys.argv = ['elo', 'pretrain', {str(path)!r}]; cli.main()"
    )
    done = forked(code)
    assert done.returncode == 3, done.stderr
    for text in ("pretrain does not fit: its tensors take", "ulimit -v", "The biggest levers: dtype=bf16"):
        assert text in done.stderr, text
    assert done.stderr.splitlines()[-1].count(" saves ") == 3
    assert "detach: layers" not in done.stderr and not (Path(run_tree["output"]) / "pretrain").exists()


def small_model(spec: ModelSpec, layers: tuple[int, ...], dtype: torch.dtype, *, whole: bool) -> Decoder:
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, shape in names.expected_shapes(spec).items()}
    return Decoder(spec, tensors, layers, train_outer=whole)


@pytest.mark.parametrize("state", ["fp32", "8bit"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("arm", ["elo_pretrain", "elo_align"])
def test_snapshots_are_as_large_as_they_are_expected(arm: Any, dtype: Any, state: Any) -> None:
    spec = replace(preset_spec("llama-3.1-8b-mini"), layers=3, V=500)
    layers = (0, 2) if arm == "elo_pretrain" else (0, 1, 2)
    setting = Setting(arm, spec, layers, 64, 1, dtype=dtype, state=state, device="cpu")
    model = small_model(spec, layers, torch.float32 if dtype == "fp32" else torch.bfloat16, whole=arm == "elo_align")
    optimizer = MasterAdamW(model, OptimizerConfig(state=state))
    assert expected.snapshot_bytes(setting) == pytest.approx(optimizer.snapshot_bytes, rel=1e-4)
    optimizer._attempts = 1  # before the first step there are no moments to save
    for tensors in (optimizer.weights(), optimizer.moments()):
        stored = writer._separate(tensors)
        assert all(stored[name].data_ptr() == tensor.data_ptr() for name, tensor in tensors.items())
    assert expected.snapshot_host_bytes(setting) == 0
    assert expected.snapshot_host_bytes(replace(setting, device="cuda")) == expected.snapshot_bytes(setting)


def test_the_ring_is_as_large_as_counted() -> None:
    assert expected.READING_BYTES == (mover.RING_SLOTS + mover.RING_THREADS) * mover.RING_SLOT_BYTES


def system(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal: 4000 kB\nMemFree: 10 kB\nMemAvailable: 3000 kB\n"}


def test_room_is_the_least_of_what_limits_it(tmp_path: Path) -> None:
    assert host_room(system(tmp_path / "plain", MEMINFO)) == Room(3000 * 1024, "memory available on this machine")
    group = {
        "proc/self/cgroup": "0::/a/b\n",
        "sys/fs/cgroup/a/b/memory.max": "max\n", "sys/fs/cgroup/a/b/memory.current": "5\n",
        "sys/fs/cgroup/a/memory.max": "1000000\n", "sys/fs/cgroup/a/memory.current": "400000\n",
        "sys/fs/cgroup/a/memory.stat": "anon 100\nactive_file 1000\ninactive_file 2000\n",
    }  # fmt: skip
    found = host_room(system(tmp_path / "second", MEMINFO | group))
    assert found.bytes == 1000000 - 400000 + 3000 and "control group" in found.what
    group = {
        "proc/self/cgroup": "5:cpu:/x\n4:memory:/of/the/host\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "2000000\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "500000\n",
        "sys/fs/cgroup/memory/memory.stat": "total_active_file 10\ntotal_inactive_file 20\nactive_file 7\n",
    }
    assert host_room(system(tmp_path / "first", MEMINFO | group)).bytes == 1500030
    free = {**group, "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}
    assert host_room(system(tmp_path / "free", MEMINFO | free)).bytes == 3000 * 1024
    assert host_room(tmp_path / "nothing").bytes > 0


def test_a_limit_of_the_process_bounds_the_room(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    root = system(tmp_path, MEMINFO | {"proc/self/status": "VmSize:\t 100 kB\nVmData:\t 50 kB\n"})
    used = 1024 * int(next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmData" in x).split()[1])
    soft = used + (4 << 30)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, before[1]))
    try:
        big = {"proc/meminfo": f"MemAvailable: {1 << 40} kB\n", "proc/self/status": "VmData:\t 50 kB\n"}
        assert host_room(root).bytes == 3000 * 1024
        found = host_room(system(tmp_path / "big", big))
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
    assert found == Room(soft - 50 * 1024, "data segment left to this process (ulimit -d)")


@pytest.mark.parametrize(("memory", "host"), [("24GB", "128GB"), ("8GB", "64GB")])
def test_the_examples_fit_the_cards_they_are_named_after(memory: str, host: str, elo: Elo) -> None:
    path = EXAMPLES / f"llama-8b-{memory.lower()}.yaml"
    found = planned(elo, path, "--shapes", "llama-3.1-8b", "--gpu", memory, "--host", host)
    for stage in ("pretrain", "align"):
        assert found[stage]["fits"] and found[stage]["host_fits"]
    assert found["align"]["engine"]["name"] == "streamed"
    text = path.read_text().replace("\n# ", " ")
    said = [int(number) for number in re.findall(r"predicted to take (\d+) GiB", text)]
    assert len(said) == 2
    for stage, number in zip(("pretrain", "align"), said, strict=True):
        assert found[stage]["device_bytes"] / 2**30 == pytest.approx(number, rel=0.05, abs=0.5), "renew the comment"
    in_memory = planned(elo, path, "--shapes", "llama-3.1-8b", "--gpu", memory)["align"]["host_parts"]
    model = sum(in_memory[name] for name in ("weights", "optimizer state", "waiting gradients"))
    (kept,) = re.findall(r"(\d+) GiB of weights, moments and waiting gradients", text)
    (inputs,) = re.findall(r"and ([\d.]+) GiB of the layers' inputs", text)
    assert model / 2**30 == pytest.approx(float(kept), abs=0.5)
    assert in_memory["layers' inputs"] / 2**30 == pytest.approx(float(inputs), abs=0.5)


def test_every_arm_has_its_counts() -> None:
    """Bench arms store these two beside each other: none is missing, and nothing executes less than it must."""
    spec = read_spec(preset_config("llama-3.1-8b"))
    for arm in ARMS:
        again: Any = "none" if arm == "transformers_shallow" else "layer"
        found = arm_flops(Setting(arm, spec, (0, 31), 8192, 1, recompute=again))
        assert found.executed.total >= found.model.total > 0


def test_what_a_run_has_stored_is_room_for_it(tmp_path: Path) -> None:
    assert plan._stored(tmp_path / "none") == 0
    (tmp_path / "align").mkdir()
    (tmp_path / "align" / "weights").write_bytes(bytes(12345))
    (tmp_path / "plan.json").write_bytes(bytes(100))
    assert plan._stored(tmp_path) == 12445
    room = plan.Target.here(torch.device("cpu"), str(tmp_path)).disk
    assert room is not None and "with what is stored there" in room.what
