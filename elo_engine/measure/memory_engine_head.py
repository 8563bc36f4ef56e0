"""What the head's loss and its gradients allocate, all of them made in the forward pass: `cpu_head.py` on the CPU,
`kernels/linear_cross_entropy.py` on a GPU. Sizes in bytes.
"""

from __future__ import annotations

import torch

from elo_engine.measure.environment import has_bf16
from elo_engine.measure.ledger import Held, Ledger
from elo_engine.measure.memory_fp8 import outliers
from elo_engine.measure.setting import Setting

LOSS = "loss workspace"
# cpu_head.HeadTiles
_ROWS, _COLS, _MOST_COLS, _CHUNK_BYTES = 2048, 512, 4096, 128 << 20
_CAPPED_ROWS = 1024  # chunked_head.CHUNK_ROWS, of as many bytes as above
_SWEEP_WIDTH = 32  # cpu_native.fits_frozen_head: widths of whole register tiles
# kernels.linear_cross_entropy.LinearCrossEntropyLaunch
_GPU_CHUNK_BYTES, _ROW_STEP, _MOST_ROWS, _ALIGN = 1 << 30, 256, 8192, 16


def _round_up(count: int, step: int) -> int:
    return -(-count // step) * step


def gpu_chunk(N: int, V: int, width: int) -> int:
    """Rows of logits that are alive at a time, as `LinearCrossEntropyLaunch.chunk` has them."""
    fitting = _GPU_CHUNK_BYTES // (_round_up(V, _ALIGN) * width) // _ROW_STEP * _ROW_STEP
    most = max(_ROW_STEP, min(_MOST_ROWS, fitting))
    chunks = max(1, -(-N // most))
    return min(N, most, _round_up(-(-N // chunks), _ROW_STEP))


def forward(setting: Setting, ledger: Ledger, *, learns: bool) -> Held:
    """-> gradient of the hidden states, which lives until the backward. That of the head is added to the step's sum."""
    spec, N, w = setting.spec, setting.N, setting.width
    losses, d_hidden = ledger.add(LOSS, 4 * N), ledger.add(LOSS, N * spec.D * w)
    if setting.device == "cuda" and setting.fp8 != "none":
        chunk = gpu_chunk(N, spec.V, 3)  # logits in bf16 and gradients in 8 bits; rounded hidden rows, and row scales
        ledger.spike(LOSS, chunk * (3 * _round_up(spec.V, _ALIGN) + spec.D + 2 * outliers(spec.D) + 12))
    elif setting.device == "cuda":
        ledger.spike(LOSS, gpu_chunk(N, spec.V, w) * _round_up(spec.V, _ALIGN) * w)
    elif spec.head_softcap is not None:
        _capped_rows(setting, ledger, learns=learns)
    else:
        _cpu_rows(setting, ledger, learns=learns)
    ledger.drop(losses)
    return d_hidden


def _capped_rows(setting: Setting, ledger: Ledger, *, learns: bool) -> None:
    """`chunked_head.py`: logits, the soft-cap's derivative, and a third of their size; then the products of their
    gradient.
    """
    spec, w = setting.spec, setting.width
    rows = min(setting.N, max(1, min(_CAPPED_ROWS, _CHUNK_BYTES // (4 * spec.V))))
    rounded = w * rows * spec.V if w == 2 else 0
    ledger.spike(LOSS, 12 * rows * spec.V + rounded)
    product = spec.V * spec.D * (w + (4 if w == 2 else 0)) if learns else w * rows * spec.D
    ledger.spike(LOSS, w * rows * spec.V + product)


def _cpu_rows(setting: Setting, ledger: Ledger, *, learns: bool) -> None:
    """Chunks of rows; of two chunks that follow each other, one is dropped when the next one has been set up."""
    spec, N, w = setting.spec, setting.N, setting.width
    most = max(1, min(_ROWS, _CHUNK_BYTES // (4 * spec.V))) if learns else _ROWS
    chunks = -(-N // most)
    rows = -(-N // chunks)
    wide_RD = 4 * rows * spec.D
    tiles = -(-spec.V // _COLS)
    checks = ledger.add(LOSS, 8 * N)  # the rows that have a label
    # A frozen head in fp32 is one C++ sweep, in bf16 or of a ragged width torch's products on tiles of the vocabulary.
    cols = _COLS if learns else min(_MOST_COLS, max(_COLS, _ROWS * _COLS // rows))
    wide = min(cols, spec.V)
    tile = 0
    if w == 2:
        # The processor's bf16 products have results of bf16, beside which the probabilities are rounded and the head's
        # rows copied; a result that is added to a sum in fp32 is cast first. Traced on a Xeon with AMX.
        added = max(rows, wide if learns else 0)
        tile = max(2 * (rows * wide + wide * spec.D + rows * spec.D), 6 * added * spec.D)
        if not has_bf16(torch.device("cpu")):
            # fp32 products take copies of the head's rows, two tiles of them, because one lives until the next is made;
            # where the head learns the last one lives while all are made again, a single tile too
            again = learns and cols >= spec.V
            tile = 4 * spec.D * (2 * spec.V if again else min(2 * cols, spec.V))
    buffer = ledger.add(LOSS, 4 * rows * spec.V if learns else 0)
    before: list[Held] = []
    for _ in range(min(chunks, 2)):
        now = [ledger.add(LOSS, wide_RD)]  # the targets' rows of the head
        if w == 2:
            now.append(ledger.add(LOSS, wide_RD))
        ledger.spike(LOSS, wide_RD)
        now.append(ledger.add(LOSS, wide_RD + 8 * rows))  # the sum, and maximum and sum of every row
        ledger.drop(*before)
        before = now
        if learns:
            before.append(ledger.add(LOSS, 2 * 4 * tiles * rows))
            ledger.spike(LOSS, 4 * tiles * rows)
        elif w == 2 or spec.D % _SWEEP_WIDTH:
            before.append(ledger.add(LOSS, 4 * rows * cols))
        ledger.spike(LOSS, tile)
        before.append(ledger.add(LOSS, 3 * 4 * rows))
    ledger.drop(checks, buffer, *before)
