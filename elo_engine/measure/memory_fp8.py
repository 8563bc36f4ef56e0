"""What products of 8-bit operands take on a GPU beside what they take in bf16: the head in both layouts, the gradients
of a chunk's logits, and operands that are rounded for one product and gone after it. Sizes in bytes.

Emulated, as on a CPU, the head is two bf16 matrices, and what the rounding passes take is not counted.
"""

from __future__ import annotations

from elo_engine.measure.ledger import Held, Ledger
from elo_engine.measure.setting import Setting

ACT = "activations"
_ALIGN = 16  # kernels.quantize_fp8.ALIGN


def padded(count: int) -> int:
    """Rows of a vocabulary or of tokens as inner dimension of an 8-bit product."""
    return -(-count // _ALIGN) * _ALIGN


def outliers(D: int) -> int:
    """Columns of a head that are multiplied with what rounding left of them: `reference_fp8.outlier_count`."""
    return min(max(32, D // 64), D // 2) // 8 * 8


def head_bytes(setting: Setting) -> int:
    """Of the rounded head, with its mean, what it was made with and the scales of its rows and columns."""
    if setting.fp8 == "none":
        return 0
    V, D, J = padded(setting.spec.V), setting.spec.D, outliers(setting.spec.D)
    rounded = V * (2 * D + 2 * J) + 4 * (V + D) if setting.device == "cuda" else 4 * setting.spec.V * (D + J)
    return 20 * D + 8 * J + rounded


class Fp8Products:
    """Entries of the layers' products; none where they are of bf16."""

    def __init__(self, setting: Setting, ledger: Ledger) -> None:
        self._ledger, self._N, self._w = ledger, setting.N, setting.width
        self._on = setting.fp8 == "all" and setting.device == "cuda"

    def out(self, out_bytes: int, width: int) -> Held:
        """A projection's result, [N, O] of `out_bytes` from [N, width]: while it is made both operands are there."""
        ledger = self._ledger
        if not self._on:
            return ledger.add(ACT, out_bytes)
        with ledger.during(ACT, (self._N + out_bytes // self._w // self._N) * width):
            return ledger.add(ACT, out_bytes)

    def backward(self, out: int, width: int) -> None:
        """Of a projection from `width` to `out`, entered when both of its results are there: d_out in both layouts, and
        the larger of the weight and the input the other way around.
        """
        if self._on:
            rows = padded(self._N)
            self._ledger.spike(ACT, (self._N + rows) * out + max(out, rows) * width)
