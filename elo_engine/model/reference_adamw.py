"""What AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) means, in plain torch: with fp32 moments, and with moments
of 8 bits that are rounded at random. Without the C++ extension the 8-bit one is also what the CPU runs.

The 8-bit format (blocks of 256 elements with one scale; idea of Dettmers et al. 2022, arXiv 2110.02861):
    exp_avg     int8  c:  scale * sign(c) * (c / 127)^2        exp_avg_sq  uint8 c:  scale * (c / 255)^4
Whatever is rounded (codes, bf16 weights) goes up with the probability that keeps its mean. The random bits are a hash
of seed, step, tensor and element, so a resumed run draws those that an uninterrupted one would. Every operation is the
one that kernels/adamw_8bit.py does, in the same order, so that results differ where fp32 arithmetic does and nowhere
else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

GROUP = 256  # elements that share a scale
_CHUNK = GROUP * 4096  # elements at a time: temporaries of the hash are 8 MiB each
_MASK = 0xFFFFFFFF
_GOLDEN, _GOLDEN_PRIME = 0x9E3779B9, 0x9E3779B1  # 2^32 / golden ratio, and the prime beside it
_SMALLEST_SCALE = 2.0**-120  # below, roots would lose their meaning, and moments have none beside eps
_WHOLE = 2.0**23  # added and taken off again, it rounds to a whole number


def mix(x: Tensor, key: Tensor) -> Tensor:
    """The 32-bit finaliser of MurmurHash3 (Appleby) with a key in its middle; numbers of 32 bits held in int64."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK
    x = ((x ^ (x >> 13) ^ key) * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)


def step_key(seed: int, step: int) -> int:
    """The 32-bit key of one step's random bits."""
    zero = torch.zeros((), dtype=torch.int64)
    key = zero
    for number in (seed, seed >> 32, step, step >> 32):
        key = mix((key + ((number * _GOLDEN + 1) & _MASK)) & _MASK, zero)
    return int(key)


def random_bits(key: int, tensor: int, first: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """32 random bits for each of the elements `first` to `first + count` of tensor number `tensor`: int64 [count]."""
    zero = torch.zeros((), dtype=torch.int64, device=device)
    base = mix((zero + key + tensor * _GOLDEN) & _MASK, zero)
    key_of_tensor = mix(base, base)
    x = torch.arange(first, first + count, device=device).bitwise_and_(_MASK)
    x.mul_(_GOLDEN_PRIME).add_(base).bitwise_and_(_MASK)
    # `mix` in place: one temporary of 8 bytes an element beside the result
    x.bitwise_xor_(x >> 16).mul_(0x85EBCA6B).bitwise_and_(_MASK)
    x.bitwise_xor_(x >> 13).bitwise_xor_(key_of_tensor).mul_(0xC2B2AE35).bitwise_and_(_MASK)
    return x.bitwise_xor_(x >> 16)


def _rows(flat: Tensor) -> Tensor:
    """[n] -> [groups, 256], the last one filled with zeros."""
    return torch.nn.functional.pad(flat, (0, -flat.numel() % GROUP)).view(-1, GROUP)


def _root(x: Tensor) -> Tensor:
    """The fp32 root rounded correctly, as a GPU and C++ have it. torch's own may be off in its last place (MKL's is);
    through fp64 it is exact, since a root of 24 bits is never within 2^-50 of the middle between two others.
    """
    return x.double().sqrt().float()


def _round_up(low: Tensor, below: Tensor, above: Tensor, value: Tensor, bits: Tensor) -> Tensor:
    """low + 1 with probability (value - below) / (above - below), else low."""
    up = (bits.float() + 0.5) * 2.0**-16 * (above - below) < value - below
    return torch.where(up, low + 1.0, low)


def _low(at: Tensor, most: float) -> Tensor:
    """The code below; a whole number may give the one before it, and is then rounded up with certainty."""
    return ((at - 0.5).clamp_min(0.0) + _WHOLE - _WHOLE).clamp_max(most)


def encode_signed(value: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 [n] and 16 random bits each -> int8 codes [n], fp32 scales [ceil(n / 256)]; right on average."""
    rows = _rows(value)
    scale = rows.abs().amax(dim=1)
    steps = torch.where(scale > _SMALLEST_SCALE, 127.0 / _root(scale), 0.0)
    at = _root(rows.abs()) * steps[:, None]
    low = _low(at, 126.0)
    code = _round_up(low, low * low, low * low + 2.0 * low + 1.0, at * at, _rows(bits))
    code = torch.where(rows < 0, -code, code)
    return code.to(torch.int8).view(-1)[: value.numel()], scale


def encode_unsigned(value: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 [n] >= 0 and 16 random bits each -> uint8 codes [n], fp32 scales; right on average, but never 0 for a
    positive value, since the root of a second moment is a divisor.
    """
    rows = _rows(value)
    scale = rows.amax(dim=1)
    steps = torch.where(scale > _SMALLEST_SCALE, 255.0 / _root(_root(scale)), 0.0)
    at = _root(_root(rows)) * steps[:, None]
    low = _low(at, 254.0)
    at, below = at * at, low * low
    above = below + 2.0 * low + 1.0
    code = _round_up(low, below * below, above * above, at * at, _rows(bits))
    code = torch.where((rows > 0) & (code < 1.0), 1.0, code)
    return code.to(torch.uint8).view(-1)[: value.numel()], scale


def _spread(scales: Tensor, count: int) -> Tensor:
    return scales[:, None].expand(-1, GROUP).reshape(-1)[:count]


def decode_signed(codes: Tensor, scales: Tensor) -> Tensor:
    """What int8 codes [n] mean, fp32 [n]."""
    share = codes.float() * (1.0 / 127.0)
    return share * share.abs() * _spread(scales, codes.numel())


def decode_unsigned(codes: Tensor, scales: Tensor) -> Tensor:
    """What uint8 codes [n] mean, fp32 [n]."""
    share = codes.float() * (1.0 / 255.0)
    share = share * share
    return share * share * _spread(scales, codes.numel())


def round_to_bf16(value: Tensor, bits: Tensor) -> Tensor:
    """fp32 and 16 random bits each -> bf16, right on average; what lies beyond the largest bf16 is cut to it."""
    exact = value.view(torch.int32).long() & _MASK
    rounded = (exact + bits) & _MASK
    rounded = torch.where((rounded & 0x7F800000) == 0x7F800000, exact, rounded) >> 16
    return torch.where(rounded >= 1 << 15, rounded - (1 << 16), rounded).to(torch.int16).view(torch.bfloat16)


def empty_codes(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """8-bit moments of zero for a weight: exp_avg int8, exp_avg_sq uint8 (of its shape), and their fp32 scales."""
    scales = torch.zeros(-(-weight.numel() // GROUP), dtype=torch.float32, device=weight.device)
    codes = torch.zeros_like(weight, dtype=torch.int8, memory_format=torch.contiguous_format)
    return codes, codes.to(torch.uint8), scales, scales.clone()


def leaf_norms(grads: Sequence[Tensor | None]) -> list[Tensor]:
    """The norm of each gradient that is there: fp32 scalars, whatever type the gradients have."""
    return [torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in grads if grad is not None]


def control(
    norms: Sequence[Tensor], powers: Tensor, lr: float, clip: float | None
) -> tuple[Tensor, dict[str, float]]:
    """The fp32 pair [norm, 1 if the step is taken], and the numbers that the update needs; {} if it is not taken.

    norms are the `leaf_norms` of all gradients in the order of the leaves, from however many lists.
    powers is the fp64 vector [beta1^t, beta2^t, t, beta1, beta2]; it is advanced unless the norm is not finite.
    """
    parts = [norm.double() for norm in norms]
    norm = torch.linalg.vector_norm(torch.stack(parts)) if parts else torch.zeros((), dtype=torch.float64)
    finite = bool(torch.isfinite(norm))
    result = torch.stack((norm.float(), norm.new_tensor(finite).float()))
    if not finite:
        return result, {}
    powers[:2] *= powers[3:]
    powers[2] += 1
    power1, power2, _, beta1, beta2 = powers.tolist()
    lr, limit = (float(torch.tensor(number, dtype=torch.float32)) for number in (lr, clip or 0.0))
    numbers = {
        "factor": limit / float(norm) if clip is not None and float(norm) > limit else 1.0,
        "step": lr / (1 - power1),
        "root": 1 / (1 - power2) ** 0.5,
        "rate1": 1 - beta1,
        "rate2": 1 - beta2,
    }
    return result, numbers


@torch.no_grad()
def adamw_fp32(
    grads: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    leaves: Sequence[Tensor] | None,
    powers: Tensor,
    *,
    lr: float,
    eps: float,
    weight_decay: float,
    clip: float | None,
) -> Tensor:
    """One step in place; arguments and result as of kernels/adamw.py `adamw_fp32`, and any float type will do."""
    result, numbers = control(leaf_norms(grads), powers, lr, clip)
    for i, grad in enumerate(grads if numbers else []):
        if grad is None:
            continue
        weight, m, v = weights[i], exp_avgs[i], exp_avg_sqs[i]
        grad = grad.to(weight.dtype) * numbers["factor"]
        m += (grad - m) * numbers["rate1"]
        v += (grad * grad - v) * numbers["rate2"]
        weight -= weight * (lr * weight_decay) + numbers["step"] * m / (_root(v) * numbers["root"] + eps)
        if leaves is not None:
            leaves[i].copy_(weight)
    return result


@torch.no_grad()
def adamw_8bit(
    grads: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    exp_avg_scales: Sequence[Tensor],
    exp_avg_sq_scales: Sequence[Tensor],
    powers: Tensor,
    *,
    lr: float,
    eps: float,
    weight_decay: float,
    clip: float | None,
    key: int,
) -> Tensor:
    """One step in place; arguments and result as of kernels/adamw_8bit.py `adamw_8bit`. Temporaries are bounded."""
    result, numbers = control(leaf_norms(grads), powers, lr, clip)
    if numbers:
        state = (weights, exp_avgs, exp_avg_sqs, exp_avg_scales, exp_avg_sq_scales)
        update_8bit(grads, *state, numbers, eps=eps, decay=lr * weight_decay, key=key)
    return result


@torch.no_grad()
def update_8bit(
    grads: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    exp_avg_scales: Sequence[Tensor],
    exp_avg_sq_scales: Sequence[Tensor],
    numbers: Mapping[str, float],
    *,
    eps: float,
    decay: float,
    key: int,
    first: int = 0,
) -> None:
    """The update of `adamw_8bit` with the numbers that `control` made, of tensors that are `first`, first + 1, ... in
    the model. `decay` is the learning rate times the weight decay. A tensor whose gradient is None stays as it is.
    """
    for i, grad in enumerate(grads):
        if grad is None:
            continue
        flat = [tensor.view(-1) for tensor in (grad, weights[i], exp_avgs[i], exp_avg_sqs[i])]
        for start in range(0, flat[0].numel(), _CHUNK):
            g, weight, m_codes, v_codes = (tensor[start : start + _CHUNK] for tensor in flat)
            groups = slice(start // GROUP, (start + g.numel() - 1) // GROUP + 1)
            m_scales, v_scales = exp_avg_scales[i][groups], exp_avg_sq_scales[i][groups]
            m, v = decode_signed(m_codes, m_scales), decode_unsigned(v_codes, v_scales)
            g = g.float() * numbers["factor"]
            m += (g - m) * numbers["rate1"]
            v += (g * g - v) * numbers["rate2"]
            exact = weight.float()
            change = exact * decay + numbers["step"] * m / (_root(v) * numbers["root"] + eps)
            exact = exact - change
            bits = random_bits(key, first + i, start, g.numel(), g.device)
            for value, codes, scales, encode, chance in (
                (m, m_codes, m_scales, encode_signed, bits >> 16),
                (v, v_codes, v_scales, encode_unsigned, ((bits * _GOLDEN_PRIME) & _MASK) >> 16),
            ):
                new_codes, new_scales = encode(value, chance)
                codes.copy_(new_codes)
                scales.copy_(new_scales)
            weight.copy_(round_to_bf16(exact, bits & 0xFFFF) if weight.dtype == torch.bfloat16 else exact)
