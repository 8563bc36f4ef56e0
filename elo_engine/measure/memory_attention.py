"""Temporaries of attention beside its inputs, outputs and gradients. Sizes in bytes."""

from __future__ import annotations

from elo_engine.measure.setting import Setting


def flash_backward_bytes(setting: Setting) -> int:
    """Temporaries of flash attention 2's backward pass beside the three gradients, of torch's copy of it as well: an
    fp32 sum of the queries' gradient, padded by 128 tokens a document, and with grouped queries the gradients of keys
    and values once for every query head. Read from its source, not measured.
    """
    spec, B = setting.spec, setting.micro_batch
    width = -(-spec.E // 32) * 32
    total = 4 * (setting.N + 128 * B) * spec.H * width + 4 * setting.N * spec.H
    if spec.K != spec.H:
        total += 2 * setting.N * spec.H * spec.E * setting.width
    return total


def _cpu_blocks(T: int) -> tuple[int, int]:
    """Queries and keys of a block of torch's CPU flash attention."""
    return (256 if T >= 768 else 64 if T >= 192 else 32), 512


def sdpa_forward_bytes(setting: Setting) -> int:
    """Scores, row sums and output of one block a thread on the CPU; nothing on a GPU."""
    if setting.device == "cuda":
        return 0
    queries, keys = _cpu_blocks(setting.sequence_length)
    return 4 * _threads() * (queries * min(keys, setting.sequence_length) + queries * (2 + setting.spec.E))


def sdpa_backward_bytes(setting: Setting) -> int:
    """Scores and their gradient of one block a thread on the CPU; on a GPU as flash attention."""
    if setting.device == "cuda":
        return flash_backward_bytes(setting)
    queries, keys = _cpu_blocks(setting.sequence_length)
    return 4 * _threads() * 2 * queries * min(keys, setting.sequence_length)


def _threads() -> int:
    import torch

    return torch.get_num_threads()
