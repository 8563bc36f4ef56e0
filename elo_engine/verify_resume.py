"""`elo verify-resume`: whether a run that is killed goes on bit for bit, tried on this machine with this configuration.

Each stage is trained for a few steps twice: straight, and killed (SIGKILL) half-way behind a snapshot and resumed by
another process. Both begin with the configuration's own model, text, engine, kernels and optimizer; a step has at most
two micro-batches, so that gradients are still accumulated and the trial stays short. Alignment begins with the source
model, as full continual pretraining does: its steps are the same. Then the last snapshots are compared to the bit, and
the records step by step.

Where they differ, the straight run is made once more. Two straight runs that differ mean that this device is not
deterministic, and on CUDA the trial is made again with torch.use_deterministic_algorithms, with what that costs.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from safetensors import safe_open

from elo_engine import console
from elo_engine.config import RunConfig, load_config, make_config
from elo_engine.corpora import make_mixture, require_shards
from elo_engine.detach import open_source
from elo_engine.errors import FailedError, RefusedError, UsageError
from elo_engine.plan import fitted_here
from elo_engine.summary import read_steps
from elo_engine.train import state

Stage = Literal["pretrain", "align"]
_FILES = ("weights.safetensors", "optimizer.safetensors")
_COMPARED = ("loss_nats", "gradient_norm", "lr", "tokens_total", "tokens_loss", "updated")


def stages_of(config: RunConfig, asked: str | None) -> list[Stage]:
    """Which stages there are to try. Raises UsageError: no such one."""
    both: list[Stage] = ["align"] if config.align.when == "interleaved" else ["pretrain", "align"]
    if asked is None:
        return both
    found: list[Stage] = [stage for stage in both if stage == asked]
    if not found:
        raise UsageError(
            f"--stage {asked}: use {' or '.join(both)}"
            + ("; interleaved, both kinds of steps are the stage align" if len(both) == 1 else "")
        )
    return found


def trial_config(config: RunConfig, steps: int, output: Path) -> RunConfig:
    """The same run with `steps` steps a stage, of two micro-batches at most, and nothing evaluated."""
    tree: dict[str, Any] = json.loads(config.model_dump_json())
    tree["output"], tree["evaluate"] = str(output), {"every": 0}
    for name in ("pretrain", "align"):
        section = tree[name]
        row = config.data.sequence_length
        section["tokens_per_step"] = min(section["tokens_per_step"], 2 * section["micro_batch"] * row)
        section["tokens"] = steps * section["tokens_per_step"]
    total = steps * (2 if config.align.when == "interleaved" else 1)
    tree["snapshot"] = {"every": total // 2, "keep": 2}
    return make_config(tree, "verify-resume")


def verify(path: Path, overrides: list[str], asked: str | None, steps: int, work: Path | None) -> list[dict[str, Any]]:
    """Try each stage; see `_verify_stage` for what is returned of it. What was written is removed, unless a run failed
    or differed.

    Raises:
        UsageError, RefusedError: a configuration that cannot be run here, a folder in the way. FailedError: a process
        of the trial failed, with what it said.
    """
    folder = None if not path.is_dir() else path / "config.resolved.yaml"
    config = load_config(folder or path, overrides)
    stages = stages_of(config, asked)
    require_shards(config)
    source = open_source(config)
    config = fitted_here(config, source).config  # of the whole run, so that every process has the same
    make_mixture(config, source.folder, source.spec.V)  # every check of the data, before anything is written
    work = work or Path(f"{config.output}-verify")
    if work.exists():
        raise RefusedError(f"{work}: is in the way; remove it, or give another folder with --work")
    work.mkdir(parents=True)
    found, whole = [], False
    try:
        for stage in stages:
            found.append(_verify_stage(config, stage, steps, work / stage))
        whole = True
    except KeyboardInterrupt:
        whole = True
        raise
    finally:
        if whole and all(one["exact"] for one in found):
            shutil.rmtree(work)
        else:
            console.err.print(f"verify-resume: what was written stays in {work}", markup=False)
    return found


def _verify_stage(config: RunConfig, stage: Stage, steps: int, folder: Path) -> dict[str, Any]:
    """One stage's trial.

    Returns:
        stage, steps, cut (the step it resumed from), exact; tensors and bytes that were compared; differences, as
        text, the first of them first; repeatable: whether two straight runs are equal (None: not tried);
        deterministic: the same trial with torch's deterministic algorithms and `cost`, the ratio of its median step to
        the plain one (None: not tried).
    """
    total = trial_config(config, steps, folder).last_step(stage)
    with console.progress_bar(f"verify-resume {stage} (steps)", 3 * total - total // 2) as bar:
        done = 0

        def run(name: str, last: int = 0, *, deterministic: bool = False) -> Path:
            nonlocal done
            before = done
            output = _process(config, stage, steps, folder / name, last, deterministic, lambda n: bar(before + n, name))
            done = before + (last + 1 if last else total)
            return output

        def pair(suffix: str, *, deterministic: bool) -> tuple[Path, Path]:
            straight = run(f"straight{suffix}", deterministic=deterministic)
            cut = run(f"cut{suffix}", total // 2, deterministic=deterministic)
            run(f"cut{suffix}", deterministic=deterministic)
            return straight, cut

        straight, cut = pair("", deterministic=False)
        found: dict[str, Any] = {"stage": stage, "steps": total, "cut": total // 2, **compare(straight, cut, stage)}
        found |= {"repeatable": None, "deterministic": None}
        if not found["exact"]:
            again = run("straight-again")
            found["repeatable"] = compare(straight, again, stage)["exact"]
            if not found["repeatable"] and open_source(config).device.type == "cuda":
                sure = pair("-deterministic", deterministic=True)
                found["deterministic"] = compare(*sure, stage) | {"cost": _step_s(sure[0]) / _step_s(straight)}
    return found


def _process(
    config: RunConfig,
    stage: Stage,
    steps: int,
    output: Path,
    last: int,
    deterministic: bool,
    told: Callable[[int], None],
) -> Path:
    """A stage in a process of its own, until it ends or is dead as it should be."""
    path = output.with_name(f"{output.name}.yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(trial_config(config, steps, output).to_yaml(), encoding="utf-8")
    environment = dict(os.environ)
    if deterministic:
        environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # what torch asks for
    command = [sys.executable, "-m", "elo_engine.resume_child", str(path), stage, str(last), str(int(deterministic))]
    shown = output.with_name(f"{output.name}.log")
    with shown.open("ab") as file:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment)
        try:
            while process.poll() is None:
                time.sleep(0.05)
                told(_step_now(output))
        finally:
            process.kill()
            process.wait()
    if process.returncode == (-9 if last else 0):
        return output
    tail = "\n".join(shown.read_text(encoding="utf-8", errors="replace").splitlines()[-12:])
    raise FailedError(
        f"verify-resume: {stage}, {output.name}: ended with status {process.returncode}"
        f"{f', before step {last + 1} was on record' if last else ''}; it said:\n{tail}"
    )


def _step_now(output: Path) -> int:
    try:
        return int(json.loads((output / "STATUS").read_text(encoding="utf-8")).get("step", 0))
    except (OSError, json.JSONDecodeError):
        return 0


def _step_s(output: Path) -> float:
    steps = read_steps(output)
    return float(median([one["step_s"] for one in steps if one["warm"]] or [one["step_s"] for one in steps]))


def compare(one: Path, other: Path, stage: str) -> dict[str, Any]:
    """Two runs of a stage: the newest snapshots to the bit, and the records of each step.

    Returns:
        exact; tensors, bytes: that both have; differences: one text each, empty where exact.
    """
    differences: list[str] = []
    snapshots = [_newest(output / stage) for output in (one, other)]
    tensors = size = 0
    for name in _FILES:
        count, counted, unequal = _compare_tensors(snapshots[0] / name, snapshots[1] / name)
        tensors, size = tensors + count, size + counted
        differences += [f"{name}: {text}" for text in unequal]
    places = [json.loads((folder / "state.json").read_text(encoding="utf-8"))["progress"] for folder in snapshots]
    differences += [
        f"progress: {key} is {places[0].get(key)} straight and {places[1].get(key)} resumed"
        for key in sorted(places[0].keys() | places[1].keys())
        if places[0].get(key) != places[1].get(key)
    ]
    steps = [
        {(r["stage"], r["step"]): {key: r.get(key) for key in _COMPARED} for r in read_steps(o)} for o in (one, other)
    ]
    for at in sorted(steps[0].keys() | steps[1].keys(), key=lambda at: (at[1], at[0])):
        left, right = steps[0].get(at, {}), steps[1].get(at, {})
        differences += [
            f"step {at[1]} of {at[0]}: {key} is {left.get(key)} straight and {right.get(key)} resumed"
            for key in _COMPARED
            if left.get(key) != right.get(key)
        ]
    return {"exact": not differences, "tensors": tensors, "bytes": size, "differences": differences}


def _newest(folder: Path) -> Path:
    found = state.latest_snapshot(folder, lambda text: None)
    if found is None:
        raise FailedError(f"{folder}: the trial left no snapshot")
    return found


def _compare_tensors(one: Path, other: Path) -> tuple[int, int, list[str]]:
    """Tensors and bytes that were compared, and a text for each that differs; one tensor at a time in memory."""
    differences, size = [], 0
    with safe_open(one, "pt") as left, safe_open(other, "pt") as right:
        names = sorted(set(left.keys()) | set(right.keys()))
        for name in names:
            if name not in left.keys() or name not in right.keys():  # noqa: SIM118 (it is no mapping)
                differences.append(f"{name} is in one of both alone")
                continue
            a, b = left.get_tensor(name), right.get_tensor(name)
            size += a.nbytes
            if a.dtype != b.dtype or a.shape != b.shape:
                differences.append(f"{name} is {a.dtype} {tuple(a.shape)} straight, {b.dtype} {tuple(b.shape)} resumed")
            elif not torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)):
                apart = (a.double() - b.double()).abs()
                count, most = int((apart != 0).sum()), float(apart.max())
                differences.append(f"{name} differs in {count} of {a.numel()} values, by {most:.3g} at most")
    return len(names), size, differences


def describe(found: list[dict[str, Any]]) -> list[str]:
    """What a person reads."""
    lines = []
    for one in found:
        head = f"{one['stage']}: {one['steps']} steps, killed after step {one['cut']} and resumed"
        if one["exact"]:
            lines.append(
                f"{head}: the same to the bit ({one['tensors']} tensors of weights and moments, {one['bytes']} bytes, "
                "all losses, place in the data)"
            )
            continue
        lines.append(f"{head}: NOT the same, {len(one['differences'])} differences, first: {one['differences'][0]}")
        if one["repeatable"]:
            lines.append("  two straight runs are the same to the bit, so what differs comes from resuming")
            continue
        lines.append("  two straight runs differ too: this device, or its number of threads, is not deterministic")
        if (sure := one["deterministic"]) is not None:
            verdict = "the same to the bit" if sure["exact"] else f"not the same either: {sure['differences'][0]}"
            lines.append(
                f"  with torch's deterministic algorithms {verdict}, at {sure['cost']:.2f} times the step time"
            )
    return lines


def require_exact(found: list[dict[str, Any]]) -> None:
    """Raises FailedError: a stage was not the same to the bit."""
    stages = [one["stage"] for one in found if not one["exact"]]
    if stages:
        raise FailedError(f"verify-resume: {' and '.join(stages)} did not continue bit for bit")
