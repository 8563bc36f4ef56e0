"""Which path computes an op: plain torch references, the CPU fast path, or Triton kernels.

`configure("reference")` forces the definitions, `"fused"` the fast paths and fails where one is missing, `"auto"` takes
what is there; `describe()` says what and why. Under TRITON_INTERPRET=1, `"fused"` runs the Triton kernels on the CPU
through Triton's interpreter: slow, and the way to follow a training run through every kernel without a GPU.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Literal

import torch
from torch import Tensor

from elo_engine.errors import RefusedError
from elo_engine.model import cpu

Mode = Literal["auto", "reference", "fused"]

_HAS_TRITON = importlib.util.find_spec("triton") is not None
# Triton decides when it is imported, so this is read once too.
_INTERPRETED = _HAS_TRITON and os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
_mode: Mode = "auto"


def configure(mode: Mode, device: torch.device) -> str:
    """Choose how ops are computed from here on, for this process; returns one line saying what and why.

    Raises:
        RefusedError: `fused` is forced and a fast path is missing on this device.
    """
    global _mode
    if mode == "fused" and device.type == "cuda" and not _HAS_TRITON:
        raise RefusedError(
            "kernels: fused needs triton on a GPU and it is not installed; pip install triton, or kernels: auto"
        )
    if mode == "fused" and device.type == "cpu" and not (cpu.HAS_CSRC or _INTERPRETED):
        raise RefusedError(
            f"kernels: fused needs the C++ extension on a CPU and it is missing ({cpu.CSRC_REASON}); "
            "install a C++17 compiler and reinstall, or use kernels: auto"
        )
    _mode = mode
    if device.type == "cpu":
        cpu.keep_freed_memory()
    return describe(device)


def describe(device: torch.device) -> str:
    """Which path computes the ops on a device, and why, in one line."""
    if _mode == "reference":
        return "kernels: plain torch references (forced)"
    if device.type == "cuda":
        from elo_engine.model.ops.attention import describe_backend

        kernels = "Triton" if _HAS_TRITON else "plain torch (triton is not installed)"
        return f"kernels: {kernels}; attention: {describe_backend()}"
    if _INTERPRETED and _mode == "fused":
        return "kernels: Triton, interpreted on the CPU (TRITON_INTERPRET)"
    if cpu.HAS_CSRC:
        return "kernels: CPU fast path with C++ extension"
    return f"kernels: CPU fast path in torch alone ({cpu.CSRC_REASON})"


def forced() -> bool:
    """Whether `fused` was asked for: then a fast path that is missing is an error, not a detour."""
    return _mode == "fused"


def use_reference() -> bool:
    """Whether the definitions were asked for."""
    return _mode == "reference"


def has_triton() -> bool:
    """Whether kernels can be compiled at all."""
    return _HAS_TRITON


def use_triton(tensor: Tensor) -> bool:
    """Whether a Triton kernel computes on this tensor."""
    if not _HAS_TRITON or _mode == "reference":
        return False
    return tensor.is_cuda or (_INTERPRETED and _mode == "fused")


def use_cpu(tensor: Tensor) -> bool:
    """Whether the CPU fast path computes on this tensor."""
    return not tensor.is_cuda and _mode != "reference" and not use_triton(tensor)
