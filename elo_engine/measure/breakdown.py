"""From the trace of one optimizer step to where its time and memory go.

A trace is what torch's profiler exports for Perfetto; times in it are microseconds. The step marks its parts with
ranges named `elo::PART`, which do not overlap. Two definitions of "busy":
    GPU: a kernel, copy or fill runs. It belongs to the part in which it was launched, found by its correlation id, not
        to the part that the host has reached by then.
    CPU: a torch op or one of the engine's native ops runs.
Of the rest, what lies in the part `data` is data (the host reads rows while nothing else runs), and everything else is
gaps: launch gaps on a GPU, Python between the ops on a CPU. So all parts sum to the step.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from elo_engine.errors import FailedError
from elo_engine.measure.roofline import Ceilings, NamedWork, Work, op_work

PREFIX = "elo::"
NATIVE = "csrc::"  # ranges around calls into the engine's C++
HIDDEN_GRADIENT = PREFIX + "hidden_gradient"  # the moment at which the head's backward pass is done
RANGES = ("data", "forward", "head", "backward", "optimizer")
PARTS = (*RANGES, "other", "gaps")

Event = dict[str, Any]
Span = tuple[float, float]
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver")


@dataclass
class Row:
    """All calls of one kernel (GPU), or the time of one op outside of the ops that it calls (CPU)."""

    name: str
    calls: int = 0
    us: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0
    floor_us: float = 0.0
    counted_us: float = 0.0  # time of the calls whose work is known
    parts: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, us: float, part: str, work: Work | None, ceilings: Ceilings) -> None:
        self.calls += 1
        self.us += us
        self.parts[part] += us
        if work is not None:
            self.flops += work.flops
            self.bytes += work.bytes
            self.floor_us += ceilings.floor_s(work) * 1e6
            self.counted_us += us

    def record(self, step_us: float) -> dict[str, Any]:
        """For JSON; `roofline_share` is None where neither FLOPs nor bytes are known."""
        known = self.counted_us > 0 and self.floor_us > 0
        parts = sorted(self.parts.items(), key=lambda item: -item[1])
        return {
            "name": self.name, "calls": self.calls, "ms": self.us / 1e3, "share": self.us / step_us,
            "ms_by_part": {part: us / 1e3 for part, us in parts}, "flops": self.flops or None,
            "bytes": self.bytes or None, "roofline_share": self.floor_us / self.counted_us if known else None,
        }  # fmt: skip


class StepTrace:
    """One step in a trace.

    Raises:
        FailedError: the trace has no range `elo::step`.
    """

    def __init__(self, events: list[Event]) -> None:
        spans: dict[str, list[Span]] = defaultdict(list)
        for event in events:
            if event.get("cat") == "user_annotation" and event["name"].startswith(PREFIX):
                spans[event["name"].removeprefix(PREFIX)].append(_span(event))
        if not spans["step"]:
            raise FailedError(
                f"the profiler's trace has no range {PREFIX}step: its buffer overflowed, or another profiler was "
                "active; profile fewer micro-batches a step"
            )
        self.step = spans["step"][-1]
        self.us = self.step[1] - self.step[0]
        marks = sorted(start for start, _ in spans[HIDDEN_GRADIENT.removeprefix(PREFIX)])
        parts = [(*span, name) for name in RANGES if name != "backward" for span in spans[name]]
        for start, stop in spans["backward"]:
            # what precedes the gradient of the hidden states is the head's
            mark = next((mark for mark in marks if start <= mark < stop), start)
            parts += [(start, mark, "head_backward"), (mark, stop, "backward")]
        self.parts = sorted(part for part in parts if self.step[0] <= part[0] < self.step[1] and part[0] < part[1])
        self._starts = [part[0] for part in self.parts]
        inside = [event for event in events if event.get("ph") == "X" and self._holds(event)]
        self.ops = [event for event in inside if _is_op(event)]
        self.memory = [event for event in events if event.get("name") == "[memory]" and self._holds(event)]
        self.kernels = sorted(
            (event for event in inside if event.get("cat") in _DEVICE), key=lambda event: float(event["ts"])
        )
        self._launched = {
            event["args"]["correlation"]: float(event["ts"])
            for event in inside
            if event.get("cat") in _LAUNCHES and "correlation" in event.get("args", {})
        }

    def _holds(self, event: Event) -> bool:
        return self.step[0] <= float(event.get("ts", -1.0)) <= self.step[1]

    def part_at(self, ts: float) -> str:
        """The part that the host is in."""
        at = bisect_right(self._starts, ts) - 1
        return self.parts[at][2] if at >= 0 and ts < self.parts[at][1] else "other"

    def launch_part(self, kernel: Event) -> str:
        """The part in which a kernel was launched."""
        launched = self._launched.get(kernel.get("args", {}).get("correlation"))
        return "other" if launched is None else self.part_at(launched)


def _is_op(event: Event) -> bool:
    return event.get("cat") == "cpu_op" or (
        event.get("cat") == "user_annotation" and str(event["name"]).startswith(NATIVE)
    )


def _span(event: Event) -> Span:
    return float(event["ts"]), float(event["ts"]) + float(event["dur"])


def merged(spans: Iterable[Span]) -> list[Span]:
    """The union, as spans that do not touch."""
    out: list[Span] = []
    for start, stop in sorted(spans):
        if out and start <= out[-1][1]:
            out[-1] = out[-1][0], max(out[-1][1], stop)
        else:
            out.append((start, stop))
    return out


def time_by_part(trace: StepTrace) -> dict[str, float]:
    """Microseconds of the step by part; keys are PARTS and `head_backward`, and their sum is the step."""
    begin, end = trace.step
    spans = merged(_span(event) for event in trace.ops) if not trace.kernels else []
    pieces = [(start, stop, "") for start, stop in spans]
    for kernel in trace.kernels:
        pieces.append((*_span(kernel), trace.launch_part(kernel)))
    found: dict[str, float] = dict.fromkeys((*PARTS, "head_backward"), 0.0)
    at = begin
    for start, stop, part in pieces:
        start, stop = max(start, at), min(stop, end)
        if stop <= start:
            continue  # over while another kernel ran
        _share_out(trace, at, start, found, busy=False)
        if part:
            found[part] += stop - start
        else:
            _share_out(trace, start, stop, found, busy=True)
        at = stop
    _share_out(trace, at, end, found, busy=False)
    return found


def _share_out(trace: StepTrace, start: float, stop: float, found: dict[str, float], *, busy: bool) -> None:
    """Time on the host's axis, to the parts that lie there; where nothing ran, to `data` or to `gaps`."""
    rest = stop - start
    first = max(0, bisect_right([part[0] for part in trace.parts], start) - 1) if rest > 0 else len(trace.parts)
    for begin, end, part in trace.parts[first:]:
        if begin >= stop:
            break
        inside = min(end, stop) - max(begin, start)
        if inside > 0 and (busy or part == "data"):
            found[part] += inside
            rest -= inside
    if rest > 0:
        found["other" if busy else "gaps"] += rest


def top_rows(trace: StepTrace, ceilings: Ceilings, named: list[NamedWork]) -> list[Row]:
    """Kernels, or on a CPU ops by self time, the longest first."""
    rows: dict[str, Row] = {}
    for name, us, part, work in _kernel_calls(trace) if trace.kernels else _op_calls(trace):
        rows.setdefault(name, Row(name)).add(us, part.replace("head_backward", "head"), work, ceilings)
    for entry in named:
        matching = [row for row in rows.values() if re.search(entry.pattern, row.name)]
        total = sum(row.us for row in matching)
        for row in matching:
            share = row.us / total if total else 0.0
            row.flops, row.bytes = entry.work.flops * share, entry.work.bytes * share
            row.floor_us, row.counted_us = ceilings.floor_s(entry.work) * 1e6 * share, row.us
    return sorted(rows.values(), key=lambda row: -row.us)


Call = tuple[str, float, str, Work | None]


def _kernel_calls(trace: StepTrace) -> Iterable[Call]:
    """Of several kernels that one op launches, the longest does the op's work."""
    works = {event["args"]["External id"]: op_work(event["name"], event["args"]) for event in trace.ops
             if "External id" in event.get("args", {})}  # fmt: skip
    longest: dict[Any, Event] = {}
    for kernel in trace.kernels:
        op = kernel.get("args", {}).get("External id")
        if works.get(op) is not None and (op not in longest or kernel["dur"] > longest[op]["dur"]):
            longest[op] = kernel
    for kernel in trace.kernels:
        op = kernel.get("args", {}).get("External id")
        work = works[op] if op in longest and longest[op] is kernel else None
        yield str(kernel["name"]), float(kernel["dur"]), trace.launch_part(kernel), work


def _op_calls(trace: StepTrace) -> Iterable[Call]:
    """Self times: an op's duration without the ops inside it. Work counts once, for the innermost op that has any."""
    threads: dict[Any, list[Event]] = defaultdict(list)
    for event in trace.ops:
        threads[event["tid"]].append(event)
    for ops in threads.values():
        ops.sort(key=lambda event: (float(event["ts"]), -float(event["dur"])))
        open_: list[tuple[Event, list[float]]] = []  # an op with [time inside its callees, whether they did its work]

        def close(open_: list[tuple[Event, list[float]]] = open_) -> Call:
            event, (inside, counted) = open_.pop()
            work = None if counted else op_work(event["name"], event.get("args", {}))
            if open_:
                open_[-1][1][0] += float(event["dur"])
                open_[-1][1][1] += counted or work is not None
            us = max(0.0, float(event["dur"]) - inside)
            return str(event["name"]), us, trace.part_at(float(event["ts"])), work

        for event in ops:
            while open_ and _span(open_[-1][0])[1] <= float(event["ts"]):
                yield close()
            open_.append((event, [0.0, 0.0]))
        while open_:
            yield close()


def memory_timeline(trace: StepTrace, base_bytes: int, *, cuda: bool) -> list[tuple[float, int, int, str]]:
    """(ms since the step began, bytes in tensors, change in bytes, part) at every allocation and release.

    `base_bytes`: what is there when the step begins.
    """
    held, out = base_bytes, [(0.0, base_bytes, 0, "data")]
    for event in sorted(trace.memory, key=lambda event: float(event["ts"])):
        if (event["args"]["Device Type"] == 1) != cuda:
            continue
        change = int(event["args"]["Bytes"])
        held += change
        part = trace.part_at(float(event["ts"])).replace("head_backward", "head")
        out.append(((float(event["ts"]) - trace.step[0]) / 1e3, held, change, part))
    out.append((trace.us / 1e3, held, 0, out[-1][3]))
    return out
