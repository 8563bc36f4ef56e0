"""How much memory this machine, or the limit that this process runs under, still has to give."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import resource
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Room:
    """Bytes that can still be had, and of what."""

    bytes: int
    what: str


def give_back_freed_memory(device: torch.device) -> None:
    """Return to the system what this process has freed and kept, so that asking how much is there gives what a stage
    can have, and resident memory is what is used.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def device_room(device: torch.device) -> Room:
    """What a stage can have on its device: of a GPU what is free, of a CPU see `host_room`."""
    if device.type != "cuda":
        return host_room()
    return Room(torch.cuda.mem_get_info(device)[0], f"free on {torch.cuda.get_device_name(device)}")


def host_room(root: Path = Path("/")) -> Room:
    """The least of: memory that the kernel calls available, what the control group's limit leaves, and what the limits
    of the process (`ulimit -v`, `ulimit -d`) leave. `root` is where /proc and /sys are.
    """
    found = [*_available(root), *_control_group(root), *_process_limits(root)]
    if not found:  # no Linux
        found = [Room(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "memory of this machine")]
    return min(found, key=lambda room: room.bytes)


def _fields(path: Path, separator: str) -> dict[str, int]:
    """`name: 12 kB` or `name 12` -> bytes or counts; {} where the file is not there."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    found = {}
    for line in lines:
        name, _, rest = line.partition(separator)
        words = rest.split()
        if words and words[0].isdigit():
            found[name.strip()] = int(words[0]) * (1024 if words[1:] == ["kB"] else 1)
    return found


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None  # `max` is no limit


def _available(root: Path) -> list[Room]:
    fields = _fields(root / "proc/meminfo", ":")
    return [Room(fields["MemAvailable"], "memory available on this machine")] if "MemAvailable" in fields else []


def _control_group(root: Path) -> list[Room]:
    """Version 2: every group from this process's up to the root. Version 1: that of the memory controller, and what is
    mounted for it in a container, whose own path is the host's.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    rooms = []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number != "0" and "memory" not in controllers.split(","):
            continue
        base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current")
        if number != "0":
            base, names = base / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        folder = base / path.strip("/")
        for group in (folder, *(parent for parent in folder.parents if parent.is_relative_to(base))):
            limit, used = (_number(group / name) for name in names)
            if limit is None or used is None or limit >= 1 << 60:  # version 1 has no word for no limit
                continue
            stat = _fields(group / "memory.stat", " ")
            prefix = "" if number == "0" else "total_"
            # pages of files are given up before the limit is hit
            files = sum(stat.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))
            rooms.append(Room(max(0, limit - used + files), "left below the control group's memory limit"))
    return rooms


def _process_limits(root: Path) -> list[Room]:
    status = _fields(root / "proc/self/status", ":")
    rooms = []
    for limit, used, what in (
        (resource.RLIMIT_AS, "VmSize", "address space left to this process (ulimit -v)"),
        (resource.RLIMIT_DATA, "VmData", "data segment left to this process (ulimit -d)"),
    ):
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY and used in status:
            rooms.append(Room(max(0, soft - status[used]), what))
    return rooms


def resident_bytes() -> int:
    """Memory of this process that is in RAM now; 0 where the system does not say."""
    return _fields(Path("/proc/self/status"), ":").get("VmRSS", 0)
