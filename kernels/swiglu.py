"""Gated activations (Shazeer 2020, arXiv 2002.05202): y = act(gate) * up.

SwiGLU: act(g) = silu(g) = g * sigmoid(g). GeGLU: act is gelu with the tanh approximation (Hendrycks and Gimpel 2016,
arXiv 1606.08415), g * (1 + tanh(u)) / 2 with u = sqrt(2 / pi) * (g + 0.044715 g^3). As (1 + tanh(u)) / 2 = sigmoid(2u),
both are g * sigmoid(z), and nothing is lost where tanh is near -1.

Shapes: N rows (tokens), F columns (MLP width). Everything is fp32 or bf16 in memory and fp32 in registers, with one
rounding at the store; plain torch rounds act(gate) on its way and saves it for the backward. Here the backward saves
nothing and computes the sigmoid again from gate: reading N x F once more would cost more than one exponential. For the
same reason it can write y itself once more, so that the forward's y need not be kept for the next weight's gradient.
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

    block_f: 1024 columns over num_warps: 4 (128 threads) are 8 bf16 values a thread, one 16-byte load per tensor, the
        widest there is. 1024 divides the MLP widths 14336 (Llama-3.1-8B), 8192 (Llama-3.2-1B) and 14336 (Gemma-2-9B)
        and wastes at most a quarter of the last block on 18944 (Qwen2.5-7B) and 1536 (SmolLM2-135M).
    """

    block_f: int = 1024
    num_warps: int = 4


LAUNCH = SwigluLaunch()


@triton.jit
def _exponent(gate_F, ACTIVATION: tl.constexpr):
    """z of act(g) = g * sigmoid(z), and dz/dg."""
    if ACTIVATION == "silu":
        z_F = gate_F
        slope_F = tl.full(gate_F.shape, 1.0, dtype=tl.float32)
    else:
        # Beyond 12, where sigmoid(z) is 0 or 1 in fp32, the powers of g would only overflow, and inf * 0 is NaN.
        bounded_F = tl.minimum(tl.maximum(gate_F, -12.0), 12.0)
        square_F = bounded_F * bounded_F
        # 1.59... = 2 sqrt(2 / pi)
        z_F = 1.5957691216057308 * bounded_F * (1.0 + 0.044715 * square_F)
        slope_F = 1.5957691216057308 * (1.0 + 0.134145 * square_F)
    return z_F, slope_F


@triton.jit
def _sigmoid(z_F):
    """sigmoid(z) and its derivative sigmoid(z) * sigmoid(-z), from exp(-|z|), which cannot overflow.

    Not sigmoid * (1 - sigmoid): near sigmoid = 1 the difference has lost its digits, and gelu's large dz/dg shows it.
    """
    shrink_F = tl.exp(-tl.abs(z_F))
    share_F = 1.0 / (1.0 + shrink_F)
    other_F = shrink_F * share_F
    return tl.where(z_F < 0.0, other_F, share_F), other_F * share_F


@triton.jit
def _gated_forward_kernel(
    gate_ptr, up_ptr, y_ptr, stride_gate_n, stride_up_n, F, ACTIVATION: tl.constexpr, BLOCK_F: tl.constexpr
):
    # Rows are counted in 64 bits: 150,000 tokens of 14336 already pass 2^31 elements.
    row = tl.program_id(0).to(tl.int64)
    col_F = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside_F = col_F < F
    gate_F = tl.load(gate_ptr + row * stride_gate_n + col_F, mask=inside_F, other=0.0).to(tl.float32)
    up_F = tl.load(up_ptr + row * stride_up_n + col_F, mask=inside_F, other=0.0).to(tl.float32)
    z_F, _ = _exponent(gate_F, ACTIVATION)
    sigmoid_F, _ = _sigmoid(z_F)
    y_F = gate_F * sigmoid_F * up_F
    tl.store(y_ptr + row * F + col_F, y_F.to(y_ptr.dtype.element_ty), mask=inside_F)


@triton.jit
def _gated_backward_kernel(
    d_y_ptr,
    gate_ptr,
    up_ptr,
    d_gate_ptr,
    d_up_ptr,
    y_ptr,
    stride_d_y_n,
    stride_gate_n,
    stride_up_n,
    stride_d_gate_n,
    stride_d_up_n,
    stride_y_n,
    F,
    ACTIVATION: tl.constexpr,
    NEED_Y: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    col_F = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside_F = col_F < F
    d_y_F = tl.load(d_y_ptr + row * stride_d_y_n + col_F, mask=inside_F, other=0.0).to(tl.float32)
    gate_F = tl.load(gate_ptr + row * stride_gate_n + col_F, mask=inside_F, other=0.0).to(tl.float32)
    up_F = tl.load(up_ptr + row * stride_up_n + col_F, mask=inside_F, other=0.0).to(tl.float32)
    z_F, slope_F = _exponent(gate_F, ACTIVATION)
    sigmoid_F, d_sigmoid_F = _sigmoid(z_F)
    act_F = gate_F * sigmoid_F
    # d act / d gate = sigmoid(z) + gate * sigmoid'(z) * dz/dgate
    d_gate_F = d_y_F * up_F * (sigmoid_F + gate_F * (d_sigmoid_F * slope_F))
    d_up_F = d_y_F * act_F
    # The results may lie where d_y, gate and up do. A store may be laid out over the threads otherwise than a load, so
    # every thread must have read before any writes.
    tl.debug_barrier()
    tl.store(d_gate_ptr + row * stride_d_gate_n + col_F, d_gate_F.to(d_gate_ptr.dtype.element_ty), mask=inside_F)
    tl.store(d_up_ptr + row * stride_d_up_n + col_F, d_up_F.to(d_up_ptr.dtype.element_ty), mask=inside_F)
    if NEED_Y:
        # The forward's product in the forward's order, so that its bits come out again.
        y_F = act_F * up_F
        tl.store(y_ptr + row * stride_y_n + col_F, y_F.to(y_ptr.dtype.element_ty), mask=inside_F)


def _forward(activation: str, gate_NF: torch.Tensor, up_NF: torch.Tensor) -> torch.Tensor:
    check_rows("gate_NF", gate_NF)
    check_rows("up_NF", up_NF)
    check_like("up_NF", up_NF, "gate_NF", gate_NF)
    check_device(gate_NF=gate_NF, up_NF=up_NF)
    rows, width = gate_NF.shape
    y_NF = torch.empty((rows, width), dtype=gate_NF.dtype, device=gate_NF.device)
    if rows:
        with torch.cuda.device_of(gate_NF):
            _gated_forward_kernel[(rows, triton.cdiv(width, LAUNCH.block_f))](
                gate_NF,
                up_NF,
                y_NF,
                gate_NF.stride(0),
                up_NF.stride(0),
                width,
                ACTIVATION=activation,
                BLOCK_F=LAUNCH.block_f,
                num_warps=LAUNCH.num_warps,
            )
    return y_NF


def _backward(
    activation: str,
    d_y_NF: torch.Tensor,
    gate_NF: torch.Tensor,
    up_NF: torch.Tensor,
    out: tuple[torch.Tensor, torch.Tensor] | None,
    y_out: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    d_gate_NF, d_up_NF = out if out is not None else (torch.empty_like(d_y_NF), torch.empty_like(d_y_NF))
    named = {"d_y_NF": d_y_NF, "gate_NF": gate_NF, "up_NF": up_NF, "d_gate_NF": d_gate_NF, "d_up_NF": d_up_NF}
    given = named if y_out is None else {**named, "y_out": y_out}
    for name, tensor in given.items():
        check_rows(name, tensor)
        check_like(name, tensor, "gate_NF", gate_NF)
    check_device(**given)
    rows, width = gate_NF.shape
    if rows:
        with torch.cuda.device_of(gate_NF):
            _gated_backward_kernel[(rows, triton.cdiv(width, LAUNCH.block_f))](
                *named.values(),
                y_out,
                *(tensor.stride(0) for tensor in named.values()),
                0 if y_out is None else y_out.stride(0),
                width,
                ACTIVATION=activation,
                NEED_Y=y_out is not None,
                BLOCK_F=LAUNCH.block_f,
                num_warps=LAUNCH.num_warps,
            )
    return d_gate_NF, d_up_NF


def swiglu_forward(gate_NF: torch.Tensor, up_NF: torch.Tensor) -> torch.Tensor:
    """y = silu(gate) * up.

    Args:
        gate_NF, up_NF: fp32 or bf16, both of one type; rows contiguous, any row stride, so the two halves of one
            [N, 2F] matrix can be passed as they are.

    Returns:
        y_NF in the same type, contiguous.

    Raises:
        ValueError: wrong shape, type, strides or device.
    """
    return _forward("silu", gate_NF, up_NF)


def swiglu_backward(
    d_y_NF: torch.Tensor,
    gate_NF: torch.Tensor,
    up_NF: torch.Tensor,
    *,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    y_out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `swiglu_forward` from its inputs alone, and on request y once more.

    Args:
        d_y_NF: gradient of y; gate_NF, up_NF: the forward's inputs. All of one shape and type; any row stride.
        out: where to write d_gate and d_up, for example the two halves of one [N, 2F] matrix; may be gate and up
            themselves, whose values are then gone. Two new contiguous matrices if not given.
        y_out: where to write y, the bits that the forward returned, in the same shape and type. May be d_y itself,
            whose values are then gone: each program reads its own elements before it writes them, and no program reads
            another's. It must not overlap any argument in another way. y is not computed if not given.

    Returns:
        d_gate_NF, d_up_NF in the same type.

    Raises:
        ValueError: wrong shape, type, strides or device.
    """
    return _backward("silu", d_y_NF, gate_NF, up_NF, out, y_out)


def geglu_forward(gate_NF: torch.Tensor, up_NF: torch.Tensor) -> torch.Tensor:
    """y = gelu(gate) * up, gelu with the tanh approximation; all else as in `swiglu_forward`.

    Raises:
        ValueError: wrong shape, type, strides or device.
    """
    return _forward("gelu", gate_NF, up_NF)


def geglu_backward(
    d_y_NF: torch.Tensor,
    gate_NF: torch.Tensor,
    up_NF: torch.Tensor,
    *,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    y_out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `geglu_forward`; arguments and results as in `swiglu_backward`.

    Raises:
        ValueError: wrong shape, type, strides or device.
    """
    return _backward("gelu", d_y_NF, gate_NF, up_NF, out, y_out)
