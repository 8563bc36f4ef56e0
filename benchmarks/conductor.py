"""The clock of an arm's process: commands come on stdin, one a line, and each step answers with one JSON line.

Commands: `step` (timed), `trace` (its tensor bytes followed exactly on a CPU; slower, so not timed), `finish`. A step
is timed from its command to the end of the optimizer's work on the device, data wait included.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import torch

from elo_engine.benchmarks.evidence import Evidence
from elo_engine.measure.device_state import clocks, energy_joules
from elo_engine.measure.roofline import synchronize
from elo_engine.measure.tensor_trace import traced_tensor_bytes


def peaks(device: torch.device) -> dict[str, int | None]:
    """Bytes: GPU memory as torch's allocator had it, and the process's resident memory at its highest."""
    gpu = device.type == "cuda"
    return {
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(device) if gpu else None,
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(device) if gpu else None,
        "host_peak_bytes": status_bytes("VmHWM"),
    }


def status_bytes(field: str) -> int | None:
    """A line of /proc/self/status in bytes. (getrusage would give the peak of the process that started this one.)"""
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return None


class Conductor:
    """Between the harness and a training loop; `wait` blocks until the next command."""

    def __init__(
        self, device: torch.device, evidence: Evidence, replies: IO[str], commands: IO[str] = sys.stdin
    ) -> None:
        self.device, self.evidence = device, evidence
        self.finished = False
        self._replies, self._commands = replies, commands
        self._stack = ExitStack()
        self._trace: Any = None
        self._answer: dict[str, Any] = {}
        self._first = True
        self.peaks: dict[str, int | None] = {}
        self.clocks: dict[str, Any] = {}

    def wait(self) -> None:
        """Read the next command and start its clock."""
        command = self._commands.readline().strip()
        if command in ("finish", ""):
            self.finished = True
            self.peaks = peaks(self.device)  # before anything looks at the weights
            return
        if self._first and self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)  # from here on it is training, not loading
        self._first = False
        self._trace = None
        if command == "trace" and self.device.type == "cpu":
            self._trace = self._stack.enter_context(traced_tensor_bytes())
        self._energy = energy_joules(self.device)
        self._began = time.perf_counter()

    def stepped(self) -> None:
        """The optimizer's step is queued: stop the clock when the device is done."""
        synchronize(self.device)
        seconds = time.perf_counter() - self._began
        energy = energy_joules(self.device)
        self.evidence.steps += 1
        self._stack.close()
        self.clocks = clocks(self.device) if self.device.type == "cuda" else {}
        self._answer = {
            "seconds": seconds,
            "energy_j": None if energy is None or self._energy is None else energy - self._energy,
        }
        if self._trace is not None:
            self._answer |= {"tensor_peak_bytes": self._trace.peak_bytes}

    def answer(self, loss: float, gradient_norm: float, way: str = "") -> None:
        """The step's loss and the norm of its gradient before clipping are known: answer the command.

        way: how a step was made that could be a graph (`graph_arms.Way`).
        """
        known = {"loss": loss, "gradient_norm": gradient_norm} | ({"way": way} if way else {})
        self.say(self._answer | known)

    def say(self, message: dict[str, Any]) -> None:
        """One line to the harness."""
        self._replies.write(json.dumps(message) + "\n")
        self._replies.flush()
