"""Interleaved alignment with the whole model in a store: the same bits as with it on the device."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from interleaved_cases import ROW_TOKENS, configured, engine, everything, run, streamed
from planner_cases import only_what_is_made_here
from stream_cases import CPU, SPEC, counter, differing, never, step_rows

from elo_engine.config import make_config
from elo_engine.engine_choice import streamed_setting
from elo_engine.levers import stage_setting
from elo_engine.measure.components import predicted_held
from elo_engine.measure.planner import predict_memory
from elo_engine.measure.setting import Streaming
from elo_engine.measure.tensor_trace import traced_tensor_bytes
from elo_engine.model import ops
from elo_engine.train.loop import to_batch

Elo = Callable[..., tuple[int, str]]
WAYS = [
    {},
    {"inputs": "host"},
    {"store": "disk"},
    {"store": "disk", "inputs": "host"},
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _bounded_search() -> Iterator[None]:
    with only_what_is_made_here():
        yield


@pytest.fixture(autouse=True)
def _fast() -> Any:
    ops.configure("auto", CPU)
    yield
    ops.configure("auto", CPU)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_every_bit_is_that_of_the_model_on_the_device(way: dict[str, str], tied: bool, tmp_path: Path) -> None:
    spec, config = replace(SPEC, tied=tied), configured(6, 3)
    here, there = engine(config, spec), streamed(config, spec, folder=tmp_path, **way)
    for step in range(9):
        assert run(here, step, step + 1) == run(there, step, step + 1)
        maps = zip(here.shallow.model.bridge_tensors, there.model.bridge_tensors, strict=True)
        assert all(torch.equal(a, b) for a, b in maps), f"bridge after step {step}"
        if step in (3, 8):  # a snapshot in the middle makes all updates early and changes nothing
            assert differing(everything(here), everything(there)) == []


@pytest.mark.parametrize(("state", "bridge"), [("8bit", "linear"), ("fp32", "none"), ("8bit", "none")])
def test_other_states_and_no_bridge_too(state: str, bridge: str) -> None:
    config = configured(6, 3, state)
    config = config.model_copy(update={"detach": config.detach.model_copy(update={"bridge": bridge})})
    here, there = engine(config), streamed(config)
    assert run(here, 0, 9) == run(there, 0, 9)
    assert differing(everything(here), everything(there)) == []


def test_in_slices_it_agrees_to_rounding() -> None:
    config = configured(6, 3)
    here, there = engine(config), streamed(config, vocabulary="sliced")
    for mine, theirs in zip(run(here, 0, 9), run(there, 0, 9), strict=True):
        assert theirs.loss_sum == pytest.approx(mine.loss_sum, rel=2e-5)
        assert theirs.norm == pytest.approx(mine.norm, rel=2e-4)


def test_bf16_learns_what_the_resident_one_does() -> None:
    """Gradients wait in bf16 there, so the bits differ; the losses hardly."""
    config = configured(6, 3, "8bit")
    here, there = engine(config, dtype=torch.bfloat16), streamed(config, dtype=torch.bfloat16)
    losses = [[outcome.loss_sum for outcome in run(made, 0, 9)] for made in (here, there)]
    assert losses[1] == pytest.approx(losses[0], rel=5e-3) and losses[0][-1] < losses[0][2]


@pytest.mark.parametrize("questions", [0, 2, 5, 14, 30])
def test_a_whole_step_that_is_given_up_changes_nothing(questions: int) -> None:
    config = configured(6, 3)
    straight, cut = streamed(config), streamed(config)
    for step in range(6):
        turn, rows = cut.turns.turn(step), step_rows(step)
        if turn.kind == "align":
            given_up = turn.engine.step(rows, ROW_TOKENS, turn.lr, first=False, should_stop=counter(questions))
            assert given_up is None
        assert run(straight, step, step + 1) == run(cut, step, step + 1)
    assert differing(everything(straight), everything(cut)) == []


def test_a_step_that_is_not_finite_is_counted_and_left_out() -> None:
    config = configured(4, 2)
    here, there = engine(config), streamed(config)
    run(here, 0, 2), run(there, 0, 2)
    there.whole.flush()
    norm = there.whole.trainable()["model.norm.weight"]
    for weight in (here.model.norm_D.detach(), norm):
        kept = weight.clone()
        weight[0] = torch.inf
        whole = here.whole if weight is not norm else there.whole
        outcome = whole.step(step_rows(2), ROW_TOKENS, 1e-2, first=False, should_stop=never)
        assert outcome is not None and not outcome.updated
        weight.copy_(kept)
    assert run(here, 2, 6) == run(there, 2, 6)
    assert differing(everything(here), everything(there)) == []


@pytest.mark.parametrize("state", ["fp32", "8bit"])
@pytest.mark.parametrize(("first", "second"), [(engine, streamed), (streamed, engine), (streamed, streamed)])
def test_either_engine_goes_on_from_the_others_snapshot(first: Any, second: Any, state: str) -> None:
    config = configured(6, 3, state)
    for cut in (1, 3, 5):  # before the first whole step, right after it, between
        straight, resumed = first(config), second(config)
        run(straight, 0, cut)
        saved = everything(straight)
        resumed.optimizer.load(
            {name: t for name, t in saved.items() if name.startswith("model.")},
            {name: t for name, t in saved.items() if not name.startswith("model.")},
        )
        assert run(straight, cut, 9) == run(resumed, cut, 9)
        assert differing(everything(straight), everything(resumed)) == []


def test_updated_at_once_each_unit_by_its_own_norm() -> None:
    """Without clipping that is the same step."""
    tree = configured(6, 3).model_dump()
    for stage in ("pretrain", "align"):
        tree[stage]["optimizer"]["clip"] = None
    tree["align"]["stream"]["update"] = "at_once"
    config = make_config(tree)
    here, there = engine(config), streamed(config, update="at_once")
    assert [one.loss_sum for one in run(here, 0, 9)] == [one.loss_sum for one in run(there, 0, 9)]
    assert differing(everything(here), everything(there)) == []


def test_the_scorer_sees_the_newest_detached_layers() -> None:
    """Held-out losses in the middle of a run, between whole-model steps."""
    config = configured(6, 3)
    here, there = engine(config), streamed(config)
    batch = to_batch(step_rows(50), CPU)

    def scored() -> torch.Tensor:
        (losses,) = there.scorer.losses_of([batch], lambda share: None)
        return losses

    run(here, 0, 3), run(there, 0, 3)
    old = scored()
    run(here, 3, 5), run(there, 3, 5)  # shallow steps alone
    assert here.turns.turn(3).kind == here.turns.turn(4).kind == "pretrain"
    with torch.no_grad():
        assert torch.equal(scored(), here.scorer.token_losses(batch))
    assert not torch.allclose(old, scored(), rtol=1e-3)


@pytest.mark.parametrize("wide", [False, True], ids=["whole steps decide", "shallow steps decide"])
@pytest.mark.parametrize("way", [{}, {"inputs": "host"}, {"vocabulary": "sliced", "inputs": "host"}], ids=str)
def test_the_predicted_peak_is_the_traced_one(way: dict[str, Any], wide: bool) -> None:
    """Of what torch's allocator hands out, over steps of both kinds; the store is not its."""
    spec = replace(SPEC, D=128, F=352, V=3000, H=2, K=2, E=64)
    tree = configured(4, 4).model_dump()
    tree["pretrain"]["micro_batch"], tree["align"]["micro_batch"] = 6 if wide else 1, 1
    tree["detach"]["bridge_tokens"] = 640
    config = make_config(tree)
    made = streamed(config, spec, **way)
    run(made, 0, 2)
    with traced_tensor_bytes() as trace:
        run(made, 2, 6)
    setting = streamed_setting(stage_setting(config, "align", spec, "cpu", "fp32"), Streaming(**way))
    predicted = predict_memory(setting)
    ratio = predicted.peak_bytes / trace.peak_bytes
    assert 1.0 <= ratio <= 1.08, (ratio, predicted)
    held = predicted_held(setting)
    assert made.held() == pytest.approx({name: held[name] for name in made.held()}, rel=0.02)


def test_a_run_leaves_the_files_of_a_resident_one(
    run_tree: dict[str, Any], write_config: Callable[..., Path], elo: Elo, tmp_path: Path
) -> None:
    run_tree["align"] |= {"when": "interleaved", "recompute": "none"}
    run_tree["detach"] = {"bridge": "linear", "bridge_tokens": 512}
    for name in ("resident", "streamed"):
        tree = run_tree | {"output": str(tmp_path / name), "align": run_tree["align"] | {"engine": name}}
        status, shown = elo("run", write_config(tree, f"{name}.yaml"))
        assert status == 0, shown
    files = sorted(path.name for path in (tmp_path / "resident" / "model").glob("*.safetensors"))
    assert files
    for name in files:
        left, right = ((tmp_path / kind / "model" / name).read_bytes() for kind in ("resident", "streamed"))
        assert left == right, name
    plan = json.loads((tmp_path / "streamed" / "plan.json").read_text())
    assert plan["align"]["engine"]["name"] == "streamed"
