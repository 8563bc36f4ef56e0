"""kernels/rotary.py against an fp64 truth: no worse than plain torch in the same type, and rounded once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="triton is not installed; pip install 'elo-engine[gpu]'")

from .kernel_errors import assert_no_worse, assert_rounded_once, error_by_row
from .launching import BACKENDS, Launcher
from .rotary_definition import DTYPES, PARTIAL, POSITIONS, SHAPES, Shape, Tables, by_head, example, turned


@pytest.fixture(scope="module", params=BACKENDS)
def launch(request: pytest.FixtureRequest) -> Launcher:
    return Launcher(request.param)


def run(launch: Launcher, qkv: torch.Tensor, tables: Tables, shape: Shape, **kwargs: Any) -> torch.Tensor:
    out = qkv.clone()
    assert launch("rotary", "rotary_forward", out, *tables, **shape.heads, **kwargs) == [None]
    return out


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inverse", [False, True])
def test_turn_is_no_worse_than_torch(launch: Launcher, shape: Shape, dtype: torch.dtype, inverse: bool) -> None:
    qkv, tables = example(shape, dtype)
    found = run(launch, qkv, tables, shape, inverse=inverse)
    truth = turned(qkv.double(), tables, shape, inverse)
    theirs = turned(qkv, tables, shape, inverse)
    assert_no_worse(by_head(found, shape), by_head(theirs, shape), by_head(truth, shape), error_by_row)
    assert_rounded_once(by_head(found, shape), by_head(truth, shape))
    # The bits of what does not turn are those that lay there, NaN and all.
    v = slice((shape.H + shape.K) * shape.E, None)
    assert torch.equal(found[:, v], qkv[:, v])
    heads = (shape.N, shape.H + 2 * shape.K, shape.E)
    assert torch.equal(found.view(heads)[..., 2 * shape.R :], qkv.view(heads)[..., 2 * shape.R :])


def test_the_inverse_is_the_gradient_and_turns_back(launch: Launcher) -> None:
    qkv, tables = example(PARTIAL, torch.float32)
    d_out, _ = example(PARTIAL, torch.float32)
    d_out = d_out.flip(0)
    leaf = qkv.double().requires_grad_()
    (truth,) = torch.autograd.grad(turned(leaf, tables, PARTIAL), leaf, d_out.double())
    assert_rounded_once(run(launch, d_out, tables, PARTIAL, inverse=True), truth)
    back = run(launch, run(launch, qkv, tables, PARTIAL), tables, PARTIAL, inverse=True)
    torch.testing.assert_close(back, qkv, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_inside_a_wider_matrix(launch: Launcher, dtype: torch.dtype) -> None:
    qkv, (cos, sin, positions) = example(PARTIAL, dtype)
    wide = torch.full((PARTIAL.N, qkv.shape[1] + 13), 7.0, dtype=dtype)
    inner = wide[:, 5:-8]
    inner.copy_(qkv)
    cut_cos, cut_sin = (F.pad(table, (2, 3), value=5.0)[:, 2:-3] for table in (cos, sin))
    assert launch("rotary", "rotary_forward", inner, cut_cos, cut_sin, positions.int(), **PARTIAL.heads) == [None]
    assert torch.equal(inner, run(launch, qkv, (cos, sin, positions), PARTIAL))
    assert bool((wide[:, :5] == 7).all()) and bool((wide[:, -8:] == 7).all())


def poison_is_where_it_belongs(launch: Launcher, planted: list[tuple[str, str]]) -> bool:
    """A token before the table's first row, one behind its last, one far off; what does not turn stays in all of them.

    The tables are the middle of larger ones, so that a kernel that reads beyond them reads numbers.
    """
    shape = Shape(6, 2, 1, 10, 3)
    qkv, (cos, sin, _) = example(shape, torch.float32)
    positions = torch.tensor([0, -1, POSITIONS - 4, 3, 2**40, POSITIONS - 5])
    tables = (cos[2:-2], sin[2:-2], positions)
    found = run(launch, qkv, tables, shape, planted=planted).view(6, 4, 10)
    lost = torch.zeros(6, 4, 10, dtype=torch.bool)
    lost[[1, 2, 4], :3, :6] = True
    safe = torch.where((positions >= 0) & (positions < POSITIONS - 4), positions, 0)
    right = turned(qkv, (*tables[:2], safe), shape).view(6, 4, 10)
    return torch.equal(found.isnan(), lost) and torch.allclose(found[~lost], right[~lost], rtol=0, atol=1e-5)


def test_a_position_outside_the_table_is_poison(launch: Launcher) -> None:
    assert poison_is_where_it_belongs(launch, [])


@pytest.mark.parametrize(
    "planted",
    [("position >= 0", "position >= -1"), ("position < P", "position <= P"), ('float("nan")', "0.0")],
)
def test_a_planted_hole_in_the_check_of_positions_is_seen(launch: Launcher, planted: tuple[str, str]) -> None:
    assert not poison_is_where_it_belongs(launch, [planted])


def test_huge_and_tiny_heads_stay_finite(launch: Launcher) -> None:
    shape = Shape(3, 1, 1, 16, 8)
    _, tables = example(shape, torch.float32)
    qkv = torch.tensor([0.0, 1e30, 1e-30])[:, None] * torch.linspace(1, 2, 48)
    truth = turned(qkv.double(), tables, shape)
    assert_rounded_once(by_head(run(launch, qkv, tables, shape), shape), by_head(truth, shape))


def test_no_rows(launch: Launcher) -> None:
    tables = (torch.ones(3, 4), torch.ones(3, 4), torch.zeros(0, dtype=torch.int64))
    assert run(launch, torch.empty(0, 32), tables, Shape(0, 2, 1, 8, 4)).shape == (0, 32)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"qkv_NC": torch.zeros(64, 4).t()}, r"qkv_NC: strides \(1, 4\).*qkv_NC\.contiguous\(\)"),
    ({"qkv_NC": torch.zeros(1, 64).expand(4, 64)}, "qkv_NC: strides .*must not overlap"),
    ({"qkv_NC": torch.zeros(4, 64).half()}, "qkv_NC: dtype torch.float16"),
    ({"qkv_NC": torch.zeros(4, 72)}, "qkv_NC: 72 columns, but 2 query and twice 1 key/value heads of 16 are 64; pass"),
    ({"k_heads": 0}, "qkv_NC: 64 columns, but 2 query and twice 0"),
    ({"cos_PR": torch.zeros(3, 8).bfloat16()}, "cos_PR: dtype torch.bfloat16; pass the angles' table in torch.float32"),
    ({"sin_PR": torch.zeros(3, 8).double()}, "sin_PR: dtype torch.float64"),
    ({"sin_PR": torch.zeros(3, 7)}, "sin_PR: .*but cos_PR is"),
    ({"sin_PR": torch.zeros(8, 3).t()}, r"sin_PR: strides \(1, 3\)"),
    ({"cos_PR": torch.zeros(3, 9), "sin_PR": torch.zeros(3, 9)}, "cos_PR: 9 angles a position turn 18 .* head has 16"),
    ({"cos_PR": torch.zeros(0, 8), "sin_PR": torch.zeros(0, 8)}, "cos_PR: has no rows"),
    ({"positions_N": torch.zeros(5, dtype=torch.int64)}, "positions_N: expected a vector of 4 elements"),
    ({"positions_N": torch.zeros(4)}, "positions_N: dtype torch.float32; convert the positions to torch.int64"),
    ({"positions_N": torch.zeros(8, dtype=torch.int64)[::2]}, "positions_N: stride 2"),
    ({"head_width": 4096, "qkv_NC": torch.zeros(4, 4 * 4096)}, "head_width: 4096 exceeds 2048"),
]
RIGHT: dict[str, Any] = {
    "qkv_NC": torch.zeros(4, 64), "cos_PR": torch.zeros(3, 8), "sin_PR": torch.zeros(3, 8),
    "positions_N": torch.zeros(4, dtype=torch.int64), "q_heads": 2, "k_heads": 1, "head_width": 16,
}  # fmt: skip


@pytest.mark.parametrize(("wrong", "message"), WRONG)
def test_refused(launch: Launcher, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        launch("rotary", "rotary_forward", **{**RIGHT, **wrong})


@pytest.mark.parametrize(
    "planted",
    [
        ("row * stride_cos_p", "token * stride_cos_p"),
        ("row * stride_sin_p", "token * stride_sin_p"),
        ("return cos_R[None, :]", "return cos_R.to(tl.bfloat16).to(tl.float32)[None, :]"),
        ("low_GR * cos_1R - high_GR * sin_1R", "low_GR * cos_1R + high_GR * sin_1R"),
        ("high_GR * cos_1R + low_GR * sin_1R", "high_GR * cos_1R - low_GR * sin_1R"),
        ("sin_1R = -sin_1R", "sin_1R = sin_1R"),
        ("(head_G[:, None] < HEADS)", "(head_G[:, None] <= HEADS)"),
        ("(col_R[None, :] < R)", "(col_R[None, :] <= R)"),
        ("(col_R[None, :] < R)", "(col_R[None, :] < R - 1)"),
        ("low_ptr_GR + R, mask=inside_GR, other", "low_ptr_GR + R + 1, mask=inside_GR, other"),
        ("token * stride_qkv_n", "(token // 2) * stride_qkv_n"),
    ],
)
def test_a_planted_error_is_seen(launch: Launcher, planted: tuple[str, str]) -> None:
    qkv, tables = example(PARTIAL, torch.bfloat16)
    seen = False
    for inverse in (False, True):
        found = run(launch, qkv, tables, PARTIAL, inverse=inverse, planted=[planted])
        truth = turned(qkv.double(), tables, PARTIAL, inverse)
        try:
            assert_rounded_once(by_head(found, PARTIAL), by_head(truth, PARTIAL))
        except AssertionError:
            seen = True
    assert seen
