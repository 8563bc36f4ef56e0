"""A layer's products of 8-bit operands: the emulation and, where kernels run, what a card would do, against the exact
products of the rounded operands; and that a whole layer's gradients go through them.
"""

from __future__ import annotations

import os
from typing import get_args

import pytest
import torch
from forked import PYTEST, Forked
from torch import Tensor

from elo_engine.config import Recompute
from elo_engine.model import ops
from elo_engine.model.ops import linear_fp8
from elo_engine.model.ops.quantize_fp8 import EMULATE
from elo_engine.model.reference_fp8 import E4M3, rounded_tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CARD = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
DEVICE = torch.device("cuda" if CARD else "cpu")
WAYS = ["emulated", *(["kernels"] if INTERPRETED or CARD else [])]


@pytest.fixture(autouse=True, params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.delenv(EMULATE, raising=False)
    if request.param == "emulated":
        monkeypatch.setenv(EMULATE, "emulated")
    return str(request.param)


def operands(N: int, D: int, out: int, bias: bool) -> tuple[Tensor, ...]:
    torch.manual_seed(N)
    made = [torch.randn(N, D), torch.randn(out, D) * D**-0.5, torch.randn(out), torch.randn(N, out)]
    x, weight, bias_O, d_out = (tensor.bfloat16().to(DEVICE) for tensor in made)
    return x.requires_grad_(), weight.requires_grad_(), bias_O.requires_grad_(), d_out


def exact(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The product of what the operands are rounded to, x @ y^T, and what it may err: half a unit of bf16, and fp32
    sums of as many terms as there are; of a card's instructions, sums of some 14 bits.
    """
    sums = 2.0**-13 if CARD else x.shape[1] * 2.0**-24
    a, b = (rounded_tensor(t.detach(), E4M3).double() for t in (x, y))
    truth = a @ b.t()
    return truth, truth.abs() * 2.0**-8 + sums * (a.abs() @ b.abs().t())


def assert_close(found: Tensor | None, truth: Tensor, allowed: Tensor) -> None:
    assert found is not None
    excess = (found.double() - truth).abs() - allowed
    assert bool((excess <= 0).all()), f"{float(excess.max()):.3g} beyond its bound"


# rows that are no multiple of 16 are padded where they are summed over
@pytest.mark.parametrize("shape", [(32, 64, 48), (21, 48, 80), (1, 16, 16)])
@pytest.mark.parametrize("bias", [False, True])
def test_out_and_both_gradients(shape: tuple[int, int, int], bias: bool) -> None:
    x, weight, bias_O, d_out = operands(*shape, bias)
    out = ops.linear(x, weight, bias_O if bias else None, fp8=True)
    truth, allowed = exact(x, weight)
    if bias:
        truth = truth + bias_O.detach().double()
        allowed = allowed + 2.0**-7 * truth.abs() + 2.0**-8 * (truth - bias_O.detach().double()).abs()
    assert_close(out, truth, allowed)
    out.backward(d_out)
    assert_close(x.grad, *exact(d_out, weight.t()))
    assert_close(weight.grad, *exact(d_out.t(), x.t()))
    assert out.dtype == x.grad.dtype == weight.grad.dtype == torch.bfloat16  # type: ignore[union-attr]
    if bias:
        assert torch.equal(bias_O.grad, d_out.sum(0))  # type: ignore[arg-type]


def test_it_is_not_the_product_of_bf16() -> None:
    x, weight, *_ = operands(32, 64, 48, False)
    exact = ops.linear(x, weight).detach()
    apart = ops.linear(x, weight, fp8=True).detach() - exact
    assert 0.01 < float(apart.norm() / exact.norm()) < 0.06  # 3.7 % is expected


def test_only_what_is_needed_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for name in ("by_weight", "by_input"):
        right = getattr(linear_fp8.OutGradient, name)
        monkeypatch.setattr(
            linear_fp8.OutGradient, name, lambda *args, name=name, right=right: made.append(name) or right(*args)
        )
    x, weight, _, d_out = operands(32, 64, 48, False)
    ops.linear(x.detach(), weight, fp8=True).backward(d_out)
    ops.linear(x, weight.detach(), fp8=True).backward(d_out)
    assert made == ["by_input", "by_weight"]


def test_the_nodes_with_a_norm_and_an_activation() -> None:
    """Their gradients are those of the same op with bf16 products, up to what rounding to 8 bits explains."""
    torch.manual_seed(0)
    N, D, F = 48, 64, 96
    shapes = {"hidden": (N, D), "update": (N, D), "gamma": (D,), "gate_up": (2 * F, D), "down": (D, F)}
    found = []
    for fp8 in (False, True):
        torch.manual_seed(1)
        t = {name: (torch.randn(shape) * shape[-1] ** -0.25).bfloat16().to(DEVICE).requires_grad_()
             for name, shape in shapes.items()}  # fmt: skip
        total, packed = ops.add_norm_linear(
            t["hidden"], t["update"], t["gamma"], t["gate_up"], None, 1e-5, fp8=fp8
        )
        first = ops.norm_linear(t["hidden"].detach(), t["gamma"], t["gate_up"], None, 1e-5, fp8=fp8)
        out = ops.gated_linear(packed, t["down"], fp8=fp8) + ops.gated_linear(first, t["down"], fp8=fp8)
        (out.float().square().sum() + total.float().sum()).backward()
        found.append({name: tensor.grad.double() for name, tensor in t.items() if tensor.grad is not None})
    assert found[0].keys() == shapes.keys()
    for name, truth in found[0].items():
        apart = float((found[1][name] - truth).norm() / truth.norm())
        assert 0.005 < apart < 0.2, f"{name}: {apart:.3f}"  # 5 products one after the other, 3.7 % each and twice that


def test_a_layer_that_is_run_again_is_the_same_layer(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from .test_ops import tiny_layer

    if DEVICE.type == "cuda":
        pytest.skip("the layer of tests/test_ops.py is made on its own device")
    from elo_engine.model.decoder import run_layer

    spec, weights, rope, packing = tiny_layer(learns=True)
    weights = {name: tensor.detach().bfloat16().requires_grad_() for name, tensor in weights.items()}
    found = []
    for recompute in get_args(Recompute):
        hidden = torch.randn(13, 64, generator=torch.Generator().manual_seed(3)).bfloat16().requires_grad_()
        for tensor in weights.values():
            tensor.grad = None
        out = run_layer(recompute, spec, 0, weights, hidden, rope, packing, fp8=True)
        out.float().square().sum().backward()
        found.append([out.detach(), hidden.grad, *(tensor.grad for tensor in weights.values())])
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))


@pytest.mark.skipif(INTERPRETED, reason="this is the process that it would start")
def test_the_same_under_tritons_interpreter(forked: Forked) -> None:
    """The whole file again, with the kernels that round and torch's product of 8-bit matrices on a CPU."""
    pytest.importorskip("triton", reason="triton is not installed; pip install 'elo-engine[gpu]'")
    from .launching import ROOT

    rounded = "sys.path.insert(0, '.'); from tests import launching; launching._round_as_hardware_does()"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    program = f"import sys; {rounded}\n{PYTEST}"
    done = forked(program, __file__, environment=environment, folder=ROOT, timeout_s=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
