"""Rounding to 8-bit floats: the definition against the formats' own bounds, the kernels against the definition to the
bit, and the product of what was rounded.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed; pip install 'elo-engine[gpu]'")

from elo_engine.model import reference_fp8
from elo_engine.model.reference_fp8 import E4M3, E5M2, Format

from .launching import BACKENDS, Launcher

Tensor = torch.Tensor
STEM = "quantize_fp8"
KINDS = [E4M3, E5M2]
# Half a unit of the mantissa, and half of the smallest number, as a share of the largest: a scale of a power of two
# leaves the largest number of a row between half of the format's largest and all of it.
HALF_UNIT = {E4M3: 2.0**-4, E5M2: 2.0**-3}
FLUSHED = {E4M3: 2.0**-10 / 224, E5M2: 2.0**-17 / 28672}


@pytest.fixture(scope="module", params=BACKENDS)
def launch(request: pytest.FixtureRequest) -> Launcher:
    if request.param == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this card has no 8-bit floats")
    return Launcher(request.param)


def example(rows: int, width: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Numbers of many sizes in every row, and rows of many sizes."""
    generator = torch.Generator().manual_seed(rows * 1000 + width)
    spread = torch.exp2(torch.randint(-24, 1, (rows, width), generator=generator).float())
    size = torch.exp2(torch.randint(-40, 41, (rows, 1), generator=generator).float())
    return (torch.randn(rows, width, generator=generator) * spread * size).to(dtype)


def bits(q: Tensor) -> Tensor:
    return q.contiguous().view(torch.uint8)


@pytest.mark.parametrize("kind", KINDS, ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("by", ["row", "tensor"])
def test_the_definition_keeps_the_formats_bounds(kind: Format, by: str) -> None:
    x = example(40, 3000, torch.float32)
    quantize = reference_fp8.quantize_rows if by == "row" else reference_fp8.quantize_tensor
    q, scale = quantize(x, kind)
    mantissa, _ = torch.frexp(scale)
    assert bool((mantissa == 0.5).all()), "a scale is no power of two"
    largest = x.double().abs().amax(1, keepdim=True) if by == "row" else x.double().abs().amax()
    error = (q.double() * scale.double() - x.double()).abs()
    allowed = torch.maximum(x.double().abs() * HALF_UNIT[kind], largest * FLUSHED[kind])
    assert bool((error <= allowed).all()), float((error / allowed).max())
    assert bool((error > allowed / 2).any()), "the bound is not what limits anything"
    rounded = reference_fp8.rounded_rows(x, kind) if by == "row" else reference_fp8.rounded_tensor(x, kind)
    assert torch.equal(rounded.double(), q.double() * scale.double()), "bf16 does not hold it exactly"


@pytest.mark.parametrize("kind", KINDS, ids=["e4m3", "e5m2"])
def test_a_scale_is_the_smallest_that_fits(kind: Format) -> None:
    sizes = torch.tensor([kind.largest, kind.largest * 1.01, kind.largest / 2, 1.0, 3e-20, 0.0, 1e38])
    scales = reference_fp8.scale_of(sizes, kind)
    assert scales[:3].tolist() == [1.0, 2.0, 0.5] and float(scales[5]) == 2.0**-100
    for size, scale in zip(sizes.double().tolist(), scales.double().tolist(), strict=True):
        assert size / scale <= kind.largest and (size == 0.0 or size / (scale / 2) > kind.largest)
    assert bool(reference_fp8.scale_of(torch.tensor([torch.inf, torch.nan]), kind).isnan().all())


def test_where_nothing_underflows_it_does_not_matter_whose_the_scale_is() -> None:
    """So one scale for a whole matrix costs no precision in the layers; rows a thousand times apart in size."""
    x = torch.randn(64, 200).abs().add(1).mul(torch.logspace(0, 3, 64)[:, None])
    by_row, by_tensor = (f(x) for f in (reference_fp8.rounded_rows, reference_fp8.rounded_tensor))
    assert torch.equal(by_row, by_tensor)
    x[0] *= 2.0**-20
    assert not torch.equal(reference_fp8.rounded_rows(x), reference_fp8.rounded_tensor(x))


@pytest.mark.parametrize("kind", KINDS, ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(5, 100), (3, 5000), (0, 64), (1, 1)])
def test_rows_by_the_kernel(launch: Launcher, shape: tuple[int, int], dtype: torch.dtype, kind: Format) -> None:
    x = example(*shape, dtype)
    q, scale = launch(STEM, "quantize_rows", x, kind.dtype)
    true, true_scale = reference_fp8.quantize_rows(x, kind) if shape[0] else (q, scale)
    assert torch.equal(scale, true_scale) and torch.equal(bits(q), bits(true))


@pytest.mark.parametrize("left", [True, False])
def test_rests_behind_the_rows(launch: Launcher, left: bool) -> None:
    """To the bit, into rows of a larger stride; q + rest is off by 2^-8 of the number at most."""
    x, outliers = example(5, 100), torch.tensor([3, 17, 18, 40, 64, 77, 98, 99])
    whole = torch.zeros(5, 128, dtype=torch.uint8).view(torch.float8_e4m3fn)
    _, scale = launch(STEM, "quantize_rows", x, outliers_J=outliers, left=left, out_NC=whole[:, :116])
    true, true_scale = reference_fp8.quantize_rows(x, E4M3, outliers, left=left)
    assert torch.equal(scale, true_scale) and torch.equal(bits(whole[:, :116]), bits(true))
    assert not bits(whole[:, 116:]).any()
    q, rest = (true[:, at : at + 8].double() * true_scale.double() for at in ((100, 108) if left else (108, 100)))
    assert torch.equal(q, true[:, outliers].double() * true_scale.double())
    flushed = x.double().abs().amax(1, keepdim=True) * FLUSHED[E4M3]
    wanted = x[:, outliers].double()
    assert bool(((q + rest - wanted).abs() <= wanted.abs() * 2.0**-8 + flushed).all())


@pytest.mark.parametrize("kind", KINDS, ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("shape", [(5, 100), (200, 150), (32, 64), (130, 16)])
@pytest.mark.parametrize(("plain", "transposed"), [(True, False), (False, True), (True, True)])
def test_a_matrix_by_the_kernel(
    launch: Launcher, shape: tuple[int, int], plain: bool, transposed: bool, kind: Format
) -> None:
    x = torch.cat((example(*shape), example(*shape)), dim=1)[:, : shape[1]]  # of any row stride
    q, other, scale = launch(STEM, "quantize_tensor", x, kind.dtype, plain=plain, transposed=transposed)
    true, true_scale = reference_fp8.quantize_tensor(x, kind)
    assert torch.equal(scale, true_scale) and (q is None) != plain and (other is None) != transposed
    if q is not None:
        assert torch.equal(bits(q), bits(true))
    if other is not None:
        assert other.shape == (shape[1], -(-shape[0] // 16) * 16)
        assert torch.equal(bits(other[:, : shape[0]]), bits(true.t())) and not bits(other[:, shape[0] :]).any()


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_is_not_hidden(launch: Launcher, bad: float) -> None:
    x = example(4, 300)
    x[1, 7] = bad
    for found in (launch(STEM, "quantize_rows", x), reference_fp8.quantize_rows(x)):
        back = found[0].float() * found[1]
        assert back[1].isnan().any() and back[[0, 2, 3]].isfinite().all()
    _, _, scale = launch(STEM, "quantize_tensor", x)
    assert scale.isnan() and reference_fp8.quantize_tensor(x)[1].isnan()


def extremes(head: Tensor) -> tuple[Tensor, Tensor]:
    return head.amin(0).float(), head.amax(0).float()


def test_a_head_that_is_not_finite_is_not_hidden(launch: Launcher) -> None:
    for bad in (torch.nan, torch.inf):
        head = example(48, 64)
        head[5, 9] = bad
        _, rows_scale, columns, columns_scale = launch(
            STEM, "quantize_both_layouts", head, torch.zeros(64), torch.arange(8), extremes(head)
        )
        assert rows_scale is not None and columns is not None and columns_scale is not None
        back = columns.float() * columns_scale
        assert back[9].isnan().any() and back[[8, 10]].isfinite().all()


@pytest.mark.parametrize("vocabulary", [48, 300])
def test_both_layouts_of_a_head(launch: Launcher, vocabulary: int) -> None:
    head = example(vocabulary, 64)
    mean = reference_fp8.mean_row(head, None)
    outliers = reference_fp8.outliers(reference_fp8.column_deviations(head, mean), None)
    made = launch(STEM, "quantize_both_layouts", head, mean, outliers, extremes(head))
    rows, rows_scale, columns, columns_scale = (tensor for tensor in made if tensor is not None)
    head = head.float() - mean
    padded = -(-vocabulary // 16) * 16
    assert rows.shape == (padded, 128) and columns.shape == (64, padded) and not bits(rows)[vocabulary:].any()
    assert rows_scale.shape == (padded, 1) and columns_scale.shape == (64, 1)
    assert not bits(columns[:, vocabulary:]).any() and bool((rows_scale[vocabulary:] == 1).all())
    for found, scale, truth in (
        (rows[:vocabulary], rows_scale[:vocabulary], reference_fp8.quantize_rows(head, E4M3, outliers, left=False)),
        (columns[:, :vocabulary], columns_scale, reference_fp8.quantize_rows(head.t())),
    ):
        true, true_scale = truth
        assert torch.equal(bits(found), bits(true)) and torch.equal(scale, true_scale)
    # the same places, written over by another head
    other = -2 * head.bfloat16()
    launch(STEM, "quantize_both_layouts", other, mean, outliers, extremes(other), out=tuple(made))
    again = launch(STEM, "quantize_both_layouts", other, mean, outliers, extremes(other))
    for written, true in zip(made, again, strict=True):
        assert written is not None and true is not None and torch.equal(bits(written), bits(true))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(x_ND - shift_D) * inverse_D", "x_ND * inverse_D"),
        ("tl.load(most_ptr", "tl.load(least_ptr"),
        ("shift_D - tl.load(least_ptr", "shift_D - tl.load(most_ptr"),
        ("x_D -= tl.load(shift_ptr", "x_D += tl.load(shift_ptr"),
        ("x_J -= tl.load(shift_ptr", "x_J += tl.load(shift_ptr"),
        ("outliers_J=outliers_J, left=False", "outliers_J=outliers_J, left=True"),
    ],
)
def test_a_planted_error_in_a_head_is_seen(launch: Launcher, old: str, new: str) -> None:
    generator = torch.Generator().manual_seed(3)
    head = torch.randn(48, 64, generator=generator).bfloat16()
    head[7] *= -8  # some columns have their largest number above the mean and some below it
    given = head, torch.randn(64, generator=generator), torch.arange(8), extremes(head)
    right, wrong = (launch(STEM, "quantize_both_layouts", *given, planted=planted) for planted in ([], [(old, new)]))
    assert not all(
        a is not None and b is not None and torch.equal(bits(a), bits(b)) for a, b in zip(right, wrong, strict=True)
    )


@pytest.mark.parametrize("by", ["rows", "tensor"])
def test_the_product_of_what_was_rounded(launch: Launcher, by: str) -> None:
    """Against the exact product of the same 8-bit numbers: fp32 sums, one rounding to bf16."""
    left, right = torch.randn(33, 96), torch.randn(48, 96)
    quantize = reference_fp8.quantize_rows if by == "rows" else reference_fp8.quantize_tensor
    pairs = quantize(left), quantize(right)
    (found,) = launch(STEM, "scaled_product", *pairs, torch.bfloat16)
    a, b = (q.double() * scale.double() for q, scale in pairs)
    truth = a @ b.t()
    # rounded once to bf16, and sums of 96 terms in fp32; a card's instructions keep some 14 bits of theirs
    sums = 2.0**-13 if torch.cuda.is_available() else 96 * 2.0**-24
    allowed = truth.abs() * 2.0**-8 + sums * (a.abs() @ b.abs().t())
    assert bool(((found.double() - truth).abs() <= allowed).all())


@pytest.mark.parametrize(
    ("function", "old", "new"),
    [
        ("quantize_rows", "behind_ptr, q_J if LEFT else rest_J", "behind_ptr, rest_J if LEFT else q_J"),
        ("quantize_rows", "scaled_J - q_J.to(tl.float32)", "scaled_J"),
        ("quantize_rows", "0x1FFFFF", "0x0FFFFF"),
        ("quantize_rows", "(127 - power) << 23", "(126 - power) << 23"),
        ("quantize_tensor", "- 127 - EXPONENT", "- 128 - EXPONENT"),
    ],
)
def test_a_planted_error_is_seen(launch: Launcher, function: str, old: str, new: str) -> None:
    x = torch.linspace(1, 2, 256).mul(torch.logspace(0, 5, 64, base=2.0)[:, None]).bfloat16()
    x[:, 0] = torch.linspace(7.2, 7.9, 64).bfloat16() * 32  # mantissas above 1.75
    kwargs: dict[str, Any] = {"planted": [(old, new)]}
    outliers: dict[str, Any] = {"outliers_J": torch.arange(8)} if function == "quantize_rows" else {}
    q, *_, scale = launch(STEM, function, x, **kwargs, **outliers)
    true, true_scale = getattr(reference_fp8, function)(x, **outliers)
    assert not torch.equal(bits(q), bits(true)) or not torch.equal(scale, true_scale)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((torch.zeros(4),), {}, "x_ND: expected rows x columns"),
        ((torch.zeros(6, 4).t(),), {}, "x_ND: strides"),
        ((torch.zeros(4, 6), torch.int8), {}, "dtype: torch.int8; pass torch.float8_e4m3fn or torch.float8_e5m2"),
        ((torch.zeros(4, 6),), {"out_NC": torch.zeros(4, 5)}, "out_NC: .*pass .4, 6. of torch.float8_e4m3fn"),
    ],
)
def test_refused(launch: Launcher, args: tuple[Any, ...], kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        launch(STEM, "quantize_rows", *args, **kwargs)
