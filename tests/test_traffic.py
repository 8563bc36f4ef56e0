"""Bytes over the link: against what the streamed engine copies, against figures counted elsewhere, and as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from stream_cases import ROWS, SPEC, Case, T

from elo_engine.config import OptimizerConfig
from elo_engine.measure.cards import find_card
from elo_engine.measure.traffic import LINK_SHARE, LINKS, WAYS, Phase, fits, layer_flops, step_traffic
from elo_engine.model.presets import preset_spec
from elo_engine.stream.device import DeviceUnits

LLAMA = preset_spec("llama-3.1-8b")
TOKENS = 65536


def copied(case: Case, monkeypatch: pytest.MonkeyPatch, update: str) -> Counter[str]:
    """Bytes that the streamed engine copies each way in a steady step, without the padding of its blocks; on a CPU the
    copies are the same calls.
    """
    found: Counter[str] = Counter()
    down, up, send = DeviceUnits._down, DeviceUnits._up, DeviceUnits.send

    def size(units: Any, number: int, block: Any) -> int:
        return sum(field.nbytes for field in units._store.units[number].block(block).fields)

    def counted_down(self: Any, number: int, block: Any, piece: Any) -> None:
        found["down"] += size(self, number, block)
        down(self, number, block, piece)

    def counted_up(self: Any, number: int, block: Any, piece: Any) -> None:
        found["up"] += size(self, number, block)
        up(self, number, block, piece)

    def counted_send(self: Any, number: int, grads: Any) -> Any:
        found["up"] += size(self, number, "gradients")
        return send(self, number, grads)

    for name, counted in (("_down", counted_down), ("_up", counted_up), ("send", counted_send)):
        monkeypatch.setattr(DeviceUnits, name, counted)
    engine = case.streamed(update=update)
    case.steps(engine, 0, 2)
    found.clear()
    case.steps(engine, 2, 3)
    return found


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("way", "update"), [(WAYS[0], "lazy"), (WAYS[1], "at_once")], ids=["lazy", "at once"])
def test_the_engine_copies_what_is_counted(way: Any, update: str, tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the byte, but for 256 moments to a scale, of which a small tensor has fewer."""
    spec = replace(SPEC, tied=tied)
    case = Case(spec=spec, dtype=torch.bfloat16, optimizer=OptimizerConfig(state="8bit", clip=0.5))
    found = copied(case, monkeypatch, update)
    counted = step_traffic(way, spec, T, ROWS * T, 3)
    assert (found["down"], found["up"]) == pytest.approx((counted.down, counted.up), rel=1e-3)


def one_layer(way: Any) -> dict[str, Phase]:
    """The phases of a step, of one layer of Llama-3.1-8B alone."""
    phases = [step_traffic(way, replace(LLAMA, layers=n), 8192, TOKENS, 8).phases for n in (2, 3)]
    return {
        b.name: Phase(b.name, b.flops - a.flops, b.down - a.down, b.up - a.up) for a, b in zip(*phases, strict=True)
    }


def test_a_layers_bytes_are_those_of_the_design() -> None:
    """436 MB down forward, 879 MB down and up backward: the figures of `at once`. Lazy moves the state to the forward
    pass and a gradient beside it: 8 bytes down and 6 up a parameter in all, in place of 6 and 4.
    """
    at_once, lazy = one_layer("layer-major, at once"), one_layer("layer-major, lazy")
    assert (at_once["forward"].down, at_once["forward"].up) == (pytest.approx(436e6, rel=0.005), 0)
    assert at_once["backward"].down == at_once["backward"].up == pytest.approx(879e6, rel=0.005)
    for phases, per_parameter in ((at_once, (6, 4)), (lazy, (8, 6))):
        moved = [sum(getattr(phase, way) for phase in phases.values()) for way in ("down", "up")]
        assert [size / LLAMA.layer_parameters for size in moved] == pytest.approx(per_parameter, abs=0.04)
    assert lazy["forward"].down / at_once["forward"].down == pytest.approx(3.02, abs=0.01)


# By card: milliseconds per 1000 tokens and layer, forward and backward with recomputation, and tokens a step that hide
# the link, as the design counts them.
DESIGN = {
    "rtx-4090": (3.2, 10, 5400), "rtx-3090": (7.8, 24, 2200), "rtx-4060-ti-8gb": (12, 38, 2800),
    "h200": (0.69, 2.15, 12000),
}  # fmt: skip


@pytest.mark.parametrize("name", DESIGN)
def test_the_tokens_that_hide_the_link_are_those_of_the_design(name: str) -> None:
    """With the design's own rates of computing; these are 0.67 to 0.95 of the published peaks, which a bound takes. The
    design's tokens are the forward pass's: backward needs fewer.
    """
    forward_ms, backward_ms, tokens = DESIGN[name]
    card, phases = find_card(name), one_layer("layer-major, at once")
    rate = LINK_SHARE * card.link_bytes_per_s
    for phase, ms in ((phases["forward"], forward_ms), (phases["backward"], backward_ms)):
        flop_per_s = phase.flops * 1000 / (ms / 1000)
        assert 0.66 < flop_per_s / card.flop_per_s < 0.97
        found = phase.hidden_from(flop_per_s, rate)
        assert found == pytest.approx(tokens, rel=0.05) if phase.name == "forward" else found < tokens


def test_seconds_are_the_longest_of_what_runs_side_by_side() -> None:
    phase = Phase("forward", 100.0, 60.0, 30.0, times=4)
    assert phase.seconds(8, 10.0, 2.0) == 4 * 60 / 2
    assert phase.seconds(80, 10.0, 2.0) == 80 * 100 / 10
    assert phase.hidden_from(10.0, 2.0) == 3.0  # tokens of each of the four


def test_layer_major_does_not_grow_with_the_micro_batches_and_the_usual_order_does() -> None:
    def moved(way: Any, k: int) -> tuple[float, float]:
        found = step_traffic(way, LLAMA, 2048, TOKENS, k)
        return found.down, found.up

    for way in ("layer-major, lazy", "layer-major, at once", "ZeRO-Offload, stage 2"):
        assert moved(way, 1) == moved(way, 32)
    assert moved("per micro-batch", 32) == pytest.approx([32 * size for size in moved("per micro-batch", 1)])


def test_who_gains_what_and_where_nothing_is_gained() -> None:
    """Against streaming per micro-batch on a 4090 at its peak: 1.5 times at micro-batches of 2048 tokens, nothing at
    8192, which hide the link in either order. ZeRO-Offload holds 16 GB of weights, more than a small card has.
    """
    card = find_card("rtx-4090")
    rates = card.flop_per_s, LINK_SHARE * LINKS["pcie-4-x16"]
    for k, least, most in ((32, 1.5, 2.0), (8, 1.0, 1.01)):
        T = TOKENS // k
        ours, theirs = (step_traffic(way, LLAMA, T, TOKENS, k).seconds(*rates) for way in (WAYS[0], WAYS[2]))
        assert least <= theirs / ours <= most
    offload = step_traffic("ZeRO-Offload, stage 2", LLAMA, 2048, TOKENS, 1)
    assert offload.device_bytes == 2 * LLAMA.parameters
    assert [fits(offload, find_card(name)) for name in ("rtx-4060-ti-8gb", "rtx-4080", "rtx-4090")] == [
        False, False, True
    ]  # fmt: skip
    assert fits(step_traffic(WAYS[0], LLAMA, 2048, TOKENS, 1), find_card("rtx-4060-ti-8gb"))


def test_the_parts_of_the_operations_are_their_sum() -> None:
    from elo_engine.measure.flops import arm_flops
    from elo_engine.measure.setting import Setting

    setting = Setting("elo_align_streamed", LLAMA, (), 8192, 1)
    assert sum(layer_flops(LLAMA, 8192)) == pytest.approx(arm_flops(setting).executed.total)


def test_the_table(elo: Callable[..., tuple[int, str]]) -> None:
    status, said = elo("bench", "traffic", "--model", "llama-3.1-8b", "--gpu", "rtx-4090", "--tokens-per-step", "65536")
    assert status == 0, said
    assert said.startswith("Computed, not measured")
    assert all(f"| {way} | " in said for way in WAYS) and "rtx-4090, 24 GB, pcie-4-x16" in said
    status, said = elo("bench", "traffic", "--gpu", "rtx-4060-ti-8gb", "--link", "pcie-5-x16")
    assert status == 0 and "8 GB, pcie-5-x16" in said and "16.1: does not fit" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--link", "usb"), "--link 'usb': it is one of pcie-4-x8"),
        (("--gpu", "voodoo"), "voodoo"),
        (("--model", "gpt-5"), "gpt-5"),
        (("--tokens-per-step", "4096"), "--micro-batch-tokens 8192: a step has 4096"),
    ],
)
def test_bad_options_are_refused(elo: Callable[..., tuple[int, str]], options: tuple[str, ...], said: str) -> None:
    status, text = elo("bench", "traffic", *options)
    assert status == 2 and said in text, text
