"""The attention seam: one definition, and whoever computes it best on this device.

On CUDA: flash-attn where it is installed, else torch's own variable-length flash attention (torch 2.11 and newer),
else torch's scaled_dot_product_attention document by document. On the CPU: csrc's. A sliding window is known to all
of them; a soft-cap on the scores to flash-attn and csrc. Where a soft-cap meets a backend without one, `kernels:
fused` refuses by name and `auto` takes the slow exact way.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from elo_engine.errors import RefusedError
from elo_engine.model import cpu, reference
from elo_engine.model.ops import choice

if TYPE_CHECKING:
    from elo_engine.model.layers import Packing

Backend = Literal["flash-attn", "torch varlen", "sdpa"]


@functools.cache
def _varlen_parameters() -> frozenset[str]:
    """The names that torch's varlen_attn takes here; empty where there is none that does causal windows and scales."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return frozenset()
    from torch.nn.attention.varlen import varlen_attn

    names = frozenset(inspect.signature(varlen_attn).parameters)
    return names if {"window_size", "scale"} <= names else frozenset()


@functools.cache
def _flash_attn_parameters() -> frozenset[str]:
    """The names that flash-attn's function takes here; empty where it is not installed, or does not load with this
    torch.
    """
    try:
        from flash_attn import flash_attn_varlen_func
    except (ImportError, OSError):
        return frozenset()
    return frozenset(inspect.signature(flash_attn_varlen_func).parameters)


def _backend(dtype: torch.dtype, E: int, softcap: float | None) -> Backend:
    """What serves a CUDA tensor. The flash kernels take bf16, heads of a multiple of 8 up to 256 wide."""
    if dtype == torch.bfloat16 and E <= 256 and E % 8 == 0:
        if {"window_size"} | (set() if softcap is None else {"softcap"}) <= _flash_attn_parameters():
            return "flash-attn"
        if _varlen_parameters() and softcap is None:
            return "torch varlen"
    return "sdpa"


def describe_backend() -> str:
    """What computes attention in bf16 on CUDA, for the line that a run prints."""
    return _backend(torch.bfloat16, 128, None)


def why_not_padded(dtype: torch.dtype, E: int, softcap: float | None) -> str | None:
    """What keeps a CUDA step from depending on nothing of the host's; None: nothing."""
    if choice.use_reference():
        return "kernels: reference looks at numbers of the device"
    if not choice.has_triton():
        return "triton is not installed, and AdamW without it waits for the norm"
    if _backend(dtype, E, softcap) == "sdpa":
        capped = "" if softcap is None else f" with scores capped at {softcap:g}"
        return f"no fused attention here takes heads of {E} in {str(dtype).removeprefix('torch.')}{capped}"
    return None


def attention(
    q_NHE: Tensor, k_NKE: Tensor, v_NKE: Tensor, packing: Packing, scale: float, window: int | None = None,
    softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """Causal attention inside each document, none across; see `reference.attention`. -> [N, H, E]

    Raises:
        RefusedError: `kernels: fused` on CUDA, and no fused backend here has a soft-cap, or takes this width in bf16.
    """
    if choice.use_reference():
        return reference.attention(q_NHE, k_NKE, v_NKE, packing.segment_starts, scale, window, softcap)
    if not q_NHE.is_cuda:
        return cpu.attention(q_NHE, k_NKE, v_NKE, packing.segment_starts, scale, window, softcap)
    backend = _backend(q_NHE.dtype, q_NHE.shape[2], softcap)
    if backend == "flash-attn":
        return _flash_attn(q_NHE, k_NKE, v_NKE, packing, scale, window, softcap)
    if backend == "torch varlen":
        return _torch_varlen(q_NHE, k_NKE, v_NKE, packing, scale, window)
    if choice.forced() and (softcap is not None or q_NHE.dtype == torch.bfloat16):
        what = f"soft-capped scores (soft-cap {softcap})" if softcap is not None else f"heads of {q_NHE.shape[2]}"
        raise RefusedError(
            f"kernels: fused, but no fused attention here does {what} in {q_NHE.dtype}: torch's variable-length flash "
            "attention has no soft-cap and needs torch 2.11; install flash-attn, or use kernels: auto, which is slower"
        )
    return cpu.attention_by_segment(q_NHE, k_NKE, v_NKE, packing.segment_starts, scale, window, softcap)


def _flash_attn(
    q_NHE: Tensor, k_NKE: Tensor, v_NKE: Tensor, packing: Packing, scale: float, window: int | None,
    softcap: float | None,
) -> Tensor:  # fmt: skip
    from flash_attn import flash_attn_varlen_func

    offsets_S, longest = packing.offsets, packing.longest
    options: dict[str, Any] = {} if softcap is None else {"softcap": softcap}
    return flash_attn_varlen_func(  # type: ignore[no-any-return]
        q_NHE, k_NKE, v_NKE, offsets_S, offsets_S, longest, longest, softmax_scale=scale, causal=True,
        window_size=(-1 if window is None else window - 1, 0), **options,
    )  # fmt: skip


def _torch_varlen(
    q_NHE: Tensor, k_NKE: Tensor, v_NKE: Tensor, packing: Packing, scale: float, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    offsets_S, longest = packing.offsets, packing.longest
    options: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in _varlen_parameters() else {}
    mixed = varlen_attn(
        q_NHE, k_NKE, v_NKE, offsets_S, offsets_S, longest, longest, scale=scale,
        window_size=(-1 if window is None else window - 1, 0), **options,
    )  # fmt: skip
    assert isinstance(mixed, Tensor)
    return mixed
