"""kernels/linear_cross_entropy.py as a whole, against an fp64 truth and plain torch, and what it allocates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="triton is not installed; pip install 'elo-engine[gpu]'")

from elo_engine.kernels import linear_cross_entropy as kernel

from .cpu_paths import Recorder
from .kernel_errors import assert_no_worse, assert_rounded_once
from .launching import BACKENDS, Launcher
from .linear_cross_entropy_cases import DTYPES, STEM, Tensor, inside, losses, operands, run


@pytest.fixture(scope="module", params=BACKENDS)
def launch(request: pytest.FixtureRequest) -> Launcher:
    return Launcher(request.param)


def chain(args: tuple[Tensor, ...], softcap: float | None, chunk: int) -> list[Tensor]:
    """Loss, d_hidden, d_head by F.linear, F.cross_entropy and autograd, in the type of the arguments, in chunks: a
    CPU's product of two rows sums up otherwise than its product of five.
    """
    hidden, head = (tensor.clone().requires_grad_() for tensor in args[:2])
    parts = zip(hidden.split(chunk), args[2].split(chunk), strict=True)
    loss = torch.cat([losses(F.linear(part, head), labels, softcap) for part, labels in parts])
    return [loss.detach(), *torch.autograd.grad(loss.sum(), (hidden, head))]


def whole(launch: Launcher, *args: Tensor, **kwargs: Any) -> list[Tensor]:
    found = launch(STEM, "linear_cross_entropy_forward", *args, need_d_head=True, **kwargs)
    assert all(tensor is not None for tensor in found)
    return [tensor for tensor in found if tensor is not None]


def error_of_all(found: Tensor, truth: Tensor) -> float:
    """Of the whole matrix: both round each logit to bf16, and where the largest of these errors falls is luck."""
    return float((found.double() - truth).norm() / truth.norm().clamp_min(1e-30))


def assert_chain(found: list[Tensor], args: tuple[Tensor, ...], softcap: float | None, chunk: int) -> None:
    """Loss and both gradients, in the type of head and hidden, are no worse than plain torch's."""
    hidden, head, labels = args
    assert [tensor.dtype for tensor in found] == [torch.float32, hidden.dtype, torch.float32]
    ours, theirs = [found[0], found[1], found[2].to(head.dtype)], chain(args, softcap, chunk)
    for ours_one, their_one, true in zip(
        ours, theirs, chain((hidden.double(), head.double(), labels), softcap, chunk), strict=True
    ):
        assert_no_worse(ours_one, their_one, true, error_of_all)


# One row, one chunk, whole chunks and a rest; vocabularies of one token, ragged, and more than a block.
WHOLE = [(1, 8, 1, 1), (1, 16, 5, 4), (9, 32, 96, 9), (7, 24, 300, 3), (6, 576, 1500, 4), (5, 40, 4100, 2)]


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("shape", WHOLE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_no_worse_than_torch(
    launch: Launcher, shape: tuple[int, int, int, int], dtype: torch.dtype, softcap: float | None
) -> None:
    args, chunk = operands(*shape[:3], dtype), shape[3]
    args[2][1::4] = -100
    assert_chain(whole(launch, *args, chunk_rows=chunk, softcap=softcap), args, softcap, chunk)
    if chunk == shape[0]:  # what the budget allows is one chunk, too
        assert_chain(whole(launch, *args, softcap=softcap), args, softcap, chunk)


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_products_are_rounded_once(launch: Launcher, dtype: torch.dtype) -> None:
    """Logits that bf16 holds exactly: then the gradient of the logits is known, and the head's is added in fp32."""
    generator = torch.Generator().manual_seed(3)
    hidden, head = (torch.randint(-2, 3, (n, 8), generator=generator).to(dtype) for n in (7, 300))
    labels = torch.arange(7) * 40
    loss, d_logits = run(launch, (F.linear(hidden, head), labels, hidden, head))
    found, wide = whole(launch, hidden, head, labels, chunk_rows=3), d_logits.double()
    assert torch.equal(found[0], loss)
    assert_rounded_once(found[1], wide @ head.double())
    assert_rounded_once(found[2], wide.t() @ hidden.double())
    out = torch.full((300, 10), 0.5)
    d_head = whole(launch, hidden, head, labels, chunk_rows=3, d_head_out_VD=out[:, :8])[2]
    assert torch.equal(d_head, out[:, :8]) and bool((out[:, 8:] == 0.5).all())
    assert_rounded_once(d_head, wide.t() @ hidden.double() + 0.5)
    launch(STEM, "linear_cross_entropy_forward", hidden, head, labels, d_head_out_VD=out[:, :8])
    assert torch.equal(d_head, out[:, :8])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_without_a_good_label_touches_no_other(launch: Launcher, dtype: torch.dtype) -> None:
    """-100 hides whatever the row holds; a label outside the vocabulary is not hidden."""
    hidden, head, labels = operands(6, 16, 1500, dtype)
    labels[1], labels[3], labels[5] = -100, 1500, -100
    hidden[1] = float("nan")
    loss, d_hidden, _ = launch(STEM, "linear_cross_entropy_forward", hidden, head, labels)
    assert loss is not None and d_hidden is not None
    for found in (loss[:, None], d_hidden):
        assert not bool(found[[1, 5]].any()) and bool(found[3].isnan().all())
        assert bool((torch.isfinite(found[::2]) & (found[::2] != 0)).all())


def test_all_rows_ignored(launch: Launcher) -> None:
    hidden, head, _ = operands(4, 16, 1030, torch.bfloat16)
    found = launch(STEM, "linear_cross_entropy_forward", hidden, head, torch.full((4,), -100), need_d_head=True)
    assert [tensor is not None and not bool(tensor.any()) for tensor in found] == [True] * 3


def test_the_same_bits_again_and_what_is_not_wanted_is_not_made(launch: Launcher) -> None:
    args = operands(5, 32, 1030, torch.bfloat16)
    nan = ("buffer_RV = torch.empty((chunk, owned),", "buffer_RV = torch.full((chunk, owned), float('nan'),")
    both, again = whole(launch, *args, chunk_rows=2), whole(launch, *args, chunk_rows=2, planted=[nan])
    assert all(torch.equal(a, b) for a, b in zip(both, again, strict=True))
    for d_hidden, d_head in ((True, False), (False, True), (False, False)):
        needs = {"need_d_hidden": d_hidden, "need_d_head": d_head}
        found = launch(STEM, "linear_cross_entropy_forward", *args, chunk_rows=2, **needs)
        assert [tensor is not None for tensor in found] == [True, d_hidden, d_head]
        assert all(a is None or torch.equal(a, b) for a, b in zip(found, both, strict=True))


def test_rows_inside_a_wider_matrix(launch: Launcher) -> None:
    hidden, head, labels = operands(5, 32, 300, torch.bfloat16)
    found = whole(launch, inside(hidden), inside(head), labels, chunk_rows=2)
    expected = whole(launch, hidden, head, labels, chunk_rows=2)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_no_rows(launch: Launcher) -> None:
    hidden, head, labels = torch.empty(0, 8), torch.ones(9, 8), torch.empty(0, dtype=torch.int64)
    loss, d_hidden, d_head = whole(launch, hidden, head, labels)
    assert loss.shape == (0,) and d_hidden.shape == (0, 8) and torch.equal(d_head, torch.zeros(9, 8))
    assert whole(launch, hidden, head, labels, d_head_out_VD=head.clone())[2].equal(head)
    assert run(launch, (torch.empty(0, 9), labels, hidden, head))[0].shape == (0,)


LABELS = torch.zeros(4).long()
FOUR, SIX = torch.zeros(4, 6), torch.zeros(5, 6)  # hidden_ND, head_VD


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((torch.zeros(6, 4).t(), SIX, LABELS), {}, r"hidden_ND: strides \(1, 4\).*contiguous\(\)"),
        ((FOUR, torch.zeros(1, 6).expand(5, 6), LABELS), {}, "head_VD: strides .*must not overlap"),
        ((FOUR.half(), SIX.half(), LABELS), {}, "hidden_ND: dtype torch.float16"),
        (
            (FOUR, SIX.bfloat16(), LABELS),
            {},
            r"head_VD: \(5, 6\) of torch.bfloat16, but hidden_ND .*same width",
        ),
        ((FOUR, torch.zeros(5, 7), LABELS), {}, r"head_VD: \(5, 7\) .*same width"),
        ((FOUR, torch.zeros(0, 6), LABELS), {}, "head_VD: .*at least one row"),
        ((FOUR, SIX, LABELS[:3]), {}, "labels_N: expected a vector of 4 elements"),
        ((FOUR, SIX, torch.zeros(8).long()[::2]), {}, "labels_N: stride 2"),
        ((FOUR, SIX, LABELS.float()), {}, "labels_N: dtype torch.float32"),
        ((FOUR, SIX, LABELS), {"softcap": 0.0}, "softcap: 0.0; pass a positive number"),
        ((FOUR, SIX, LABELS), {"softcap": float("inf")}, "softcap: inf; pass a positive number"),
        ((FOUR, SIX, LABELS), {"chunk_rows": 0}, "chunk_rows: 0; pass at least 1"),
        ((FOUR, SIX, LABELS), {"d_head_out_VD": SIX.bfloat16()}, "d_head_out_VD: .*bfloat16; pass torch.float32"),
        ((FOUR, SIX, LABELS), {"d_head_out_VD": FOUR}, r"d_head_out_VD: \(4, 6\) .*shape \(5, 6\)"),
        ((FOUR, SIX, LABELS), {"d_head_out_VD": torch.zeros(6, 5).t()}, "d_head_out_VD: strides"),
    ],
)
def test_refused(launch: Launcher, args: tuple[Tensor, ...], kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        whole(launch, *args, **kwargs)


def test_chunks_keep_to_their_budget() -> None:
    chunk = kernel.LAUNCH.chunk
    assert [chunk(32768, vocabulary, 2) for vocabulary in (128256, 50257, 256, 10**7)] == [4096, 8192, 8192, 256]
    assert chunk(32768, 128256, 4) == 2048 and chunk(100, 128256, 2) == 100 and chunk(0, 128256, 2) == 0
    assert chunk(4097, 128256, 2) == 2304  # and 1793, not 4096 and 1
    assert [kernel.LAUNCH.stride(vocabulary) for vocabulary in (1, 50257, 128256)] == [16, 50272, 128256]
    assert kernel.workspace_bytes(32768, 4096, 128256, 2) < 1.25 * 2**30
    assert kernel.workspace_bytes(32768, 4096, 128256, 2, need_d_head=True) > 2**30 + 4 * 4096 * 128256


class Allocations(Recorder):
    """The bytes of every tensor made inside, each kept alive so that no two share an address."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[int, int] = {}
        self.kept: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        given = [x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)]
        if result.untyped_storage().data_ptr() not in given:
            self.kept.append(result)
            self.bytes[result.untyped_storage().data_ptr()] = result.untyped_storage().nbytes()
        return result


@pytest.mark.parametrize("needs", [(True, False), (False, False), (True, True), (False, True)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_chunk_of_logits_is_all_there_is(
    monkeypatch: pytest.MonkeyPatch, needs: tuple[bool, bool], dtype: torch.dtype
) -> None:
    """The kernel itself allocates nothing, so it is left out here, and its process with it."""
    if dtype == torch.bfloat16 and needs[1]:
        pytest.skip("on the CPU the operands of this product are widened to fp32")
    monkeypatch.setattr(kernel, "_launch", lambda *args: None)
    monkeypatch.setattr(kernel, "check_device", lambda **tensors: None)
    args, (rows, width, vocabulary, chunk) = operands(50, 48, 1001, dtype), (50, 48, 1001, 8)
    kwargs: dict[str, Any] = {"need_d_hidden": needs[0], "need_d_head": needs[1], "chunk_rows": chunk}
    for tensor in args[:2]:
        tensor.requires_grad_()  # as a model's are; nothing is recorded for autograd
    with Allocations() as record:
        kernel.linear_cross_entropy_forward(*args, **kwargs)
    assert sum(record.bytes.values()) == kernel.workspace_bytes(rows, width, vocabulary, dtype.itemsize, **kwargs)
    assert record.largest == (vocabulary * width if needs[1] else chunk * 1008) < rows * vocabulary
    assert record.flops == 2 * rows * width * vocabulary * (1 + sum(needs))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="measures a card's memory")
def test_a_card_holds_no_more_than_the_workspace() -> None:
    hidden, head, labels = (tensor.cuda() for tensor in operands(2048, 256, 50257, torch.bfloat16))
    kwargs: dict[str, Any] = {"need_d_head": True, "chunk_rows": 512}
    kernel.linear_cross_entropy_forward(hidden, head, labels, **kwargs)  # the library's own workspace
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kernel.linear_cross_entropy_forward(hidden, head, labels, **kwargs)
    limit = kernel.workspace_bytes(2048, 256, 50257, 2, **kwargs)
    assert torch.cuda.max_memory_allocated() - before <= limit + 16 * 512  # each allocation is rounded up to 512 bytes


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("hidden_ND[part], labels_N[part]", "hidden_ND[part], labels_N[: chunk][: len(hidden_ND[part])]"),
        ("loss_N[part])", "loss_N[:chunk])"),
        ("out=d_hidden_ND[part])", "out=d_hidden_ND[: len(labels_R)])"),
        ("beta=1 if adding or start else 0", "beta=0"),
        ("softcap, need_d_hidden or need_d_head)", "softcap, False)"),
        ("_launch(tensors, owned, softcap", "_launch(tensors, owned, None"),
    ],
)
def test_a_planted_error_in_the_chunks_is_seen(launch: Launcher, old: str, new: str) -> None:
    args = operands(7, 24, 300, torch.float32)
    found = whole(launch, *args, chunk_rows=3, softcap=5.0, planted=[(old, new)])
    with pytest.raises(AssertionError, match="plain torch"):
        assert_chain(found, args, 5.0, 3)
