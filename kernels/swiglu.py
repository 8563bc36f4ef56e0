"""SwiGLU (Shazeer 2020, arXiv 2002.05202): y = silu(gate) * up, with silu(g) = g * sigmoid(g).

Shapes: N rows (tokens), F columns (MLP width). Everything is fp32 or bf16 in memory and fp32 in registers,
with one rounding at the store; plain torch rounds silu(gate) on its way and saves it for the backward. Here
the backward saves nothing and computes the sigmoid again from gate: reading N x F once more would cost more
than one exponential.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .arguments import check_device, check_like, check_rows


@dataclass(frozen=True)
class SwigluLaunch:
    """Launch numbers; the op is bound by memory, so they serve the loads. Not yet timed on a card.

    block_f: 1024 columns over num_warps: 4 (128 threads) are 8 bf16 values a thread, one 16-byte load per
        tensor, the widest there is. 1024 divides the MLP widths 14336 (Llama-3.1-8B), 8192 (Llama-3.2-1B) and
        14336 (Gemma-2-9B) and wastes at most a quarter of the last block on 18944 (Qwen2.5-7B) and 1536
        (SmolLM2-135M).
    """

    block_f: int = 1024
    num_warps: int = 4


LAUNCH = SwigluLaunch()


@triton.jit
def _swiglu_forward_kernel(gate_ptr, up_ptr, y_ptr, stride_gate_n, stride_up_n, F, BLOCK_F: tl.constexpr):
    # Rows are counted in 64 bits: 150,000 tokens of 14336 already pass 2^31 elements.
    row = tl.program_id(0).to(tl.int64)
    col_F = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside_F = col_F < F
    gate_F = tl.load(gate_ptr + row * stride_gate_n + col_F, mask=inside_F, other=0.0).to(tl.float32)
    up_F = tl.load(up_ptr + row * stride_up_n + col_F, mask=inside_F, other=0.0).to(tl.float32)
    y_F = gate_F * tl.sigmoid(gate_F) * up_F
    tl.store(y_ptr + row * F + col_F, y_F.to(y_ptr.dtype.element_ty), mask=inside_F)


@triton.jit
def _swiglu_backward_kernel(
    d_y_ptr,
    gate_ptr,
    up_ptr,
    d_gate_ptr,
    d_up_ptr,
    stride_d_y_n,
    stride_gate_n,
    stride_up_n,
    stride_d_gate_n,
    stride_d_up_n,
    F,
    BLOCK_F: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    col_F = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside_F = col_F < F
    d_y_F = tl.load(d_y_ptr + row * stride_d_y_n + col_F, mask=inside_F, other=0.0).to(tl.float32)
    gate_F = tl.load(gate_ptr + row * stride_gate_n + col_F, mask=inside_F, other=0.0).to(tl.float32)
    up_F = tl.load(up_ptr + row * stride_up_n + col_F, mask=inside_F, other=0.0).to(tl.float32)
    sigmoid_F = tl.sigmoid(gate_F)
    silu_F = gate_F * sigmoid_F
    # d silu / d gate = sigmoid + gate * sigmoid * (1 - sigmoid)
    d_gate_F = d_y_F * up_F * (sigmoid_F + silu_F * (1.0 - sigmoid_F))
    d_up_F = d_y_F * silu_F
    tl.store(
        d_gate_ptr + row * stride_d_gate_n + col_F, d_gate_F.to(d_gate_ptr.dtype.element_ty), mask=inside_F
    )
    tl.store(d_up_ptr + row * stride_d_up_n + col_F, d_up_F.to(d_up_ptr.dtype.element_ty), mask=inside_F)


def swiglu_forward(gate_NF: torch.Tensor, up_NF: torch.Tensor) -> torch.Tensor:
    """y = silu(gate) * up.

    Args:
        gate_NF, up_NF: fp32 or bf16, both of one type; rows contiguous, any row stride, so the two halves of
            one [N, 2F] matrix can be passed as they are.

    Returns:
        y_NF in the same type, contiguous.

    Raises:
        ValueError: wrong shape, type, strides or device.
    """
    check_rows("gate_NF", gate_NF)
    check_rows("up_NF", up_NF)
    check_like("up_NF", up_NF, "gate_NF", gate_NF)
    check_device(gate_NF=gate_NF, up_NF=up_NF)
    rows, width = gate_NF.shape
    y_NF = torch.empty((rows, width), dtype=gate_NF.dtype, device=gate_NF.device)
    if rows:
        with torch.cuda.device_of(gate_NF):
            _swiglu_forward_kernel[(rows, triton.cdiv(width, LAUNCH.block_f))](
                gate_NF,
                up_NF,
                y_NF,
                gate_NF.stride(0),
                up_NF.stride(0),
                width,
                BLOCK_F=LAUNCH.block_f,
                num_warps=LAUNCH.num_warps,
            )
    return y_NF


def swiglu_backward(
    d_y_NF: torch.Tensor,
    gate_NF: torch.Tensor,
    up_NF: torch.Tensor,
    *,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `swiglu_forward` from its inputs alone.

    Args:
        d_y_NF: gradient of y; gate_NF, up_NF: the forward's inputs. All of one shape and type; any row
            stride.
        out: where to write d_gate and d_up, for example the two halves of one [N, 2F] matrix; may be gate and
            up themselves, whose values are then gone. Two new contiguous matrices if not given.

    Returns:
        d_gate_NF, d_up_NF in the same type.

    Raises:
        ValueError: wrong shape, type, strides or device.
    """
    d_gate_NF, d_up_NF = out if out is not None else (torch.empty_like(d_y_NF), torch.empty_like(d_y_NF))
    named = {"d_y_NF": d_y_NF, "gate_NF": gate_NF, "up_NF": up_NF, "d_gate_NF": d_gate_NF, "d_up_NF": d_up_NF}
    for name, tensor in named.items():
        check_rows(name, tensor)
        check_like(name, tensor, "gate_NF", gate_NF)
    check_device(**named)
    rows, width = gate_NF.shape
    if rows:
        with torch.cuda.device_of(gate_NF):
            _swiglu_backward_kernel[(rows, triton.cdiv(width, LAUNCH.block_f))](
                *named.values(),
                *(tensor.stride(0) for tensor in named.values()),
                width,
                BLOCK_F=LAUNCH.block_f,
                num_warps=LAUNCH.num_warps,
            )
    return d_gate_NF, d_up_NF
