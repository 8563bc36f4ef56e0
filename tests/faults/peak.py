"""The peak of resident memory of this process alone."""

from __future__ import annotations

from pathlib import Path


def own_peak_mib() -> float:
    """VmHWM, MiB: since the program was loaded. `ru_maxrss` begins with the peak of the process that started it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return round(int(line.split()[1]) / 1024, 1)
    raise OSError("/proc/self/status: has no VmHWM, so this kernel does not tell a process's peak")
