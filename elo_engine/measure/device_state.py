"""What a device says of itself while it computes: energy, clocks, power limit, temperature, through NVML on a GPU and
RAPL on a CPU; None where neither is there or may be read.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

_RAPL = Path("/sys/class/powercap")


@functools.cache
def _nvml() -> Any:
    """NVML's bindings, initialised; None without them or without a driver."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except (ImportError, OSError):
        return None
    except Exception as error:  # NVML's own error class exists only where the import worked
        if type(error).__name__.startswith("NVMLError"):
            return None
        raise
    return pynvml


@functools.cache
def _handle(index: int) -> Any:
    nvml = _nvml()
    if nvml is None:
        return None
    # by UUID: CUDA_VISIBLE_DEVICES renumbers torch's devices and not NVML's
    uuid = str(torch.cuda.get_device_properties(index).uuid)
    try:
        return nvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
    except nvml.NVMLError:
        return None


def _read(call: str, index: int, *args: Any) -> Any:
    nvml, handle = _nvml(), _handle(index)
    if nvml is None or handle is None:
        return None
    try:
        return getattr(nvml, call)(handle, *args)
    except nvml.NVMLError:  # a card or a driver that does not tell
        return None


def energy_joules(device: torch.device) -> float | None:
    """Joules since some moment in the past: of the whole card, or of all processor packages."""
    if device.type == "cuda":
        millijoules = _read("nvmlDeviceGetTotalEnergyConsumption", device.index or 0)
        return None if millijoules is None else millijoules / 1e3
    total = 0.0
    counters = list(_RAPL.glob("intel-rapl:[0-9]*/energy_uj")) if _RAPL.is_dir() else []
    for counter in counters:
        if counter.parent.name.count(":") != 1:
            continue  # a part of a package that is counted whole
        try:
            total += int(counter.read_text()) / 1e6
        except (OSError, ValueError):
            return None
    return total if counters else None


def clocks(device: torch.device) -> dict[str, Any]:
    """Clocks in MHz, power in W, temperature in degrees C, driver: {} where nothing tells them."""
    if device.type != "cuda":
        return {"cpu_mhz": _cpu_mhz()}
    nvml = _nvml()
    if nvml is None:
        return {}
    index = device.index or 0
    kinds = {"sm_mhz": nvml.NVML_CLOCK_SM, "memory_mhz": nvml.NVML_CLOCK_MEM}
    found: dict[str, Any] = {name: _read("nvmlDeviceGetClockInfo", index, kind) for name, kind in kinds.items()}
    found |= {f"max_{name}": _read("nvmlDeviceGetMaxClockInfo", index, kind) for name, kind in kinds.items()}
    limit = _read("nvmlDeviceGetEnforcedPowerLimit", index)
    found["power_limit_w"] = None if limit is None else limit / 1e3
    found["temperature_c"] = _read("nvmlDeviceGetTemperature", index, nvml.NVML_TEMPERATURE_GPU)
    found["driver"] = nvml.nvmlSystemGetDriverVersion()
    return found


def _cpu_mhz() -> list[float]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    return [float(line.split(":")[1]) for line in lines if line.startswith("cpu MHz")]
