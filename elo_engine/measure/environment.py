"""On what a run computes: the device and number format it chooses and why, and the versions that go into every
record.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any, Literal

import torch

from elo_engine.errors import RefusedError

PACKAGES = (
    "torch", "triton", "transformers", "tokenizers", "safetensors", "numpy", "flash-attn", "huggingface_hub",
    "pydantic",
    "matplotlib", "gguf", "pyarrow", "tensorboard", "liger-kernel", "peft", "accelerate", "bitsandbytes", "torchao",
    "pytest-benchmark",
)  # fmt: skip


def choose_device(wanted: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """Raises RefusedError when `cuda` is forced and there is none."""
    if wanted == "cuda" and not torch.cuda.is_available():
        built = torch.version.cuda or "no CUDA"
        raise RefusedError(
            f"device: cuda is asked for and torch sees no GPU (torch {torch.__version__}, built for {built})"
        )
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(wanted)


def has_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bf16 matrices natively (emulation is slower than fp32)."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    flags = cpu_flags()
    return "avx512_bf16" in flags or "amx_bf16" in flags


def choose_dtype(wanted: Literal["auto", "bf16", "fp32"], device: torch.device) -> tuple[torch.dtype, str]:
    """The compute dtype and one sentence on why."""
    if wanted == "auto":
        if has_bf16(device):
            return torch.bfloat16, f"bf16: this {device.type} computes it natively"
        return torch.float32, f"fp32: this {device.type} has no native bf16"
    return (torch.bfloat16 if wanted == "bf16" else torch.float32), f"{wanted}: asked for"


def cpu_flags() -> frozenset[str]:
    """Instruction-set flags of the first core; empty where /proc/cpuinfo does not exist."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return frozenset(line.split(":", 1)[1].split())
    except OSError:
        return frozenset()
    return frozenset()


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def device_name(kind: Literal["cpu", "cuda"] | str) -> str:
    """As its maker calls it."""
    return torch.cuda.get_device_name() if kind == "cuda" else f"{_cpu_name()}, {os.cpu_count()} cores"


@functools.cache
def _version(package: str) -> str | None:
    """None: it is not installed. Read once in a process, which has one of each: the files are several a package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe_environment() -> dict[str, Any]:
    """Versions, processor, memory, GPU: what a reader of a record needs to judge its figures."""
    versions = {name: _version(name) for name in PACKAGES}
    flags = cpu_flags()
    record: dict[str, Any] = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": versions,
        "cpu": _cpu_name(),
        "cpu_cores": os.cpu_count(),
        "cpu_threads_used": torch.get_num_threads(),
        "cpu_features": sorted(flags & {"avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16"}),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": [],
    }
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        record["gpus"].append(
            {
                "name": properties.name,
                "memory_bytes": properties.total_memory,
                "compute_capability": f"{properties.major}.{properties.minor}",
            }
        )
    return record
