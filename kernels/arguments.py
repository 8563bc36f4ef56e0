"""What every launcher checks before it touches memory: a kernel is handed bare pointers and would read past a
tensor that is smaller, strided otherwise or of another type than it believes.

Shapes: N rows, D/F/V columns. The checks read only Python-side metadata, so none of them waits for the
device.
"""

from __future__ import annotations

import torch
import triton

FLOATS = (torch.float32, torch.bfloat16)

# `triton.jit` chooses between the compiler and the interpreter when it decorates, so this is read at that
# same moment.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)


def check_rows(name: str, tensor: torch.Tensor) -> None:
    """Require an fp32 or bf16 matrix whose rows are contiguous and do not overlap; the row stride is free.

    Raises:
        ValueError: naming the argument, what is wrong with it, and what to pass instead.
    """
    if tensor.dim() != 2:
        raise ValueError(
            f"{name}: expected rows x columns, got shape {tuple(tensor.shape)}; flatten batch and tokens"
        )
    check_float(name, tensor)
    rows, columns = tensor.shape
    if columns == 0:
        raise ValueError(
            f"{name}: has no columns (shape {tuple(tensor.shape)}), so there is nothing to compute"
        )
    strided = rows > 0 and columns > 1 and tensor.stride(1) != 1
    overlapping = rows > 1 and tensor.stride(0) < columns
    if strided or overlapping:
        raise ValueError(
            f"{name}: strides {tensor.stride()} for shape {tuple(tensor.shape)}; a kernel reads a"
            f" row as one contiguous run and rows must not overlap. Pass {name}.contiguous()"
        )


def check_vector(name: str, tensor: torch.Tensor, length: int) -> None:
    """Require a contiguous vector of `length` elements, of any type.

    Raises:
        ValueError: naming the argument, its shape and strides.
    """
    if tensor.shape != (length,):
        raise ValueError(f"{name}: expected a vector of {length} elements, got shape {tuple(tensor.shape)}")
    if length > 1 and tensor.stride(0) != 1:
        raise ValueError(
            f"{name}: stride {tensor.stride(0)}, but it must be contiguous. Pass {name}.contiguous()"
        )


def check_float(name: str, tensor: torch.Tensor) -> None:
    """Require one of the types the kernels are proved in (`FLOATS`).

    Raises:
        ValueError: naming the argument and its type.
    """
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{name}: dtype {tensor.dtype}; convert it to torch.float32 or torch.bfloat16")


def check_like(name: str, tensor: torch.Tensor, like_name: str, like: torch.Tensor) -> None:
    """Require the shape and the type of another argument.

    Raises:
        ValueError: naming both arguments.
    """
    if tensor.shape != like.shape or tensor.dtype != like.dtype:
        raise ValueError(
            f"{name}: {tuple(tensor.shape)} of {tensor.dtype}, but {like_name} is {tuple(like.shape)} of"
            f" {like.dtype}; both must be the same"
        )


def check_device(**tensors: torch.Tensor) -> None:
    """Require all tensors on one CUDA device, or on the CPU under Triton's interpreter.

    Raises:
        ValueError: naming the tensors and their devices.
    """
    devices = {name: tensor.device for name, tensor in tensors.items()}
    listed = ", ".join(f"{name} on {device}" for name, device in devices.items())
    if len(set(devices.values())) != 1:
        raise ValueError(f"one kernel cannot reach several devices: {listed}; move them to one")
    if not INTERPRETED and next(iter(devices.values())).type != "cuda":
        raise ValueError(
            f"a Triton kernel needs a CUDA device: {listed}. Use elo_engine.model.reference there, or set"
            " TRITON_INTERPRET=1 before triton is imported to step through the kernel on the CPU"
        )
