"""One optimizer step under torch's profiler, and the folder that shows what it did.

    trace.json.gz          the trace, for ui.perfetto.dev or chrome://tracing
    profile.json           every figure; profile.md the same to read
    time.png, memory.png   where the time goes, and bytes in tensors over the step (with matplotlib)
    memory_timeline.json   every allocation and release of the step
    memory_snapshot.pickle on CUDA: torch's own snapshot of one more step, for pytorch.org/memory_viz
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from elo_engine.errors import RefusedError
from elo_engine.measure.breakdown import PARTS, PREFIX, StepTrace, memory_timeline, time_by_part, top_rows
from elo_engine.measure.environment import describe_environment
from elo_engine.measure.meter import human_bytes
from elo_engine.measure.roofline import Ceilings, NamedWork, synchronize

SNAPSHOT_ENTRIES = 1_000_000  # allocations and releases that torch keeps for a snapshot; a step of an 8B makes few 10k
ROWS_SHOWN = 25

PART_MEANING = {
    "data": "rows of the mixture and their way to the device; on a GPU the time that it idles meanwhile",
    "forward": "embedding, layers, final norm",
    "head": "the head's products, the loss and its gradients, which are made in the forward pass; what is left of its "
    "backward pass is a scaling, and counted here",
    "backward": "the layers' backward pass, with recompute also what is run a second time",
    "optimizer": "gradient norm, clipping, AdamW",
    "other": "work outside of these, such as the running sum of the loss",
    "gaps": "nothing runs: on a GPU it waits for the next launch, on a CPU Python works between two ops",
}


def part(name: str) -> record_function:
    """A range that marks a part of the step (`breakdown.RANGES`, `step`); about 1 us where no profiler runs."""
    return record_function(PREFIX + name)


@dataclass
class Capture:
    """A step as it was recorded.

    Attributes:
        events: of the trace.
        base_bytes: in tensors on the device when the step began, by what they are.
        result: the step's loss in nats.
        allocated_bytes, reserved_bytes: peaks by torch's CUDA allocator; None on a CPU.
    """

    events: list[dict[str, Any]]
    device: torch.device
    base_bytes: dict[str, int]
    result: float = math.nan
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None


@dataclass
class Conditions:
    """What the figures hold for: goes into every file and caption."""

    title: str
    facts: dict[str, Any]
    unprofiled_ms: list[float] = field(default_factory=list)  # the steps before, the first of them cold


def _profiler(device: torch.device) -> profile:
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    return profile(activities=activities, record_shapes=True, profile_memory=True)


def capture(step: Callable[[], float], device: torch.device, base_bytes: dict[str, int], trace_path: Path) -> Capture:
    """Run `step`, which marks itself with `part("step")`, under the profiler; the trace goes to `trace_path`, a
    .json.gz.
    """
    with _profiler(device):  # its first start loads and allocates what the step should not be charged with
        torch.ones(8, device=device).add_(1)
        synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        base_bytes = base_bytes | {"other": torch.cuda.memory_allocated(device) - sum(base_bytes.values())}
    found = Capture([], device, base_bytes)
    with _profiler(device) as profiler:
        found.result = step()
        synchronize(device)
    if device.type == "cuda":
        found.allocated_bytes = torch.cuda.max_memory_allocated(device)
        found.reserved_bytes = torch.cuda.max_memory_reserved(device)
    profiler.export_chrome_trace(str(trace_path))
    with gzip.open(trace_path, "rt", encoding="utf-8") as file:
        found.events = json.load(file)["traceEvents"]
    return found


def time_step(step: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of wall time."""
    synchronize(device)
    began = time.perf_counter()
    step()
    synchronize(device)
    return (time.perf_counter() - began) * 1e3


def memory_snapshot(step: Callable[[], Any], device: torch.device, path: Path) -> None:
    """torch's record of every CUDA allocation of one step with its stack; not the timed step, since stacks cost time.

    torch writes this file with pickle, which its viewer reads; nothing here ever reads one.
    """
    torch.cuda.memory._record_memory_history(
        stacks="python", max_entries=SNAPSHOT_ENTRIES, device=device
    )
    try:
        step()
        synchronize(device)
        torch.cuda.memory._dump_snapshot(str(path))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None, device=device)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder under another name until the block ends without an error; then it gets its own.

    Raises:
        RefusedError: `path` exists.
    """
    refuse_existing(path)
    made = path.with_name(path.name + ".part")
    shutil.rmtree(made, ignore_errors=True)  # of a call that was killed
    made.mkdir(parents=True)
    try:
        yield made
        made.rename(path)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def refuse_existing(path: Path) -> None:
    """Raises RefusedError when something is there already."""
    if path.exists():
        raise RefusedError(f"{path}: exists, and nothing is written over; name another folder with --out")


def analyse(found: Capture, ceilings: Ceilings, named: list[NamedWork], conditions: Conditions) -> dict[str, Any]:
    """What goes into `profile.json`."""
    trace, cuda = StepTrace(found.events), found.device.type == "cuda"
    times = time_by_part(trace)
    head_backward = times.pop("head_backward")
    times["head"] += head_backward
    timeline = memory_timeline(trace, sum(found.base_bytes.values()), cuda=cuda)
    peak = max(timeline, key=lambda entry: entry[1])
    peaks: dict[str, int] = {}
    for _, held, _, name in timeline:
        peaks[name] = max(held, peaks.get(name, 0))
    ran = "GPU kernels" if trace.kernels else "ops by self time"
    return {
        "title": conditions.title,
        "conditions": conditions.facts,
        "step_ms": trace.us / 1e3,
        "unprofiled_step_ms": conditions.unprofiled_ms,
        "loss_nats": found.result,
        "parts": [
            {"part": name, "ms": times[name] / 1e3, "share": times[name] / trace.us, "meaning": PART_MEANING[name]}
            for name in PARTS
        ],
        "head_backward_ms": head_backward / 1e3,
        "busy_share": 1.0 - times["gaps"] / trace.us,
        "rows": ran,
        "kernels": [row.record(trace.us) for row in top_rows(trace, ceilings, named)],
        "ceilings": ceilings.record(),
        "memory": {
            "base_bytes": found.base_bytes,
            "peak_bytes": peak[1],
            "peak_ms": peak[0],
            "peak_part": peak[3],
            "peak_bytes_by_part": peaks,
            "max_allocated_bytes": found.allocated_bytes,
            "max_reserved_bytes": found.reserved_bytes,
            "what": "bytes in tensors on the " + ("GPU" if cuda else "CPU, as torch's allocator was asked for them"),
            "timeline": timeline,
        },
        "environment": describe_environment(),
    }


def write_files(folder: Path, report: dict[str, Any]) -> None:
    """`profile.json`, `profile.md`, `memory_timeline.json`, and the pictures where matplotlib is installed."""
    memory = dict(report["memory"])
    timeline = memory.pop("timeline")
    _write_json(
        folder / "memory_timeline.json",
        {"columns": ["ms", "bytes", "change_bytes", "part"], "base_bytes": memory["base_bytes"], "events": timeline},
    )
    _write_json(folder / "profile.json", {**report, "memory": memory}, indent=2)
    pictures = importlib.util.find_spec("matplotlib") is not None
    if pictures:
        from elo_engine.measure.profile_plots import plot_memory, plot_time

        plot_time(report, folder / "time.png")
        plot_memory(report, folder / "memory.png")
    (folder / "profile.md").write_text("\n".join(markdown(report, pictures)) + "\n", encoding="utf-8")


def _write_json(path: Path, content: dict[str, Any], indent: int | None = None) -> None:
    path.write_text(json.dumps(content, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


def describe(report: dict[str, Any]) -> list[str]:
    """The step in a few lines."""
    unprofiled = report["unprofiled_step_ms"]
    lines = [f"{report['title']}: step {report['step_ms']:.1f} ms under the profiler, {unprofiled[-1]:.1f} ms before"]
    lines += [f"  {entry['part']:10}{entry['ms']:12.2f} ms {100 * entry['share']:6.1f} %" for entry in report["parts"]]
    memory = report["memory"]
    lines.append(f"  peak {human_bytes(memory['peak_bytes'])} in {memory['peak_part']}, {memory['what']}")
    return lines


def markdown(report: dict[str, Any], pictures: bool) -> list[str]:
    """`profile.md`."""
    memory, ceilings = report["memory"], report["ceilings"]
    parts = [
        [entry["part"], f"{entry['ms']:.3f}", f"{100 * entry['share']:.1f} %", entry["meaning"]]
        for entry in report["parts"]
    ]
    rows = [
        [
            f"`{_short(row['name'])}`", ", ".join(list(row["ms_by_part"])[:2]), str(row["calls"]), f"{row['ms']:.3f}",
            f"{100 * row['share']:.1f} %", _amount(row["flops"], "FLOP"), _amount(row["bytes"], "B"),
            "" if row["roofline_share"] is None else f"{100 * row['roofline_share']:.0f} %",
        ]
        for row in report["kernels"][:ROWS_SHOWN]
    ]  # fmt: skip
    shown = sum(row["share"] for row in report["kernels"][:ROWS_SHOWN])
    facts = [f"* {name}: {value}" for name, value in report["conditions"].items()]
    base = ", ".join(f"{name} {human_bytes(size)}" for name, size in memory["base_bytes"].items())
    unprofiled = ", ".join(f"{ms:.1f}" for ms in report["unprofiled_step_ms"])
    lines = [
        f"# {report['title']}", "", *facts, "",
        f"One steady optimizer step: {report['step_ms']:.2f} ms under the profiler, which slows it. The steps before "
        f"it, without the profiler: {unprofiled} ms, the first of them cold.",
        "",
        *(["![time by part](time.png)", ""] if pictures else []),
        *_table(["part", "ms", "share", "what it is"], parts), "",
        f"The head's backward pass took {report['head_backward_ms']:.3f} ms of its part. A part's time is that of the "
        + ("kernels launched in it." if report["rows"] == "GPU kernels" else "torch and native ops that ran in it."),
        "", f"## Top {report['rows']}", "",
        *_table(["name", "part", "calls", "ms", "share of step", "FLOP", "bytes", "of roofline"], rows), "",
        f"These are {100 * shown:.1f} % of the step. Roofline: the time that the FLOPs need at "
        f"{ceilings['matmul_flop_per_s'] / 1e9:.0f} GFLOP/s, or the bytes at "
        f"{ceilings['memory_bytes_per_s'] / 1e9:.1f} GB/s, whichever is longer, over the measured time. Both rates "
        f"are of this run: a large product in {ceilings['matmul_dtype']}, the faster of a large copy and an update in "
        "place. "
        "Above 100 %: the bytes came from cache. Empty: neither is known, as for Python inside an op.",
        "", "## Memory", "",
        *(["![memory over the step](memory.png)", ""] if pictures else []),
        f"Peak {human_bytes(memory['peak_bytes'])} at {memory['peak_ms']:.1f} ms, in {memory['peak_part']}: "
        f"{memory['what']}. When the step began: {base}. The gradients of the step before are dropped before it.",
    ]  # fmt: skip
    if memory["max_allocated_bytes"] is not None:
        lines.append(
            f"torch's allocator: at most {human_bytes(memory['max_allocated_bytes'])} allocated, "
            f"{human_bytes(memory['max_reserved_bytes'])} reserved."
        )
    opens = "`trace.json.gz` opens at https://ui.perfetto.dev or chrome://tracing."
    if report["rows"] == "GPU kernels":
        opens += " `memory_snapshot.pickle`, of one step more, opens at https://pytorch.org/memory_viz."
    return [*lines, "", opens]


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(header)} |", "|" + "---|" * len(header), *(f"| {' | '.join(row)} |" for row in rows)]


def _short(name: str, most: int = 70) -> str:
    name = name.replace("|", "/").replace("`", "'")
    return name if len(name) <= most else name[: most - 3] + "..."


def _amount(count: float | None, unit: str) -> str:
    if not count:
        return ""
    power = min(5, max(0, int(math.log10(count) // 3)))
    return f"{count / 10 ** (3 * power):.2f} {('', 'k', 'M', 'G', 'T', 'P')[power]}{unit}"
