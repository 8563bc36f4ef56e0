"""Rounding to 8-bit floats, products of what was rounded, and the frozen head's loss made of them, in plain torch: the
definition that the kernels and `torch._scaled_mm` are tested against, and, asked for by name, an emulation on machines
without such products.

A tensor is divided by a scale, rounded to e4m3 (three bits of mantissa, up to 448) or e5m2 (two, up to 57344), and
multiplied by the scale again. Scales are powers of two, so both are exact, and whether a row has a scale of its own or
shares its tensor's moves where numbers underflow but changes no rounding above that: in e4m3 at most 2^-4 of a number
down to 2^-15 of the largest, at most 2^-19 of the largest below. What comes out has four bits at most, so bf16 holds it
exactly and a bf16 product with sums in fp32 is the product of 8-bit operands.

Formats: Micikevicius et al. 2022, arXiv 2209.05433. Shapes as in `reference.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
ROWS = 1024  # of logits at a time
PIECE = 512  # rows of a head whose rounding stays in cache
COLUMNS = 2048  # of a tile between the two products, so that its passes stay in cache


@dataclass(frozen=True)
class Format:
    """An 8-bit float type; its largest number is 1.75 * 2^exponent."""

    dtype: torch.dtype
    exponent: int

    @property
    def largest(self) -> float:
        return 1.75 * 2.0**self.exponent


E4M3, E5M2 = Format(torch.float8_e4m3fn, 8), Format(torch.float8_e5m2, 15)


def scale_of(largest: Tensor, kind: Format) -> Tensor:
    """The smallest power of two that brings `largest` (fp32, not negative) into the format's range; 2^-100 for 0. NaN
    for what is not finite, so that it is seen in all it scales.
    """
    mantissa, exponent = torch.frexp(largest)  # in [0.5, 1)
    power = exponent - 1 - kind.exponent + (mantissa > 0.875).int()
    scale = torch.ldexp(torch.ones_like(largest), power.clamp(-100, 120))
    return torch.where(largest > 0, scale, 2.0**-100).where(largest.isfinite(), torch.nan)


def quantize_rows(
    x_ND: Tensor, kind: Format = E4M3, outliers_J: Tensor | None = None, *, left: bool = True
) -> tuple[Tensor, Tensor]:
    """-> the rows in 8 bits, and their scales, fp32 [N, 1]: x is about q * scale.

    outliers_J: columns of which what rounding left over is rounded too and set behind the rows, [N, D + 2 J]: [q, q of
        those, rest of those] in a product's left operand, [q, rest, q] in its right. Then left @ right^T has of these
        columns q q' + q rest' + rest q': off by 2^-8 or so, by rest rest' and by what rounding left of the rests.
    """
    scale_N1 = scale_of(x_ND.float().abs().amax(1, keepdim=True), kind)
    scaled_ND = x_ND.float() / scale_N1
    q_ND = _cast(scaled_ND, kind)
    if outliers_J is None:
        return q_ND, scale_N1
    scaled_NJ = scaled_ND[:, outliers_J]
    q_NJ = _cast(scaled_NJ, kind)
    rest_NJ = _cast(scaled_NJ - q_NJ.float(), kind)
    behind = (q_NJ, rest_NJ) if left else (rest_NJ, q_NJ)
    return torch.cat([part.view(torch.uint8) for part in (q_ND, *behind)], 1).view(kind.dtype), scale_N1


def quantize_tensor(x_ND: Tensor, kind: Format = E4M3) -> tuple[Tensor, Tensor]:
    """-> the matrix in 8 bits, and its one scale, an fp32 scalar."""
    scale = scale_of(torch.linalg.vector_norm(x_ND, torch.inf).float(), kind)
    return _cast(x_ND.float() / scale, kind), scale


def _cast(scaled: Tensor, kind: Format) -> Tensor:
    """Round to nearest even; what a scale brought into the range stays in it, and NaN stays NaN."""
    return scaled.clamp(-kind.largest, kind.largest).to(kind.dtype)


def decoded(q: Tensor) -> Tensor:
    """8 bits -> bf16, exact; by way of fp16, which is exact too and to which torch converts faster on a CPU."""
    return q.to(torch.float16).to(torch.bfloat16)


def rounded_rows(
    x_ND: Tensor, kind: Format = E4M3, outliers_J: Tensor | None = None, *, left: bool = True
) -> Tensor:
    """What `quantize_rows` keeps of x, in bf16."""
    q_ND, scale_N1 = quantize_rows(x_ND, kind, outliers_J, left=left)
    return decoded(q_ND).mul_(scale_N1)


def rounded_tensor(x_ND: Tensor, kind: Format = E4M3) -> Tensor:
    """What `quantize_tensor` keeps of x, in bf16."""
    q_ND, scale = quantize_tensor(x_ND, kind)
    return decoded(q_ND).mul_(scale)


def mean_row(head_VD: Tensor, softcap: float | None) -> Tensor:
    """What is taken off every row of a head before it is rounded, fp32 [D]: the rows' mean. It adds the same to all
    logits of a token, so it changes no loss and no gradient, and it can be most of a row: rounded with it, the errors
    of what cancels would not cancel. Zeros under a soft-cap, which logits do not enter without it.
    """
    mean_D = head_VD.mean(0, dtype=torch.float32)
    return mean_D if softcap is None else torch.zeros_like(mean_D)


SHIFT = 0.5  # of a column's deviation, at most: the errors grow by 4 % with it (it adds SHIFT^2 / 3 to the square)


def shifted_mean(mean_D: Tensor, deviation_D: Tensor, draw_D: Tensor) -> Tensor:
    """What is taken off in one step. Any row will do, since it cancels; with another one in each step the head's
    numbers are rounded elsewhere each time, so their errors are no property of the head that training could learn.

    draw_D: uniform in [0, 1).
    """
    return mean_D + deviation_D * (2.0 * SHIFT * (draw_D - 0.5))


def column_deviations(head_VD: Tensor, mean_D: Tensor) -> Tensor:
    """Root mean square of each column of a head less `mean_D`, fp32 [D]."""
    squares_D: Tensor = torch.linalg.vector_norm(head_VD, dim=0, dtype=torch.float32).square() / len(head_VD)
    return (squares_D - mean_D.square()).clamp_min(0.0).sqrt()


def outlier_count(width: int) -> int:
    """J of `outliers`: a 64th of the columns, at least 32, a multiple of 8 that is no more than half of them."""
    return min(max(32, width // 64), width // 2) // 8 * 8


def outliers(deviation_D: Tensor, hidden_ND: Tensor | None) -> Tensor:
    """Columns whose terms in the logits are the largest, and so what rounding them adds: int64 [J], ascending.

    The error of a rounded number is some 2.6 % of it, so that of a column's terms goes with the root mean square of the
    hidden state there times that of the head less its mean, `column_deviations`.

    hidden_ND: of text as it is trained on; without it, the head's columns alone say.
    """
    size_D = deviation_D
    if hidden_ND is not None:
        size_D = size_D * torch.linalg.vector_norm(hidden_ND, dim=0, dtype=torch.float32)
    return size_D.topk(outlier_count(len(size_D))).indices.sort().values


def rounded_head(head_VD: Tensor, mean_D: Tensor, outliers_J: Tensor) -> tuple[Tensor, Tensor]:
    """What a head in 8 bits keeps of `head - mean`: rows with a scale each and what is set behind them of `outliers_J`,
    [V, D + 2 J], as right operand; and [V, D] with a scale for each column. bf16.
    """
    (V, D), dtype, device = head_VD.shape, torch.bfloat16, head_VD.device
    by_row_VC = torch.empty(V, D + 2 * len(outliers_J), dtype=dtype, device=device)
    by_column_VD = torch.empty(V, D, dtype=dtype, device=device)
    largest_D = torch.zeros(D, device=device)
    parts = [slice(start, start + PIECE) for start in range(0, V, PIECE)]
    for part in parts:
        centred_PD = head_VD[part].float() - mean_D
        torch.maximum(largest_D, centred_PD.abs().amax(0), out=largest_D)
        by_row_VC[part] = rounded_rows(centred_PD, E4M3, outliers_J, left=False)
    scale_D = scale_of(largest_D, E4M3)
    for part in parts:
        centred_PD = head_VD[part].float() - mean_D
        by_column_VD[part] = decoded(_cast(centred_PD.div_(scale_D), E4M3)).mul_(scale_D)
    return by_row_VC, by_column_VD


@torch.no_grad()
def linear_cross_entropy_fp8(
    hidden_ND: Tensor, head_VD: Tensor, by_row_VC: Tensor, by_column_VD: Tensor, mean_D: Tensor, outliers_J: Tensor,
    labels_N: Tensor, *, softcap: float | None = None, need_d_hidden: bool = True,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Losses of a frozen head whose products are of 8-bit operands, and the gradient of their SUM by the hidden states.

    The target is left out of both products. With z its logit, a dot product in fp32, and o the log-sum-exp of the other
    logits, the loss is softplus(o - z); with w = sigmoid(o - z)
        d_hidden = w (softmax of the others @ (head - mean) - (head[target] - mean)),
    where the first term is a product of 8 bits, whose left side is exp(logit - largest), at most 1, for all rows alike,
    and the second is of bf16. z is made of the same rounded operands as the other logits: made of others, an error that
    all logits share would not cancel, and training finds that out (docs/fp8.md).

    Args:
        hidden_ND, head_VD: bf16.
        by_row_VC, by_column_VD: `rounded_head` of the head, of `mean_row` and of `outliers`.
    Returns:
        losses fp32 [N], 0 where the label is -100; d_hidden bf16, zeros in those rows.
    """
    losses_N = torch.zeros(len(hidden_ND), dtype=torch.float32, device=hidden_ND.device)
    d_hidden_ND = torch.zeros_like(hidden_ND, memory_format=torch.contiguous_format) if need_d_hidden else None
    for start in range(0, len(hidden_ND), ROWS):
        part = slice(start, start + ROWS)
        target_R1, kept_R = labels_N[part].clamp_min(0)[:, None], labels_N[part] != IGNORED
        rounded_RC = rounded_rows(hidden_ND[part], E4M3, outliers_J)
        logits_RV = F.linear(rounded_RC, by_row_VC)
        z_R = torch.linalg.vecdot(rounded_RC.float(), by_row_VC[target_R1[:, 0]].float())
        z_R, slope_R = _capped(z_R, softcap)
        top_R, total_R = _others(logits_RV, target_R1, softcap)
        odds_R = top_R + total_R.log() - z_R
        odds_R = odds_R.where(z_R < torch.inf, torch.nan)
        losses_N[part] = F.softplus(odds_R).where(kept_R, 0.0)
        if d_hidden_ND is None:
            continue
        others_R = torch.sigmoid(odds_R)
        shift_R = top_R.where(top_R > -torch.inf, 0.0)
        for tile_RC, begin in _tiles(logits_RV):
            share_RC, slope_RC = _capped(tile_RC.float(), softcap)
            share_RC = (share_RC - shift_R[:, None]).exp_().mul_(slope_RC)
            _leave_out(share_RC, target_R1 - begin, 0.0)
            tile_RC.copy_(decoded(_cast(share_RC.mul_(E4M3.largest), E4M3)))
        share_R = others_R / total_R.where(total_R > 0, 1.0) / E4M3.largest
        rest_RD = torch.mm(logits_RV, by_column_VD).mul_(share_R[:, None])
        target_RD = head_VD[target_R1[:, 0]].float() - mean_D
        d_RD = rest_RD.float() - (others_R * slope_R)[:, None] * target_RD
        d_hidden_ND[part] = d_RD.where(kept_R[:, None], 0.0).to(d_hidden_ND.dtype)
    return losses_N, d_hidden_ND


def _others(logits_RV: Tensor, target_R1: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Largest logit of each row but the target's, and the sum of exp(logit - largest)."""
    top_R = torch.full((len(logits_RV),), -torch.inf, device=logits_RV.device)
    total_R = torch.zeros_like(top_R)
    for tile_RC, begin in _tiles(logits_RV):
        x_RC = _leave_out(_capped(tile_RC.float(), softcap)[0], target_R1 - begin, -torch.inf)
        new_R = torch.maximum(top_R, x_RC.amax(1))
        shift_R = new_R.where(new_R != -torch.inf, 0.0)
        total_R = total_R * (top_R - shift_R).exp() + (x_RC - shift_R[:, None]).exp_().sum(1)
        top_R = new_R
    return top_R, total_R


def _tiles(logits_RV: Tensor) -> list[tuple[Tensor, int]]:
    return [(tile, i * COLUMNS) for i, tile in enumerate(logits_RV.split(COLUMNS, dim=1))]


def _leave_out(tile_RC: Tensor, at_R1: Tensor, value: float) -> Tensor:
    """`value` in each row's column `at_R1`, where that lies in the tile; without a wait for the device."""
    inside_R1 = (at_R1 >= 0) & (at_R1 < tile_RC.shape[1])
    index_R1 = at_R1.clamp(0, tile_RC.shape[1] - 1)
    return tile_RC.scatter_(1, index_R1, tile_RC.gather(1, index_R1).masked_fill_(inside_R1, value))


def _capped(x: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Soft-capped numbers and the slope there."""
    if softcap is None:
        return x, torch.ones((), device=x.device)
    y = torch.tanh(x / softcap)
    return softcap * y, 1.0 - y * y
