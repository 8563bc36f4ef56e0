"""kernels/rotary_norm.py against an fp64 truth: no worse than plain torch in the same type, and rounded once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed; pip install 'elo-engine[gpu]'")

from .kernel_errors import assert_no_worse, assert_rounded_once, error_by_row
from .launching import BACKENDS, Launcher
from .rotary_definition import (
    DTYPES,
    EPS,
    PARTIAL,
    POSITIONS,
    SHAPES,
    Gammas,
    Shape,
    Tables,
    by_head,
    example,
    gammas,
    plain_norm,
    true_norm,
)

# The interpreter takes milliseconds a program: it shows with 2 for each group of heads what a GPU does with more.
FEW_PROGRAMS = ("LAUNCH.backward_programs // groups", "2")


@pytest.fixture(scope="module", params=BACKENDS)
def launch(request: pytest.FixtureRequest) -> Launcher:
    return Launcher(request.param)


def run_norm(
    launch: Launcher,
    qkv: torch.Tensor,
    tables: Tables,
    both: Gammas,
    d_out: torch.Tensor,
    shape: Shape,
    **kwargs: Any,
) -> list[torch.Tensor]:
    """out, d_qkv, d_q_gamma, d_k_gamma."""
    kwargs |= shape.heads
    (out,) = launch("rotary_norm", "rotary_norm_forward", qkv, *tables, *both, EPS, **kwargs)
    grads = launch("rotary_norm", "rotary_norm_backward", d_out, qkv, *tables, *both, EPS, **kwargs)
    found = [tensor for tensor in (out, *grads) if tensor is not None]
    assert len(found) == 4
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_is_no_worse_than_torch(launch: Launcher, shape: Shape, dtype: torch.dtype) -> None:
    qkv, tables = example(shape, dtype)
    d_out, both = qkv.flip(0, 1), gammas(shape, dtype)
    unit_offset = shape.R == 7
    found = run_norm(launch, qkv, tables, both, d_out, shape, unit_offset=unit_offset)
    assert [tensor.dtype for tensor in found] == [dtype, dtype, torch.float32, torch.float32]
    theirs = plain_norm(qkv, tables, both, d_out, shape, unit_offset)
    truth = true_norm(qkv, tables, both, d_out, shape, unit_offset)
    for ours, torchs, exact in zip(found, theirs, truth, strict=True):
        assert_no_worse(by_head(ours, shape), by_head(torchs, shape), by_head(exact, shape), error_by_row)
        # The gammas' gradients are fp32, so this holds a bf16 run's sum over tokens and heads to fp32, too.
        assert_rounded_once(by_head(ours, shape), by_head(exact, shape))
    v = slice((shape.H + shape.K) * shape.E, None)
    assert torch.equal(found[0][:, v], qkv[:, v]) and torch.equal(found[1][:, v], d_out[:, v])


def test_gammas_in_fp32_beside_bf16_activations(launch: Launcher) -> None:
    qkv, tables = example(PARTIAL, torch.bfloat16)
    q_gamma, k_gamma = gammas(PARTIAL, torch.float32)
    both, d_out = (q_gamma + 1e-4, k_gamma.bfloat16()), qkv.flip(0, 1)
    truth = true_norm(qkv, tables, both, d_out, PARTIAL)
    for ours, exact in zip(run_norm(launch, qkv, tables, both, d_out, PARTIAL), truth, strict=True):
        assert_rounded_once(by_head(ours, PARTIAL), by_head(exact, PARTIAL))


def test_more_tokens_than_programs_and_the_same_bits_again(launch: Launcher) -> None:
    """Some programs walk over one token more than others."""
    planted, tokens = ([], 1100) if launch.backend == "cuda" else ([FEW_PROGRAMS], 3)
    shape = Shape(tokens, 5, 2, 24, 7)
    qkv, tables = example(shape, torch.float32)
    both, d_out = gammas(shape, torch.float32), qkv.flip(0, 1)
    first, second = (run_norm(launch, qkv, tables, both, d_out, shape, planted=planted) for _ in range(2))
    for found, again, exact in zip(first, second, true_norm(qkv, tables, both, d_out, shape), strict=True):
        assert_rounded_once(by_head(found, shape), by_head(exact, shape))
        assert torch.equal(found, again)


def test_what_is_not_wanted_is_not_made(launch: Launcher) -> None:
    qkv, tables = example(PARTIAL, torch.bfloat16)
    both, d_out = gammas(PARTIAL, torch.bfloat16), qkv.flip(0, 1)
    _, d_qkv, d_q_gamma, d_k_gamma = run_norm(launch, qkv, tables, both, d_out, PARTIAL)
    backward = ("rotary_norm", "rotary_norm_backward", d_out, qkv, *tables, *both, EPS)
    alone, *none = launch(*backward, **PARTIAL.heads, need_d_gamma=False)
    assert alone is not None and torch.equal(alone, d_qkv) and none == [None, None]
    nothing, alone_q, alone_k = launch(*backward, **PARTIAL.heads, need_d_qkv=False)
    assert nothing is None and alone_q is not None and alone_k is not None
    # Without the v heads there are more programs, so the order of summation is another one.
    for found, exact in ((alone_q, d_q_gamma), (alone_k, d_k_gamma)):
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="no gradient is asked for"):
        launch(*backward, **PARTIAL.heads, need_d_qkv=False, need_d_gamma=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_inside_a_wider_matrix(launch: Launcher, dtype: torch.dtype) -> None:
    shape = Shape(2, 3, 2, 24, 7)
    qkv, (cos, sin, positions) = example(shape, dtype)
    wide = torch.full((shape.N, qkv.shape[1] + 13), 7.0, dtype=dtype)
    inner = wide[:, 5:-8]
    inner.copy_(qkv)
    both = gammas(shape, dtype)
    expected = run_norm(launch, qkv, (cos, sin, positions), both, qkv, shape)
    cut_cos, cut_sin = (torch.cat((table, table), dim=1)[:, :7] for table in (cos, sin))
    found = run_norm(launch, inner, (cut_cos, cut_sin, positions.int()), both, inner, shape)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(inner, qkv) and bool((wide[:, :5] == 7).all()) and bool((wide[:, -8:] == 7).all())


def test_a_position_outside_the_table_is_poison(launch: Launcher) -> None:
    shape = Shape(2, 2, 1, 10, 3)
    qkv, (cos, sin, _) = example(shape, torch.float32)
    tables, both = (cos, sin, torch.tensor([1, POSITIONS], dtype=torch.int32)), gammas(shape, torch.float32)
    out, d_qkv, d_q_gamma, _ = run_norm(launch, qkv, tables, both, qkv, shape)
    assert bool(torch.isfinite(out[0]).all()) and bool(torch.isfinite(d_qkv[0]).all())
    assert out[1].view(4, 10).isnan().nonzero().tolist() == [[head, i] for head in range(3) for i in range(6)]
    assert bool(d_qkv[1].view(4, 10)[:3].isnan().all()) and bool(d_q_gamma[:6].isnan().all())


def test_zero_and_huge_heads_stay_finite(launch: Launcher) -> None:
    shape = Shape(3, 1, 1, 16, 8)
    _, tables = example(shape, torch.float32)
    qkv = torch.tensor([0.0, 1e15, 1e-12])[:, None] * torch.linspace(1, 2, 48)
    both, d_out = gammas(shape, torch.float32), torch.ones(3, 48)
    out, d_qkv, d_q_gamma, d_k_gamma = run_norm(launch, qkv, tables, both, d_out, shape)
    truth = true_norm(qkv, tables, both, d_out, shape)
    for ours, exact in ((out, truth[0]), (d_q_gamma, truth[2]), (d_k_gamma, truth[3])):
        assert_rounded_once(by_head(ours, shape), by_head(exact, shape))
    assert bool(torch.isfinite(d_qkv).all())


def test_no_rows(launch: Launcher) -> None:
    tables = (torch.ones(3, 4), torch.ones(3, 4), torch.zeros(0, dtype=torch.int64))
    empty, both = torch.empty(0, 32), (torch.ones(8), torch.ones(8))
    out, d_qkv, d_q_gamma, d_k_gamma = run_norm(launch, empty, tables, both, empty, Shape(0, 2, 1, 8, 4))
    assert out.shape == d_qkv.shape == (0, 32)
    assert torch.equal(d_q_gamma, torch.zeros(8)) and torch.equal(d_k_gamma, torch.zeros(8))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"qkv_NC": torch.zeros(64, 4).t()}, r"qkv_NC: strides \(1, 4\)"),
        ({"q_heads": 3}, "qkv_NC: 64 columns, but 3 query and twice 1"),
        ({"cos_PR": torch.zeros(3, 8).bfloat16()}, "cos_PR: dtype torch.bfloat16"),
        ({"positions_N": torch.zeros(4)}, "positions_N: dtype torch.float32"),
        ({"q_gamma_E": torch.ones(15)}, "q_gamma_E: expected a vector of 16 elements"),
        ({"k_gamma_E": torch.ones(32)[::2]}, "k_gamma_E: stride 2"),
        ({"k_gamma_E": torch.ones(16).double()}, "k_gamma_E: dtype torch.float64"),
        ({"d_out_NC": torch.zeros(4, 64).bfloat16()}, "d_out_NC: .*both must be the same"),
        ({"d_out_NC": torch.zeros(64, 4).t()}, r"d_out_NC: strides \(1, 4\)"),
    ],
)
def test_refused(launch: Launcher, wrong: dict[str, Any], message: str) -> None:
    table, ones = torch.zeros(3, 8), torch.ones(16)
    forward = {
        "qkv_NC": torch.zeros(4, 64), "cos_PR": table, "sin_PR": table, "positions_N": torch.zeros(4).long(),
        "q_gamma_E": ones, "k_gamma_E": ones, "eps": EPS, "q_heads": 2, "k_heads": 1, "head_width": 16,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        launch("rotary_norm", "rotary_norm_backward", **{"d_out_NC": torch.zeros(4, 64), **forward, **wrong})
    if "d_out_NC" not in wrong:
        with pytest.raises(ValueError, match=message):
            launch("rotary_norm", "rotary_norm_forward", **{**forward, **wrong})


# What stands in one kernel alone, and what stands in both, which is then planted in each of them by itself.
BOTH = [
    ("/ E + eps", "/ E"),
    ("square_G / E", "square_G / (2 * R)"),
    ("square_G += tl.sum(rest_GS * rest_GS, axis=1)", "square_G += 0.0"),
    ("low_GR * low_GR + high_GR * high_GR", "low_GR * low_GR"),
    ("tl.where(is_v, H + K, H)", "tl.where(is_v, H, H)"),
    ("if is_q:", "if not is_q:"),
    ("gamma = 1.0 + gamma", "gamma = 0.0 + gamma"),
    ("is_q, R + col_R, col_R < R", "is_q, col_R, col_R < R"),
    ("is_q, col_S, col_S < E", "is_q, col_S - 1, col_S < E"),
]
FORWARD = [
    ("low_GR *= rstd_G1 * _scale", "low_GR *= _scale"),
    ("high_GR *= rstd_G1 * _scale", "high_GR *= _scale"),
    ("rest_GS *= rstd_G1 * _scale", "rest_GS *= _scale"),
    ("turn(low_GR, high_GR, cos_1R, sin_1R)", "turn(low_GR, high_GR, cos_1R, -sin_1R)"),
    ("turn(low_GR, high_GR", "turn(low_GR.to(tl.bfloat16).to(tl.float32), high_GR"),
    ("    if not is_v:", "    if True:"),
]
BACKWARD = [
    ("d_high_GR, cos_1R, -sin_1R", "d_high_GR, cos_1R, sin_1R"),
    ("            low_GR *= rstd_G1\n", "            low_GR *= 1.0\n"),
    ("            high_GR *= rstd_G1\n", "            high_GR *= 1.0\n"),
    ("                rest_GS *= rstd_G1\n", "                rest_GS *= 1.0\n"),
    ("d_gamma_low_GR += d_low_GR * low_GR", "d_gamma_low_GR = d_low_GR * low_GR"),
    ("d_gamma_high_GR += d_high_GR * high_GR", "d_gamma_high_GR = d_high_GR * high_GR"),
    ("d_gamma_rest_GS += d_rest_GS * rest_GS", "d_gamma_rest_GS = d_rest_GS * rest_GS"),
    ("d_low_GR *= gamma_low_1R", "d_low_GR *= gamma_high_1R"),
    ("d_high_GR *= gamma_high_1R", "d_high_GR *= gamma_low_1R"),
    ("d_rest_GS *= gamma_rest_1S", "d_rest_GS *= 1.0"),
    ("d_low_GR * low_GR + d_high_GR * high_GR, axis=1", "d_low_GR * low_GR, axis=1"),
    ("along_G += tl.sum(d_rest_GS * rest_GS, axis=1)", "along_G += 0.0"),
    ("(along_G / E)", "(along_G / (2 * R))"),
    ("(d_low_GR - low_GR * along_G1) * rstd_G1", "(d_low_GR - low_GR * along_G1)"),
    ("(d_high_GR - high_GR * along_G1)", "d_high_GR"),
    ("(d_rest_GS - rest_GS * along_G1)", "(d_rest_GS + rest_GS * along_G1)"),
    ("N, tl.num_programs(0)", "N - 1, tl.num_programs(0)"),
    ("tl.sum(d_gamma_low_GR, axis=0)", "tl.max(d_gamma_low_GR, axis=0)"),
    ("tl.sum(d_gamma_high_GR, axis=0)", "tl.max(d_gamma_high_GR, axis=0)"),
    ("tl.sum(d_gamma_rest_GS, axis=0)", "tl.max(d_gamma_rest_GS, axis=0)"),
    ("parts_PGE[:, q_groups:]", "parts_PGE[:, :q_groups]"),
    ("        if not is_v:", "        if True:"),
]


@pytest.mark.parametrize(
    ("function", "planted"),
    [("forward", pair) for pair in BOTH + FORWARD] + [("backward", pair) for pair in BOTH + BACKWARD],
)
def test_a_planted_error_is_seen(launch: Launcher, function: str, planted: tuple[str, str]) -> None:
    # Small enough that eps matters, and some programs have more than one token.
    shape = Shape(3, 2, 1, 24, 7)
    qkv, tables = example(shape, torch.bfloat16)
    qkv, both, d_out = qkv * 0.01, gammas(shape, torch.bfloat16), qkv.flip(0, 1)
    d_arguments = (d_out,) if function == "backward" else ()
    found = launch(
        "rotary_norm",
        f"rotary_norm_{function}",
        *d_arguments,
        qkv,
        *tables,
        *both,
        EPS,
        **shape.heads,
        unit_offset=True,
        planted=[FEW_PROGRAMS, planted],
    )
    truth = true_norm(qkv, tables, both, d_out, shape, unit_offset=True)
    exact = truth[1:] if function == "backward" else truth[:1]
    with pytest.raises(AssertionError, match="beyond one rounding"):
        for ours, right in zip(found, exact, strict=True):
            assert ours is not None
            assert_rounded_once(by_head(ours, shape), by_head(right, shape))
