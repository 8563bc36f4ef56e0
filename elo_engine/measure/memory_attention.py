"""Temporaries of attention beside its inputs, outputs and gradients. Sizes in bytes."""

from __future__ import annotations

from elo_engine.measure.memory_shapes import padded_documents
from elo_engine.measure.setting import Setting


def flash_backward_bytes(setting: Setting) -> int:
    """Temporaries of flash attention 2's backward pass beside the three gradients, of torch's copy of it as well: an
    fp32 sum of the queries' gradient, padded by 128 tokens a document, and with grouped queries the gradients of keys
    and values once for every query head. Read from its source, not measured.
    """
    spec, B = setting.spec, padded_documents(setting)
    width = -(-spec.E // 32) * 32
    total = 4 * (setting.N + 128 * B) * spec.H * width + 4 * setting.N * spec.H
    if spec.K != spec.H:
        total += 2 * setting.N * spec.H * spec.E * setting.width
    return total


def in_cpp(setting: Setting, index: int) -> bool:
    """Whether csrc computes the attention of this layer; `model/cpu_attention.py`, with rows of one document."""
    if setting.device == "cuda":
        return False
    window, softcap = setting.spec.kind(index).window, setting.spec.softcap
    return setting.width == 4 or softcap is not None or (window is not None and window < setting.sequence_length)


def lse_bytes(setting: Setting) -> int:
    """Log-sum-exp of each query's scores; under a soft-cap the CPU keeps it in two parts."""
    return 4 * setting.spec.H * setting.N * (2 if setting.device == "cpu" and setting.spec.softcap is not None else 1)


def kept_bytes(setting: Setting, index: int) -> int:
    """Beside queries, keys, values and output of a layer, for its backward pass."""
    return lse_bytes(setting) + repeated_bytes(setting)


def repeated_bytes(setting: Setting) -> int:
    """Keys and values once for every query head, which torch's memory-efficient attention wants in fp32 on a GPU and
    keeps for the backward pass (model/cpu_attention.py); rows of one document.
    """
    spec = setting.spec
    if setting.device == "cpu" or setting.width == 2 or spec.H == spec.K:
        return 0
    return 2 * setting.N * spec.H * spec.E * setting.width


def padded_tokens(T: int) -> int:
    """`few_lengths` of model/cpu_attention.py."""
    step = 64 if T > 128 else 16
    return -(-T // step) * step


def padded_bytes(setting: Setting, index: int) -> int:
    """In bf16 on a CPU, of rows whose tokens are no multiple of 64 (model/cpu_attention.py): queries, keys and values
    padded, which are kept instead of views, and by how much the output is larger, or of several rows all
    of it, of which the rest is cut out.
    """
    spec, T, rows = setting.spec, setting.sequence_length, setting.micro_batch
    if setting.device == "cuda" or setting.width == 4 or in_cpp(setting, index):
        return 0
    T_padded = padded_tokens(T)
    if T_padded == T:
        return 0
    output = T_padded - T if rows == 1 else T_padded
    return setting.width * rows * spec.E * (T_padded * (spec.H + 2 * spec.K) + output * spec.H)


def copies_bytes(setting: Setting, index: int, *, backward: bool) -> int:
    """What csrc's attention holds in fp32 of a layer in bf16 during its call: queries, keys, values and output, in the
    backward pass also the output's gradient and those of the first three.
    """
    if setting.width == 4 or not in_cpp(setting, index):
        return 0
    spec = setting.spec
    inputs, output = spec.H + 2 * spec.K, spec.H
    return 4 * setting.N * spec.E * (2 * inputs + 2 * output if backward else inputs + output)


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
