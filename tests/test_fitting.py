"""`recompute: auto` and `micro_batch: auto`: the least that fits, chosen once and written down."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from elo_engine.config import RunConfig, load_config, make_config
from elo_engine.detach import open_source
from elo_engine.engine_choice import Rooms
from elo_engine.fitting import RESERVE, Fitted, fitted, is_open
from elo_engine.levers import stage_setting
from elo_engine.measure.expected import Needs
from elo_engine.measure.machine import Room
from elo_engine.measure.setting import Processes
from elo_engine.model.presets import preset_spec
from elo_engine.plan import fitted_here

SPEC = preset_spec("llama-3.2-1b")
EIGHT_BIT = {"state": "8bit"}


def configured(pretrain: dict[str, Any], align: dict[str, Any]) -> RunConfig:
    stage = {"tokens_per_step": 12 * 4096, "optimizer": EIGHT_BIT}
    data = {"shards": {"ja": "nowhere"}, "sequence_length": 4096}
    tree = {"model": "none/such", "output": "nowhere", "data": data}
    return make_config(tree | {"pretrain": stage | pretrain, "align": stage | align})


def need(config: RunConfig, stage: Any, **fields: Any) -> int:
    """Of the device, with nothing left open in the setting's own terms."""
    closed = {"recompute": "none", "micro_batch": 1}
    sections = {name: getattr(config, name).model_copy(update=closed) for name in ("pretrain", "align")}
    setting = replace(stage_setting(config.model_copy(update=sections), stage, SPEC, "cuda", "bf16"), **fields)
    micro = -(-setting.tokens_per_step // setting.N) if "micro_batch" not in fields else -(-12 // fields["micro_batch"])
    return Needs.of(replace(setting, micro_batches=micro)).device


def choose(config: RunConfig, room: int | None, **options: Any) -> Fitted:
    card = None if room is None else Room(math.ceil(room / (1 - RESERVE)), "on a card")
    assert card is None or int(card.bytes * (1 - RESERVE)) == room
    return fitted(config, SPEC, "cuda", "bf16", Rooms(card), **options)


@pytest.mark.parametrize("stage", ["pretrain", "align"])
def test_the_least_recomputation_that_fits_to_the_byte(stage: str) -> None:
    resident = {"engine": "resident"}
    config = configured({"micro_batch": 1}, resident)
    none, some = (need(config, stage, recompute=again) for again in ("none", "selective"))
    layer = need(config, stage, recompute="layer")
    assert layer < none and some < none
    for room, expected in ((none, "none"), (none - 1, "selective"), (min(some, layer) - 1, "layer")):
        found = choose(config, room)
        assert getattr(found.config, stage).recompute == expected
        assert found.chosen[f"{stage}.recompute"]["value"] == expected
    why = choose(config, none - 1).chosen[f"{stage}.recompute"]["why"]
    assert "on a card" in why and "none would take" in why


def test_alignment_stays_resident_by_running_again_before_it_is_streamed() -> None:
    config = configured({"recompute": "none", "micro_batch": 1}, {})
    some = need(config, "align", recompute="selective")
    found = choose(config, some)
    assert found.config.align.recompute == "selective"
    streamed = choose(config, min(some, need(config, "align", recompute="layer")) - 1)
    assert streamed.config.align.recompute == "layer" and "streamed" in streamed.chosen["align.recompute"]["why"]
    asked = choose(configured({}, {"engine": "streamed"}), 1 << 40)
    assert asked.chosen["align.recompute"]["why"] == "streamed, every layer is run again"


def test_as_many_rows_as_fit_shared_evenly() -> None:
    config = configured({"micro_batch": "auto", "recompute": "none"}, {"recompute": "layer"})
    assert choose(config, need(config, "pretrain", micro_batch=12)).config.pretrain.micro_batch == 12
    five = need(config, "pretrain", micro_batch=5)
    found = choose(config, five)
    assert found.config.pretrain.micro_batch == 4, "12 rows in three micro-batches, as five at once would take"
    assert "at most 5 of a step's 12 rows fit" in found.chosen["pretrain.micro_batch"]["why"]
    assert choose(config, need(config, "pretrain", micro_batch=1)).config.pretrain.micro_batch == 1
    nothing = choose(config, 1)
    assert nothing.config.pretrain.micro_batch == 1 and "not even one row" in nothing.lines()[0]
    third = choose(config, 1 << 42, processes=Processes(3, 3))
    assert third.config.pretrain.micro_batch == 4, "each has a third of the rows"


def test_recomputation_is_chosen_first_with_one_row() -> None:
    config = configured({"micro_batch": "auto", "recompute": "auto"}, {"recompute": "layer"})
    found = choose(config, need(config, "pretrain", micro_batch=2)).config.pretrain
    assert (found.recompute, found.micro_batch) == ("none", 2)


def test_where_nothing_is_known_the_least_memory_is_taken() -> None:
    for found in (choose(configured({"micro_batch": "auto"}, {}), None).config,):
        assert (found.pretrain.recompute, found.pretrain.micro_batch, found.align.recompute) == ("layer", 1, "layer")


def test_what_is_said_is_not_changed() -> None:
    config = configured({"recompute": "selective", "micro_batch": 3}, {"recompute": "none", "micro_batch": 2})
    assert not is_open(config)
    assert choose(config, 1) == Fitted(config, {})
    assert is_open(configured({}, {})), "auto is the default of recompute"


def test_interleaved_both_kinds_of_steps_fit_together() -> None:
    open_ = configured({"micro_batch": "auto"}, {"when": "interleaved", "engine": "resident"})
    found = choose(open_, 1 << 42).config
    assert (found.pretrain.recompute, found.pretrain.micro_batch, found.align.recompute) == ("none", 12, "none")
    alone = need(open_, "pretrain", micro_batch=12)
    tight = choose(open_, alone).config  # beside the whole model there is no room for that
    assert tight.pretrain.micro_batch == 1 and tight.align.recompute == "layer"


# -- a run


@pytest.fixture
def open_tree(run_tree: dict[str, Any]) -> dict[str, Any]:
    for stage in ("pretrain", "align"):
        run_tree[stage] |= {"recompute": "auto", "micro_batch": "auto"}
    return run_tree


def test_a_run_writes_down_what_it_chose_and_a_resume_keeps_it(
    open_tree: dict[str, Any], write_config: Callable[..., Path], elo: Callable[..., tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The second start finds another amount of memory, and does not ask."""
    output, config = Path(open_tree["output"]), write_config(open_tree)
    status, shown = elo("pretrain", config)
    assert status == 0, shown
    kept = yaml.safe_load((output / "config.resolved.yaml").read_text())
    for stage in ("pretrain", "align"):
        assert (kept[stage]["recompute"], kept[stage]["micro_batch"]) == ("none", 4)
    log = (output / "log.txt").read_text()
    assert "pretrain.recompute: none, it takes" in log and "pretrain.micro_batch: 4, all rows of a step" in log
    assert json.loads((output / "plan.json").read_text())["chosen"] == {}, "by then nothing is open"
    source = open_source(load_config(config))
    small = Room(1 << 20, "free now")
    monkeypatch.setattr("elo_engine.plan.device_room", lambda device: small)
    other = fitted_here(load_config(write_config(open_tree | {"output": str(output) + "-other"}, "other.yaml")), source)
    assert other.config.pretrain.recompute == "layer" and other.config.pretrain.micro_batch == 1
    again = fitted_here(load_config(config), source)
    assert again.config.pretrain == load_config(output / "config.resolved.yaml").pretrain and not again.chosen
    monkeypatch.undo()
    status, shown = elo("pretrain", config, "--resume", "auto")
    assert status == 0, shown
    status, shown = elo("pretrain", config, "pretrain.micro_batch=2", "--resume", "auto")
    assert status == 3 and "pretrain.micro_batch" in shown


def test_the_bits_are_those_of_a_run_that_says_it(
    open_tree: dict[str, Any], write_config: Callable[..., Path], elo: Callable[..., tuple[int, str]]
) -> None:
    output = Path(open_tree["output"])
    assert elo("run", write_config(open_tree))[0] == 0
    for stage in ("pretrain", "align"):
        open_tree[stage] |= {"recompute": "none", "micro_batch": 4}
    open_tree["output"] += "-said"
    assert elo("run", write_config(open_tree, "said.yaml"))[0] == 0
    written = sorted((output / "model").glob("*.safetensors"))
    assert written
    for path in written:
        assert path.read_bytes() == (Path(open_tree["output"]) / "model" / path.name).read_bytes()


def test_a_plan_says_what_it_would_choose(
    open_tree: dict[str, Any], write_config: Callable[..., Path], elo: Callable[..., tuple[int, str]]
) -> None:
    status, shown = elo("plan", write_config(open_tree), "--json")
    assert status == 0, shown
    chosen = json.loads(shown[shown.index("{") :])["chosen"]
    assert {key: one["value"] for key, one in chosen.items()} == {
        "pretrain.recompute": "none", "pretrain.micro_batch": 4, "align.recompute": "none", "align.micro_batch": 4,
    }  # fmt: skip
    assert "align.micro_batch: 4, all rows of a step" in elo("plan", write_config(open_tree))[1]
