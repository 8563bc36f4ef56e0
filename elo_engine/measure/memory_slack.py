"""What allocators add to the bytes that were asked for, and what the ledgers leave out.

CPU: the prediction is of tensors, as `tensor_trace` counts them. The ledgers leave out scalars, index lists and other
tensors of a few KiB, which in a model of a few MB show: hence the constant. They never lay more than 0.3 % under a
trace; the share is three times that, so that what is said to fit does. Not counted: C++ scratch (megabytes), BLAS and
Python itself.

GPU: nothing here has been measured on a card yet. Counted: cuBLAS takes a workspace of 32 MiB on Hopper (8 MiB before)
from torch's allocator, cuBLASLt another. Argued: torch's allocator rounds blocks to 512 bytes, and leaves up to 1 MiB
of a large block unsplit; most large tensors of a step are whole multiples of 2 MiB and lose nothing. What is freed in
another order than it was taken leaves gaps, which a card must have room for although no tensor is in them: 3 % is a
guess that only a measurement can replace. Not counted: the CUDA context, which is outside of torch's allocator.
"""

from __future__ import annotations

from elo_engine.measure.ledger import Ledger
from elo_engine.measure.setting import Setting

CPU_SHARE, CPU_BYTES = 0.01, 64 << 10
GPU_SHARE, GPU_BYTES = 0.03, 2 * (32 << 20)


def slack_bytes(setting: Setting, ledger: Ledger) -> int:
    """Bytes on top of the ledger's peak."""
    if setting.device == "cpu":
        return int(CPU_SHARE * ledger.peak_bytes) + CPU_BYTES
    return int(GPU_SHARE * ledger.peak_bytes) + GPU_BYTES
