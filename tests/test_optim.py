"""The optimizer around the update: bit for bit torch's AdamW on the CPU, accumulation, 8-bit state, snapshots."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forked import Forked

from elo_engine.config import OptimizerConfig
from elo_engine.errors import FailedError, RefusedError
from elo_engine.model import reference_adamw as plain
from elo_engine.model import split_weights
from elo_engine.model.decoder import Leaf
from elo_engine.train.loop import Progress
from elo_engine.train.optim import MasterAdamW
from elo_engine.train.state import restore, save_snapshot

ROOT = Path(__file__).resolve().parents[1]
SHAPES = ((1,), (7, 30), (40, 64))


def model(dtype: torch.dtype, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> Any:
    """What the optimizer sees of a decoder: leaves, the last one packed of two tensors."""
    generator = torch.Generator().manual_seed(3)
    leaves = []
    for i, shape in enumerate(shapes):
        tensor = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
        names, parts = (f"part.{i}",), (shape,)
        if i == len(shapes) - 1 and shape[0] % 2 == 0:
            names, parts = (f"part.{i}.a", f"part.{i}.b"), ((shape[0] // 2, *shape[1:]),) * 2
        leaves.append(Leaf(tensor, names, parts))
    return SimpleNamespace(leaves=leaves, dtype=dtype)


def backward(made: Any, seed: int, poison: float = 1.0) -> list[torch.Tensor]:
    """A backward pass whose gradients are noise; returns them."""
    generator = torch.Generator().manual_seed(seed)
    noise = [torch.randn(leaf.tensor.shape, generator=generator).to(made.dtype) for leaf in made.leaves]
    noise[-1].view(-1)[-1] *= poison
    sum((leaf.tensor * g).sum() for leaf, g in zip(made.leaves, noise, strict=True)).backward()  # type: ignore[union-attr]
    return noise


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_fp32_state_is_torchs_adamw_bit_for_bit(dtype: torch.dtype, clip: float | None) -> None:
    made, config = model(dtype), OptimizerConfig(lr=1e-2, weight_decay=0.1, clip=clip)
    optimizer = MasterAdamW(made, config)
    masters = [leaf.tensor.detach().float().clone() for leaf in made.leaves]
    adamw = torch.optim.AdamW(masters, lr=1e-2, betas=config.betas, eps=config.eps, weight_decay=0.1, fused=True)
    for step in range(4):
        optimizer.zero_grad()
        parts = [backward(made, 10 * step + micro) for micro in range(step % 3 + 1)]
        for i, master in enumerate(masters):
            master.grad = parts[0][i].float().clone()
            for part in parts[1:]:
                master.grad += part[i]
        norm = torch.nn.utils.get_total_norm([m.grad for m in masters if m.grad is not None])
        if clip is not None and float(norm) > clip:
            torch._foreach_mul_([m.grad for m in masters if m.grad is not None], clip / float(norm))
        adamw.param_groups[0]["lr"] = 1e-2 / (step + 1)
        adamw.step()
        result = optimizer.step(1e-2 / (step + 1))
        assert torch.equal(result.norm, norm) and result.updated == 1
    for (leaf, ours), theirs in zip(optimizer.masters, masters, strict=True):
        assert torch.equal(ours, theirs) and torch.equal(leaf.tensor, theirs.to(dtype))
    saved = optimizer.moments()
    assert float(saved["step"]) == 4
    assert torch.equal(saved["exp_avg.part.1"], adamw.state[masters[1]]["exp_avg"])
    assert torch.equal(saved["exp_avg_sq.part.2.b"], adamw.state[masters[2]]["exp_avg_sq"][20:])


def test_one_micro_batch_is_not_widened_and_a_second_adds_in_fp32() -> None:
    made = model(torch.bfloat16)
    optimizer = MasterAdamW(made, OptimizerConfig())
    first = backward(made, 1)
    kept = optimizer._grads.of_one_type()
    assert all(g is not None and g.dtype == torch.bfloat16 for g in kept)
    assert all(leaf.tensor.grad is None for leaf in made.leaves)
    assert all(torch.equal(g, f) for g, f in zip(kept, first, strict=True) if g is not None)
    second, third = backward(made, 2), backward(made, 3)
    for i, found in enumerate(optimizer._grads.of_one_type()):
        assert found is not None and found.dtype == torch.float32
        assert torch.equal(found, first[i].float() + second[i].float() + third[i].float())
    optimizer.zero_grad()
    assert optimizer._grads.of_one_type() == [None] * 3


def steps_of(optimizer: MasterAdamW, made: Any, first: int, last: int) -> None:
    for step in range(first, last):
        optimizer.zero_grad()
        backward(made, step, poison=float("inf") if step == 2 else 1.0)  # a skipped step draws numbers too
        optimizer.step(1e-2)


def everything(optimizer: MasterAdamW) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in (optimizer.weights() | optimizer.moments()).items()}


MASTERS: tuple[Any, ...] = ("none", "24", "32")


@pytest.mark.parametrize(("state", "master"), [("fp32", "none"), *(("8bit", master) for master in MASTERS)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_from_a_snapshot_equals_uninterrupted_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype, state: Any, master: Any
) -> None:
    config = OptimizerConfig(lr=1e-2, weight_decay=0.1, state=state, master=master)
    straight = model(dtype)
    through = MasterAdamW(straight, config, seed=5)
    steps_of(through, straight, 0, 7)
    broken = model(dtype)
    before = MasterAdamW(broken, config, seed=5)
    steps_of(before, broken, 0, 4)
    folder = save_snapshot(tmp_path, before, Progress(step=4), {}, {}, keep=1)
    fresh = model(dtype)
    with torch.no_grad():
        for leaf in fresh.leaves:
            leaf.tensor.zero_()
    after = MasterAdamW(fresh, config, seed=5)
    restore(folder, after)
    steps_of(after, fresh, 4, 7)
    left, right = everything(through), everything(after)
    assert left.keys() == right.keys() and [name for name in left if not torch.equal(left[name], right[name])] == []
    assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(straight.leaves, fresh.leaves, strict=True))
    assert float(left["powers"][2]) == 6, "seven steps, one of them skipped"


def test_a_seed_and_a_step_draw_their_own_numbers() -> None:
    made, other = model(torch.bfloat16), model(torch.bfloat16)
    steps_of(MasterAdamW(made, OptimizerConfig(state="8bit"), seed=1), made, 0, 1)
    steps_of(MasterAdamW(other, OptimizerConfig(state="8bit"), seed=2), other, 0, 1)
    assert not torch.equal(made.leaves[2].tensor, other.leaves[2].tensor)
    keys = {plain.step_key(seed, step) for seed in (0, 1, 2**40) for step in range(1000)}
    assert len(keys) > 2995 and all(0 <= key < 2**32 for key in keys)


def test_a_snapshot_of_the_other_format_is_refused() -> None:
    for here, there in (("fp32", "8bit"), ("8bit", "fp32")):
        made = model(torch.bfloat16)
        saved = MasterAdamW(made, OptimizerConfig(state=there))  # type: ignore[arg-type]
        steps_of(saved, made, 0, 1)
        mine = MasterAdamW(model(torch.bfloat16), OptimizerConfig(state=here))  # type: ignore[arg-type]
        with pytest.raises(RefusedError, match=f"is {there} and this run's is {here}; set optimizer.state: {there}"):
            mine.load(saved.weights(), saved.moments())


@pytest.mark.parametrize("here", MASTERS)
@pytest.mark.parametrize("there", MASTERS)
def test_weights_of_more_bits_are_refused_and_of_fewer_taken_over(there: Any, here: Any) -> None:
    made = model(torch.bfloat16)
    saved = MasterAdamW(made, OptimizerConfig(state="8bit", master=there))
    steps_of(saved, made, 0, 2)
    mine = MasterAdamW(model(torch.bfloat16), OptimizerConfig(state="8bit", master=here))
    if MASTERS.index(there) > MASTERS.index(here):
        with pytest.raises(RefusedError, match=f"set optimizer.master: {there}"):
            mine.load(saved.weights(), saved.moments())
        return
    mine.load(saved.weights(), saved.moments())
    assert all(torch.equal(mine.weights()[name], t.to(mine.weights()[name])) for name, t in saved.weights().items())


def test_numbers_of_24_bits_come_back_and_their_leaf_is_the_nearest() -> None:
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(0, 0x7F7F7F00, (5000,), generator=generator) & ~0xFF
    edges = torch.tensor([0, 0x100, 0x8000, 0x7F00, 0x3FFFFF00, 0x3F7F8000, 0x7F7F7F00])
    bits = torch.cat((bits, edges)).int()
    number = torch.cat((bits, bits | torch.tensor(-(2**31), dtype=torch.int32))).view(torch.float32)
    leaf, low = torch.empty_like(number, dtype=torch.bfloat16), torch.empty_like(number, dtype=torch.int8)
    split_weights.split(number, leaf, low)
    assert torch.equal(split_weights.join(leaf, low).view(torch.int32), number.view(torch.int32))
    distance = (leaf.double() - number.double()).abs()
    assert bool((distance <= (number.to(torch.bfloat16).double() - number.double()).abs()).all())
    split_weights.split(torch.full((1,), 3.4e38), leaf[:1], low[:1])
    assert bool(torch.isfinite(leaf[0])), "beyond the largest it is cut"


def test_updates_far_below_the_resolution_add_up() -> None:
    """Weights 1 under a constant gradient: every step takes lr = 2^-17 off, 1/512 of a bf16 step below 1; in 1024 steps
    2^-7. Rounded at random to 24 bits, whose step below 1 is 2^-16, each update errs by at most that with a variance of
    2^-34, independently: 32 of 2^-17 over 1024 steps, and six of those for 4096 elements; moments of 8 bits are exact
    here, since all elements are their group's largest. Without a master the mean is right and single weights are off.
    """
    moved: dict[str, torch.Tensor] = {}
    for master in MASTERS:
        made = model(torch.bfloat16, ((64, 64),))
        with torch.no_grad():
            made.leaves[0].tensor.fill_(1.0)
        optimizer = MasterAdamW(made, OptimizerConfig(state="8bit", master=master, clip=None))
        for _ in range(1024):
            optimizer.zero_grad()
            made.leaves[0].tensor.sum().backward()
            optimizer.step(2.0**-17)
        weights = torch.cat([t.double().flatten() for t in optimizer.weights().values()])
        moved[master] = 1.0 - weights
    truth, spread = 2.0**-7, 32 * 2.0**-17
    assert float((moved["32"] - truth).abs().max()) < 1024 * 2.0**-24
    assert float((moved["24"] - truth).abs().max()) < 6 * spread
    assert abs(float(moved["24"].mean()) - truth) < 5 * spread / 64 + 1024 * 2.0**-24
    # rounded to bf16: a step below 1 is 2^-8, so a walk of 1024 steps of chance 1/512 is spread by sqrt(2) of them
    assert abs(float(moved["none"].mean()) - truth) < 5 * 2**0.5 * 2.0**-8 / 64
    assert float((moved["none"] - truth).abs().max()) > 2.0**-8


def test_8bit_state_of_other_leaves_is_refused() -> None:
    made = model(torch.bfloat16)
    saved = MasterAdamW(made, OptimizerConfig(state="8bit"))
    steps_of(saved, made, 0, 1)
    packed = model(torch.bfloat16)
    leaf = packed.leaves[2]
    packed.leaves[2] = Leaf(leaf.tensor, ("part.2.a", "part.2.c"), leaf.shapes)
    weights = {**saved.weights(), "part.2.c": saved.weights()["part.2.b"]}
    with pytest.raises(FailedError, match=r"packs \['part.2.a', 'part.2.b'\] where this model packs"):
        MasterAdamW(packed, OptimizerConfig(state="8bit")).load(weights, saved.moments())
    short = {name: t for name, t in saved.moments().items() if name != "exp_avg_scales.part.1"}
    with pytest.raises(FailedError, match=r"holds no tensor 'exp_avg_scales.part.1'"):
        MasterAdamW(model(torch.bfloat16), OptimizerConfig(state="8bit")).load(saved.weights(), short)


def test_8bit_state_takes_two_bytes_a_parameter() -> None:
    made = model(torch.bfloat16, ((1024, 1024),))
    optimizer = MasterAdamW(made, OptimizerConfig(state="8bit"))
    state = optimizer._state
    assert state.scales is not None and state.leaves is None
    held = [*state.exp_avgs, *state.exp_avg_sqs, *state.scales[0], *state.scales[1]]
    assert sum(t.untyped_storage().nbytes() for t in held) / 2**20 <= 2.04
    assert state.weights[0].data_ptr() == made.leaves[0].tensor.data_ptr(), "the leaf itself is the weight"
    assert optimizer.snapshot_bytes == sum(t.nbytes for t in held) + 2 * 2**20


def test_a_step_that_is_not_finite_changes_nothing_in_8bit() -> None:
    made = model(torch.bfloat16)
    optimizer = MasterAdamW(made, OptimizerConfig(state="8bit"))
    steps_of(optimizer, made, 0, 2)
    kept = everything(optimizer)
    backward(made, 9, poison=float("nan"))
    result = optimizer.step(1e-2)
    now = everything(optimizer)
    assert result.updated == 0 and not bool(torch.isfinite(result.norm))
    assert [name for name in kept if not torch.equal(kept[name], now[name])] == ["attempts"]


@pytest.mark.parametrize("state", ["fp32", "8bit"])
def test_a_step_that_was_skipped_is_counted_across_a_snapshot(state: Any) -> None:
    """What a step draws goes by its number, so that of one after it must be the same in a run that is resumed."""
    made, other = model(torch.bfloat16), model(torch.bfloat16)
    optimizer, again = (MasterAdamW(one, OptimizerConfig(state=state)) for one in (made, other))
    steps_of(optimizer, made, 0, 2)
    backward(made, 9, poison=float("nan"))
    assert optimizer.step(1e-2).updated == 0 and optimizer.attempts == 3
    again.load(optimizer.weights(), optimizer.moments())
    assert again.attempts == 3 and all(torch.equal(everything(optimizer)[name], value)
                                       for name, value in everything(again).items())  # fmt: skip


def final_loss(state: Any, dtype: torch.dtype) -> float:
    """Least squares with noise of variance 1: mean loss of the last 50 of 400 steps."""
    made = model(dtype, ((32, 64),))
    optimizer = MasterAdamW(made, OptimizerConfig(state=state, betas=(0.9, 0.999), clip=None))
    generator = torch.Generator().manual_seed(0)
    truth, losses = torch.randn(32, 64, generator=generator), []
    for step in range(400):
        x = torch.randn(256, 64, generator=generator)
        y = x @ truth.T + torch.randn(256, 32, generator=generator)
        optimizer.zero_grad()
        loss = (x @ made.leaves[0].tensor.float().T - y).square().mean()
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step(0.03 * min(1.0, 2 * (1 - step / 400)))
    return sum(losses[-50:]) / 50


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_regression_trains_as_well_with_8bit_state(dtype: torch.dtype) -> None:
    """Rounding a bf16 weight of size 1 at random has a variance of at most (2^-7)^2 / 4 = 1.5e-5, and 64 of them feed
    an output: 0.1 % of the noise's variance a step. It adds up over the steps that Adam takes to correct it, and the
    moments' rounding makes steps unequal by a few per cent: 2 % of the floor that fp32 state reaches is 20 times that.
    """
    reached, fp32 = final_loss("8bit", dtype), final_loss("fp32", dtype)
    assert 0.95 < fp32 < 1.05, "the noise is what is left"
    assert reached < 1.02 * fp32


@pytest.mark.parametrize("scale", [1.0, 1e-12])
def test_codes_are_right_on_average_over_many_keys(scale: float) -> None:
    """Each element's mean over 4000 draws, in standard deviations: 5 is a chance of 6e-7 an element."""
    draws, generator = 4000, torch.Generator().manual_seed(1)
    value = torch.randn(256, generator=generator) * scale
    for encode, decode, given in (
        (plain.encode_signed, plain.decode_signed, value),
        (plain.encode_unsigned, plain.decode_unsigned, value * value / scale),
    ):
        bits = torch.stack([plain.random_bits(plain.step_key(7, step), 1, 0, 256) for step in range(draws)]) >> 16
        codes, scales = encode(given.repeat(draws), bits.view(-1))
        found = decode(codes, scales).view(draws, 256).double()
        low, high = found.amin(0), found.amax(0)
        spread = ((high - given).clamp_min(0) * (given - low).clamp_min(0)).sqrt()
        # 16 random bits know a chance to 2^-17 of the gap; below code 1 a second moment is rounded up.
        slack = (high - low) * 2**-16 + given.abs().double() * 1e-6
        z = ((found.mean(0) - given).abs() - slack) / (spread / draws**0.5 + 1e-30)
        above_one = codes.view(draws, 256).amin(0) > 1 if encode is plain.encode_unsigned else given == given
        assert int(above_one.sum()) > 240 and float(z[above_one].max()) < 5


def test_a_slowly_decaying_average_does_not_stick() -> None:
    """beta2 0.999 moves a code of 100 by 1/40 of a step: rounding to nearest would leave it for ever."""
    codes, scales = torch.full((256,), 100, dtype=torch.uint8), torch.ones(1)
    codes[0] = 255
    start = plain.decode_unsigned(codes, scales)
    for step in range(300):
        value = plain.decode_unsigned(codes, scales) * 0.999
        value[0] = 1.0
        codes, scales = plain.encode_unsigned(value, plain.random_bits(plain.step_key(0, step), 0, 0, 256) >> 16)
    mean = float(plain.decode_unsigned(codes, scales)[1:].mean() / start[1])
    # 0.999^300 = 0.7407; one walk is spread by 5.5 %, the mean of 255 by 0.34 %: 5 of those.
    assert abs(mean - 0.999**300) < 0.0175


def test_bf16_rounding_is_right_on_average_and_keeps_what_is_exact() -> None:
    bits = plain.random_bits(plain.step_key(3, 4), 0, 0, 1 << 16) & 0xFFFF
    for value in (1.001, -1.003, 3e-39, 1e30):
        exact = torch.full((1 << 16,), value)
        found = plain.round_to_bf16(exact, bits).double()
        low, high, mean = float(found.min()), float(found.max()), float(exact[0])
        chance = (mean - low) / (high - low)
        deviation = (high - low) * (chance * (1 - chance) / len(found)) ** 0.5
        assert low < mean < high and abs(float(found.mean()) - mean) < 5 * deviation
    kept = torch.tensor([0.0, -1.5, float("inf"), torch.finfo(torch.bfloat16).max])
    assert torch.equal(plain.round_to_bf16(kept, torch.full((4,), 0xFFFF)).float(), kept)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_through_triton_three_launches_a_step_and_the_same_numbers(forked: Forked) -> None:
    """The whole optimizer under Triton's interpreter: whatever the number of tensors, and fresh gradients each step."""
    program = """
import sys
sys.path.insert(0, sys.argv[1])
import quick_interpreter
import torch
import test_optim as t
from elo_engine.config import OptimizerConfig
from elo_engine.kernels import adamw, adamw_8bit
from elo_engine.model.ops import choice
from elo_engine.train.optim import MasterAdamW

quick_interpreter.install()
launches = []

class Counted:
    def __init__(self, kernel):
        self.kernel = kernel
    def __getitem__(self, grid):
        launches.append(grid)
        return self.kernel[grid]

for module in (adamw, adamw_8bit):
    for name in [name for name in vars(module) if name.endswith("_kernel")]:
        setattr(module, name, Counted(getattr(module, name)))
for state in ("fp32", "8bit"):
    found = []
    for mode in ("fused", "reference"):
        choice.configure(mode, torch.device("cpu"))
        made = t.model(torch.bfloat16, t.SHAPES * 3)
        optimizer = MasterAdamW(made, OptimizerConfig(lr=1e-2, state=state))
        for step in range(3):
            launches.clear()
            optimizer.zero_grad()
            t.backward(made, step)
            optimizer.step(1e-2)
            assert len(launches) == (3 if mode == "fused" else 0), (mode, launches)
        found.append({name: x.double() for name, x in optimizer.weights().items()})
    gap = max(float((found[0][name] - found[1][name]).abs().max()) for name in found[0])
    print(state, gap)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = forked(program, Path(__file__).parent, environment=environment)
    assert done.returncode == 0, done.stderr
    gaps = dict(line.split() for line in done.stdout.splitlines())
    # fp32: three steps of fp32 arithmetic on weights up to 4. 8bit: one bf16 step of such a weight where a chance
    # fell between two last places.
    assert float(gaps["fp32"]) < 2e-6 and float(gaps["8bit"]) <= 2**-6
