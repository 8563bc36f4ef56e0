"""kernels/swiglu.py (SwiGLU, GeGLU) against an fp64 truth: no worse than plain torch in the same type, rounded once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="triton is not installed; pip install 'elo-engine[gpu]'")

from .kernel_errors import assert_no_worse, assert_rounded_once, error_by_row
from .launching import BACKENDS, Launcher

DTYPES = [torch.float32, torch.bfloat16]
OPS = ["swiglu", "geglu"]
# A block is 1024 columns: one row, less than a block, a block and one, several; and SmolLM2's 1536.
SHAPES = [(1, 7), (3, 100), (2, 1025), (5, 1536), (1, 4096)]


@pytest.fixture(scope="module", params=BACKENDS)
def launch(request: pytest.FixtureRequest) -> Launcher:
    return Launcher(request.param)


def example(rows: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows * 10_000 + width)
    gate, up, d_y = (torch.randn(rows, width, generator=generator).to(dtype) for _ in range(3))
    return gate * 4, up, d_y


def activation(op: str, gate: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) if op == "swiglu" else F.gelu(gate, approximate="tanh")


def plain(op: str, gate: torch.Tensor, up: torch.Tensor, d_y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """y, d_gate, d_up by plain torch and autograd, in the type of the arguments."""
    gate, up = gate.clone().requires_grad_(), up.clone().requires_grad_()
    y = activation(op, gate) * up
    return y.detach(), *torch.autograd.grad(y, (gate, up), d_y)


def run(
    launch: Launcher, op: str, gate: torch.Tensor, up: torch.Tensor, d_y: torch.Tensor, **kwargs: Any
) -> list[torch.Tensor]:
    (y,) = launch("swiglu", f"{op}_forward", gate, up, **kwargs)
    d_gate, d_up = launch("swiglu", f"{op}_backward", d_y, gate, up, **kwargs)
    assert y is not None and d_gate is not None and d_up is not None
    return [y, d_gate, d_up]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_no_worse_than_torch(launch: Launcher, op: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    gate, up, d_y = example(*shape, dtype)
    truth = plain(op, gate.double(), up.double(), d_y.double())
    for ours, theirs, exact in zip(run(launch, op, gate, up, d_y), plain(op, gate, up, d_y), truth, strict=True):
        assert ours.dtype == dtype
        assert_no_worse(ours, theirs, exact, error_by_row)
        assert_rounded_once(ours, exact)


@pytest.mark.parametrize("op", OPS)
def test_every_gate_of_every_size(launch: Launcher, op: str) -> None:
    """Relative to each entry, not to the largest of its row: tiny gates; the negative tail, where tanh is near -1."""
    sizes = torch.cat((torch.logspace(-30, -1, 200), torch.linspace(0.1, 5, 200)))
    gate = torch.cat((sizes, -sizes))[None]
    y, d_gate, _ = run(launch, op, gate, torch.ones_like(gate), torch.ones_like(gate))
    truth = plain(op, gate.double(), torch.ones_like(gate).double(), torch.ones_like(gate).double())
    # exp(z) of |z| < 16 has 16 half units more than its argument.
    assert float((y / truth[0] - 1).abs().max()) < 2.0**-19
    assert float((d_gate - truth[1]).abs().max()) < 2.0**-21


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_halves_of_one_matrix_are_read_and_written_where_they_lie(
    launch: Launcher, op: str, dtype: torch.dtype
) -> None:
    gate, up, d_y = example(4, 1100, dtype)
    packed = torch.cat((gate, up), dim=1)
    d_packed = torch.full_like(packed, 7.0)
    halves = packed.chunk(2, dim=1)
    (y,) = launch("swiglu", f"{op}_forward", *halves)
    launch("swiglu", f"{op}_backward", d_y, *halves, out=d_packed.chunk(2, dim=1))
    expected = run(launch, op, gate, up, d_y)
    assert y is not None and torch.equal(y, expected[0])
    assert torch.equal(d_packed, torch.cat(expected[1:], dim=1))


def test_gradients_may_replace_their_inputs(launch: Launcher) -> None:
    gate, up, d_y = example(3, 1030, torch.bfloat16)
    expected = run(launch, "swiglu", gate, up, d_y)
    launch("swiglu", "swiglu_backward", d_y, gate, up, out=(gate, up))
    assert torch.equal(gate, expected[1]) and torch.equal(up, expected[2])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_backward_writes_y_again(launch: Launcher, op: str, dtype: torch.dtype) -> None:
    """The forward's bits: into rows of a wider matrix, then over d_y while the gradients replace gate and up."""
    gate, up, d_y = example(3, 1030, dtype)
    expected = run(launch, op, gate, up, d_y)
    wide = torch.full((3, 1100), 7.0, dtype=dtype)
    found = launch("swiglu", f"{op}_backward", d_y, gate, up, y_out=wide[:, 10:1040])
    assert len(found) == 2 and torch.equal(wide[:, 10:1040], expected[0])
    assert bool((wide[:, :10] == 7).all()) and bool((wide[:, 1040:] == 7).all())
    for ours, exact in zip(found, expected[1:], strict=True):
        assert ours is not None and torch.equal(ours, exact)
    launch("swiglu", f"{op}_backward", d_y, gate, up, out=(gate, up), y_out=d_y)
    assert all(torch.equal(a, b) for a, b in zip((d_y, gate, up), expected, strict=True))


def saturates(launch: Launcher, op: str, planted: list[tuple[str, str]]) -> bool:
    gate = torch.tensor([[-3e38, -1e20, -1e4, -200.0, 0.0, 200.0, 1e4, 1e20, 3e38]])
    up, d_y = torch.full_like(gate, 0.5), torch.full_like(gate, 2.0)
    relu = gate.clamp_min(0)
    slope = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0, 1.0]])
    found = run(launch, op, gate, up, d_y, planted=planted)
    return all(torch.equal(a, b) for a, b in zip(found, (0.5 * relu, slope, 2 * relu), strict=True))


@pytest.mark.parametrize("op", OPS)
def test_large_gates_saturate_without_nan(launch: Launcher, op: str) -> None:
    assert saturates(launch, op, [])


@pytest.mark.parametrize(
    ("op", "planted"),
    [
        ("geglu", ("tl.minimum(tl.maximum(gate_F, -12.0), 12.0)", "gate_F")),
        ("swiglu", ("tl.exp(-tl.abs(z_F))", "tl.exp(-z_F)")),
    ],
)
def test_a_planted_overflow_is_seen(launch: Launcher, op: str, planted: tuple[str, str]) -> None:
    assert not saturates(launch, op, [planted])


@pytest.mark.parametrize("op", OPS)
def test_no_rows(launch: Launcher, op: str) -> None:
    empty = torch.empty(0, 8)
    assert [tuple(tensor.shape) for tensor in run(launch, op, empty, empty, empty)] == [(0, 8)] * 3


@pytest.mark.parametrize(
    ("gate", "up", "message"),
    [
        (torch.zeros(4, 6).t(), torch.zeros(6, 4), r"gate_NF: strides \(1, 6\).*gate_NF\.contiguous\(\)"),
        (torch.zeros(1, 6).expand(4, 6), torch.zeros(4, 6), "gate_NF: strides .*must not overlap"),
        (torch.zeros(4, 6), torch.zeros(4, 5), "up_NF: .*but gate_NF is"),
        (torch.zeros(4, 6), torch.zeros(4, 6).bfloat16(), "up_NF: .*both must be the same"),
        (torch.zeros(4, 6).double(), torch.zeros(4, 6).double(), "gate_NF: dtype torch.float64"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), "gate_NF: expected rows x columns"),
        (torch.zeros(4, 0), torch.zeros(4, 0), "gate_NF: has no columns"),
    ],
)
def test_refused(launch: Launcher, gate: torch.Tensor, up: torch.Tensor, message: str) -> None:
    for op in OPS:
        with pytest.raises(ValueError, match=message):
            launch("swiglu", f"{op}_forward", gate, up)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"y_out": torch.zeros(4, 5)}, "y_out: .*but gate_NF is"),
        ({"y_out": torch.zeros(4, 6).bfloat16()}, "y_out: .*both must be the same"),
        ({"y_out": torch.zeros(6, 4).t()}, r"y_out: strides \(1, 4\).*y_out\.contiguous\(\)"),
        ({"y_out": torch.zeros(1, 6).expand(4, 6)}, "y_out: strides .*must not overlap"),
        ({"out": (torch.zeros(4, 6), torch.zeros(4, 7))}, "d_up_NF: .*but gate_NF is"),
        ({"d_y_NF": torch.zeros(4, 6).bfloat16()}, "d_y_NF: .*both must be the same"),
        ({"d_y_NF": torch.zeros(6, 4).t()}, r"d_y_NF: strides \(1, 4\)"),
    ],
)
def test_the_backward_refuses(launch: Launcher, kwargs: dict[str, Any], message: str) -> None:
    right = {name: torch.zeros(4, 6) for name in ("d_y_NF", "gate_NF", "up_NF")}
    for op in OPS:
        with pytest.raises(ValueError, match=message):
            launch("swiglu", f"{op}_backward", **{**right, **kwargs})


@pytest.mark.parametrize(
    ("op", "planted"),
    [
        ("swiglu", ("gate_F * sigmoid_F * up_F", "gate_F * sigmoid_F * (up_F + 0.01)")),
        ("swiglu", ("mask=inside_F)", "mask=col_F < F - 1)")),
        ("swiglu", ("z_F = gate_F", "z_F = 1.001 * gate_F")),
        ("swiglu", ("tl.full(gate_F.shape, 1.0", "tl.full(gate_F.shape, 1.01")),
        ("swiglu", ("1.0 / (1.0 + shrink_F)", "1.0 / (1.001 + shrink_F)")),
        ("swiglu", ("other_F = shrink_F * share_F", "other_F = shrink_F * share_F * share_F")),
        ("swiglu", ("tl.where(z_F < 0.0, other_F, share_F)", "tl.where(z_F < 0.0, share_F, other_F)")),
        ("swiglu", ("share_F), other_F * share_F", "share_F), other_F * other_F")),
        ("swiglu", ("share_F), other_F * share_F", "share_F), other_F")),
        ("swiglu", ("act_F = gate_F * sigmoid_F", "act_F = gate_F * sigmoid_F.to(tl.bfloat16).to(tl.float32)")),
        ("swiglu", ("d_gate_F = d_y_F * up_F *", "d_gate_F = d_y_F *")),
        ("swiglu", ("sigmoid_F + gate_F * (d_sigmoid_F", "sigmoid_F - gate_F * (d_sigmoid_F")),
        ("swiglu", ("d_up_F = d_y_F * act_F", "d_up_F = d_y_F * act_F.to(tl.bfloat16).to(tl.float32)")),
        ("swiglu", ("y_F = act_F * up_F", "y_F = act_F")),
        ("geglu", ("-12.0), 12.0)", "-2.0), 2.0)")),
        ("geglu", ("square_F = bounded_F * bounded_F", "square_F = bounded_F")),
        ("geglu", ("z_F = 1.5957691216057308", "z_F = 1.5958")),
        ("geglu", ("1.0 + 0.044715 * square_F", "1.0 + 0.04472 * square_F")),
        ("geglu", ("slope_F = 1.5957691216057308", "slope_F = 1.596")),
        ("geglu", ("1.0 + 0.134145 * square_F", "1.0 + 0.044715 * square_F")),
        ("geglu", ("(d_sigmoid_F * slope_F)", "d_sigmoid_F")),
    ],
)
def test_a_planted_error_is_seen(launch: Launcher, op: str, planted: tuple[str, str]) -> None:
    gate, up, d_y = example(3, 1030, torch.float32 if op == "geglu" else torch.bfloat16)
    y, d_gate, d_up = plain(op, gate.double(), up.double(), d_y.double())
    found = run(launch, op, gate, up, d_y, planted=[planted])
    y_again = torch.zeros_like(gate)
    launch("swiglu", f"{op}_backward", d_y, gate, up, y_out=y_again, planted=[planted])
    with pytest.raises(AssertionError, match="beyond one rounding"):
        for ours, exact in zip((*found, y_again), (y, d_gate, d_up, y), strict=True):
            assert_rounded_once(ours, exact)
