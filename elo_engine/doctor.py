"""`elo doctor`: what is installed and used, and why a fast path is off."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import torch

from elo_engine.checkpoint.residency import huge_pages
from elo_engine.measure.environment import choose_device, choose_dtype, describe_environment
from elo_engine.measure.meter import human_bytes
from elo_engine.model import cpu, ops


def examine() -> tuple[dict[str, Any], list[str]]:
    """The environment as data, and as lines for a person; a line that starts with '!' names a fast path that is off."""
    environment = describe_environment()
    device = choose_device("auto")
    dtype, why = choose_dtype("auto", device)
    lines = [
        f"python {environment['python']} on {environment['system']}",
        f"cpu: {environment['cpu']}, {environment['cpu_cores']} cores, {environment['cpu_threads_used']} threads used, "
        f"{human_bytes(environment['memory_bytes'])} memory, "
        f"{', '.join(environment['cpu_features']) or 'no known features'}",
    ]
    for gpu in environment["gpus"]:
        lines.append(
            f"gpu: {gpu['name']}, {human_bytes(gpu['memory_bytes'])}, sm_{gpu['compute_capability'].replace('.', '')}"
        )
    if environment["gpus"]:
        lines.append(_compiler())
    else:
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        lines.append(f"! gpu: torch sees none (torch {torch.__version__} is {built}); everything runs on the CPU")
    lines.append(f"default: {device}, {why}")
    lines.append(ops.describe(device))
    lines.append(_fp8(device))
    if cpu.HAS_CSRC:
        lines.append("C++ extension: loaded")
    else:
        lines.append(f"! C++ extension: off ({cpu.CSRC_REASON})")
    lines.append(_loading())
    optional = {
        "triton": "fused kernels on a GPU",
        "flash_attn": "attention on a GPU; torch's own serves without it, but for soft-capped scores",
        "matplotlib": "the plot of a report",
        "pyarrow": "parquet input of elo data",
        "gguf": "elo demo's model",
        "tensorboard": "live curves",
    }
    for name, use in optional.items():
        there = importlib.util.find_spec(name) is not None
        lines.append(f"{'' if there else '! '}{name}: {'installed' if there else 'not installed'} ({use})")
    environment["dtype"] = str(dtype).removeprefix("torch.")
    return environment, lines


def _compiler() -> str:
    """Whether Triton can make its kernels' launchers, which it compiles at their first use; without them no kernel
    runs.
    """
    found = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if found is None:
        return "! C compiler: none (CC, gcc, clang), and Triton launches no kernel without; install gcc"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # as Triton looks for it
    header = Path(sysconfig.get_path("include", scheme), "Python.h")
    if not header.is_file():
        return f"! C compiler: {found}, but {header} is missing, and Triton launches no kernel without; get python3-dev"
    return f"C compiler: {found} (for the launchers of Triton's kernels)"


def _fp8(device: torch.device) -> str:
    """Whether products of 8-bit floats can be had here, and why not."""
    said = ops.describe_fp8(device)
    return f"! {said}" if "none here" in said else said


def _loading() -> str:
    """How checkpoints are read here, and what slows it."""
    how = "loading: by the C++ mover" if cpu.HAS_CSRC else "! loading: by the mover in Python"
    pages = huge_pages()
    if pages not in ("always", "madvise"):
        return f"! {how.removeprefix('! ')}; transparent huge pages are {pages}, without which memory fills 3x slower"
    return f"{how}, into huge pages ({pages})"
