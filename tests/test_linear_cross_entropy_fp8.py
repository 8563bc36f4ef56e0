"""The frozen head's loss by products of 8-bit operands: definition and kernel against an fp64 truth, with bounds that
follow from the formats.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="triton is not installed; pip install 'elo-engine[gpu]'")

from elo_engine.kernels import linear_cross_entropy_fp8 as kernel
from elo_engine.model import reference_fp8
from elo_engine.model.reference_fp8 import E4M3, rounded_rows

from .launching import BACKENDS, Launcher
from .linear_cross_entropy_cases import operands

Tensor = torch.Tensor
STEM = "linear_cross_entropy_fp8"
Found = tuple[Tensor, Tensor | None]
# Small blocks, so that small examples have several.
SMALL = [
    ("BLOCK_V=LAUNCH.block_v if vocabulary > LAUNCH.least_v else LAUNCH.least_v", "BLOCK_V=256"),
    ("BLOCK_D=LAUNCH.block_d", "BLOCK_D=64"),
]


@pytest.fixture(scope="module", params=["definition", *BACKENDS])
def launch(request: pytest.FixtureRequest) -> Launcher | None:
    if request.param == "definition":
        return None
    if request.param == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this card has no 8-bit floats")
    return Launcher(request.param)


def mean_of(head: Tensor, softcap: float | None = None) -> Tensor:
    return reference_fp8.mean_row(head, softcap)


def outliers_of(head: Tensor, mean: Tensor, hidden: Tensor | None = None) -> Tensor:
    return reference_fp8.outliers(reference_fp8.column_deviations(head, mean), hidden)


def layouts(head: Tensor, mean: Tensor, outliers: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """As `kernels.quantize_fp8.quantize_both_layouts` makes them, to the bit (tests/test_quantize_fp8.py)."""
    V = len(head)
    padded = F.pad(head.float() - mean, (0, 0, 0, -V % 16))
    rows, rows_scale = reference_fp8.quantize_rows(padded, E4M3, outliers, left=False)
    rows_scale[V:] = 1.0
    columns, columns_scale = reference_fp8.quantize_rows(padded.t().contiguous())
    return (rows, rows_scale), (columns, columns_scale)


def by_definition(hidden: Tensor, head: Tensor, labels: Tensor, softcap: float | None = None, **kwargs: Any) -> Found:
    mean = mean_of(head, softcap)
    outliers = outliers_of(head, mean)
    rounded = reference_fp8.rounded_head(head, mean, outliers)
    return reference_fp8.linear_cross_entropy_fp8(
        hidden, head, *rounded, mean, outliers, labels, softcap=softcap, **kwargs
    )


def run(
    launch: Launcher | None, step: tuple[Tensor, Tensor, Tensor], *, planted: Any = (), softcap: float | None = None,
    **kwargs: Any,
) -> Found:  # fmt: skip
    hidden, head, labels = step
    if launch is None:
        kwargs.pop("chunk_rows", None)
        return by_definition(hidden, head, labels, softcap, **kwargs)
    outliers = outliers_of(head, mean := mean_of(head, softcap))
    found = launch(
        STEM, "linear_cross_entropy_fp8_forward", hidden, head, *layouts(head, mean, outliers), mean, outliers, labels,
        planted=[*SMALL, *planted], softcap=softcap, **kwargs,
    )  # fmt: skip
    assert found[0] is not None
    return found[0], found[1]


def check(found: Found, step: tuple[Tensor, Tensor, Tensor], softcap: float | None = None) -> None:
    """Against the loss of the ROUNDED operands in fp64, the target's term of the gradient unrounded.

    Logits are rounded to bf16: an error of at most half a unit, 2^-8 of a logit with what fp32 sums err, moves the loss
    by no more than the largest such error, and every share of the softmax by a factor of exp of twice that. Each share
    is then rounded to e4m3: 2^-4 of it, or half of the smallest number, 2^-10 / 448 of the row's largest. The product
    and the sum with the target's term are rounded to bf16.
    """
    hidden, head, labels = step
    capped = (lambda x: x) if softcap is None else (lambda x: softcap * torch.tanh(x / softcap))
    centred = head.float() - mean_of(head, softcap)
    outliers = outliers_of(head, mean := mean_of(head, softcap))
    by_row, by_column = (t.double() for t in reference_fp8.rounded_head(head, mean, outliers))
    raw_NV = rounded_rows(hidden, E4M3, outliers).double() @ by_row.t()
    delta = 2.0**-8 * float(raw_NV.abs().max()) + 2.0**-18
    kept, target_N1 = labels != -100, labels.clamp_min(0)[:, None]
    z_N = raw_NV.gather(1, target_N1)[:, 0]
    x_NV = capped(raw_NV).scatter(1, target_N1, -torch.inf)
    odds_N = torch.logsumexp(x_NV, 1) - capped(z_N)
    loss_N = F.softplus(odds_N).where(kept, 0.0)
    ours_N, d_ours_ND = found
    # a loss far below 1 is exp(odds), which moves by a factor
    allowed_N = torch.minimum(torch.tensor(delta), loss_N * math.expm1(delta)) + 2.0**-18 * loss_N
    excess = (ours_N.double() - loss_N).abs() - allowed_N
    assert bool((excess <= 0).all()), f"the loss is {float(excess.max()):.3g} beyond its bound"
    if d_ours_ND is None:
        return
    others_N = torch.sigmoid(odds_N)
    slope_NV, slope_N = (torch.ones_like(raw_NV), torch.ones_like(z_N)) if softcap is None else (
        1 - torch.tanh(raw_NV / softcap) ** 2, 1 - torch.tanh(z_N / softcap) ** 2)  # fmt: skip
    share_NV = torch.softmax(x_NV, 1) * slope_NV * others_N[:, None]
    top_N = torch.softmax(x_NV, 1).amax(1) * others_N
    rest_ND = share_NV @ by_column
    target_ND = (others_N * slope_N)[:, None] * centred[target_N1[:, 0]].double()
    d_ND = (rest_ND - target_ND).where(kept[:, None], 0.0)
    # the slope of a soft-cap moves with the logit too: by 2 / cap of its change at most
    moved = math.expm1(2 * delta) + (0.0 if softcap is None else 2 * delta / softcap / float(slope_NV.min()))
    wrong_NV = share_NV * (2.0**-4 * (1 + moved) + moved) + top_N[:, None] * 2.0**-10 / 448
    allowed_ND = wrong_NV @ by_column.abs() + math.expm1(2 * delta) * target_ND.abs()
    allowed_ND += 2.0**-8 * (rest_ND.abs() + allowed_ND + d_ND.abs())
    excess = (d_ours_ND.double() - d_ND).abs() - allowed_ND
    assert bool((excess[kept] <= 0).all()), f"the gradient is {float(excess.max()):.3g} beyond its bound"
    assert not d_ours_ND[~kept].any() and not ours_N[~kept].any()


CASES = [(7, 64, 300, None), (9, 112, 1000, None), (5, 64, 2048, None), (6, 48, 515, 5.0), (1, 16, 17, None)]


def test_a_mean_of_the_rows_changes_nothing(launch: Launcher) -> None:
    """What is the same in all rows of a head cancels in a softmax, and here it costs no precision: with rows of a
    hundred times the size the errors are those without, where rounding such rows as they are would lose everything.
    """
    hidden, head, labels = operands(16, 64, 500, torch.float32)
    hidden, head = hidden.bfloat16(), (head * 4).round() / 4  # so that bf16 holds the sums exactly
    common = torch.full((64,), 16.0)
    common[::2] = -16.0
    plain, d_plain = run(launch, (hidden, head.bfloat16(), labels))
    found, d_found = run(launch, (hidden, (head + common).bfloat16(), labels))
    assert torch.equal((head + common).bfloat16().float(), head + common)
    assert d_plain is not None and d_found is not None
    # the mean of the rows is rounded to fp32, and what is left may round to the next 8-bit number now and then
    assert float((found - plain).abs().max()) < 0.02
    assert float((d_found.float() - d_plain.float()).norm() / d_plain.float().norm()) < 0.02
    capped, _ = run(launch, (hidden, (head + common).bfloat16(), labels), softcap=20.0)
    assert float((capped - plain).abs().max()) > 0.02, "under a soft-cap it does not cancel"


@pytest.mark.parametrize(("rows", "width", "vocabulary", "softcap"), CASES)
def test_loss_and_gradient(launch: Launcher, rows: int, width: int, vocabulary: int, softcap: float | None) -> None:
    """Vocabularies that 16 divides and others; some rows without a label; chunks that do not come out even."""
    hidden, head, labels = operands(rows, width, vocabulary, torch.bfloat16)
    labels[1::4] = -100
    step = hidden, head, labels
    found = run(launch, step, softcap=softcap, chunk_rows=4)
    assert found[0].dtype == torch.float32 and found[1] is not None and found[1].dtype == torch.bfloat16
    check(found, step, softcap)
    losses, nothing = run(launch, step, softcap=softcap, need_d_hidden=False)
    assert nothing is None and torch.equal(losses, found[0])


def test_rounding_to_8_bits_costs_what_the_format_says(launch: Launcher) -> None:
    """The whole error against the unrounded truth: a logit's is at most 2^-3 (1 + 2^-5) of the sum of its terms' sizes,
    plus what underflows; and on average far less, 3.7 % of its root of summed squares.
    """
    hidden, head, labels = operands(64, 256, 1000, torch.bfloat16)
    exact_NV = hidden.double() @ head.double().t()
    rounded_NV = rounded_rows(hidden).double() @ rounded_rows(head).double().t()  # this head's mean is next to nothing
    largest = 2.0**-3 * (1 + 2.0**-5) * (hidden.double().abs() @ head.double().abs().t())
    assert bool(((rounded_NV - exact_NV).abs() <= largest).all())
    expected = 0.037 * (hidden.double().square() @ head.double().square().t()).sqrt()
    ratio = float((rounded_NV - exact_NV).square().mean().sqrt() / expected.square().mean().sqrt())
    assert 0.8 < ratio < 1.2, ratio
    losses, d_hidden = run(launch, (hidden, head, labels))
    truth_N = F.cross_entropy(exact_NV, labels, reduction="none")
    p_NV = torch.softmax(exact_NV, 1) - F.one_hot(labels, 1000)
    d_ND = p_NV @ head.double()
    assert d_hidden is not None
    # errors of logits of 0.11 each (3.7 % of their deviation of 3) move a row's losses and shares by as much
    relative = float((d_hidden.double() - d_ND).norm() / d_ND.norm())
    assert float((losses.double() - truth_N).abs().mean()) < 0.11 and relative < 0.11, relative


def test_columns_that_bring_most_of_the_error_are_multiplied_with_their_rests() -> None:
    """Eight of 256 columns thirty times the others, as some of a real model's are. Without their rests the logits err
    by 3.7 % of the root of their terms' squares, with them by what the other columns bring: 3.7 % of that of theirs,
    and 2^-8 or so of the eight's.
    """
    hidden, head, _ = operands(64, 256, 1000, torch.bfloat16)
    hidden[:, 5:200:25] *= 30
    exact_NV, mean = hidden.double() @ head.double().t(), torch.zeros(256)
    outliers = outliers_of(head, mean, hidden)
    assert set(range(5, 200, 25)) <= set(outliers.tolist()) and len(outliers) == 32
    plain_NV = rounded_rows(hidden).double() @ rounded_rows(head).double().t()
    by_row, _ = reference_fp8.rounded_head(head, mean, outliers)
    with_rests_NV = rounded_rows(hidden, E4M3, outliers).double() @ by_row.double().t()
    error, left = ((found_NV - exact_NV).square().mean().sqrt() for found_NV in (plain_NV, with_rests_NV))
    others = torch.ones(256, dtype=torch.bool)
    others[outliers] = False
    squares = (hidden.double()[:, others].square() @ head.double()[:, others].square().t()).mean()
    assert 0.8 < float(left / (0.037 * squares.sqrt())) < 1.25, "more is left than the other columns bring"
    assert float(left) < float(error) / 5
    # taken for the left operand, both would have the rests behind q, and rests would be multiplied with rests
    wrong = rounded_rows(head, E4M3, outliers).double()
    wrong_NV = rounded_rows(hidden, E4M3, outliers).double() @ wrong.t()
    assert float((wrong_NV - exact_NV).square().mean().sqrt()) > float(left) * 5


def test_a_target_that_is_all_but_certain(launch: Launcher) -> None:
    """Its logit is 20, the others' -8: a loss of 1e-9, and a gradient as small, neither of them lost."""
    hidden, head = torch.zeros(1, 16), torch.zeros(1200, 16)
    hidden[0, 0], head[:, 0], head[:, 1] = 20.0, -0.4, 1.0
    head[7] = 0.0
    head[7, 0] = 1.0
    step = hidden.bfloat16(), head.bfloat16(), torch.tensor([7])
    found = run(launch, step)
    check(found, step)
    assert 1e-10 < float(found[0]) < 2e-9 and found[1] is not None and 0 < float(found[1].abs().max()) < 1e-8


def test_one_token_is_all_there_is(launch: Launcher) -> None:
    hidden, head, labels = operands(3, 16, 1, torch.bfloat16)
    losses, d_hidden = run(launch, (hidden, head, labels))
    assert not losses.any() and d_hidden is not None and not d_hidden.any()


def test_a_label_from_elsewhere_is_not_hidden() -> None:
    launch = Launcher(BACKENDS[-1])
    hidden, head, labels = operands(4, 64, 300, torch.bfloat16)
    labels[2] = 300
    losses, d_hidden = run(launch, (hidden, head, labels))
    assert losses.isnan().tolist() == [False, False, True, False]
    assert d_hidden is not None and d_hidden.isnan().any(1).tolist() == [False, False, True, False]


def test_a_hidden_state_that_is_no_number_is_not_hidden(launch: Launcher) -> None:
    hidden, head, labels = operands(4, 64, 300, torch.bfloat16)
    hidden[1, 3], labels[3] = torch.nan, -100
    losses, d_hidden = run(launch, (hidden, head, labels))
    assert losses.isnan().tolist() == [False, True, False, False]
    assert d_hidden is not None and d_hidden.isnan().any(1).tolist() == [False, True, False, False]


PLANTED = {
    "the scale twice": [("* (1.0 / 448.0))", "* (1.0 / 448.0) * (1.0 / 448.0))")],
    "no scale": [("* (1.0 / 448.0))", ")")],
    "no target's term": [("rest_D + weight * head_D", "rest_D")],
    "the target in the product": [("(col_V < V) & (col_V != target), share_V", "(col_V < V), share_V")],
    "the target in the sum": [("_others(row_ptr, target, V", "_others(row_ptr, -1, V")],
    "padding in the product": [("tl.where((col_V < V) & (col_V != target), share_V, 0.0)",
                                "tl.where(col_V != target, share_V, 448.0)")],
    "rows of another chunk": [("_launch((logits_RV[now], labels_N[part]", "_launch((logits_RV[now], labels_N[now]")],
    "the mean in the target's term": [("head_D -= tl.load", "head_D -= 0.0 * tl.load")],
    "no scale of the target's row": [("* tl.load(rows_scale_ptr + target)", "")],
    "the target's row of the chunk": [("d_hidden_ND[part], labels_N[part], weight_R",
                                       "d_hidden_ND[part], labels_N[now], weight_R")],
    "no soft-cap": [("gradient, len(head_VD), softcap)", "gradient, len(head_VD), None)")],
    "no slope of the soft-cap": [("share_V = share_V * slope_V", "share_V = share_V")],
}  # fmt: skip


@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_error_is_seen(launch: Launcher | None, what: str) -> None:
    if launch is None:
        pytest.skip("planted in the kernel; tests/test_fp8.py plants some in the definition")
    hidden, head, labels = operands(7, 64, 300, torch.bfloat16)
    head += 0.5  # a mean that would be missed
    labels[::2] = (hidden @ head.t()).argmax(1)[::2]  # of targets that are likely what is wrong with them is seen
    step, softcap = (hidden, head, labels), 5.0 if "soft-cap" in what else None
    right = run(launch, step, softcap=softcap, chunk_rows=3)
    check(right, step, softcap)
    with pytest.raises(AssertionError, match="beyond its bound"):
        check(run(launch, step, softcap=softcap, chunk_rows=3, planted=PLANTED[what]), step, softcap)


LABELS, HIDDEN, HEAD = torch.zeros(4).long(), torch.zeros(4, 16).bfloat16(), torch.zeros(20, 16).bfloat16()


@pytest.mark.parametrize(
    ("hidden", "head", "change", "message"),
    [
        (HIDDEN.float(), HEAD.float(), None, "hidden_ND: dtype torch.float32; 8-bit products"),
        (HIDDEN[:, :8].contiguous(), HEAD[:, :8].contiguous(), None, "hidden_ND: 8 columns.*multiple of 16"),
        (HIDDEN, HEAD, ("rows", 20), r"rows: \(20, 32\) .*pass \(32, 32\)"),
        (HIDDEN, HEAD, ("outliers", 5), r"outliers_J: \(5,\) of torch.int64; pass a multiple of 8"),
        (HIDDEN, HEAD, ("columns", 20), r"columns: \(16, 20\) .*pass \(16, 32\)"),
        (HIDDEN, HEAD, ("scale", 20), r"rows: scales \(20, 1\).*pass \(32, 1\)"),
    ],
)
def test_refused(hidden: Tensor, head: Tensor, change: Any, message: str) -> None:
    outliers = outliers_of(head, mean_of(head))
    (rows, rows_scale), (columns, columns_scale) = layouts(head, mean_of(head), outliers)
    if change is not None:
        what, size = change
        rows = rows[:size] if what == "rows" else rows
        columns = columns[:, :size].contiguous() if what == "columns" else columns
        rows_scale = rows_scale[:size] if what == "scale" else rows_scale
        outliers = outliers[:size] if what == "outliers" else outliers
    with pytest.raises(ValueError, match=message):
        kernel.linear_cross_entropy_fp8_forward(
            hidden, head, (rows, rows_scale), (columns, columns_scale), mean_of(head), outliers, LABELS
        )


def test_chunks_and_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte that a call allocates, of tensors without values, is counted; three bytes a logit keep the budget."""
    from .test_linear_cross_entropy import Allocations

    # logits and gradients of a chunk keep to the budget of 1 GiB, its rounded rows and the results come beside it
    beside = 2 * 32768 * 4096 + 4 * 32768 + 4096 * 4096
    assert kernel.workspace_bytes(32768, 4096, 128256, 64) <= 2**30 + beside + 4096 * 2 * 64
    for name in ("_launch", "_add_target", "check_device"):
        monkeypatch.setattr(kernel, name, lambda *args, **named: None)
    rounding = importlib.import_module("elo_engine.kernels.quantize_fp8")
    monkeypatch.setattr(rounding, "check_device", lambda **tensors: None)
    monkeypatch.setattr(type(rounding._quantize_rows_kernel), "run", lambda *args, **named: None)
    hidden, head, labels = operands(48, 64, 1001, torch.bfloat16)
    outliers = outliers_of(head, mean := mean_of(head))
    made_of = hidden, head, *layouts(head, mean, outliers), mean, outliers, labels
    for need in (True, False):
        with Allocations() as record:
            kernel.linear_cross_entropy_fp8_forward(*made_of, need_d_hidden=need, chunk_rows=16)
        # the rounded rows of the second and the third chunk: the record keeps them all alive
        again = 2 * 16 * (64 + 2 * 32 + 4)
        expected = kernel.workspace_bytes(48, 64, 1001, 32, need_d_hidden=need, chunk_rows=16) + again
        assert sum(record.bytes.values()) == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card with 8-bit floats")
def test_a_card_agrees_with_the_definition() -> None:
    """At a model's shapes: kernel and library against the emulation, which differ in the order of sums alone."""
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this card has no 8-bit floats")
    from elo_engine.kernels import quantize_fp8

    hidden, head, labels = (tensor.cuda() for tensor in operands(1030, 576, 49152, torch.bfloat16))
    labels[5::7] = -100
    mean = mean_of(head)
    outliers = outliers_of(head, mean)
    extremes = head.amin(0).float(), head.amax(0).float()
    rows, rows_scale, columns, columns_scale = quantize_fp8.quantize_both_layouts(head, mean, outliers, extremes)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    losses, d_hidden = kernel.linear_cross_entropy_fp8_forward(
        hidden, head, (rows, rows_scale), (columns, columns_scale), mean, outliers, labels
    )
    peak = torch.cuda.max_memory_allocated() - before
    allowed = kernel.workspace_bytes(1030, 576, 49152, 32) + (64 << 20)  # and what the library of products may take
    true, d_true = by_definition(hidden, head, labels)
    # sums in another order move a bf16 logit by a unit now and then, 2^-8 of 12, and shares across a step of e4m3
    assert d_hidden is not None and d_true is not None and float((losses - true).abs().max()) < 0.05
    assert float((d_hidden.float() - d_true.float()).norm() / d_true.float().norm()) < 0.01
    assert peak <= allowed
    assert E4M3.largest == 448.0
