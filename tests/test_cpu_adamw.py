"""The 8-bit AdamW step in C++ against its definition in torch: equal bits on every instruction set, no tolerance."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from cpu_paths import NATIVE
from torch import Tensor

from elo_engine.model import cpu_adamw, cpu_native
from elo_engine.model import reference_adamw as plain
from elo_engine.model.ops import choice
from elo_engine.model.ops.adamw import AdamwState, adamw_step

if not NATIVE:
    pytest.skip(f"no C++ extension: {cpu_native.CSRC_REASON}", allow_module_level=True)

KEY = 0xFEDCBA98  # above 2^31
OPTIONS: dict[str, Any] = {"lr": 1e-2, "eps": 1e-8, "weight_decay": 0.1}
# None; one element; a group but for one, whole, and one more; some groups and a rest; three of the driver's tasks.
SHAPES: tuple[tuple[int, ...], ...] = ((0,), (1,), (255,), (256,), (257,), (7, 100), (20, 30, 60))
DTYPES = [torch.float32, torch.bfloat16]
Tensors = list[Tensor]
Shapes = tuple[tuple[int, ...], ...]


@pytest.fixture(params=NATIVE)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    with cpu_native.using(request.param):
        yield request.param


def noise(seed: int, dtype: torch.dtype = torch.float32, shapes: Shapes = SHAPES) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def powers() -> Tensor:
    return torch.tensor([1.0, 1.0, 0.0, 0.9, 0.999], dtype=torch.float64)


def start(dtype: torch.dtype, shapes: Shapes = SHAPES) -> list[Tensors]:
    """Weights, codes and scales after two steps of the definition, so that no code is trivial."""
    weights = [(w * 0.3).to(dtype) for w in noise(5, shapes=shapes)]
    state = [weights, *(list(part) for part in zip(*map(plain.empty_codes, weights), strict=True))]
    counts = powers()
    for step in (1, 2):
        plain.adamw_8bit(noise(20 + step, shapes=shapes), *state, counts, clip=None, key=step, **OPTIONS)
    return state


def copied(state: list[Tensors]) -> list[Tensors]:
    return [[t.clone() for t in part] for part in state]


def bits_of(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in (torch.int8, torch.uint8) else tensor.view(torch.int8)


def differences(ours: list[Tensors], theirs: list[Tensors]) -> list[tuple[int, int]]:
    """(part, tensor) wherever a bit differs; parts are weights, two kinds of codes, their scales."""
    return [
        (part, i)
        for part in range(5)
        for i, (a, b) in enumerate(zip(ours[part], theirs[part], strict=True))
        if not torch.equal(bits_of(a), bits_of(b))
    ]


def both(
    state: list[Tensors], grads: list[list[Tensor | None]], clip: float | None = None, key: int = KEY, **options: Any
) -> tuple[list[Tensors], list[Tensors]]:
    """The state after steps with these gradients: by C++, and by the definition; norms and powers must be equal."""
    ours, theirs, our_powers, their_powers = copied(state), copied(state), powers(), powers()
    for step, given in enumerate(grads):
        rest: dict[str, Any] = {**OPTIONS, **options, "clip": clip, "key": (key + step) % 2**32}
        our_result = cpu_adamw.adamw_8bit(given, *ours, our_powers, **rest)
        result = plain.adamw_8bit(given, *theirs, their_powers, **rest)
        assert torch.equal(our_result, result) and torch.equal(our_powers, their_powers)
    return ours, theirs


@pytest.mark.parametrize("clip", [None, 1e6, 1.0])
@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("grad_dtype", DTYPES)
def test_every_bit_is_the_definitions_over_several_steps(
    path: str, grad_dtype: torch.dtype, weight_dtype: torch.dtype, clip: float | None
) -> None:
    state = start(weight_dtype)
    grads: list[list[Tensor | None]] = [[*noise(30 + step, grad_dtype)] for step in range(4)]
    grads[1][5] = grads[2][1] = None
    ours, theirs = both(state, grads, clip)
    assert differences(ours, theirs) == []
    assert {part for part, _ in differences(ours, state)} == set(range(5)), "a step changes weights, codes and scales"


@pytest.mark.parametrize("key", [0, 1, 2**31, 2**32 - 1])
def test_any_key_and_no_weight_decay(path: str, key: int) -> None:
    state = start(torch.bfloat16)
    ours, theirs = both(state, [[*noise(6)]], key=key, weight_decay=0.0)
    assert differences(ours, theirs) == []
    other, _ = both(state, [[*noise(6)]], key=key ^ 256, weight_decay=0.0)
    assert {0, 1, 2} <= {part for part, _ in differences(ours, other)}, "another key draws other numbers"


def test_no_gradient_leaves_a_tensor_as_it_is_and_others_keep_their_numbers(path: str) -> None:
    state = start(torch.bfloat16)
    grads: list[Tensor | None] = [*noise(6)]
    whole, _ = both(state, [list(grads)])
    grads[2] = grads[4] = None
    part, theirs = both(state, [grads])
    assert differences(part, theirs) == []
    assert {i for _, i in differences(part, state)} == {1, 3, 5, 6}
    assert {i for _, i in differences(part, whole)} == {2, 4}, "random bits depend on the place in the model"
    nothing, _ = both(state, [[None] * len(SHAPES)])
    assert differences(nothing, state) == []


@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-30, 1e-19, 1e-12, 1e12, 1e16])
def test_small_and_large_gradients(path: str, size: float, weight_dtype: torch.dtype) -> None:
    """1e-42 is below the normal numbers, 1e16 near where the sum of squares would overflow; then some are 1."""
    state = start(weight_dtype)
    empty = [state[0], *(list(part) for part in zip(*map(plain.empty_codes, state[0]), strict=True))]
    for begin in (state, empty):
        grads = [g * size for g in noise(8)]
        ours, theirs = both(begin, [[*grads], [*grads], [*noise(9)]])
        assert differences(ours, theirs) == []
        for g in grads:
            g.view(-1)[::100] = 1.0
        ours, theirs = both(begin, [[*grads]], clip=0.5)
        assert differences(ours, theirs) == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_weights_and_scales(path: str, dtype: torch.dtype) -> None:
    """The largest numbers, infinities and NaN as weights, and scales from 0 over 2^-120 to 1e30 under all codes."""
    shapes = ((2048,),)
    weights = noise(1, dtype, shapes)
    largest = torch.finfo(dtype).max
    special = [largest, -largest, float("inf"), float("-inf"), float("nan"), 0.0, -0.0, 1e-40, 1e30]
    weights[0][:: 2048 // 9][:9] = torch.tensor(special).to(dtype)
    m = torch.arange(2048).to(torch.int8)
    scales = torch.tensor([0.0, 1e-40, 2.0**-121, 2.0**-120, 1e-30, 1.0, 1e19, 1e30])
    state = [weights, [m], [m.view(torch.uint8).flip(0)], [scales], [scales.flip(0)]]
    for lr in (1e-2, 1e36):
        for grads in (noise(2, torch.float32, shapes), [torch.zeros(2048)], [torch.full((2048,), 1e-30)]):
            ours, theirs = both(state, [[*grads]], lr=lr, weight_decay=0.0)
            assert differences(ours, theirs) == []


def test_a_broken_state_stays_to_be_seen(path: str) -> None:
    for broken in (float("nan"), float("inf")):
        state = start(torch.float32, ((512,),))
        state[3][0][1] = state[4][0][0] = broken
        ours, theirs = both(state, [[torch.ones(512)]])
        assert not bool(torch.isfinite(ours[3][0][1])) and not bool(torch.isfinite(ours[4][0][0]))
        for part in (0, 3, 4):
            torch.testing.assert_close(ours[part], theirs[part], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_norm_that_is_not_finite_changes_nothing(path: str, bad: float) -> None:
    state, grads, counts = start(torch.bfloat16), noise(7, torch.bfloat16), powers()
    grads[-1].view(-1)[-1] = bad
    now = copied(state)
    result = cpu_adamw.adamw_8bit(grads, *now, counts, clip=1.0, key=KEY, **OPTIONS)
    assert result[1] == 0.0 and not bool(torch.isfinite(result[0]))
    assert differences(now, state) == [] and torch.equal(counts, powers())


def test_threads_change_nothing(path: str) -> None:
    shapes = ((40_000,), (300,), (33_333,))
    state, found, before = start(torch.bfloat16, shapes), [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            found.append(both(state, [[*noise(6, shapes=shapes)]], clip=1.0))
    finally:
        torch.set_num_threads(before)
    assert all(differences(ours, theirs) == [] == differences(ours, found[0][0]) for ours, theirs in found)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_write_beyond_a_tensor(path: str, dtype: torch.dtype) -> None:
    """Tensors that are cut from longer ones, and start anywhere."""
    for count in (1, 3, 255, 256, 257, 600):
        state = start(dtype, ((count,),))
        memory = [[torch.full((t[0].numel() + 9,), 77, dtype=t[0].dtype)] for t in state]
        views = [[m[0][3 : 3 + t[0].numel()].copy_(t[0])] for m, t in zip(memory, state, strict=True)]
        grads: list[Tensor | None] = [torch.randn(count + 1)[1:]]
        cpu_adamw.adamw_8bit(grads, *views, powers(), clip=None, key=KEY, **OPTIONS)
        plain.adamw_8bit(grads, *state, powers(), clip=None, key=KEY, **OPTIONS)
        assert differences(views, state) == []
        assert all(bool((m[0][:3] == 77).all()) and bool((m[0][-6:] == 77).all()) for m in memory)


def test_the_op_takes_the_extension_unless_the_definition_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, definition = Mock(side_effect=cpu_native.adamw_8bit), Mock(side_effect=plain.adamw_8bit)
    monkeypatch.setattr(cpu_native, "adamw_8bit", fast)
    monkeypatch.setattr(plain, "adamw_8bit", definition)
    one = torch.ones(300)
    for mode, native, grads, expected in [
        ("auto", "auto", [one, one], 1),
        ("reference", "auto", [one, one], 0),
        ("auto", "torch", [one, one], 0),
        ("auto", "auto", [one, one.bfloat16()], 0),
    ]:
        state = AdamwState.zeros([one.clone(), one.clone()], None, (0.9, 0.999), bits=8)
        monkeypatch.setattr(choice, "_mode", mode)
        with cpu_native.using(native):
            result = adamw_step(state, grads, clip=1.0, key=KEY, **OPTIONS)
        assert (fast.call_count, definition.call_count) == (expected, 1 - expected)
        assert result.updated == 1 and float(state.powers[2]) == 1
        fast.reset_mock()
        definition.reset_mock()


def test_the_wrapper_refuses() -> None:
    numbers = {"factor": 1.0, "step": 0.1, "root": 1.0, "rate1": 0.1, "rate2": 0.001}

    def run(part: int, wrong: Tensor, key: int = KEY) -> None:
        lists = [[torch.ones(3, 100)], *start(torch.float32, ((3, 100),))]
        lists[part] = [wrong]
        cpu_native.adamw_8bit(*lists, numbers, eps=1e-8, decay=0.0, key=key)  # type: ignore[arg-type]

    good = torch.ones(3, 100)
    run(0, good)
    for part, wrong in [
        (0, torch.ones(300)), (0, torch.ones(100, 3).t()), (0, torch.ones(3, 128)[:, :100]), (0, good.double()),
        (1, good.half()), (1, torch.ones(1, 100).expand(3, 100)), (1, torch.ones(3, 100, device="meta")),
        (2, good.to(torch.uint8)), (3, good.to(torch.int8)), (3, torch.zeros(3, 99, dtype=torch.uint8)),
        (4, torch.ones(3)), (5, torch.ones(1)), (5, torch.ones(4)[::2]), (5, good[0, :2].double()),
    ]:  # fmt: skip
        with pytest.raises(AssertionError):
            run(part, wrong)
    for key in (-1, 2**32):
        with pytest.raises(AssertionError, match="key"):
            run(0, good, key)
    lists = [[torch.ones(3)] * 2, *(part * 2 for part in start(torch.float32, ((3,),)))]
    with pytest.raises(AssertionError, match="lists"):
        cpu_native.adamw_8bit(*lists[:5], lists[5][:1], numbers, eps=0.0, decay=0.0, key=0)
    lists[0][1] = lists[0][1].bfloat16()
    with pytest.raises(AssertionError, match="gradient 1"):
        cpu_native.adamw_8bit(*lists, numbers, eps=0.0, decay=0.0, key=0)


def test_the_extension_checks_what_would_crash() -> None:
    native = cpu_native._csrc
    assert native is not None
    memory = torch.zeros(600)
    row = (address := memory.data_ptr(),) * 6
    good = ([row], [1], [0], False, False, (1.0, 0.0, 1.0, 0.1, 0.1, 1e-8, 0.0), 0, "auto")
    native.adamw_8bit(*good)
    native.adamw_8bit([(0,) * 6], [0], *good[2:])  # of no elements: no address is looked at
    wrong_at = [(i, 0) for i in range(6)] + [(i, address + 1) for i in (0, 1, 4, 5)]  # codes may lie anywhere
    for position, value in [
        *((0, [(*row[:i], wrong, *row[i + 1 :])]) for i, wrong in wrong_at),
        (0, []), (0, [row, row]), (1, [-1]), (1, [1 << 62]), (1, []), (2, [-1]), (2, [0, 1]),
        (6, -1), (6, 1 << 32), (7, "sse9"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=r"adamw|null|aligned|overflows|instruction set"):
            native.adamw_8bit(*good[:position], value, *good[position + 1 :])


RIGHT = SimpleNamespace(**vars(plain))
ULP = 1 + 2.0**-23
PLANTED: list[tuple[str, Any]] = [
    ("random_bits", lambda key, tensor, first, *rest: RIGHT.random_bits(key, tensor, first + 1, *rest)),
    ("random_bits", lambda key, tensor, *rest: RIGHT.random_bits(key, 0, *rest)),
    ("mix", lambda x, key: RIGHT.mix(x, key * 0)),
    ("_GOLDEN_PRIME", 0x9E3779B3),
    ("_WHOLE", 2.0**22),
    ("_round_up", lambda low, below, above, value, bits: torch.where(2 * value > below + above, low + 1, low)),
    ("_round_up", lambda low, below, above, value, bits: RIGHT._round_up(low, below, above, value, bits ^ 0x8000)),
    ("encode_signed", lambda value, bits: RIGHT.encode_signed(value.abs(), bits)),
    ("encode_signed", lambda value, bits: RIGHT.encode_signed(value * ULP, bits)),
    ("encode_unsigned", lambda value, bits: RIGHT.encode_unsigned(value * ULP, bits)),
    ("decode_signed", lambda codes, scales: RIGHT.decode_signed(codes, scales) * ULP),
    ("decode_unsigned", lambda codes, scales: RIGHT.decode_unsigned(codes, scales) * ULP),
    ("round_to_bf16", lambda value, bits: value.bfloat16()),
    ("round_to_bf16", lambda value, bits: RIGHT.round_to_bf16(value, bits & 0x7FFF)),
]


@pytest.mark.parametrize("planted", range(len(PLANTED)))
def test_a_planted_difference_is_seen(monkeypatch: pytest.MonkeyPatch, planted: int) -> None:
    """The comparison above is worth something: with one thing wrong in the definition, bits differ."""
    state = start(torch.bfloat16)
    ours, theirs = both(state, [[*noise(6)]])
    assert differences(ours, theirs) == []
    monkeypatch.setattr(plain, *PLANTED[planted])
    ours, theirs = both(state, [[*noise(6)]])
    assert differences(ours, theirs) != []
