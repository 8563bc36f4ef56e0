"""kernels/adamw.py against an fp64 truth: no worse than torch.optim.AdamW, and each step rounded once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed; pip install 'elo-engine[gpu]'")

from .kernel_errors import assert_no_worse, assert_rounded_once, error_by_row
from .launching import BACKENDS, Launcher

DTYPES = [torch.float32, torch.bfloat16]
BETAS = (0.9, 0.999)
OPTIONS: dict[str, Any] = {"lr": 1e-2, "eps": 1e-8, "weight_decay": 0.1}
# One element; groups and a rest; a tile of 2048; two tiles, the last one ragged.
SIZES = (1, 300, 2048, 2600)
Tensors = list[torch.Tensor]


@pytest.fixture(scope="module", params=BACKENDS)
def launch(request: pytest.FixtureRequest) -> Launcher:
    return Launcher(request.param)


def noise(seed: int, dtype: torch.dtype = torch.float32, sizes: tuple[int, ...] = SIZES) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


def powers() -> torch.Tensor:
    return torch.tensor([1.0, 1.0, 0.0, *BETAS], dtype=torch.float64)


def exact(
    state: list[Tensors], grads: list[torch.Tensor | None], step: int, clip: float | None, *, lr: float, eps: float,
    weight_decay: float,
) -> list[Tensors]:  # fmt: skip
    """Weights, exp_avg, exp_avg_sq in fp64 after step number `step`, by the paper's formulas."""
    norm = sum(float(g.double().square().sum()) for g in grads if g is not None) ** 0.5
    factor = clip / norm if clip is not None and norm > clip else 1.0
    out: list[Tensors] = [[], [], []]
    for weight, m, v, g in zip(*state, grads, strict=True):
        weight, m, v = weight.double(), m.double(), v.double()
        if g is not None:
            m = BETAS[0] * m + (1 - BETAS[0]) * g.double() * factor
            v = BETAS[1] * v + (1 - BETAS[1]) * (g.double() * factor) ** 2
            m_hat, v_hat = m / (1 - BETAS[0] ** step), v / (1 - BETAS[1] ** step)
            weight = weight - lr * weight_decay * weight - lr * m_hat / (v_hat.sqrt() + eps)
        for part, value in zip(out, (weight, m, v), strict=True):
            part.append(value)
    return out


def fp32_start() -> list[Tensors]:
    weights = noise(1)
    return [weights, [torch.zeros_like(w) for w in weights], [torch.zeros_like(w) for w in weights]]


def run_fp32(
    launch: Launcher, state: list[Tensors], grads: list[torch.Tensor | None], counts: torch.Tensor,
    leaves: Tensors | None = None, clip: float | None = None, planted: list[tuple[str, str]] | None = None,
    **options: Any,
) -> torch.Tensor:  # fmt: skip
    copies = None if leaves is None else tuple(leaves)
    (control,) = launch(
        "adamw", "adamw_fp32", tuple(grads), *(tuple(part) for part in state), copies, counts,
        clip=clip, planted=planted, **{**OPTIONS, **options},
    )  # fmt: skip
    assert control is not None
    return control


@pytest.mark.parametrize("clip", [None, 1e6, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fp32_is_no_worse_than_torch(launch: Launcher, dtype: torch.dtype, clip: float | None) -> None:
    """Three steps of all tensors at once; each is one rounding from the truth of the step before."""
    state, counts, leaves = fp32_start(), powers(), [w.bfloat16() for w in noise(9)]
    truth, theirs = state, [w.clone().requires_grad_() for w in state[0]]
    adamw = torch.optim.AdamW(theirs, betas=BETAS, foreach=False, **OPTIONS)
    for step in (1, 2, 3):
        grads = noise(10 + step, dtype)
        before = [[t.clone() for t in part] for part in state]
        truth = exact(truth, list(grads), step, clip, **OPTIONS)
        control = run_fp32(launch, state, list(grads), counts, leaves, clip)
        for parts in zip(state, exact(before, list(grads), step, clip, **OPTIONS), strict=True):
            for found, right in zip(*parts, strict=True):
                assert_rounded_once(found, right)
        for leaf, weight in zip(leaves, state[0], strict=True):
            assert torch.equal(leaf, weight.bfloat16())
        for tensor, grad in zip(theirs, grads, strict=True):
            tensor.grad = grad.float()
        norm = torch.nn.utils.clip_grad_norm_(theirs, clip or float("inf"))
        adamw.step()
        assert float(control[0]) == pytest.approx(float(norm), rel=1e-6) and control[1] == 1.0
    moments = [[adamw.state[t][kind] for t in theirs] for kind in ("exp_avg", "exp_avg_sq")]
    for parts in zip(state, [[t.detach() for t in theirs], *moments], truth, strict=True):
        for found, other, right in zip(*parts, strict=True):
            assert_no_worse(found, other, right, error_by_row)
    assert counts.tolist() == pytest.approx([BETAS[0] ** 3, BETAS[1] ** 3, 3, *BETAS], rel=1e-15)


def test_fp32_with_no_leaf_no_gradient_and_the_same_bits_again(launch: Launcher) -> None:
    first, second = fp32_start(), fp32_start()
    grads: list[torch.Tensor | None] = [*noise(2)]
    grads[1] = None
    for state in (first, second):
        run_fp32(launch, state, grads, powers(), clip=1.0)
    assert all(torch.equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True))
    start = fp32_start()
    assert all(torch.equal(first[part][1], start[part][1]) for part in range(3)), "no gradient, no decay either"
    for found, right in zip(first[0], exact(start, grads, 1, 1.0, **OPTIONS)[0], strict=True):
        assert_rounded_once(found, right)


def test_tensors_inside_larger_ones_at_odd_places(launch: Launcher) -> None:
    """Not aligned to 16 bytes, and what lies beside them is not touched."""
    wide = [[torch.full((302,), 7.0) for _ in range(2)] for _ in range(3)]
    state = [[t[1:301] for t in part] for part in wide]
    for part, start in zip(state, ([0.5, 1.0], [0.0, 0.0], [0.0, 0.0]), strict=True):
        for tensor, value in zip(part, start, strict=True):
            tensor.fill_(value)
    before, grads = [[t.clone() for t in part] for part in state], noise(3, sizes=(300, 300))
    run_fp32(launch, state, list(grads), powers())
    for found, right in zip(state[0], exact(before, list(grads), 1, None, **OPTIONS)[0], strict=True):
        assert_rounded_once(found, right)
    assert all(float(t[0]) == float(t[-1]) == 7.0 for part in wide for t in part)


def test_more_tiles_than_one_sum_takes(launch: Launcher) -> None:
    """8 tiles a sum, and here one sum a round: nothing is left out, nothing counted twice."""
    rounds = ("BLOCK_P=LAUNCH.sums_per_round", "BLOCK_P=1")
    (grad,) = noise(2, sizes=(17 * 2048 + 5,))
    norm = float(grad.double().norm())
    for planted in ([rounds], [rounds, ("range(program * TILES,", "range(0,")], [rounds, ("total_P +=", "total_P =")]):
        state = [[torch.ones_like(grad)], [torch.zeros_like(grad)], [torch.zeros_like(grad)]]
        control = run_fp32(launch, state, [grad], powers(), planted=planted)
        assert (float(control[0]) == pytest.approx(norm, rel=1e-6)) == (planted == [rounds])
        for found, right in zip(state[1], [0.1 * grad.double()], strict=True):
            assert_rounded_once(found, right)


def test_huge_gradients_are_clipped(launch: Launcher) -> None:
    state, grads = fp32_start(), [g * 1e16 for g in noise(4)]
    right = exact(state, list(grads), 1, 1.0, **OPTIONS)
    control = run_fp32(launch, state, list(grads), powers(), clip=1.0)
    assert float(control[0]) > 1e17
    for parts in zip(state, right, strict=True):
        for found, truth in zip(*parts, strict=True):
            assert_rounded_once(found, truth)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grads": (torch.ones(8).half(),)}, r"grads\[0\]: dtype torch\.float16"),
        ({"grads": (torch.ones(9),)}, r"grads\[0\]: 9 elements where weights\[0\] needs 8"),
        ({"grads": ()}, "grads: 0 for 1 weights"),
        ({"weights": (torch.ones(16)[::2],)}, r"weights\[0\]: strides \(2,\); .*contiguous"),
        ({"weights": (torch.ones(8).bfloat16(),)}, r"weights\[0\]: dtype torch\.bfloat16; pass torch\.float32"),
        ({"m": (torch.ones(8).double(),)}, r"exp_avgs\[0\]: dtype torch\.float64"),
        ({"v": ()}, "exp_avg_sqs: 0 tensors for 1 weights"),
        ({"leaves": (torch.ones(8),)}, r"leaves\[0\]: dtype torch\.float32; pass torch\.bfloat16"),
        ({"powers": torch.ones(5)}, "powers: .*torch.float32; pass the vector that adamw_powers made"),
        ({name: (torch.ones(0),) for name in ("grads", "weights", "m", "v")}, "nothing to update"),
    ],
)
def test_fp32_refuses(launch: Launcher, change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {name: (torch.ones(8),) for name in ("grads", "weights", "m", "v")}
    given |= {"leaves": None, "powers": powers(), **change}
    with pytest.raises(ValueError, match=message):
        launch("adamw", "adamw_fp32", *given.values(), clip=None, **OPTIONS)


@pytest.mark.parametrize(
    "planted",
    [
        ("lane < size(table_ptr, tensor, ALIGNED) - start", "lane < size(table_ptr, tensor, ALIGNED) - start - 1"),
        ("total += grad * grad", "total = grad * grad"),
        ("program * TILES + TILES, blocks", "program * TILES + TILES, blocks - 1"),
        ("norm = tl.sqrt(tl.sum(total_P, axis=0))", "norm = tl.sum(total_P, axis=0)"),
        ("tl.load(powers_ptr) * beta1", "tl.load(powers_ptr)"),
        ("tl.load(powers_ptr + 1) * beta2", "tl.load(powers_ptr + 1) * beta1"),
        ("+ 1.0\n    tl.store(powers_ptr, power1", "+ 2.0\n    tl.store(powers_ptr, power1"),
        ("tl.where(norm > clip, clip / norm, 1.0)", "clip / norm + 1.0"),
        ("(1.0 / tl.sqrt(1.0 - power2))", "(1.0 / (1.0 - power2))"),
        ("(1.0 - beta2).to(tl.float32)", "(1.0 - beta2.to(tl.float32))"),
        ("m += (grad - m)", "m += grad"),
        ("v += (grad * grad - v)", "v += (grad - v)"),
        ("tl.load(control_ptr + 4) + eps", "tl.load(control_ptr + 4)"),
        ("master -= decay * master +", "master -= "),
        ("* m / denominator", "* grad / denominator"),
        ("tl.store(leaf_ptr, master.to", "tl.store(leaf_ptr, m.to"),
    ],
)
def test_a_planted_fp32_error_is_seen(launch: Launcher, planted: tuple[str, str]) -> None:
    # After one step of the truth, so that the moments are not zero; small gradients, so that eps matters.
    options = {**OPTIONS, "eps": 1e-3}
    grads = [g * 0.01 for g in noise(8)]
    state = [[t.float() for t in part] for part in exact(fp32_start(), list(grads), 1, 0.5, **options)]
    counts, leaves, later = powers(), [w.bfloat16() for w in state[0]], [g * 3 for g in noise(12)]
    counts[:3] = torch.tensor([BETAS[0], BETAS[1], 1.0])
    right = exact(state, list(later), 2, 0.5, **options)
    norm = sum(float(g.double().square().sum()) for g in later) ** 0.5
    control = run_fp32(launch, state, list(later), counts, leaves, 0.5, [planted], **options)
    with pytest.raises(AssertionError):
        for parts in zip(state, right, strict=True):
            for found, truth in zip(*parts, strict=True):
                assert_rounded_once(found, truth)
        assert all(torch.equal(leaf, w.bfloat16()) for leaf, w in zip(leaves, state[0], strict=True))
        assert float(control[0]) == pytest.approx(norm, rel=1e-6)
        assert counts.tolist() == pytest.approx([BETAS[0] ** 2, BETAS[1] ** 2, 2, *BETAS], rel=1e-14)
