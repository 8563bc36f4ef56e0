"""The AdamW step in parts: leaves in groups, norms before numbers before updates, is the step over all leaves at once.

On the CPU bit for bit on every path. Under Triton bit for bit where the norm does not clip, and where it does within
one rounding of the truth, since squares are added in another order.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from cpu_paths import NATIVE
from forked import Forked
from torch import Tensor

from elo_engine.model import cpu_native
from elo_engine.model.ops import choice
from elo_engine.model.ops.adamw import AdamwState, StepNumbers, adamw_step, adamw_update, leaf_norms, step_numbers

from .kernel_errors import assert_rounded_once
from .launching import BACKENDS, ROOT, Launcher

KEY = 0xFEDCBA98  # above 2^31
OPTIONS: dict[str, Any] = {"lr": 1e-2, "eps": 1e-8, "weight_decay": 0.1}
# A matrix; one element; none; a group of 256 and one more; two tiles of 2048, the last one ragged; a group and a rest.
SHAPES: tuple[tuple[int, ...], ...] = ((7, 100), (1,), (0,), (257,), (20, 130), (300,), (512,))
CUTS = [(0, 7), (0, 1, 2, 3, 4, 5, 6, 7), (0, 2, 5, 7), (0, 6, 7)]
DTYPES = [torch.float32, torch.bfloat16]
# What makes the step on a CPU: the mode of the ops, the C++ or its absence, and the bits of the moments.
PATHS = [("auto", "torch", 32), ("reference", "auto", 32), ("auto", "torch", 8), ("reference", "auto", 8)]
PATHS += [("auto", native, 8) for native in NATIVE]


@pytest.fixture(params=PATHS, ids=lambda path: f"{path[0]}-{path[1]}-{path[2]}")
def bits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    mode, native, moments = request.param
    monkeypatch.setattr(choice, "_mode", mode)
    with cpu_native.using(native):
        yield moments


def noise(seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def start(bits: int, leaf_dtype: torch.dtype) -> AdamwState:
    """bf16 leaves are weights of 8-bit state and copies of the masters of fp32 state."""
    weights = [w * 0.3 for w in noise(5)]
    leaves = [w.to(leaf_dtype) for w in weights]
    if bits == 8:
        return AdamwState.zeros(leaves, None, (0.9, 0.999), bits=8)
    return AdamwState.zeros(weights, leaves if leaf_dtype == torch.bfloat16 else None, (0.9, 0.999), bits=32)


def lists(state: AdamwState) -> list[list[Tensor]]:
    found = [state.weights, state.exp_avgs, state.exp_avg_sqs, *(state.scales or ())]
    return found if state.leaves is None else [*found, state.leaves]


def part(state: AdamwState, first: int, end: int) -> AdamwState:
    """The state of some leaves, with powers that nobody may read or write."""
    cut = slice(first, end)
    return AdamwState(
        state.weights[cut],
        None if state.leaves is None else state.leaves[cut],
        state.exp_avgs[cut],
        state.exp_avg_sqs[cut],
        None if state.scales is None else (state.scales[0][cut], state.scales[1][cut]),
        torch.full((5,), float("nan"), dtype=torch.float64),
    )


def groups(cuts: tuple[int, ...]) -> list[tuple[int, int]]:
    return list(pairwise(cuts))


def numbers_of(state: AdamwState, grads: list[Tensor], cuts: tuple[int, ...], **options: Any) -> StepNumbers:
    norms = [norm for first, end in groups(cuts) for norm in leaf_norms(grads[first:end])]
    bits: Any = 8 if state.scales is not None else 32
    return step_numbers(state.powers, norms, bits=bits, **{**OPTIONS, **options})


def differences(ours: AdamwState, theirs: AdamwState) -> set[tuple[int, int]]:
    """(list, leaf) wherever a bit differs."""
    return {
        (kind, i)
        for kind, pair in enumerate(zip(lists(ours), lists(theirs), strict=True))
        for i, (a, b) in enumerate(zip(*pair, strict=True))
        if not torch.equal(a.view(-1).view(torch.int8), b.view(-1).view(torch.int8))
    }


@pytest.mark.parametrize("clip", [None, 1e6, 0.5])
@pytest.mark.parametrize("leaf_dtype", DTYPES)
@pytest.mark.parametrize("grad_dtype", DTYPES)
def test_parts_are_the_step_bit_for_bit(
    bits: int, grad_dtype: torch.dtype, leaf_dtype: torch.dtype, clip: float | None
) -> None:
    """Steps of different cuts, whose groups are updated in any order."""
    ours, theirs = start(bits, leaf_dtype), start(bits, leaf_dtype)
    for step, cuts in enumerate(CUTS):
        grads, options = noise(30 + step, grad_dtype), {"clip": clip, "key": (KEY + step) % 2**32}
        result = adamw_step(theirs, [g.clone() for g in grads], **OPTIONS, **options)
        numbers = numbers_of(ours, grads, cuts, **options)
        for first, end in reversed(groups(cuts)):
            adamw_update(part(ours, first, end), grads[first:end], numbers, first=first)
        assert torch.equal(numbers.result.norm, result.norm) and numbers.result.updated == result.updated == 1.0
        assert differences(ours, theirs) == set()
        assert torch.equal(ours.powers, theirs.powers) and ours.powers[2] == step + 1
    changed = {kind for kind, _ in differences(ours, start(bits, leaf_dtype))}
    assert changed == set(range(len(lists(ours)))), "weights, moments, scales and leaves"


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_are_scalars_and_those_of_torch(bits: int, dtype: torch.dtype) -> None:
    grads = noise(3, dtype)
    norms = leaf_norms(grads)
    assert len(norms) == len(SHAPES) and {norm.dim() for norm in norms} == {0} and leaf_norms([]) == []
    for norm, grad in zip(norms, grads, strict=True):
        assert torch.equal(norm.float(), torch.nn.utils.get_total_norm([grad.float()]))


def test_updates_may_wait_until_the_next_steps_numbers_are_made(bits: int) -> None:
    ours, theirs = start(bits, torch.bfloat16), start(bits, torch.bfloat16)
    steps = [noise(40), noise(41)]
    for key, grads in enumerate(steps):
        adamw_step(theirs, [g.clone() for g in grads], clip=1.0, key=key, **OPTIONS)
    made = [numbers_of(ours, grads, CUTS[0], clip=1.0, key=key) for key, grads in enumerate(steps)]
    for first, end in groups(CUTS[2]):
        for grads, numbers in zip(steps, made, strict=True):
            adamw_update(part(ours, first, end), grads[first:end], numbers, first=first)
    assert differences(ours, theirs) == set() and torch.equal(ours.powers, theirs.powers)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_step_that_is_not_taken_changes_nothing(bits: int, bad: float) -> None:
    state, grads = start(bits, torch.bfloat16), noise(7, torch.bfloat16)
    grads[3][-1] = bad
    powers = state.powers.clone()
    numbers = numbers_of(state, grads, CUTS[2], clip=1.0, key=KEY)
    for first, end in groups(CUTS[2]):
        adamw_update(part(state, first, end), grads[first:end], numbers, first=first)
    assert numbers.result.updated == 0.0 and not bool(torch.isfinite(numbers.result.norm))
    assert differences(state, start(bits, torch.bfloat16)) == set() and torch.equal(state.powers, powers)


def test_random_bits_are_of_the_leafs_number_in_the_model() -> None:
    """With a wrong number 8-bit state differs, so that the comparisons above would see it; fp32 state does not."""
    for bits in (8, 32):
        right, wrong, grads = start(bits, torch.bfloat16), start(bits, torch.bfloat16), noise(2)
        for state, shift in ((right, 0), (wrong, 1)):
            numbers = numbers_of(state, grads, CUTS[0], clip=None, key=KEY)
            adamw_update(part(state, 4, 7), grads[4:], numbers, first=4 + shift)
        assert (differences(right, wrong) != set()) == (bits == 8)


def test_no_gradient_at_all_is_a_step_of_norm_0(bits: int) -> None:
    ours, theirs = start(bits, torch.float32), start(bits, torch.float32)
    result = adamw_step(theirs, [None] * len(SHAPES), clip=1.0, **OPTIONS)
    numbers = numbers_of(ours, [], (0,), clip=1.0)
    assert numbers.result.norm == result.norm == 0.0 and torch.equal(ours.powers, theirs.powers)


def test_what_does_not_belong_together_is_refused(bits: Any) -> None:
    state, other = start(bits, torch.float32), start(40 - bits, torch.float32)
    numbers = numbers_of(state, noise(1), CUTS[0], clip=None)
    with pytest.raises(ValueError, match="grads: 6 for 7 weights"):
        adamw_update(state, noise(1)[1:], numbers)
    with pytest.raises(ValueError, match=f"numbers: made for moments of {bits} bits"):
        adamw_update(other, noise(1), numbers)
    assert differences(state, start(bits, torch.float32)) == set()


# The kernels, under Triton's interpreter and on a GPU where there is one.

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
BETAS = (0.9, 0.999)


@pytest.fixture(scope="module", params=BACKENDS)
def launch(request: pytest.FixtureRequest) -> Launcher:
    pytest.importorskip("triton", reason="triton is not installed; pip install 'elo-engine[gpu]'")
    return Launcher(request.param)


def kernel_norms(launch: Launcher, grads: list[Tensor], cuts: tuple[int, ...], **options: Any) -> Tensor:
    found = [launch("adamw_norms", "leaf_norms", tuple(grads[a:b]), **options)[0] for a, b in groups(cuts)]
    assert all(norms is not None and norms.dtype == torch.float64 for norms in found)
    return torch.cat([norms for norms in found if norms is not None])


def kernel_parts(
    launch: Launcher, state: AdamwState, grads: list[Tensor], cuts: tuple[int, ...], clip: float | None,
    planted: list[tuple[str, str]] | None = None,
) -> Tensor:  # fmt: skip
    """One step in parts; the control vector. planted: in the file of the update."""
    norms = kernel_norms(launch, grads, cuts)
    (control,) = launch("adamw_norms", "step_control", norms, state.powers, lr=OPTIONS["lr"], clip=clip)
    assert control is not None
    for first, end in groups(cuts):
        some = [tuple(tensors[first:end]) for tensors in lists(state)]
        given = (tuple(grads[first:end]), *some[: 5 if state.scales else 3])
        if state.scales is not None:
            options = {**OPTIONS, "key": KEY, "first": first, "planted": planted}
            launch("adamw_8bit", "update_8bit", *given, control, **options)
        else:
            leaves = some[3] if state.leaves is not None else None
            launch("adamw", "update_fp32", *given, leaves, control, planted=planted, **OPTIONS)
    return control


def kernel_step(launch: Launcher, state: AdamwState, grads: list[Tensor], clip: float | None) -> Tensor:
    given = [tuple(grads), *(tuple(tensors) for tensors in lists(state)[: 5 if state.scales else 3])]
    if state.scales is not None:
        (control,) = launch("adamw_8bit", "adamw_8bit", *given, state.powers, clip=clip, key=KEY, **OPTIONS)
    else:
        leaves = None if state.leaves is None else tuple(state.leaves)
        (control,) = launch("adamw", "adamw_fp32", *given, leaves, state.powers, clip=clip, **OPTIONS)
    assert control is not None
    return control


@pytest.mark.parametrize(("moments", "dtype"), [(8, torch.bfloat16), (32, torch.float32)])
def test_kernels_in_parts_are_the_step_bit_for_bit_where_nothing_clips(
    launch: Launcher, moments: int, dtype: torch.dtype
) -> None:
    ours, theirs = start(moments, torch.bfloat16), start(moments, torch.bfloat16)
    for step, cuts in enumerate([(0, 4, 7), (0, 2, 5, 7)][: 2 if moments == 32 else 1]):
        grads = noise(50 + step, dtype)
        control, right = kernel_parts(launch, ours, grads, cuts, 1e6), kernel_step(launch, theirs, grads, 1e6)
        assert torch.equal(control[1:7], right[1:7]) and control[2] == 1.0
        # Sums of squares in another order: 19 additions in fp32 at the most, and a root halves their errors.
        assert float(control[0]) == pytest.approx(float(right[0]), rel=20 * 2.0**-24)
        assert differences(ours, theirs) == set() and torch.equal(ours.powers, theirs.powers)


def test_kernels_in_parts_clip_by_the_norm_of_all(launch: Launcher) -> None:
    state, grads = start(32, torch.bfloat16), noise(60)
    norm = float(torch.cat([g.double().view(-1) for g in grads]).norm())
    before = [w.double() for w in state.weights]
    control = kernel_parts(launch, state, grads, (0, 2, 5, 7), 0.5)
    assert float(control[0]) == pytest.approx(norm, rel=20 * 2.0**-24)
    assert state.leaves is not None
    for i, grad in enumerate(grads):
        g = grad.double() * 0.5 / norm
        found = (state.exp_avgs[i], state.exp_avg_sqs[i], state.weights[i])
        change = g / (g.abs() + OPTIONS["eps"]) + OPTIONS["weight_decay"] * before[i]
        for ours, truth in zip(found, (0.1 * g, 0.001 * g * g, before[i] - OPTIONS["lr"] * change), strict=True):
            if truth.numel():
                assert_rounded_once(ours, truth)
        assert torch.equal(state.leaves[i], state.weights[i].bfloat16())


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_by_kernels(launch: Launcher, dtype: torch.dtype) -> None:
    """Aligned to 16 bytes or not, of no elements, and of more tiles than a sum takes; here one sum a round."""
    grads = [*noise(8, dtype), torch.randn(601).to(dtype)[1:], torch.randn(9 * 2048).to(dtype)]
    truth = torch.stack([g.double().norm() for g in grads])
    rounds = ("BLOCK_P=LAUNCH.sums_per_round", "BLOCK_P=1")
    for cuts, planted in [((0, 4, 9), None), ((0, 9), [rounds])]:
        norms = kernel_norms(launch, grads, cuts, planted=planted)
        torch.testing.assert_close(norms, truth, rtol=20 * 2.0**-24, atol=0)
    for wrong in [] if dtype == torch.bfloat16 else [
        ("total_P +=", "total_P ="), ("bounds_ptr + tensor)", "bounds_ptr)"), ("part < end", "part < end - 1"),
        ("bounds_ptr + tensor + 1", "bounds_ptr + tensor + 1 - tensor // 8"), ("tl.sqrt(", "("),
    ]:  # fmt: skip
        norms = kernel_norms(launch, grads, (0, 9), planted=[rounds, wrong] if wrong[0] == "total_P +=" else [wrong])
        assert not torch.allclose(norms, truth, rtol=20 * 2.0**-24, atol=0), wrong


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("moments", [8, 32])
def test_kernels_in_parts_change_nothing_where_the_norm_is_not_finite(
    launch: Launcher, moments: int, bad: float
) -> None:
    state, grads = start(moments, torch.bfloat16), noise(7)
    grads[4][-1, -1] = bad
    powers = state.powers.clone()
    control = kernel_parts(launch, state, grads, (0, 4, 7), 1.0)
    assert control[1] == 0.0 and not bool(torch.isfinite(control[0]))
    assert differences(state, start(moments, torch.bfloat16)) == set() and torch.equal(state.powers, powers)


def test_a_planted_error_of_the_parts_is_seen(launch: Launcher) -> None:
    grads = noise(9)
    right = start(8, torch.bfloat16)
    kernel_step(launch, right, grads, None)
    state = start(8, torch.bfloat16)
    kernel_parts(launch, state, grads, (0, 4, 7), None, [("(first + tensor).to(tl.uint32)", "tensor.to(tl.uint32)")])
    assert {i for _, i in differences(state, right)} == {4, 5, 6}, "those whose number is not their place in the list"
    norms, powers = kernel_norms(launch, grads, (0, 7)), start(8, torch.bfloat16).powers
    squares = [("number = number * number", "pass")]
    (control,) = launch("adamw", "control", norms, powers, 1e-2, None, norms=True, planted=squares)
    assert control is not None and abs(float(control[0]) / float(norms.norm()) - 1) > 0.1


def test_launchers_of_the_parts_refuse(launch: Launcher) -> None:
    state, good = start(8, torch.bfloat16), torch.ones(8)
    control, powers = torch.ones(8), state.powers
    with pytest.raises(ValueError, match=r"grads\[1\]: strides \(2,\); .*contiguous"):
        launch("adamw_norms", "leaf_norms", (good, torch.ones(16)[::2]))
    with pytest.raises(ValueError, match="nothing to update"):
        launch("adamw_norms", "leaf_norms", ())
    with pytest.raises(ValueError, match=r"grads\[0\]: dtype torch\.float64"):
        launch("adamw_norms", "leaf_norms", (good.double(),))
    with pytest.raises(ValueError, match=r"\['torch\.bfloat16', 'torch\.float32'\] in one call"):
        launch("adamw_norms", "leaf_norms", (good, good.bfloat16()))
    for norms, counts, message in [
        (good, powers, r"norms_S: \(8,\) of torch\.float32.*leaf_norms made"),
        (good.double()[::2], powers, r"norms_S: .*strides \(2,\)"),
        (good.double(), powers.float(), "powers: .*torch.float32; pass the vector that adamw_powers made"),
    ]:
        with pytest.raises(ValueError, match=message):
            launch("adamw_norms", "step_control", norms, counts, lr=0.1, clip=None)
    with pytest.raises(ValueError, match=r"control_C: \(7,\) of torch\.float32; pass the vector that step_control"):
        launch("adamw", "update_fp32", (good,), (good,), (good,), (good,), None, control[:7], **OPTIONS)
    eight = [tuple(tensors[:1]) for tensors in lists(state)]
    for change, message in [
        ({"first": -1}, "first: -1 is outside"), ({"first": 2**31}, "first: "), ({"key": 2**32}, "key: 4294967296"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            launch(
                "adamw_8bit", "update_8bit", (noise(1)[0],), *eight, control,
                **{**OPTIONS, "key": KEY, "first": 0, **change},
            )  # fmt: skip


PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from elo_engine.kernels import adamw, adamw_8bit, adamw_norms
from elo_engine.model.ops import choice
import quick_interpreter
import tests.test_adamw_parts as t

quick_interpreter.install()
launches = []

class Counted:
    def __init__(self, kernel):
        self.kernel = kernel
    def __getitem__(self, grid):
        launches.append(grid)
        return self.kernel[grid]

for module in (adamw, adamw_8bit, adamw_norms):
    for name in [name for name in vars(module) if name.endswith("_kernel")]:
        setattr(module, name, Counted(getattr(module, name)))
choice.configure("fused", torch.device("cpu"))
for bits in (8, 32):
    ours, theirs = t.start(bits, torch.bfloat16), t.start(bits, torch.bfloat16)
    for step, cuts in enumerate([(0, 4, 7), (0, 2, 5, 7)][: 2 if bits == 32 else 1]):
        grads, options = t.noise(step), {"clip": None, "key": t.KEY}
        right = t.adamw_step(theirs, list(grads), **t.OPTIONS, **options)
        launches.clear()
        numbers = t.numbers_of(ours, grads, cuts, **options)
        for first, end in t.groups(cuts):
            t.adamw_update(t.part(ours, first, end), grads[first:end], numbers, first=first)
        assert len(launches) == 3 * len(t.groups(cuts)) + 1, launches
        assert numbers.control_C is not None and numbers.result.updated == right.updated == 1.0
        assert abs(float(numbers.result.norm / right.norm) - 1) < 20 * 2.0**-24
        assert t.differences(ours, theirs) == set() and torch.equal(ours.powers, theirs.powers)
    assert len(t.differences(ours, t.start(bits, torch.bfloat16))) > 20
"""


@needs_triton
def test_the_op_through_triton_two_launches_a_group_one_a_step_one_an_update(forked: Forked) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    done = forked(PROGRAM, ROOT, environment=environment, folder=ROOT / "tests")
    assert done.returncode == 0, done.stderr
