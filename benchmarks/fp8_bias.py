"""Whether a card's sums of 8-bit products are off in one direction: the mean signed difference of the fp8 head's losses
from those of the emulation, whose sums are fp32, on the same rows: `python -m elo_engine.benchmarks.fp8_bias OUT.json`.

Hopper's tensor cores keep some 14 bits of a sum within an instruction (docs/fp8.md), so a logit may be off by 2^-13 of
the sum of its terms' sizes. If all are off towards zero, the losses share that error, and training would find it. The
bound is the loss's error if every logit but the target's, which is a dot product in fp32, were off by that much in the
same direction: 2^-13 sum_v p_v sum_d |hidden_d| |head_vd|, mean over the rows; 0.005 nats at Llama-3.1-8B's width with
unit-variance hidden states, where the first design's error that training found was 0.2.

Random weights of the model's shapes; labels are drawn from the head's own distribution, as text is for a trained model.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from elo_engine.benchmarks.card_report import Cases, refusing
from elo_engine.errors import FailedError, RefusedError
from elo_engine.measure.environment import choose_device
from elo_engine.model import ops, reference_fp8
from elo_engine.model.ops.quantize_fp8 import reason_without
from elo_engine.model.presets import preset_spec

KEPT = 2.0**-13  # of the sum of a logit's terms' sizes
ROWS = 1024  # at a time
# (model, tokens): the 8B's head, whose sums are longest, and two narrower ones
HEADS = (("llama-3.1-8b", 8192), ("llama-3.2-1b", 8192), ("smollm2-135m", 8192))
SEED = 42


def drawn(N: int, D: int, V: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """hidden_ND of unit variance and head_VD of 1 over the width, with a mean row as real heads have one; bf16."""
    generator = torch.Generator(device).manual_seed(SEED)
    hidden_ND = torch.randn(N, D, device=device, generator=generator)
    head_VD = torch.randn(V, D, device=device, generator=generator)
    head_VD += torch.randn(D, device=device, generator=generator)
    return hidden_ND.bfloat16(), head_VD.mul_(D**-0.5).bfloat16()


def labels_and_bound(hidden_ND: Tensor, head_VD: Tensor, kept: float = KEPT) -> tuple[Tensor, Tensor]:
    """-> labels_N drawn from the head's distribution, and of each row the most that its loss may be off, fp32 [N].

    head_VD: without its mean row, as it is multiplied.
    """
    generator = torch.Generator(hidden_ND.device).manual_seed(SEED + 1)
    labels, most = [], []
    sizes_VD = head_VD.abs()
    for rows_RD in hidden_ND.split(ROWS):
        p_RV = F.linear(rows_RD, head_VD).float().softmax(1)
        labels.append(torch.multinomial(p_RV, 1, generator=generator)[:, 0])
        most.append(kept * (torch.mm(p_RV.to(sizes_VD.dtype), sizes_VD).float() * rows_RD.float().abs()).sum(1))
    return torch.cat(labels), torch.cat(most)


def compared(found_N: Tensor, true_N: Tensor, bound_N: Tensor) -> dict[str, float]:
    """The mean signed difference in nats, its standard error over the rows, the bound, and the share of it.

    Raises:
        FailedError: a loss is not finite.
    """
    apart_N = (found_N - true_N).double()
    if not bool(apart_N.isfinite().all()):
        raise FailedError("a loss of the fp8 head is not finite")
    mean, bound = float(apart_N.mean()), float(bound_N.double().mean())
    return {
        "mean_difference_nats": mean, "standard_error_nats": float(apart_N.std()) / math.sqrt(len(apart_N)),
        "bound_nats": bound, "share_of_bound": abs(mean) / bound, "largest_difference_nats": float(apart_N.abs().max()),
        "mean_loss_nats": float(true_N.double().mean()), "rows_above": float((apart_N > 0).double().mean()),
    }  # fmt: skip


def measure(D: int, V: int, N: int, device: torch.device) -> dict[str, float]:
    """One head: the card's products against the emulation's."""
    from elo_engine.kernels import quantize_fp8
    from elo_engine.kernels.linear_cross_entropy_fp8 import linear_cross_entropy_fp8_forward

    hidden_ND, head_VD = drawn(N, D, V, device)
    mean_D = reference_fp8.mean_row(head_VD, None)
    labels_N, bound_N = labels_and_bound(hidden_ND, (head_VD.float() - mean_D).bfloat16())
    outliers_J = reference_fp8.outliers(reference_fp8.column_deviations(head_VD, mean_D), hidden_ND)
    rows_VC, rows_scale_V1, columns_DV, columns_scale_D1 = quantize_fp8.quantize_both_layouts(
        head_VD, mean_D, outliers_J, (head_VD.amin(0).float(), head_VD.amax(0).float())
    )
    found_N, _ = linear_cross_entropy_fp8_forward(
        hidden_ND, head_VD, (rows_VC, rows_scale_V1), (columns_DV, columns_scale_D1), mean_D, outliers_J, labels_N,
        need_d_hidden=False,
    )  # fmt: skip
    del rows_VC, columns_DV
    rounded = reference_fp8.rounded_head(head_VD, mean_D, outliers_J)
    true_N, _ = reference_fp8.linear_cross_entropy_fp8(
        hidden_ND, head_VD, *rounded, mean_D, outliers_J, labels_N, need_d_hidden=False
    )
    return compared(found_N, true_N, bound_N)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    given = parser.parse_args()
    cases = Cases(given.out)
    with refusing():
        device = choose_device(given.device)
        reason = reason_without(device)
        if reason is not None:
            raise RefusedError(reason)
        ops.configure("auto", device)
        # the emulation's sums in fp32 throughout, also where a product is split
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        for model, N in HEADS:
            spec = preset_spec(model)
            with cases.case(model, f"{model}, share_of_bound"):
                found = measure(spec.D, spec.V, N, device)
                cases.figures |= {f"{model}, {name}": value for name, value in found.items()}
            torch.cuda.empty_cache()
        cases.require()


if __name__ == "__main__":
    main()
