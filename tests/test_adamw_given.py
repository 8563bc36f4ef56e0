"""The numbers of a step that a repeated launch finds on the device: the same step as with numbers of the host, bit for
bit, and another one when they are others.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed; pip install 'elo-engine[gpu]'")

from elo_engine.model import reference_adamw as plain

from .launching import BACKENDS, Launcher
from .test_adamw import OPTIONS as ADAMW
from .test_adamw import noise, powers

# fp32 numbers, as are their products with the decay: a GPU rounds a launch's numbers to fp32, the interpreter does not
RATES = tuple(float(np.float32(rate)) for rate in (3e-3, 1e-3, 0.1))
OPTIONS = {**ADAMW, "weight_decay": 0.125}
KEYS = (5, 2**31 + 7, 2**32 - 1)
Planted = list[tuple[str, str]]


@pytest.fixture(scope="module", params=BACKENDS)
def launch(request: pytest.FixtureRequest) -> Launcher:
    return Launcher(request.param)


def start(bits: int) -> tuple[Any, ...]:
    """Weights, moments and for 8 bits their scales."""
    weights = [w.bfloat16() if bits == 8 else w for w in noise(1)]
    if bits == 8:
        made = [plain.empty_codes(weight) for weight in weights]
        return (tuple(weights), *(tuple(four[i] for four in made) for i in range(4)))
    return (tuple(weights), *(tuple(torch.zeros_like(w) for w in weights) for _ in range(2)))


def steps(
    launch: Launcher, bits: int, given: bool, planted: Planted | None = None, rates: tuple[float, ...] = RATES,
    keys: tuple[int, ...] = KEYS,
) -> list[torch.Tensor]:  # fmt: skip
    """Everything after three steps. With `given` the host's numbers are others: they must not be looked at."""
    state, counts, found = start(bits), powers(), []
    for step, (lr, key) in enumerate(zip(rates, keys, strict=True)):
        grads = tuple(g.bfloat16() for g in noise(10 + step))
        options = {**OPTIONS, "lr": lr, "clip": 1.0} | ({"key": key} if bits == 8 else {})
        if given:
            (options["given"],) = launch("adamw_plan", "given_bits", lr, OPTIONS["weight_decay"], key)
            options |= {"lr": 7.0} | ({"key": 1} if bits == 8 else {})
        stem, rest = ("adamw_8bit", ()) if bits == 8 else ("adamw", (None,))
        function = "adamw_8bit" if bits == 8 else "adamw_fp32"
        (control,) = launch(stem, function, grads, *state, *rest, counts, planted=planted, **options)
        assert control is not None
        found.append(control[:7])
    return [*found, counts, *(tensor for part in state for tensor in part)]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


@pytest.mark.parametrize("bits", [32, 8])
def test_given_on_the_device_is_the_same_step(launch: Launcher, bits: int) -> None:
    right = steps(launch, bits, given=False)
    assert same(steps(launch, bits, given=True), right)
    assert not same(steps(launch, bits, given=True, rates=(*RATES[:2], 0.11)), right)
    assert same(steps(launch, bits, given=True, keys=(*KEYS[:2], 9)), right) == (bits == 32)


@pytest.mark.parametrize(
    ("bits", "planted"),
    [
        (32, ("if GIVEN:\n        decay", "if False:\n        decay")),
        (32, ("if GIVEN:\n        lr", "if False:\n        lr")),
        (32, ("tl.load(given_ptr + 1)", "tl.load(given_ptr)")),
        (8, ("tl.load(given_ptr + 1)", "tl.load(given_ptr)")),
        (8, ("key = tl.load(given_ptr + 2)", "key = key")),
    ],
)
def test_a_number_of_the_host_that_is_used_would_be_seen(bits: int, planted: tuple[str, str]) -> None:
    launch = Launcher("interpreter")
    assert not same(steps(launch, bits, given=True, planted=[planted]), steps(launch, bits, given=False))


def test_wrong_numbers_are_refused(launch: Launcher) -> None:
    given = torch.zeros(4, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"given: \(4,\) of torch.int32; pass the numbers that given_bits made"):
        launch(
            "adamw", "adamw_fp32", tuple(noise(3)), *start(32), None, powers(), clip=None, given=given, **OPTIONS
        )


def test_both_variants_compile_to_the_same_arithmetic() -> None:
    """On a card too: where a rate comes from changes no multiplication, and no fusing of one with an addition."""
    from elo_engine.kernels import arguments, compiled, specimens

    if arguments.INTERPRETED:
        pytest.skip("TRITON_INTERPRET is set: there is no compiler in this process")
    found = {specimen.name: specimen for specimen in specimens.specimens()}
    pairs = [(name, name.split(" on the device")[0].rpartition(",")[0]) for name in found if "on the device" in name]
    assert len(pairs) == 3
    of_norms = found["adamw norm, clip, powers, of norms"]  # as a captured step in parts has it, with the rate there
    constants = {name: value for name, value in of_norms.constants.items() if name != "given_ptr"}
    compared = [(found[given], found[host]) for given, host in pairs]
    compared.append((replace(of_norms, constants=constants | {"GIVEN": True}), of_norms))
    for specimens_of_both in compared:
        one, other = (Counter(arithmetic(compiled.ptx_for(specimen, 90))) for specimen in specimens_of_both)
        assert one == other and sum(one.values()) > 10, (specimens_of_both[0].name, one - other, other - one)


def arithmetic(ptx: str) -> list[str]:
    """Every operation on floating-point numbers."""
    names = "fma|mul|add|sub|div|sqrt|rcp|neg|abs|min|max|cvt"
    return re.findall(rf"^\s*(?:@%p\d+ )?((?:{names})\.\S*f(?:32|64)\S*)", ptx, re.MULTILINE)
