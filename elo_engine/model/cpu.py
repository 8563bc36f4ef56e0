"""The CPU fast path: what ops.py calls on a CPU. The C++ serves where it was built, torch twins elsewhere."""

from __future__ import annotations

from elo_engine.model.cpu_attention import attention, attention_by_segment
from elo_engine.model.cpu_head import frozen_head_loss, head_loss
from elo_engine.model.cpu_memory import keep_freed_memory
from elo_engine.model.cpu_native import CSRC_REASON, HAS_CSRC, instruction_set

__all__ = [
    "CSRC_REASON",
    "HAS_CSRC",
    "attention",
    "attention_by_segment",
    "frozen_head_loss",
    "head_loss",
    "instruction_set",
    "keep_freed_memory",
]
