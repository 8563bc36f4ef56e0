"""Peak memory of a stretch of work, and speeds over steps with their spread."""

from __future__ import annotations

import resource
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass
class Peak:
    """Filled when the block ends; `what` says what was measured, because the two are not comparable."""

    bytes: int = 0
    what: str = ""
    _read: Callable[[], tuple[int, str]] = lambda: (0, "")
    _reset: Callable[[], object] = lambda: None

    @contextmanager
    def without(self) -> Iterator[None]:
        """What happens inside this block is not the work whose peak is asked for."""
        self._keep()
        try:
            yield
        finally:
            self._reset()

    def _keep(self) -> None:
        size, self.what = self._read()
        self.bytes = max(self.bytes, size)


def _read_high_water() -> int | None:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None


def _reset_high_water() -> bool:
    """Linux keeps the peak resident size and resets it on request; elsewhere the peak is that of the whole process."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Peak of the block: allocated GPU memory on CUDA, resident memory of the process on the CPU (weights included)."""
    gpu = device.type == "cuda"

    def reset() -> bool:
        if gpu:
            torch.cuda.reset_peak_memory_stats(device)
        return gpu or _reset_high_water()

    resettable = reset()

    def read() -> tuple[int, str]:
        if gpu:
            return torch.cuda.max_memory_allocated(device), "peak allocated GPU memory"
        high = _read_high_water() if resettable else None
        if high is not None:
            return high, "peak resident memory"
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "peak resident memory of the whole process"

    peak = Peak(_read=read, _reset=reset)
    try:
        yield peak
    finally:
        peak._keep()


@dataclass(frozen=True)
class Spread:
    """Median with the 10th and 90th percentile of a series."""

    median: float
    p10: float
    p90: float
    count: int


def spread(values: list[float]) -> Spread | None:
    """None for an empty series."""
    if not values:
        return None
    ordered = sorted(values)

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]

    return Spread(statistics.median(ordered), at(0.1), at(0.9), len(ordered))


def human_bytes(count: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
