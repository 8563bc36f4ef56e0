"""Weights of 24 bits in two pieces: a bf16 leaf, which the model computes with, and an int8 `low` beside it.

As integers, the bits of the fp32 number are (leaf << 16) + (low << 8): sign and magnitude are apart in fp32, so a carry
from `low` into the leaf is a step to the next bf16, across exponents too. The leaf is the bf16 nearest to the number
(of two equally near the one away from zero), and low is from -128 to 127. The largest number is 0x7F7F7F00, a little
above the largest bf16: whatever lies beyond is cut to it, since its leaf would be an infinity.

AdamW updates the fp32 number and rounds it to 24 bits at random, up with the probability that keeps its mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from elo_engine.model.reference_adamw import GROUP, random_bits

# Elements that are joined, updated and split at a time: temporaries are at most 20 bytes an element, 80 MiB. Every
# chunk has a key of its own, so this number is part of what a run's random bits are.
CHUNK = GROUP * 16384
_CHUNK_KEY = 0xC2B2AE35  # odd, so that no two chunks of a tensor share a key
_LARGEST = torch.tensor(0x7F7F7F00, dtype=torch.int32).view(torch.float32).item()


def chunk_key(key: int, number: int) -> int:
    """The key of chunk `number` of every tensor in a step whose key is `key`."""
    return (key + number * _CHUNK_KEY) & 0xFFFFFFFF


def join_into(out: Tensor, leaf: Tensor, low: Tensor) -> None:
    """The fp32 numbers of flat pieces, into `out`; temporaries as large as `out`."""
    bits = out.view(torch.int32)
    bits.copy_(leaf.view(torch.int16))
    bits.bitwise_left_shift_(16)
    bits.add_(low.to(torch.int32).bitwise_left_shift_(8))


def split_from(exact: Tensor, leaf: Tensor, low: Tensor, bits: Tensor | None = None) -> None:
    """The fp32 numbers of a flat piece into leaf and low, rounded with 8 random bits each (int32), or down to 24 bits
    where there are none; `exact` is written over.
    """
    number = exact.clamp_(-_LARGEST, _LARGEST).view(torch.int32)
    if bits is not None:
        number.add_(bits)  # in magnitude, whatever the sign
    number.bitwise_right_shift_(8)
    upper = (number + 128).bitwise_right_shift_(8)
    leaf.copy_(upper.to(torch.int16).view(torch.bfloat16))
    low.copy_(number.sub_(upper.bitwise_left_shift_(8)))


def rounding_bits(key: int, tensor: int, count: int, device: torch.device) -> Tensor:
    """8 random bits for each of the elements 0 to `count` of a chunk of tensor number `tensor`: int32 [count]."""
    return random_bits(key, tensor, 0, count, device).bitwise_and_(0xFF).to(torch.int32)


def join(leaf: Tensor, low: Tensor) -> Tensor:
    """The fp32 numbers of a contiguous leaf, in its shape."""
    out = torch.empty(leaf.shape, dtype=torch.float32, device=leaf.device)
    flat = [tensor.view(-1) for tensor in (out, leaf, low)]
    for start in range(0, leaf.numel(), CHUNK):
        join_into(*(tensor[start : start + CHUNK] for tensor in flat))
    return out


def split(exact: Tensor, leaf: Tensor, low: Tensor) -> None:
    """Numbers of at most 24 bits into a contiguous leaf and its low bits, exactly."""
    flat = [tensor.reshape(-1) for tensor in (exact, leaf, low)]
    for start in range(0, leaf.numel(), CHUNK):
        part, to_leaf, to_low = (tensor[start : start + CHUNK] for tensor in flat)
        split_from(part.to(leaf.device, torch.float32, copy=True), to_leaf, to_low)
