"""Examples for the kernel of kernels/linear_cross_entropy.py, its fp64 truth, and how the two are compared."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .kernel_errors import assert_rounded_once
from .launching import Launcher

Tensor = torch.Tensor
Step = tuple[Tensor, Tensor, Tensor, Tensor]  # logits_NV, labels_N, hidden_ND, head_VD
Pair = tuple[Tensor, Tensor]

STEM = "linear_cross_entropy"
DTYPES = [torch.float32, torch.bfloat16]
# Small blocks, so that small examples have several.
SMALL = [("block_v: int = 4096", "block_v: int = 1024"), ("block_d: int = 2048", "block_d: int = 64")]


def operands(rows: int, width: int, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """hidden_ND, head_VD, labels_N; the logits have a standard deviation of 3."""
    generator = torch.Generator().manual_seed(rows * 10_000 + vocabulary)
    hidden = (3 * width**-0.5 * torch.randn(rows, width, generator=generator)).to(dtype)
    head = torch.randn(vocabulary, width, generator=generator).to(dtype)
    return hidden, head, torch.randint(0, vocabulary, (rows,), generator=generator)


def example(rows: int, width: int, vocabulary: int, dtype: torch.dtype) -> Step:
    hidden, head, labels = operands(rows, width, vocabulary, dtype)
    return F.linear(hidden, head), labels, hidden, head


def losses(logits: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, labels, reduction="none", ignore_index=-100)


def plain(logits: Tensor, labels: Tensor, softcap: float | None = None) -> Pair:
    """Loss and d loss / d logits by plain torch and autograd, in the type of the logits."""
    logits = logits.clone().requires_grad_()
    loss = losses(logits, labels, softcap)
    (d_logits,) = torch.autograd.grad(loss.sum(), logits)
    return loss.detach(), d_logits


def exact(step: Step, softcap: float | None = None) -> Pair:
    """The truth of the step: the logits as they were rounded, but the target's as an exact dot product."""
    logits, labels, hidden, head = step
    target = labels.clamp_min(0)[:, None]
    z = (hidden.double() * head[target[:, 0]].double()).sum(-1, keepdim=True)
    return plain(logits.double().scatter(1, target, z), labels, softcap)


def run(launch: Launcher, step: Step, **kwargs: Any) -> Pair:
    """Loss and gradient by the kernel; the caller's logits stay as they are."""
    vocabulary = step[0].shape[1]
    padded = F.pad(step[0], (0, 5), value=7.0)
    (loss,) = launch(STEM, "cross_entropy_forward", padded[:, :vocabulary], *step[1:], **kwargs)
    assert loss is not None and loss.dtype == torch.float32
    assert bool((padded[:, vocabulary:] == 7.0).all()), "the kernel wrote beyond the row"
    return loss, padded[:, :vocabulary]


def odd_or_even(step: Step, at: int) -> Step:
    """Every second row."""
    return step[0][at::2], step[1][at::2], step[2][at::2], step[3]


def assert_close(found: Pair, truth: Pair) -> None:
    """The loss is fp32 whatever the logits are; the gradient is rounded once to the logits' type."""
    for ours, true in zip(found, truth, strict=True):
        assert_rounded_once(ours, true)


def inside(matrix: Tensor) -> Tensor:
    """The same values in rows of a wider matrix."""
    return torch.cat((matrix, matrix), dim=1)[:, : matrix.shape[1]]


def strided() -> Step:
    """The largest logit comes late; in one row it is the label's and all but certain."""
    _, labels, hidden, head = example(3, 100, 2500, torch.bfloat16)
    labels[1] = 2400
    hidden[1] = head[2400] * (16 / head[2400].square().sum())
    logits = F.linear(hidden, head)
    logits[::2, 2450] = 14.0
    return logits, labels, inside(hidden), inside(head)


def huge(size: float) -> Step:
    """Logits of 1e4 in sixteenths and less, exact in fp32 in any order of summation: exp(10,000) is inf, and 10,000
    has no room for the loss.
    """
    generator = torch.Generator().manual_seed(5)
    head = torch.randint(-64, 65, (2500, 8), generator=generator) / 64.0
    hidden = torch.randint(-16, 17, (4, 8), generator=generator) / 8.0
    head[:, 0], hidden[:, 0] = 1.0, size
    return F.linear(hidden, head), torch.tensor([3, 1000, 2499, 1200]), hidden, head


def certain() -> Step:
    """The target's logit is 20, the others' -8: its probability is 1 - 8e-10, its loss 8e-10. lse - logit would be 0,
    and p - 1 in fp32, too.
    """
    hidden, head = torch.tensor([[20.0, 0.0]]).bfloat16(), torch.tensor([[-0.4, 1.0]]).repeat(1200, 1).bfloat16()
    head[7] = torch.tensor([1.0, 0.0])
    return F.linear(hidden, head), torch.tensor([7]), hidden, head


def alone() -> Step:
    """All logits but the target's are -inf."""
    logits, *rest = example(2, 8, 1500, torch.float32)
    return torch.full_like(logits, float("-inf")), *rest


def masked() -> Step:
    """A masked vocabulary: its first whole blocks and a rest are -inf."""
    logits, _, hidden, head = example(2, 32, 3000, torch.float32)
    logits[:, :2100] = logits[:, 2800:] = float("-inf")
    return logits, torch.tensor([2200, 2700]), hidden, head


def even() -> Step:
    """Two tokens of about one probability: the loss is log(1 + u) with u near 1."""
    hidden, head = torch.tensor([[0.5], [0.55], [0.45]]), torch.tensor([[1.0], [2.0]])
    return torch.tensor([[9.0, 0.5]]).repeat(3, 1), torch.zeros(3).long(), hidden, head


def capped() -> Step:
    """Logits over 20 on both sides of 0.35, where the series of tanh ends, and far out; targets, too."""
    logits, labels, hidden, head = example(3, 4, 300, torch.float32)
    logits = logits / 3
    logits[:, 5:9] = torch.tensor([[40.0, 9.0, 6.6, -60.0], [1.0, 6.9, 6.6, -60.0], [1.0, 6.9, -7.0, -60.0]])
    labels[:], head[0], hidden[:] = 0, 0.0, 1.0
    head[0, 0], hidden[:, 0] = 1.0, torch.tensor([25.0, 0.5, -8.0])
    return logits, labels, hidden, head


CASES = {
    "strided": strided(),
    "huge": huge(1e4),
    "huge below": huge(-1e4),
    "certain": certain(),
    "alone": alone(),
    "one token": example(3, 8, 1, torch.bfloat16),
    "masked": masked(),
    "even": even(),
    "capped": capped(),
}


def check_case(launch: Launcher, case: str, planted: list[tuple[str, str]]) -> None:
    step, softcap = CASES[case], 20.0 if case == "capped" else None
    found, truth = run(launch, step, softcap=softcap, planted=planted), exact(step, softcap)
    if case == "certain":
        # The exponent is an fp32 number near -21: half a unit of it is 2^-20 of the loss, and it is rounded twice.
        assert 5e-10 < float(truth[0]) < 2e-9
        ratio = float(found[0]) / float(truth[0])
        assert abs(ratio - 1) <= 2.0**-18, f"{ratio:.9g} times its loss"
        assert_rounded_once(found[1], truth[1])
    else:
        assert_close(found, truth)
