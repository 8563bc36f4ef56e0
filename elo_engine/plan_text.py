"""A plan as a person reads it: a few lines in the log of a run, tables for `elo plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from elo_engine import console
from elo_engine.console import format_seconds
from elo_engine.measure.meter import human_bytes

if TYPE_CHECKING:
    from rich.table import Table

_STAGES = ("pretrain", "align")


def describe_plan(plan: dict[str, Any]) -> list[str]:
    """The plan in a few lines. What does not fit is a warning here: its stage is refused when it begins, perhaps in
    another place.
    """
    lines = [_model(plan)]
    for stage in _STAGES:
        part = plan[stage]
        lines.append(
            f"{stage}: {part['steps']} steps, {part['tokens']:,} tokens, "
            f"{part['trainable_parameters'] / 1e6:.1f}M trainable, peak memory {_peak(part)}, "
            f"{part['flops_per_token'] / 1e9:.2f} GFLOP/token"
        )
    lines += [*_process_lines(plan), *_chosen_lines(plan)]
    lines += _bridge_lines(plan)
    lines += _graph_lines(plan)
    lines += _engine_lines(plan)
    lines.append(f"disk: up to {human_bytes(plan['disk']['total_bytes'])}")
    return [*lines, *_closing(plan), *(f"warning: {text}" for text in plan["refusals"])]


def _model(plan: dict[str, Any]) -> str:
    model = plan["model"]
    return (
        f"model: {model['family']}, {model['layers']} layers, {model['parameters'] / 1e6:.1f}M parameters, "
        f"{'tied' if model['tied'] else 'untied'} head; {plan['device']}, {plan['dtype']}, layers "
        f"{plan['detached_layers']} detached"
    )


def _peak(part: dict[str, Any]) -> str:
    return f"{human_bytes(part['memory']['peak_bytes'])} ({part['memory']['moment']})"


def _engine_lines(plan: dict[str, Any]) -> list[str]:
    """Which engine aligns and why; where it is streamed, what the host holds of it."""
    part = plan["align"]
    engine = part["engine"]
    lines = [f"align's engine: {engine['name']}; {engine['why']}"]
    if engine["name"] == "streamed":
        held = ", ".join(f"{name} {human_bytes(size)}" for name, size in part["host_parts"].items() if size)
        lines.append(f"align's host memory: {human_bytes(part['host_bytes'])} ({held}), updates {engine['update']}")
    return lines


def _chosen_lines(plan: dict[str, Any]) -> list[str]:
    """What was `auto`, and what it is."""
    return [f"{key}: {one['value']}, {one['why']}" for key, one in plan["chosen"].items()]


def _process_lines(plan: dict[str, Any]) -> list[str]:
    """Of several processes, whose figures these are and what each takes of a step."""
    count = plan["processes"]["count"]
    if count == 1:
        return []
    rows = (f"{stage} {plan[stage]['micro_batches']} x {plan[stage]['micro_batch']}" for stage in _STAGES)
    return [
        f"{count} processes: memory of the device is of one of them, of the host and the disk of all; micro-batches x "
        f"rows of each in a step: {', '.join(rows)}"
    ]


def _bridge_lines(plan: dict[str, Any]) -> list[str]:
    """What stands in for the missing layers, if anything does, and what is done first to fit it."""
    bridge = plan["pretrain"].get("bridge")
    if bridge is None:
        return []
    return [
        f"pretrain's bridge: {bridge['gaps']} frozen affine maps, {human_bytes(bridge['bytes'])}, "
        f"{bridge['flops_per_token'] / 1e9:.3f} GFLOP/token; fitted first to {bridge['calibration_tokens']:,} tokens "
        f"that pass the base model once, {bridge['calibration_flops'] / 1e12:.3g} TFLOP"
    ]


def _graph_lines(plan: dict[str, Any]) -> list[str]:
    """On a GPU, whether steps are CUDA graphs."""
    lines = []
    for stage in _STAGES if plan["device"] == "cuda" else ():
        graph = plan[stage]["graph"]
        fed = f"{human_bytes(graph['buffer_bytes'])} that stay on the device"
        how = f"CUDA graphs, fed from {fed}" if graph["used"] else f"launched kernel by kernel: {graph['why_not']}"
        lines.append(f"{stage}'s steps are {how}")
    return lines


def _closing(plan: dict[str, Any]) -> list[str]:
    executed = plan["ideal_executed_speedup"]
    speedup = (
        f"ideal pipeline speedup from the operations alone: {plan['ideal_pipeline_speedup']:.2f}x; as executed, with "
        f"this run's recomputation: {executed['over_plain']:.2f}x over plain full training, "
        f"{executed['over_checkpointed']:.2f}x over checkpointed"
    )
    return [speedup, *(f"warning: {text}" for text in plan["warnings"])]


def show_plan(plan: dict[str, Any]) -> None:
    """Tables on standard output; refusals are the caller's to raise."""
    from rich.table import Table

    console.out.print(_model(plan), markup=False)
    parts = [plan[stage] for stage in _STAGES]
    room = plan["room"]["device"]
    memory = Table("peak memory", *_STAGES, title="memory of the device, bytes live at the highest moment")
    for name in parts[0]["memory"]["components"]:
        memory.add_row(name, *(human_bytes(part["memory"]["components"][name]) for part in parts))
    memory.add_section()
    memory.add_row("peak", *(human_bytes(part["memory"]["peak_bytes"]) for part in parts))
    memory.add_row("at", *(part["memory"]["moment"] for part in parts))
    if plan["device"] == "cpu":
        rest = (human_bytes(part["device_bytes"] - part["memory"]["peak_bytes"]) for part in parts)
        others = ", other processes" if plan["processes"]["on_host"] > 1 else ""
        memory.add_row(f"process, reading, snapshots{others}", *rest)
    if room is not None:
        fits = ("fits" if part["fits"] else "too large" for part in parts)
        memory.add_row(f"room: {human_bytes(room['bytes'])}", *fits)
        memory.caption = room["what"]
    console.out.print(memory)
    kinds = (_process_lines, _chosen_lines, _bridge_lines, _graph_lines)
    for line in (*(line for lines in kinds for line in lines(plan)), *_engine_lines(plan)[:1]):
        console.out.print(line, markup=False)
    if plan["align"]["engine"]["name"] == "streamed":
        console.out.print(_host(plan))
    work = Table("work", *_STAGES)
    for title, cells in _work(parts):
        work.add_row(title, *cells)
    console.out.print(work)
    disk = Table("disk", "bytes")
    for name, size in plan["disk"].items():
        disk.add_row(name.removesuffix("_bytes").replace("_", " "), human_bytes(size))
    console.out.print(disk)
    rate = plan["rate"]
    said = (
        "time: not expected, for no rate is known; name a card with --gpu, or --measure one here"
        if rate is None
        else f"time: forward and backward alone, at {rate['assumed_share']:g} of {rate['what']}; that share is an "
        "assumption, not a measurement"
    )
    for line in (said, *_closing(plan)):
        console.out.print(line, markup=False)


def _host(plan: dict[str, Any]) -> Table:
    """Host memory of a streamed alignment, by part."""
    from rich.table import Table

    part, room = plan["align"], plan["room"]["host"]
    host = Table("host memory", "align", title="memory of the host, beside the interpreter and its libraries")
    for name, size in part["host_parts"].items():
        host.add_row(name, human_bytes(size))
    host.add_section()
    host.add_row("all", human_bytes(part["host_bytes"]))
    if part["store_disk_bytes"]:
        host.add_row("and on the disk", human_bytes(part["store_disk_bytes"]))
    if room is not None:
        host.add_row(f"room: {human_bytes(room['bytes'])}", "fits" if part["host_fits"] else "too large")
        host.caption = room["what"]
    return host


def _work(parts: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    return [
        ("tokens", [f"{part['tokens']:,}" for part in parts]),
        ("steps", [f"{part['steps']:,}" for part in parts]),
        ("trainable parameters", [f"{part['trainable_parameters'] / 1e6:.1f}M" for part in parts]),
        ("GFLOP a token, of the method", [f"{part['flops_per_token'] / 1e9:.2f}" for part in parts]),
        ("GFLOP a token, executed", [f"{part['flops_per_token_executed'] / 1e9:.2f}" for part in parts]),
        ("time", ["?" if part["seconds"] is None else format_seconds(part["seconds"]) for part in parts]),
        ("a snapshot", [human_bytes(part["snapshot_bytes"]) for part in parts]),
        ("host memory", [human_bytes(part["host_bytes"]) for part in parts]),
    ]
