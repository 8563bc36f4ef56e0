"""kernels/swiglu.py against an fp64 truth: no worse than plain torch in the same type, and rounded once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="triton is not installed; pip install 'elo-engine[gpu]'")

from .kernel_errors import assert_no_worse, assert_rounded_once, error_by_row
from .launching import BACKENDS, Launcher

DTYPES = [torch.float32, torch.bfloat16]
# A block is 1024 columns: one row, less than a block, a block and one, several; and SmolLM2's 1536.
SHAPES = [(1, 7), (3, 100), (2, 1025), (5, 1536), (1, 4096)]


@pytest.fixture(scope="module", params=BACKENDS)
def launch(request: pytest.FixtureRequest) -> Launcher:
    return Launcher(request.param)


def example(rows: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows * 10_000 + width)
    gate, up, d_y = (torch.randn(rows, width, generator=generator).to(dtype) for _ in range(3))
    return gate * 4, up, d_y


def plain(gate: torch.Tensor, up: torch.Tensor, d_y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """y, d_gate, d_up by plain torch and autograd, in the type of the arguments."""
    gate, up = gate.clone().requires_grad_(), up.clone().requires_grad_()
    y = F.silu(gate) * up
    return y.detach(), *torch.autograd.grad(y, (gate, up), d_y)


def run(launch: Launcher, gate: torch.Tensor, up: torch.Tensor, d_y: torch.Tensor) -> list[torch.Tensor]:
    (y,) = launch("swiglu", "swiglu_forward", gate, up)
    d_gate, d_up = launch("swiglu", "swiglu_backward", d_y, gate, up)
    assert y is not None and d_gate is not None and d_up is not None
    return [y, d_gate, d_up]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_worse_than_torch(launch: Launcher, shape: tuple[int, int], dtype: torch.dtype) -> None:
    gate, up, d_y = example(*shape, dtype)
    truth = plain(gate.double(), up.double(), d_y.double())
    for ours, theirs, exact in zip(run(launch, gate, up, d_y), plain(gate, up, d_y), truth, strict=True):
        assert ours.dtype == dtype
        assert_no_worse(ours, theirs, exact, error_by_row)
        assert_rounded_once(ours, exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_halves_of_one_matrix_are_read_and_written_where_they_lie(
    launch: Launcher, dtype: torch.dtype
) -> None:
    gate, up, d_y = example(4, 1100, dtype)
    packed = torch.cat((gate, up), dim=1)
    d_packed = torch.full_like(packed, 7.0)
    halves = packed.chunk(2, dim=1)
    (y,) = launch("swiglu", "swiglu_forward", *halves)
    launch("swiglu", "swiglu_backward", d_y, *halves, out=d_packed.chunk(2, dim=1))
    expected = run(launch, gate, up, d_y)
    assert y is not None and torch.equal(y, expected[0])
    assert torch.equal(d_packed, torch.cat(expected[1:], dim=1))


def test_gradients_may_replace_their_inputs(launch: Launcher) -> None:
    gate, up, d_y = example(3, 1030, torch.bfloat16)
    expected = run(launch, gate, up, d_y)
    launch("swiglu", "swiglu_backward", d_y, gate, up, out=(gate, up))
    assert torch.equal(gate, expected[1]) and torch.equal(up, expected[2])


def test_large_gates_saturate_without_nan(launch: Launcher) -> None:
    gate = torch.tensor([[-1e4, -200.0, 0.0, 200.0, 1e4]])
    up, d_y = torch.full_like(gate, 3.0), torch.ones_like(gate)
    y, d_gate, d_up = run(launch, gate, up, d_y)
    assert torch.equal(y, torch.tensor([[0.0, 0.0, 0.0, 600.0, 3e4]]))
    assert torch.equal(d_gate, torch.tensor([[0.0, 0.0, 1.5, 3.0, 3.0]]))
    assert torch.equal(d_up, torch.tensor([[0.0, 0.0, 0.0, 200.0, 1e4]]))


def test_no_rows(launch: Launcher) -> None:
    empty = torch.empty(0, 8)
    assert [tuple(tensor.shape) for tensor in run(launch, empty, empty, empty)] == [(0, 8)] * 3


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
    with pytest.raises(ValueError, match=message):
        launch("swiglu", "swiglu_forward", gate, up)


@pytest.mark.parametrize(
    "planted",
    [
        ("gate_F * tl.sigmoid(gate_F) * up_F", "gate_F * tl.sigmoid(gate_F) * (up_F + 0.01)"),
        ("sigmoid_F + silu_F * (1.0 - sigmoid_F)", "sigmoid_F + silu_F * (1.0 - silu_F)"),
        ("d_up_F = d_y_F * silu_F", "d_up_F = d_y_F * silu_F.to(tl.bfloat16).to(tl.float32)"),
        ("mask=inside_F)", "mask=col_F < F - 1)"),
    ],
)
def test_a_planted_error_is_seen(launch: Launcher, planted: tuple[str, str]) -> None:
    gate, up, d_y = example(3, 1030, torch.bfloat16)
    truth = plain(gate.double(), up.double(), d_y.double())
    (y,) = launch("swiglu", "swiglu_forward", gate, up, planted=[planted])
    found = [y, *launch("swiglu", "swiglu_backward", d_y, gate, up, planted=[planted])]
    with pytest.raises(AssertionError):
        for ours, exact in zip(found, truth, strict=True):
            assert ours is not None
            assert_rounded_once(ours, exact)
