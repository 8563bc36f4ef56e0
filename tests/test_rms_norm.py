"""kernels/rms_norm.py against an fp64 truth: no worse than plain torch in the same type, and rounded once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="triton is not installed; pip install 'elo-engine[gpu]'")

from .kernel_errors import assert_no_worse, assert_rounded_once, error_by_row
from .launching import BACKENDS, Launcher

DTYPES = [torch.float32, torch.bfloat16]
EPS = 1e-5
# The interpreter takes milliseconds a program: it shows with 3 what a GPU does with 256.
FEW_PROGRAMS = ("backward_programs: int = 256", "backward_programs: int = 3")
# One row; a q/k norm's narrow rows, more of them than a tile holds; SmolLM2's 576; ragged; a power of two;
# one wide row.
SHAPES = [(1, 64), (75, 64), (7, 576), (5, 1000), (3, 2048), (1, 5000)]


@pytest.fixture(scope="module", params=BACKENDS)
def launch(request: pytest.FixtureRequest) -> Launcher:
    return Launcher(request.param)


def example(rows: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows * 10_000 + width)
    x, d_y = (torch.randn(rows, width, generator=generator).to(dtype) for _ in range(2))
    gamma = (1 + 0.3 * torch.randn(width, generator=generator)).to(dtype)
    return x, gamma, d_y


def plain(
    x: torch.Tensor, gamma: torch.Tensor, d_y: torch.Tensor, unit_offset: bool = False
) -> tuple[torch.Tensor, ...]:
    """y, d_x, d_gamma by plain torch and autograd, in the type of the arguments."""
    x, gamma = x.clone().requires_grad_(), gamma.clone().requires_grad_()
    y = F.rms_norm(x, (x.shape[-1],), 1 + gamma if unit_offset else gamma, EPS)
    return y.detach(), *torch.autograd.grad(y, (x, gamma), d_y)


def run(launch: Launcher, x: torch.Tensor, gamma: torch.Tensor, d_y: torch.Tensor, **kwargs: Any) -> list[torch.Tensor]:
    y, rstd, none = launch("rms_norm", "rms_norm_forward", x, gamma, EPS, **kwargs)
    d_x, d_gamma = launch("rms_norm", "rms_norm_backward", d_y, x, gamma, rstd, **kwargs)
    assert y is not None and d_x is not None and d_gamma is not None and none is None
    return [y, d_x, d_gamma]


def run_fused(
    launch: Launcher,
    x: torch.Tensor,
    update: torch.Tensor,
    gamma: torch.Tensor,
    d_y: torch.Tensor,
    d_residual: torch.Tensor,
    **kwargs: Any,
) -> list[torch.Tensor]:
    """sum, y, d_x, d_gamma of Gemma's norm with the residual add and the residual stream's gradient."""
    kwargs |= {"unit_offset": True}
    y, rstd, total = launch("rms_norm", "rms_norm_forward", x, gamma, EPS, update_ND=update, **kwargs)
    grads = launch("rms_norm", "rms_norm_backward", d_y, total, gamma, rstd, d_residual_ND=d_residual, **kwargs)
    found = [tensor for tensor in (total, y, *grads) if tensor is not None]
    assert len(found) == 4
    return found


def plain_fused(
    total: torch.Tensor, gamma: torch.Tensor, d_y: torch.Tensor, d_residual: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """What `run_fused` returns, from the rounded sum, in the type of the arguments."""
    y, d_x, d_gamma = plain(total, gamma, d_y, unit_offset=True)
    return total, y, d_x + d_residual, d_gamma


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_worse_than_torch(launch: Launcher, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, gamma, d_y = example(*shape, dtype)
    truth = plain(x.double(), gamma.double(), d_y.double())
    ours = run(launch, x, gamma, d_y)
    assert [tensor.dtype for tensor in ours] == [dtype, dtype, torch.float32]
    for found, theirs, exact in zip(ours, plain(x, gamma, d_y), truth, strict=True):
        assert_no_worse(found, theirs, exact, error_by_row)
        # d_gamma is fp32, so this holds a bf16 run's sum over the rows to fp32, too.
        assert_rounded_once(found, exact)


@pytest.mark.parametrize("shape", SHAPES[:-1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_add_and_offset_are_no_worse_than_torch(launch: Launcher, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, gamma, d_y = example(*shape, dtype)
    update, d_residual = x.flip(0, 1), 3 * d_y.flip(0, 1)
    found = run_fused(launch, x, update, gamma, d_y, d_residual)
    assert [tensor.dtype for tensor in found] == [dtype, dtype, dtype, torch.float32]
    # What is normed is what is stored, rounded: the truth begins there.
    total = x + update
    assert torch.equal(found[0], total)
    truth = plain_fused(total.double(), gamma.double(), d_y.double(), d_residual.double())
    theirs = plain_fused(total, gamma, d_y, d_residual)
    for ours, torchs, exact in zip(found, theirs, truth, strict=True):
        assert_no_worse(ours, torchs, exact, error_by_row)
        assert_rounded_once(ours, exact)


@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("shape", SHAPES[:-1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_after_the_norm(
    launch: Launcher, shape: tuple[int, int], dtype: torch.dtype, unit_offset: bool
) -> None:
    """Its gradient is that of the sum, so the backward pass is the norm's, which the tests above hold."""
    x, gamma, _ = example(*shape, dtype)
    residual = 3 * torch.cat((x, x), dim=1)[:, shape[1] :].flip(0, 1)
    options = {"unit_offset": unit_offset}
    y, rstd, none = launch("rms_norm", "rms_norm_forward", x, gamma, EPS, residual_ND=residual, **options)
    _, rstd_alone, _ = launch("rms_norm", "rms_norm_forward", x, gamma, EPS, **options)
    theirs = residual + plain(x, gamma, x, unit_offset)[0]
    truth = residual.double() + plain(x.double(), gamma.double(), x.double(), unit_offset)[0]
    assert y is not None and y.dtype == dtype and none is None
    assert rstd is not None and rstd_alone is not None and torch.equal(rstd, rstd_alone)
    assert_no_worse(y, theirs, truth, error_by_row)


@pytest.mark.parametrize(
    "planted",
    [
        ("y_ND += tl.load(residual_ptr_ND", "y_ND -= tl.load(residual_ptr_ND"),
        ("row_N[:, None] * stride_residual_n", "row_N[:, None] * stride_x_n"),
        ("    if HAS_RESIDUAL:\n        residual_ptr_ND", "    y_ND = y_ND.to(tl.bfloat16).to(tl.float32)\n"
         "    if HAS_RESIDUAL:\n        residual_ptr_ND"),
    ],
)  # fmt: skip
def test_a_planted_error_in_the_residual_after_it_is_seen(launch: Launcher, planted: tuple[str, str]) -> None:
    x, gamma, d_y = example(8, 1100, torch.bfloat16)
    residual = torch.cat((x, d_y), dim=1)[:, 1100:]
    truth = residual.double() + plain(x.double(), gamma.double(), x.double())[0]
    for changes in ([], [planted]):
        kwargs = {"residual_ND": residual, "planted": changes}
        y, _, _ = launch("rms_norm", "rms_norm_forward", x, gamma, EPS, **kwargs)
        error = float((y.double() - truth).abs().max() / truth.abs().max())
        # one rounding is half a unit of the entry; two, of entries of about the same size, are seen by their number
        wrong = int((y != truth.to(torch.bfloat16)).sum()) if y is not None else 0
        assert (error > 2.0**-8 or wrong > 0.01 * y.numel()) == bool(changes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_gamma(launch: Launcher, dtype: torch.dtype) -> None:
    x, gamma, d_y = example(5, 300, dtype)
    ones, d_residual = torch.ones_like(gamma), d_y.flip(0)
    truth = plain_fused(x.double(), torch.zeros_like(gamma).double(), d_y.double(), d_residual.double())
    theirs = plain(x, ones, d_y)
    # Without gamma there is nothing that an offset could be added to.
    for unit_offset in (False, True):
        y, rstd, none = launch("rms_norm", "rms_norm_forward", x, None, EPS, unit_offset=unit_offset)
        d_x, d_gamma = launch(
            "rms_norm", "rms_norm_backward", d_y, x, None, rstd,
            need_d_gamma=False, unit_offset=unit_offset, d_residual_ND=d_residual,
        )  # fmt: skip
        assert y is not None and d_x is not None and none is None and d_gamma is None
        assert_no_worse(y, theirs[0], truth[1], error_by_row)
        assert_rounded_once(y, truth[1])
        assert_rounded_once(d_x, truth[2])
    with pytest.raises(ValueError, match=r"gamma_D: None has no gradient; pass gamma, or need_d_gamma=False"):
        launch("rms_norm", "rms_norm_backward", d_y, x, None, rstd)


def test_rstd_is_what_the_backward_needs(launch: Launcher) -> None:
    x, gamma, _ = example(6, 300, torch.bfloat16)
    _, rstd, _ = launch("rms_norm", "rms_norm_forward", x, gamma, EPS)
    assert rstd is not None and rstd.dtype == torch.float32
    assert_rounded_once(rstd, torch.rsqrt(x.double().square().mean(-1) + EPS))


def test_gamma_in_fp32_beside_bf16_activations(launch: Launcher) -> None:
    x, gamma, d_y = example(4, 130, torch.bfloat16)
    gamma = gamma.float() + 1e-4
    truth = plain(x.double(), gamma.double(), d_y.double())
    for found, exact in zip(run(launch, x, gamma, d_y), truth, strict=True):
        assert_rounded_once(found, exact)


def test_more_rows_than_programs_and_the_same_bits_again(launch: Launcher) -> None:
    """Some programs walk over one row more than others."""
    planted, rows = ([], 600) if launch.backend == "cuda" else ([FEW_PROGRAMS], 8)
    x, gamma, d_y = example(rows, 2048, torch.float32)
    first, second = (run(launch, x, gamma, d_y, planted=planted) for _ in range(2))
    truth = plain(x.double(), gamma.double(), d_y.double())
    for found, again, exact in zip(first, second, truth, strict=True):
        assert_rounded_once(found, exact)
        assert torch.equal(found, again)


def test_what_is_not_wanted_is_not_made(launch: Launcher) -> None:
    x, gamma, d_y = example(5, 200, torch.bfloat16)
    _, rstd, _ = launch("rms_norm", "rms_norm_forward", x, gamma, EPS)
    both = launch("rms_norm", "rms_norm_backward", d_y, x, gamma, rstd)
    d_x, none = launch("rms_norm", "rms_norm_backward", d_y, x, gamma, rstd, need_d_gamma=False)
    assert d_x is not None and both[0] is not None and torch.equal(d_x, both[0]) and none is None
    none, d_gamma = launch("rms_norm", "rms_norm_backward", d_y, x, gamma, rstd, need_d_x=False)
    assert d_gamma is not None and both[1] is not None and torch.equal(d_gamma, both[1]) and none is None
    # The residual stream's gradient is part of d_x alone.
    kwargs = {"need_d_x": False, "d_residual_ND": d_y, "unit_offset": True}
    none, d_gamma = launch("rms_norm", "rms_norm_backward", d_y, x, gamma, rstd, **kwargs)
    assert d_gamma is not None and torch.equal(d_gamma, both[1]) and none is None
    with pytest.raises(ValueError, match="neither gradient is asked for"):
        launch("rms_norm", "rms_norm_backward", d_y, x, gamma, rstd, need_d_x=False, need_d_gamma=False)


def test_rows_inside_a_wider_matrix(launch: Launcher) -> None:
    wide_x, gamma, wide_d_y = example(5, 300, torch.bfloat16)
    x, d_y, gamma = wide_x[:, 10:250], wide_d_y[:, :240], gamma[:240]
    kept = wide_x.clone(), wide_d_y.clone()
    found = run(launch, x, gamma, d_y)
    expected = run(launch, x.contiguous(), gamma.contiguous(), d_y.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(wide_x, kept[0]) and torch.equal(wide_d_y, kept[1])
    # The update in rows of another stride than x, the residual's gradient in rows of another stride than d_y.
    found = run_fused(launch, x, d_y, gamma, d_y.contiguous(), x)
    expected = run_fused(launch, x.contiguous(), d_y.contiguous(), gamma.contiguous(), d_y.contiguous(), x.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(wide_x, kept[0]) and torch.equal(wide_d_y, kept[1])


def test_zero_rows_and_huge_rows_stay_finite(launch: Launcher) -> None:
    x = torch.stack((torch.zeros(100), torch.full((100,), 1e15), torch.full((100,), 1e-12)))
    gamma, d_y = torch.ones(100), torch.ones(3, 100)
    truth = plain(x.double(), gamma.double(), d_y.double())
    y, d_x, d_gamma = run(launch, x, gamma, d_y)
    assert_rounded_once(y, truth[0])
    assert_rounded_once(d_gamma, truth[2])
    assert bool(torch.isfinite(d_x).all())


def test_no_rows(launch: Launcher) -> None:
    y, d_x, d_gamma = run(launch, torch.empty(0, 8), torch.ones(8), torch.empty(0, 8))
    assert y.shape == d_x.shape == (0, 8) and torch.equal(d_gamma, torch.zeros(8))
    empty = torch.empty(0, 8)
    assert [len(found) for found in run_fused(launch, empty, empty, torch.ones(8), empty, empty)] == [0, 0, 0, 8]


@pytest.mark.parametrize(
    ("x", "gamma", "message"),
    [
        (torch.zeros(6, 4).t(), torch.ones(6), r"x_ND: strides \(1, 4\).*x_ND\.contiguous\(\)"),
        (torch.zeros(1, 6).expand(4, 6), torch.ones(6), "x_ND: strides .*must not overlap"),
        (torch.zeros(4, 6), torch.ones(5), "gamma_D: expected a vector of 6 elements"),
        (torch.zeros(4, 6), torch.ones(12)[::2], "gamma_D: stride 2"),
        (torch.zeros(4, 6), torch.ones(6).half(), "gamma_D: dtype torch.float16"),
        (torch.zeros(4, 6).half(), torch.ones(6), "x_ND: dtype torch.float16"),
        (torch.zeros(2, 3, 4), torch.ones(4), "x_ND: expected rows x columns"),
        (torch.zeros(1, 16385), torch.ones(16385), "rows of 16385 exceed 16384"),
    ],
)
def test_refused(launch: Launcher, x: torch.Tensor, gamma: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        launch("rms_norm", "rms_norm_forward", x, gamma, EPS)


def test_backward_refuses_what_the_forward_did_not_make(launch: Launcher) -> None:
    x, gamma, d_y = example(4, 64, torch.bfloat16)
    with pytest.raises(ValueError, match=r"rstd_N: dtype torch\.bfloat16"):
        launch("rms_norm", "rms_norm_backward", d_y, x, gamma, torch.ones(4).bfloat16())
    with pytest.raises(ValueError, match="rstd_N: expected a vector of 4 elements"):
        launch("rms_norm", "rms_norm_backward", d_y, x, gamma, torch.ones(3))
    with pytest.raises(ValueError, match=r"d_y_ND: .*both must be the same"):
        launch("rms_norm", "rms_norm_backward", d_y.float(), x, gamma, torch.ones(4))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (torch.zeros(4, 64), "NAME: .*both must be the same"),
        (torch.zeros(4, 63).bfloat16(), "NAME: .*but x_ND is"),
        (torch.zeros(64, 4).bfloat16().t(), r"NAME: strides \(1, 4\).*NAME\.contiguous\(\)"),
        (torch.zeros(1, 64).bfloat16().expand(4, 64), "NAME: strides .*must not overlap"),
    ],
)
def test_update_and_residual_are_refused(launch: Launcher, other: torch.Tensor, message: str) -> None:
    x, gamma, d_y = example(4, 64, torch.bfloat16)
    with pytest.raises(ValueError, match=message.replace("NAME", "update_ND")):
        launch("rms_norm", "rms_norm_forward", x, gamma, EPS, update_ND=other)
    with pytest.raises(ValueError, match=message.replace("NAME", "residual_ND")):
        launch("rms_norm", "rms_norm_forward", x, gamma, EPS, residual_ND=other)
    with pytest.raises(ValueError, match=message.replace("NAME", "d_residual_ND")):
        launch("rms_norm", "rms_norm_backward", d_y, x, gamma, torch.ones(4), d_residual_ND=other)


@pytest.mark.parametrize(
    "planted",
    [
        ("/ D + eps", "/ BLOCK_D + eps"),
        ("/ D + eps", "/ D"),
        ("y_ND = x_ND * rstd_N[:, None]", "y_ND = (x_ND * rstd_N[:, None]).to(tl.bfloat16)"),
        ("d_gamma_ND += d_y_ND * x_hat_ND", "d_gamma_ND = d_y_ND * x_hat_ND"),
        ("tl.sum(d_x_hat_ND * x_hat_ND, axis=1) / D", "tl.sum(d_y_ND * x_hat_ND, axis=1) / D"),
        ("tl.cdiv(N, BLOCK_N), tl.num_programs(0)", "tl.cdiv(N, BLOCK_N) - 1, tl.num_programs(0)"),
    ],
)
def test_a_planted_error_is_seen(launch: Launcher, planted: tuple[str, str]) -> None:
    # Small enough that eps matters, and some programs have more than one tile.
    x, gamma, d_y = example(8, 1100, torch.bfloat16)
    x = x * 0.01
    truth = plain(x.double(), gamma.double(), d_y.double())
    found = run(launch, x, gamma, d_y, planted=[FEW_PROGRAMS, planted])
    with pytest.raises(AssertionError):
        for ours, exact in zip(found, truth, strict=True):
            assert_rounded_once(ours, exact)


@pytest.mark.parametrize(
    "planted",
    [
        ("x_ND += tl.load(update_ptr_ND", "x_ND = tl.load(update_ptr_ND"),
        ("row_N[:, None] * stride_update_n", "row_N[:, None] * stride_x_n"),
        ("x_ND = sum_ND.to(tl.float32)", "x_ND = x_ND"),
        ("gamma_D = 1.0 + gamma_D", "gamma_D = gamma_D"),
        ("y_ND *= _scale(", "y_ND += 0.0 * _scale("),
        ("d_x_hat_ND = d_y_ND * gamma_D[None, :]", "d_x_hat_ND = d_y_ND"),
        ("d_x_ND += tl.load(d_residual_ptr_ND", "d_x_ND -= tl.load(d_residual_ptr_ND"),
        ("row_N[:, None] * stride_d_residual_n", "row_N[:, None] * stride_x_n"),
        (
            "* rstd_N[:, None]\n            if HAS_RESIDUAL",
            "* rstd_N[:, None]\n            d_x_ND = d_x_ND.to(tl.bfloat16).to(tl.float32)\n"
            "            if HAS_RESIDUAL",
        ),
    ],
)
def test_a_planted_error_in_what_is_fused_is_seen(launch: Launcher, planted: tuple[str, str]) -> None:
    x, gamma, d_y = example(8, 1100, torch.bfloat16)
    wide = torch.cat((x.flip(0), d_y.flip(0)), dim=1)
    update, d_residual = wide[:, :1100], wide[:, 1100:]
    total = x + update
    truth = plain_fused(total.double(), gamma.double(), d_y.double(), d_residual.double())
    found = run_fused(launch, x, update, gamma, d_y, d_residual, planted=[FEW_PROGRAMS, planted])
    with pytest.raises(AssertionError, match="beyond one rounding"):
        for ours, exact in zip(found, truth, strict=True):
            assert_rounded_once(ours, exact)
