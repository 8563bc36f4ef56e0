"""Which engine aligns, and why: from what is predicted and what a machine has; what a plan then says and refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from plan_fixture import unmade_run

from elo_engine.config import RunConfig, load_config, make_config
from elo_engine.detach import open_source
from elo_engine.engine_choice import EngineChoice, Predictions, choose, streamed_setting
from elo_engine.errors import RefusedError
from elo_engine.levers import stage_setting
from elo_engine.measure.expected import Needs
from elo_engine.measure.machine import Room
from elo_engine.measure.setting import Setting, Streaming
from elo_engine.model.presets import preset_spec
from elo_engine.plan import Subject, Target, align_engine, make_plan, require_memory
from elo_engine.plan_refusals import require_fit

SPEC = preset_spec("llama-3.1-8b")
Elo = Callable[..., tuple[int, str]]
ROWS = ("data.sequence_length=4096", "align.tokens_per_step=32768", "align.optimizer.state=8bit")


def configured(**align: Any) -> RunConfig:
    stage = {"tokens_per_step": 8 * 4096, "recompute": "layer", "optimizer": {"state": "8bit"}} | align
    data = {"shards": {"ja": "nowhere"}, "sequence_length": 4096}
    return make_config({"model": "none/such", "output": "nowhere", "data": data, "align": stage})


def resident(device: str = "cuda") -> Setting:
    return stage_setting(configured(), "align", SPEC, device, "bf16")


def needs(streaming: Streaming | None = None, device: str = "cuda") -> Needs:
    """What the same alignment needs."""
    setting = resident(device)
    return Needs.of(setting if streaming is None else streamed_setting(setting, streaming))


def room(count: int | None, what: str = "free on a card") -> Room | None:
    return None if count is None else Room(count, what)


def chosen(device: int | None, host: int | None, disk: int | None = None, **align: Any) -> EngineChoice:
    return choose(configured(**align), SPEC, "cuda", "bf16", room(device), room(host, "of a host"), room(disk))


def test_resident_where_it_fits_to_the_byte() -> None:
    whole = needs().device
    found = chosen(whole, None)
    assert (found.engine, found.streaming, found.setting) == ("resident", None, resident())
    assert re.fullmatch(r"resident needs [\d.]+ GiB, and there are [\d.]+ GiB \(free on a card\)", found.why)
    found = chosen(whole - 1, None)
    assert found.engine == "streamed" and found.setting == streamed_setting(resident(), Streaming())
    assert found.setting.arm == "elo_align_streamed" and found.resident_bytes == whole
    assert found.why.endswith("(free on a card): streamed, the model in host memory, layers' inputs on the device")


def test_resident_where_nothing_is_known() -> None:
    found = chosen(None, None)
    assert found.engine == "resident" and "nothing is known of the device's memory" in found.why


def test_inputs_go_to_the_host_where_the_card_has_no_room_for_them() -> None:
    on_device, on_host = needs(Streaming()), needs(Streaming(inputs="host"))
    assert on_host.device < on_device.device and on_host.host > on_device.host
    assert chosen(on_device.device, None).streaming == Streaming()
    found = chosen(on_device.device - 1, on_host.host)
    assert found.streaming == Streaming(inputs="host") and "layers' inputs on the host" in found.why
    assert "too large" not in found.why
    least = needs(Streaming(inputs="host", vocabulary="sliced"))
    assert chosen(on_host.device - 1, None).streaming == Streaming(inputs="host", vocabulary="sliced")
    assert "too large as well" in chosen(least.device - 1, None).why


def test_the_store_goes_to_the_disk_where_the_host_has_no_room_for_it() -> None:
    memory, disk = needs(Streaming(inputs="host")), needs(Streaming("disk", "host"))
    assert disk.host < memory.host and disk.disk > 45 << 30
    assert chosen(8 * 10**9, memory.host, 0).streaming == Streaming(inputs="host")
    found = chosen(8 * 10**9, memory.host - 1, disk.disk)
    assert found.streaming == Streaming("disk", "host")
    assert "the model on the disk, layers' inputs on the disk" in found.why
    found = chosen(8 * 10**9, memory.host - 1, disk.disk - 1)
    assert found.streaming == Streaming(inputs="host") and "too large as well" in found.why


@pytest.mark.parametrize(
    ("align", "streaming"),
    [
        ({"engine": "resident"}, None),
        ({"engine": "streamed"}, Streaming(inputs="host")),
        ({"stream": {"inputs": "device"}}, Streaming(vocabulary="sliced")),
        ({"stream": {"inputs": "device", "vocabulary": "whole"}}, Streaming()),
        ({"stream": {"store": "disk"}}, Streaming("disk", "host")),
        ({"stream": {"store": "memory", "update": "at_once"}}, Streaming("memory", "host", "at_once")),
    ],
)
def test_what_the_configuration_says_is_not_changed(align: dict[str, Any], streaming: Streaming | None) -> None:
    """On a small card, whether it fits there or not."""
    assert chosen(9 * 10**9, None, **align).streaming == streaming
    if "engine" in align:
        assert chosen(9 * 10**9, None, **align).why.startswith("as align.engine says")
        assert chosen(10**12, None, **align).engine == align["engine"]


def test_on_a_cpu_host_and_device_are_one_memory() -> None:
    def on_cpu(count: int) -> EngineChoice:
        return choose(configured(), SPEC, "cpu", "bf16", room(count), room(count), room(10**12))

    whole, memory = needs(device="cpu"), needs(Streaming(), device="cpu")
    disk = needs(Streaming("disk"), device="cpu")
    assert whole.device == whole.host and disk.host < min(memory.host, whole.host)
    assert on_cpu(whole.host).engine == "resident"
    below = whole.host - 1
    assert on_cpu(below).streaming == (Streaming() if memory.host <= below else Streaming("disk"))
    assert on_cpu(min(memory.host, whole.host) - 1).streaming == Streaming("disk")
    found = on_cpu(disk.host - 1)
    assert found.streaming == Streaming("disk", "host") and "the model on the disk" in found.why


# -- what a plan says and refuses


def plan_of(config: RunConfig, device: int, host: int | None = None, disk: int | None = None) -> dict[str, Any]:
    target = Target("cuda", "bf16", room(device), room(host, "of a host"), room(disk, "at a disk"))
    return make_plan(config, Subject(SPEC, 2 * SPEC.parameters), target)


def refused(found: dict[str, Any]) -> str:
    with pytest.raises(RefusedError) as error:
        require_fit(found, "align")
    return str(error.value)


def test_a_plan_names_engine_and_host_memory_by_part() -> None:
    found = plan_of(configured(), 8 * 10**9, 10**11)
    engine, part = found["align"]["engine"], found["align"]
    assert {key: engine[key] for key in ("name", "store", "inputs", "update")} == {
        "name": "streamed", "store": "memory", "inputs": "host", "update": "lazy"
    }  # fmt: skip
    assert engine["why"].startswith("resident needs")
    assert part["host_bytes"] == sum(part["host_parts"].values()) == needs(Streaming(inputs="host")).host
    assert part["memory"]["peak_bytes"] == part["device_bytes"] < 8 * 10**9
    require_fit(found, "align")
    whole = plan_of(configured(), 10**11)["align"]["engine"]
    assert (whole["name"], whole["store"], whole["inputs"], whole["update"]) == ("resident", None, None, None)


def test_host_memory_below_the_plan_is_refused_with_numbers() -> None:
    """To the byte, and with levers that are true."""
    config = configured(engine="streamed", stream={"store": "memory", "inputs": "host"})
    need = needs(Streaming(inputs="host"))
    assert plan_of(config, 8 * 10**9, need.host)["align"]["host_fits"]
    found = plan_of(config, 8 * 10**9, need.host - 1)
    said = refused(found)
    for text in ("align does not fit: streamed, with", "weights 15.0 GiB", "waiting gradients 15.0 GiB", "of a host"):
        assert text in said, said
    overrides = {lever["override"]: lever["saves_bytes"] for lever in found["align"]["advice"]["levers"]}
    assert overrides["align.stream.store=disk"] == need.host - needs(Streaming("disk", "host")).host
    assert overrides["align.stream.update=at_once"] == 2 * SPEC.parameters
    assert found["align"]["advice"]["fits_with"] == ["align.stream.store=disk"]


def test_host_memory_below_the_plan_ends_a_command_with_three(tmp_path: Path, elo: Elo) -> None:
    here = (unmade_run(tmp_path), *ROWS, "pretrain.optimizer.state=8bit", "--shapes", "llama-3.1-8b", "--gpu", "12GB")
    status, shown = elo("plan", *here, "align.stream.store=memory", "--host", "32GB")
    assert status == 3 and "of host memory; there are" in shown and "--host 32GB" in shown
    assert "align.stream.store=disk saves" in shown and "Traceback" not in shown
    status, shown = elo("plan", *here, "--host", "32GB")
    assert status == 0 and "align's engine: streamed; resident needs" in shown, shown
    assert "the model on the disk" in shown and "and on the disk" in shown
    status, shown = elo("plan", *here, "--host", "32GB", "--json")
    found, _ = json.JSONDecoder().raw_decode(shown)
    assert found["disk"]["align_store"] == found["align"]["store_disk_bytes"] > 45 << 30


def test_a_card_that_is_too_small_for_either_is_refused_with_both_numbers() -> None:
    said = refused(plan_of(configured(), 2 * 10**9))
    assert re.search(r"resident it takes [\d.]+ GiB, and streamed its tensors take [\d.]+ GiB \(", said), said
    assert "No combination fits" in said


def test_a_forced_engine_is_refused_by_name_with_the_other_as_a_lever() -> None:
    found = plan_of(configured(engine="resident"), 10 * 10**9)
    assert "align.engine=streamed saves" in refused(found)
    assert found["align"]["advice"]["fits_with"] == ["align.engine=streamed"]
    found = plan_of(configured(engine="streamed", stream={"inputs": "device", "vocabulary": "whole"}), 10 * 10**9)
    assert "streamed, its tensors take" in refused(found)
    assert found["align"]["advice"]["fits_with"] == ["align.stream.inputs=host"]
    fewer = {lever["override"]: lever["saves_bytes"] for lever in found["align"]["advice"]["levers"]}
    assert fewer["align.tokens_per_step=4096"] > 7 * 34 * 4096 * 4096 * 2 * 0.99  # hidden states of seven rows


def test_a_disk_below_the_plan_is_refused() -> None:
    config = configured(engine="streamed", stream={"store": "disk"})
    need = needs(Streaming("disk", "host")).disk
    said = refused(plan_of(config, 8 * 10**9, 10**11, need - 1))
    assert "of the disk; there are" in said and "at a disk" in said and "align.stream.store=memory takes none" in said
    found = plan_of(config, 8 * 10**9, 10**11, need)
    require_fit(found, "align")
    assert any("the run takes up to" in text for text in found["refusals"]), "with snapshots and the model it is more"


def test_here_and_now(run_tree: dict[str, Any], write_config: Callable[..., Path]) -> None:
    """A small model fits this machine; a step of ten million rows at once does not, by either engine."""
    config = load_config(write_config(run_tree))
    source = open_source(config)
    found = align_engine(config, source)
    assert found.engine == "resident" and found.setting.spec == source.spec
    forced = config.model_copy(update={"align": config.align.model_copy(update={"engine": "streamed"})})
    found = align_engine(forced, source)
    assert found.streaming is not None and found.setting.arm == "elo_align_streamed"
    predicted = require_memory(forced, source, "align").predicted
    assert predicted == Needs.of(found.setting).memory
    rows = 10**7
    run_tree["align"] |= {"tokens": 32 * rows, "tokens_per_step": 32 * rows, "micro_batch": rows}
    with pytest.raises(RefusedError, match="align does not fit"):
        align_engine(load_config(write_config(run_tree)), source)


def test_predictions_are_kept_by_everything_that_matters() -> None:
    kept, setting = Predictions(), resident()
    assert kept(setting) == Needs.of(setting) and kept(setting) is kept(replace(setting))
    others = (replace(setting, micro_batches=1), replace(setting, state="fp32"), streamed_setting(setting, Streaming()))
    for other in others:
        assert kept(other) == Needs.of(other) != kept(setting)
