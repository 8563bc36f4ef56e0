"""Where products of 8-bit operands run, and a frozen head that is rounded to 8 bits.

On a card they are `torch._scaled_mm`'s, of operands that `kernels/quantize_fp8.py` makes. Elsewhere there are none, and
nothing stands in for them unless it is asked for by name: `kernels: reference`, or ELO_FP8=emulated in the environment,
rounds to 8 bits and multiplies in bf16 (`reference_fp8.py`), which shows what training does and is slower than bf16.
"""

from __future__ import annotations

import os
from typing import Any, Literal

import torch
from torch import Tensor

from elo_engine.errors import RefusedError
from elo_engine.model import reference_fp8
from elo_engine.model.ops import choice
from elo_engine.model.reference_adamw import step_key

Fp8 = Literal["none", "head", "all"]
EMULATE = "ELO_FP8"
LEAST = (8, 9)  # compute capability: Ada; Hopper is 9.0
MULTIPLE = 16  # of the inner dimension and of a result's columns, in elements: cuBLASLt's and CUTLASS's alignment


def fp8_emulated() -> bool:
    """Whether the definition was asked for in place of a card's products."""
    return choice.use_reference() or os.environ.get(EMULATE) == "emulated"


def reason_without(device: torch.device) -> str | None:
    """Why this device multiplies no 8-bit floats; None where it does."""
    if device.type != "cuda":
        return f"a {device.type} has no such products"
    found = torch.cuda.get_device_capability(device)
    if found < LEAST:
        return (
            f"{torch.cuda.get_device_name(device)} has compute capability {found[0]}.{found[1]}, and 8-bit floats "
            f"begin with {LEAST[0]}.{LEAST[1]} (Ada, Hopper)"
        )
    return _tried(device)


def _tried(device: torch.device) -> str | None:
    """The kinds of products that training asks for, tried on small matrices: what the installed torch offers for a card
    is found out here and not in the first step.
    """
    a, b = (torch.ones(32, 64, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    one, row = torch.ones((), device=device), torch.ones(32, 1, device=device)
    try:
        torch._scaled_mm(a, b.t(), scale_a=row, scale_b=row.t(), out_dtype=torch.bfloat16)
        bias = torch.zeros(32, device=device, dtype=torch.bfloat16)
        torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, bias=bias, out_dtype=torch.bfloat16)
        for kind in (torch.bfloat16, torch.float32):
            torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=kind)
        torch.cuda.synchronize(device)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return f"torch {torch.__version__} cannot multiply them on {torch.cuda.get_device_name(device)}: {error}"
    return None


def describe_fp8(device: torch.device) -> str:
    """Whether `pretrain.fp8` can be used on a device, in one line."""
    if fp8_emulated():
        return "fp8: emulated (rounded to 8 bits, multiplied in bf16)"
    reason = reason_without(device)
    return "fp8: products of 8-bit floats (pretrain.fp8)" if reason is None else f"fp8: none here, {reason}"


def require_fp8(fp8: Fp8, device: torch.device, dtype: torch.dtype, sizes: dict[str, int]) -> None:
    """Refuse what cannot run with `pretrain.fp8`, before anything is loaded. sizes: of dimensions that are multiplied
    over, by name.

    Raises:
        RefusedError: naming what is missing, and bf16 as what to use.
    """
    use = "use pretrain.fp8: none, which is bf16 (this engine offers no int8 training)"
    if dtype != torch.bfloat16:
        raise RefusedError(
            f"pretrain.fp8: {fp8} rounds from bf16 and adds the target's term in bf16, and this run computes in "
            f"{str(dtype).removeprefix('torch.')}; set dtype: bf16, or {use}"
        )
    ragged = [f"{name} {size}" for name, size in sizes.items() if size % MULTIPLE]
    if ragged:
        raise RefusedError(
            f"pretrain.fp8: {fp8} multiplies over dimensions that are multiples of {MULTIPLE}, and this model has "
            f"{', '.join(ragged)}; {use}"
        )
    if fp8_emulated():
        return
    reason = reason_without(device)
    if reason is not None:
        raise RefusedError(
            f"pretrain.fp8: {fp8}: {reason}; {use}. To see what training in 8 bits does, slowly and on any machine, "
            f"set {EMULATE}=emulated or kernels: reference"
        )
    if not choice.has_triton():
        raise RefusedError(f"pretrain.fp8: {fp8} needs triton to round on a GPU; pip install triton, or {use}")


class Fp8Head:
    """A frozen head in 8 bits without the mean of its rows, in both layouts, each row of either with its own scale. V
    is rounded up to a multiple of 16 by rows of zeros.

    It is rounded anew for each step, without another row that is near the mean: what 8 bits change is then noise of a
    step, where of a head that is rounded once it is part of the head, which training leans on (docs/fp8.md). Under a
    soft-cap no row may be taken off, and it is rounded once.

    Args:
        head_VD: frozen, and kept: each rounding reads it, and the targets' rows are of it.
        hidden_ND: what it will meet, such as a first micro-batch's; its outliers are chosen by it.
        seed: of what is taken off besides the mean; equal seeds draw equal numbers at equal steps.

    Attributes:
        mean_D: what is taken off, fp32; zeros under a soft-cap.
        outliers_J: the columns that are multiplied with what rounding left of them, `reference_fp8.outliers`.
        rows_VC: for the logits, contracted over D and 2 J; its scales, fp32 [V, 1].
        columns_DV: for the gradient, contracted over V; its scales, fp32 [D, 1].
        of_emulation: `rounded_head`, bf16 [V, D + 2 J] and [V, D], in place of all these.
    """

    @torch.no_grad()
    def __init__(
        self, head_VD: Tensor, softcap: float | None, hidden_ND: Tensor | None = None, *, seed: int = 0
    ) -> None:
        self._head_VD, self._seed, self._moves = head_VD.detach(), seed, softcap is None
        self._centre_D = reference_fp8.mean_row(self._head_VD, softcap)
        self._deviation_D = reference_fp8.column_deviations(self._head_VD, self._centre_D)
        self._extremes = self._head_VD.amin(0).float(), self._head_VD.amax(0).float()
        self.outliers_J = reference_fp8.outliers(self._deviation_D, hidden_ND)
        self.mean_D = self._shifted(0)
        self.rows_VC: Tensor | None = None
        self.rows_scale_V1: Tensor | None = None
        self.columns_DV: Tensor | None = None
        self.columns_scale_D1: Tensor | None = None
        self.of_emulation: tuple[Tensor, Tensor] | None = None
        if fp8_emulated():
            self.of_emulation = reference_fp8.rounded_head(self._head_VD, self.mean_D, self.outliers_J)
        else:
            made = self._kernels().quantize_both_layouts(
                self._head_VD, self.mean_D, self.outliers_J, self._extremes
            )
            self.rows_VC, self.rows_scale_V1, self.columns_DV, self.columns_scale_D1 = made

    @torch.no_grad()
    def round(self, step: int) -> None:
        """Round it for a step, in the same memory and without a wait; nothing under a soft-cap."""
        if not self._moves:
            return
        self.mean_D.copy_(self._shifted(step))
        if self.of_emulation is not None:
            made = reference_fp8.rounded_head(self._head_VD, self.mean_D, self.outliers_J)
            for held, new in zip(self.of_emulation, made, strict=True):
                held.copy_(new)
        else:
            out = self.rows_VC, self.rows_scale_V1, self.columns_DV, self.columns_scale_D1
            self._kernels().quantize_both_layouts(
                self._head_VD, self.mean_D, self.outliers_J, self._extremes, out=out
            )

    @property
    def tensors(self) -> list[Tensor]:
        """All that it holds beside the head."""
        held = self.rows_VC, self.rows_scale_V1, self.columns_DV, self.columns_scale_D1
        beside = [self._centre_D, self._deviation_D, *self._extremes, self.mean_D, self.outliers_J]
        return [*beside, *(tensor for tensor in held if tensor is not None), *(self.of_emulation or ())]

    def _shifted(self, step: int) -> Tensor:
        if not self._moves:
            return self._centre_D.clone()
        device = self._centre_D.device
        draw_D = torch.empty(len(self._centre_D), pin_memory=device.type == "cuda")
        draw_D.uniform_(generator=torch.Generator().manual_seed(step_key(self._seed, step)))
        return reference_fp8.shifted_mean(
            self._centre_D, self._deviation_D, draw_D.to(device, non_blocking=True)
        )

    @staticmethod
    def _kernels() -> Any:
        from elo_engine.kernels import quantize_fp8

        return quantize_fp8
