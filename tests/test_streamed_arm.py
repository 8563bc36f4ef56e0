"""The streamed alignment as an arm: it is what it claims however it streams, and does not pass where it does less."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from test_speedup import MODEL, SECONDS, _undo_watching, one_run, run_arm, setting  # noqa: F401 - a fixture

from elo_engine.benchmarks import contestants, evidence, schemas, speedup
from elo_engine.benchmarks.contestants import Contestant
from elo_engine.errors import FailedError
from elo_engine.measure.planner import predict_memory
from elo_engine.measure.setting import ArmName, Streaming
from elo_engine.model.presets import preset_spec
from elo_engine.stream import step as streamed_step
from elo_engine.stream.device import DeviceUnits
from elo_engine.train.loop import StepOutcome


@pytest.mark.parametrize("streaming", [{}, {"inputs": "host"}, {"update": "at_once"}], ids=str)
def test_every_way_of_streaming_is_what_it_claims(streaming: dict[str, Any]) -> None:
    made = setting("elo_align_streamed", streaming=Streaming(**streaming))
    found, _ = run_arm(made)
    evidence.require_engagement(made, found)
    assert found["held"]["weights"] > 0 and found["held"] == run_arm(made, "step\nfinish\n")[0]["held"]


@pytest.mark.parametrize("arm", ["elo_pretrain", "elo_align"])
def test_a_step_is_one_command_where_its_numbers_come_late(arm: ArmName, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where the loop would launch the next step before it tells of one: the second command's step would
    be timed with the first one's, and a third would follow `finish`.
    """
    monkeypatch.setattr(StepOutcome, "waits", property(lambda self: self._read is None))
    made = setting(arm) if arm == "elo_pretrain" else setting(arm, recompute="none")
    found, answers = run_arm(made, "step\nstep\nfinish\n")
    evidence.require_engagement(made, found)
    assert len(answers) == found["steps"] == 2


def test_a_streamed_layer_that_is_left_out_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = evidence.watch_streamed

    def skipping(engine: Any, found: evidence.Evidence) -> None:
        watch(engine, found)
        layer, calls = streamed_step.decoder_layer, [0]

        def all_but_every_fourth(spec: Any, index: int, weights: Any, hidden_ND: Any, *more: Any) -> Any:
            calls[0] += 1
            return layer(spec, index, weights, hidden_ND, *more) if calls[0] % 4 else hidden_ND.clone()

        monkeypatch.setattr(streamed_step, "decoder_layer", all_but_every_fourth)

    monkeypatch.setattr(evidence, "watch_streamed", skipping)
    found, _ = run_arm(setting("elo_align_streamed"))
    with pytest.raises(FailedError, match="decoder layers ran 42 times, not 48"):
        evidence.require_engagement(setting("elo_align_streamed"), found)


def test_a_streamed_layer_that_is_not_updated_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    update = DeviceUnits._update

    def all_but_one(self: DeviceUnits, number: int, *more: Any) -> None:
        if number == 1:
            self.waiting.discard(number)
        else:
            update(self, number, *more)

    monkeypatch.setattr(DeviceUnits, "_update", all_but_one)
    found, _ = run_arm(setting("elo_align_streamed"))
    with pytest.raises(FailedError, match=r"layers\.1\..* learns and did not change"):
        evidence.require_engagement(setting("elo_align_streamed"), found)


def test_streaming_is_held_against_an_arm_that_recomputes_too() -> None:
    seconds = SECONDS | {"elo_align_streamed": [7.0, 6.6, 13.2, 6.6, 6.5]}
    made = {arm: setting(arm, recompute="none" if arm in ("elo_pretrain", "elo_align") else "layer") for arm in seconds}  # type: ignore[arg-type]
    present = {arm: Contestant(made[arm]) for arm in made}
    found = speedup.ratios([*present.values()], one_run(seconds))["streamed"]
    assert found["over_resident"]["resident"] == "engine_full"
    assert found["over_resident"]["median"] == pytest.approx(1.1)
    assert found["over_resident"]["low"] == pytest.approx(6.5 / 6) and found["over_resident"]["high"] > 1.1
    assert found["pipeline"]["engine_full"]["median"] == pytest.approx(6 / (0.36 + 0.66))
    assert found["pipeline"]["engine_full"]["ideal"] > 1
    again = present | {"elo_align": Contestant(replace(made["elo_align"], recompute="layer"))}
    found = speedup.ratios([*again.values()], one_run(seconds))["streamed"]
    assert found["over_resident"]["resident"] == "elo_align"
    assert found["over_resident"]["median"] == pytest.approx(1.65)
    alone = speedup.ratios([*present.values()], one_run(seconds, failed="out of memory: no"))["streamed"]
    assert "over_resident" not in alone and set(alone["pipeline"]) == {"transformers_full"}
    assert "streamed" not in speedup.ratios([*present.values()][:-1], one_run(SECONDS))


def test_how_alignment_is_run() -> None:
    """(s) where its inputs fit, (g) as asked; on a CPU (s) comes only by name, and its model needs the same memory."""
    assert set(contestants.default_arms("cuda")) - set(contestants.default_arms("cpu")) == {"elo_align_streamed"}

    def chosen(**options: Any) -> dict[ArmName, Contestant]:
        size = contestants.Size("cuda", "bf16", 64, **options)
        return {one.name: one for one in contestants.choose(MODEL, (0, 3), size, contestants.parse_arms("g,s"))}

    roomy, tight = chosen(memory_bytes=2**40), chosen(memory_bytes=1)
    assert roomy["elo_align_streamed"].setting.streaming.inputs == "device"
    assert tight["elo_align_streamed"].setting.streaming.inputs == "host"
    assert chosen(memory_bytes=2**40, streamed_inputs="host")["elo_align_streamed"].setting.streaming.inputs == "host"
    assert all(found["elo_align_streamed"].setting.recompute == "layer" for found in (roomy, tight))
    assert chosen(memory_bytes=2**40, align_recompute="layer")["elo_align"].setting.recompute == "layer"
    assert chosen(memory_bytes=1, align_recompute="none")["elo_align"].setting.recompute == "none"
    on_cpu = setting("elo_align_streamed")
    assert contestants.needed_bytes(on_cpu) - predict_memory(on_cpu).peak_bytes == contestants.host_bytes(on_cpu) > 0
    large = replace(on_cpu, spec=replace(preset_spec("llama-3.1-8b"), layers=10_000))
    assert "on the host, which has" in contestants.host_shortage(large)
    assert not contestants.host_shortage(on_cpu) and not contestants.host_shortage(replace(large, arm="elo_align"))


def test_what_is_said_of_streaming_needs_what_it_rests_on() -> None:
    """As `recording` checks it; earlier records say nothing of streaming and stay as they are."""
    ran = {"status": "ran", "options": {"recompute": "layer"}}
    arms: dict[str, Any] = {name: dict(ran) for name in ("elo_align_streamed", "elo_pretrain", "engine_full")}
    said = {"pipeline": {"engine_full": {}}, "over_resident": {"resident": "engine_full"}}

    def faults(streamed: Any) -> list[str]:
        return list(schemas._streamed_faults(streamed, arms))

    assert faults(None) == [] and faults(said) == []
    arms["engine_full"] = ran | {"options": {"recompute": "none"}}
    assert ["does not recompute" in fault for fault in faults(said)] == [True]
    arms["elo_align_streamed"] = {"status": "failed"}
    assert "elo_align_streamed, which did not run" in faults(said)[-1]
