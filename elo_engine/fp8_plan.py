"""What `pretrain.fp8` means for a plan: where it cannot be, and what is said of it before anything runs."""

from __future__ import annotations

from typing import Literal

from elo_engine.config import RunConfig
from elo_engine.errors import UsageError
from elo_engine.measure.expected import Rate


def fp8(config: RunConfig) -> Literal["none", "head", "all"]:
    """Which products of ELO pretraining multiply 8-bit operands.

    Raises:
        UsageError: the head learns, so its outliers and its mean would not be what they were.
    """
    if config.pretrain.fp8 != "none" and config.align.when == "interleaved":
        raise UsageError(
            f"pretrain.fp8: {config.pretrain.fp8} is for a frozen head, and with align.when: interleaved the head "
            "learns; set pretrain.fp8: none, which is bf16, or align.when: after"
        )
    return config.pretrain.fp8


def fp8_refusals(config: RunConfig, rate: Rate | None) -> list[str]:
    """Why `pretrain.fp8` cannot run on a card that is known to multiply no 8-bit floats; [] else."""
    if config.pretrain.fp8 == "none" or rate is None or rate.fp8 is not False:
        return []
    return [
        f"pretrain.fp8: {config.pretrain.fp8} needs products of 8-bit floats, which begin with Ada and Hopper, and "
        f"this card has none ({rate.what}); use pretrain.fp8: none, which is bf16 (this engine offers no int8 training)"
    ]


def fp8_warnings(config: RunConfig, device: str) -> list[str]:
    """What a plan for a CPU leaves out."""
    if config.pretrain.fp8 == "none" or device == "cuda":
        return []
    return [
        f"pretrain.fp8: {config.pretrain.fp8} is refused on a CPU unless ELO_FP8=emulated asks for its emulation, "
        "which is slower than bf16 and takes more memory than is predicted here"
    ]
