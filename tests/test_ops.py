"""The seam: every op's autograd.Function on every path against its definition in float64, and what it must not compute.

`auto` is the fast path of the device. Started under TRITON_INTERPRET=1, as the last test does, these same tests run the
Triton kernels through Triton's interpreter.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from forked import PYTEST, Forked
from kernel_errors import ARITHMETIC, HALF_UNIT, error_by_row
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from elo_engine.errors import UsageError
from elo_engine.model import ops, reference
from elo_engine.model.layers import Packing, Rope, Ropes, decoder_layer
from elo_engine.model.ops.rms_norm import norm_linear
from elo_engine.model.spec import ModelSpec, RopeSpec

if os.environ.get("TRITON_INTERPRET") == "1":
    from launching import _round_as_hardware_does

    _round_as_hardware_does()  # the interpreter cuts bf16 off where a GPU rounds: twice the error

EPS = 1e-5
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")


@pytest.fixture(autouse=True)
def path() -> Iterator[None]:
    """The fast path of this process."""
    ops.configure("fused" if INTERPRETED else "auto", DEVICE)
    yield
    ops.configure("auto", DEVICE)


def draw(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def run(how: Callable[..., Any], inputs: list[Tensor], needs: list[bool], dtype: torch.dtype) -> list[Tensor]:
    """Outputs and the gradients of the inputs that need one, for output gradients drawn from a fixed seed."""
    leaves = [
        x.to(DEVICE, dtype).requires_grad_(need) if x.is_floating_point() else x.to(DEVICE)
        for x, need in zip((x.clone() for x in inputs), needs, strict=True)
    ]
    out = how(*(x * 1.0 if i == 0 and x.requires_grad else x for i, x in enumerate(leaves)))  # the first may be written
    outs = [x for x in (out if isinstance(out, tuple) else (out,)) if x.requires_grad]
    d_outs = [x.to(DEVICE, o.dtype) for x, o in zip(draw(*[tuple(o.shape) for o in outs], seed=9), outs, strict=True)]
    wanted = [x for x in leaves if x.requires_grad]
    grads = torch.autograd.grad(outs, wanted, d_outs)
    return [x.detach().cpu() for x in (*outs, *grads)]


def compare(
    op: Callable[..., Any], definition: Callable[..., Any], inputs: list[Tensor], needs: list[bool], dtype: torch.dtype,
    measure: Callable[[Tensor, Tensor], float] = error_by_row,
) -> None:  # fmt: skip
    """The op is no further from float64 than the definition in the same dtype.

    Slack: what kernel_errors allows an fp32 computation; in bf16 half a unit, because a chain of ops rounds at several
    places, each path at its own, and the larger of two maxima over such sums is a matter of the sample.
    """
    rounded = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
    truths = run(definition, rounded, needs, torch.float64)
    theirs = run(definition, rounded, needs, dtype)
    found = run(op, rounded, needs, dtype)
    assert len(found) == len(truths) == len(theirs)
    for ours, other, truth in zip(found, theirs, truths, strict=True):
        assert bool(torch.isfinite(ours).all()) and ours.dtype == other.dtype
        ours_error, their_error = measure(ours, truth), measure(other, truth)
        slack = ARITHMETIC + (HALF_UNIT[torch.bfloat16] if dtype == torch.bfloat16 else 0.0)
        assert ours_error <= their_error + slack, f"{ours_error:.3g}, definition {their_error:.3g}, slack {slack:.3g}"


def of_largest(found: Tensor, truth: Tensor) -> float:
    """Relative to the whole tensor: the first query of a document has a gradient of 0."""
    return float((found.double() - truth).abs().max() / truth.abs().max())


DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unit_offset", [False, True])
def test_rms_norm(dtype: torch.dtype, unit_offset: bool) -> None:
    x, gamma = draw((13, 72), (72,))
    options = {"eps": EPS, "unit_offset": unit_offset}
    compare(
        lambda x, g: ops.rms_norm(x, g, **options),
        lambda x, g: reference.rms_norm(x, g, **options),
        [x, gamma], [True, True], dtype,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("needs", [[True, True, True], [False, True, True], [True, True, False]])
def test_add_rms_norm(dtype: torch.dtype, unit_offset: bool, needs: list[bool]) -> None:
    inputs = draw((13, 72), (13, 72), (72,))
    options = {"eps": EPS, "unit_offset": unit_offset}
    compare(
        lambda *x: ops.add_rms_norm(*x, **options),
        lambda *x: reference.add_rms_norm(*x, **options),
        inputs, needs, dtype,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("needs", [[True, True, True], [False, True, True], [True, False, False]])
def test_rms_norm_add(dtype: torch.dtype, unit_offset: bool, needs: list[bool]) -> None:
    inputs = draw((13, 72), (13, 72), (72,))
    options = {"eps": EPS, "unit_offset": unit_offset}
    compare(
        lambda *x: ops.rms_norm_add(*x, **options),
        lambda *x: reference.rms_norm_add(*x, **options),
        inputs, needs, dtype,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize(
    "needs", [[True] * 4, [False, True, True, True], [False, True, False, False], [False, False, True, False]]
)
def test_norm_linear(dtype: torch.dtype, unit_offset: bool, needs: list[bool]) -> None:
    """Among the cases: a hidden state that needs no gradient, where the norm's comes from the weight's product."""
    x, gamma, weight, bias = draw((23, 72), (72,), (40, 72), (40,))
    gamma[3] = 0.0  # the norm's gradient must not be divided by gamma

    def definition(x: Tensor, g: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.linear(reference.rms_norm(x, g, EPS, unit_offset=unit_offset), w, b)

    compare(
        lambda *x: ops.norm_linear(*x, EPS, unit_offset=unit_offset), definition,
        [x, gamma * 0.3 + 1, weight, bias], needs, dtype,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("needs", [[True] * 5, [False, True, True, True, True], [False, False, True, True, False]])
def test_add_norm_linear(dtype: torch.dtype, needs: list[bool]) -> None:
    inputs = draw((23, 72), (23, 72), (72,), (40, 72), (40,))

    def definition(x: Tensor, u: Tensor, g: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        sum_ND, normed_ND = reference.add_rms_norm(x, u, g, EPS)
        return sum_ND, F.linear(normed_ND, w, b)

    compare(lambda *x: ops.add_norm_linear(*x, EPS), definition, inputs, needs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("needs", [[True, True, True], [True, False, False], [False, True, True]])
def test_gated_linear(dtype: torch.dtype, activation: Any, needs: list[bool]) -> None:
    packed, down, bias = draw((11, 96), (24, 48), (24,))
    gated = reference.swiglu if activation == "silu" else reference.geglu
    compare(
        lambda x, w, b: ops.gated_linear(x, w, b, activation), lambda x, w, b: F.linear(gated(x), w, b),
        [packed * 2, down, bias], needs, dtype,
    )  # fmt: skip


def rope_for(positions_N: Tensor, R: int) -> Rope:
    angles_PR = torch.arange(int(positions_N.max()) + 1)[:, None] * 10_000.0 ** (-torch.arange(R) / R)[None]
    return Rope(angles_PR.cos().to(DEVICE), angles_PR.sin().to(DEVICE), positions_N.to(DEVICE))


POSITIONS = torch.cat([torch.arange(9), torch.arange(4)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("R", [8, 3], ids=["whole", "partial"])
@pytest.mark.parametrize("norm", ["none", "q/k norm", "q/k norm, unit offset"])
def test_rotary(dtype: torch.dtype, R: int, norm: str) -> None:
    heads, rope, unit_offset = ops.Heads(3, 1, 16), rope_for(POSITIONS, R), "offset" in norm
    qkv, q_gamma, k_gamma = draw((13, 80), (16,), (16,))

    def options(q: Tensor, k: Tensor) -> ops.HeadNorm | None:
        return None if norm == "none" else ops.HeadNorm(q, k, EPS, unit_offset)

    def definition(x: Tensor, q_gamma: Tensor, k_gamma: Tensor) -> tuple[Tensor, ...]:
        q, k, v = heads.split(x)
        if norm != "none":
            q = reference.rms_norm(q, q_gamma, EPS, unit_offset=unit_offset)
            k = reference.rms_norm(k, k_gamma, EPS, unit_offset=unit_offset)
        cos, sin = (table.to(x.dtype) if x.dtype == torch.float64 else table for table in (rope.cos_NR, rope.sin_NR))
        return reference.rotary(q, cos, sin).flatten(1), reference.rotary(k, cos, sin).flatten(1), v.flatten(1)

    def op(x: Tensor, q_gamma: Tensor, k_gamma: Tensor) -> tuple[Tensor, ...]:
        return tuple(part.flatten(1) for part in ops.rotary_packed(x, heads, rope, options(q_gamma, k_gamma)))

    needs = [True, norm != "none", norm != "none"]
    compare(op, definition, [qkv, q_gamma, k_gamma], needs, dtype)


def labels(N: int, V: int) -> Tensor:
    found = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(5))
    found[2] = -100
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("kind", ["frozen, sum", "frozen, per token", "learns, sum"])
def test_linear_cross_entropy(dtype: torch.dtype, softcap: float | None, kind: str) -> None:
    hidden, head = draw((17, 64), (301, 64))
    per_token = "per token" in kind

    def definition(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        losses_N = reference.linear_cross_entropy(x, w, y, softcap=softcap)
        return losses_N if per_token else losses_N.sum()[None]

    def op(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        found = ops.linear_cross_entropy(x, w, y, softcap=softcap, per_token=per_token)
        return found if per_token else found[None]

    compare(op, definition, [hidden, head * 0.2, labels(17, 301)], [True, "learns" in kind, False], dtype)


def test_losses_one_by_one_of_a_head_that_learns_are_refused() -> None:
    hidden, head = (x.to(DEVICE).requires_grad_() for x in draw((4, 64), (11, 64)))
    targets = labels(4, 11).to(DEVICE)
    with pytest.raises(UsageError, match="the head learns"):
        ops.linear_cross_entropy(hidden, head, targets, per_token=True)
    assert ops.token_losses(hidden, head, targets).shape == (4,), "without gradients they are given"


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attention(window: int | None, softcap: float | None) -> None:
    inputs = [x.flatten(1) for x in draw((13, 4, 16), (13, 2, 16), (13, 2, 16))]
    packing = Packing([0, 9, 13], POSITIONS.to(DEVICE))

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, 16))

    compare(
        lambda *x: ops.attention(*map(heads, x), packing, 0.25, window, softcap).flatten(1),
        lambda *x: reference.attention(*map(heads, x), [0, 9, 13], 0.25, window, softcap).flatten(1),
        inputs, [True] * 3, torch.float32, of_largest,
    )  # fmt: skip


DEFINITIONS: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "rms_norm": (lambda x, g: reference.rms_norm(x, g, EPS), [(3, 8), (8,)]),
    "rms_norm, unit offset": (lambda x, g: reference.rms_norm(x, g, EPS, unit_offset=True), [(3, 8), (8,)]),
    "add_rms_norm": (lambda x, u, g: reference.add_rms_norm(x, u, g, EPS), [(3, 8), (3, 8), (8,)]),
    "rms_norm_add": (lambda x, u, g: reference.rms_norm_add(x, u, g, EPS), [(3, 8), (3, 8), (8,)]),
    "swiglu": (reference.swiglu, [(3, 12)]),
    "geglu": (reference.geglu, [(3, 12)]),
    "rotary": (
        lambda x: reference.rotary(x, *(t.double() for t in (ROPE.cos_NR.cpu(), ROPE.sin_NR.cpu()))), [(13, 2, 8)]
    ),
    "attention": (lambda *x: reference.attention(*x, [0, 2, 5], 0.5), [(5, 4, 3), (5, 2, 3), (5, 2, 3)]),
    "attention, window, soft-cap": (
        lambda *x: reference.attention(*x, [0, 5], 0.5, 2, 1.5), [(5, 4, 3), (5, 2, 3), (5, 2, 3)]
    ),
    "linear_cross_entropy": (lambda x, w: reference.linear_cross_entropy(x, w, labels(5, 7)), [(5, 4), (7, 4)]),
    "linear_cross_entropy, soft-cap": (
        lambda x, w: reference.linear_cross_entropy(x, w, labels(5, 7), softcap=1.5, chunk=2), [(5, 4), (7, 4)]
    ),
}  # fmt: skip
ROPE = rope_for(POSITIONS, 3)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_gradcheck_of_the_definitions(name: str) -> None:
    definition, shapes = DEFINITIONS[name]
    leaves = [x.double().requires_grad_() for x in draw(*shapes)]
    assert torch.autograd.gradcheck(definition, leaves)


def tiny_layer(learns: bool) -> tuple[ModelSpec, dict[str, Tensor], Ropes, Packing]:
    spec = ModelSpec("llama", 1, 50, 64, 96, 4, 2, 16, EPS, (RopeSpec(10_000.0),), True, 64)
    shapes = {
        "norm_attention": (64,), "qkv": (128, 64), "output": (64, 64), "norm_mlp": (64,), "gate_up": (192, 64),
        "down": (64, 96),
    }  # fmt: skip
    weights = {
        key: (x * 0.2 + (len(x.shape) == 1)).to(DEVICE).requires_grad_(learns)
        for key, x in zip(shapes, draw(*shapes.values()), strict=True)
    }
    return spec, weights, (rope_for(POSITIONS, 8),), Packing([0, 9, 13], POSITIONS.to(DEVICE))


PRODUCTS = ("aten.mm", "aten.addmm")  # a GPU's attention in fp32 may be made of bmm


@pytest.mark.skipif(INTERPRETED, reason="the interpreter's own products would be counted")
def test_nothing_below_the_first_layer_is_computed() -> None:
    """The products of forward and backward are counted: the projection of query, key and value has no dX."""
    spec, weights, rope, packing = tiny_layer(learns=True)
    (hidden_ND,) = draw((13, 64))
    flops = {}
    for needed in (False, True):
        x_ND = hidden_ND.to(DEVICE).requires_grad_(needed)
        with FlopCounterMode(display=False) as counter:
            decoder_layer(spec, 0, weights, x_ND, rope, packing).sum().backward()
        flops[needed] = sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op) in PRODUCTS)
        assert (x_ND.grad is not None) == needed
    matrices = sum(weights[key].numel() for key in ("qkv", "output", "gate_up", "down"))
    assert flops[True] == 3 * 2 * 13 * matrices
    assert flops[True] - flops[False] == 2 * 13 * weights["qkv"].numel()


def test_the_gradients_below_the_first_layer_are_the_same() -> None:
    """Every weight gets the gradient that it gets when the hidden state's gradient is formed as well."""
    found = []
    for needed in (False, True):
        spec, weights, rope, packing = tiny_layer(learns=True)
        (hidden_ND,) = draw((13, 64))
        decoder_layer(spec, 0, weights, hidden_ND.to(DEVICE).requires_grad_(needed), rope, packing).sum().backward()
        found.append({key: x.grad for key, x in weights.items()})
    for key, grad in found[0].items():
        assert grad is not None
        torch.testing.assert_close(grad, found[1][key], rtol=2e-5, atol=2e-5 * float(grad.abs().max()))


def test_what_a_layer_keeps_for_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the normed states and not the gated product: they are made again."""
    spec, weights, rope, packing = tiny_layer(learns=True)
    hidden_ND = draw((13, 64))[0].to(DEVICE)
    if DEVICE.type == "cuda":  # what attention keeps is its backend's: here the queries stand for its result
        monkeypatch.setattr(ops, "attention", lambda q_NHE, *rest: q_NHE * 1.0)
    kept: dict[int, int] = {}
    inputs = {x.untyped_storage().data_ptr() for x in (*weights.values(), hidden_ND, rope[0].cos_PR, rope[0].sin_PR)}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in inputs:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // 4
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out_ND = decoder_layer(spec, 0, weights, hidden_ND, rope, packing)
    assert out_ND.requires_grad
    N, D, C, F_, H = 13, 64, 128, 96, 4
    # qkv, attention's result and log-sum-exp, the sum after attention, gate and up, two root mean squares
    most = N * (C + D + H + D + 2 * F_ + 2)
    assert sum(kept.values()) <= most, kept


@pytest.mark.parametrize("planted", ["gamma", "offset", "residual"])
def test_a_planted_error_in_the_seam_is_seen(planted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("elo_engine.model.ops.rms_norm")
    if planted == "gamma":
        right = module._product
        monkeypatch.setattr(module, "_product", lambda d, unit: right(d, unit) * 1.001)
        with pytest.raises(AssertionError):
            test_norm_linear(torch.float32, False, [False, True, True, True])
    elif planted == "offset":
        right_forward = module.norm_forward
        monkeypatch.setattr(module, "norm_forward", lambda x, g, eps, offset, *u: right_forward(x, g, eps, False, *u))
        with pytest.raises(AssertionError):
            test_norm_linear(torch.float32, True, [True] * 4)
    else:
        right_backward = module.norm_backward
        monkeypatch.setattr(module, "norm_backward", lambda *args: right_backward(*args[:6]))
        with pytest.raises(AssertionError):
            test_add_norm_linear(torch.float32, [True] * 5)


def test_no_gradient_is_made_where_none_is_needed() -> None:
    spec, weights, rope, packing = tiny_layer(learns=False)
    (hidden_ND,) = draw((13, 64))
    out_ND = decoder_layer(spec, 0, weights, hidden_ND.to(DEVICE), rope, packing)
    assert not out_ND.requires_grad
    assert norm_linear(hidden_ND.to(DEVICE), weights["norm_mlp"], weights["gate_up"], None, EPS).grad_fn is None


@pytest.mark.skipif(INTERPRETED, reason="this is the process that it would start")
def test_the_same_under_tritons_interpreter(forked: Forked) -> None:
    """The whole file again, with Triton's kernels in place of the CPU's."""
    pytest.importorskip("triton", reason="triton is not installed; pip install 'elo-engine[gpu]'")
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = forked(PYTEST, __file__, environment=environment, folder=root, timeout_s=300)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
