"""Shallow and whole-model steps in turns: the order, one optimizer state, the moving bridge, and whole runs."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Forked
from interleaved_cases import LAYERS, ROW_TOKENS, configured, engine, everything, run, seen, whole
from planner_cases import only_what_is_made_here
from safetensors.torch import load_file
from stream_cases import CPU, ROWS, SPEC, differing, never, step_rows
from torch import Tensor

from elo_engine.config import make_config
from elo_engine.engine_choice import choose
from elo_engine.measure.expected import Needs
from elo_engine.measure.machine import Room
from elo_engine.measure.planner import predict_memory, shallow_of
from elo_engine.model import ops
from elo_engine.model.bridge import gaps
from elo_engine.train.optim import MasterAdamW
from elo_engine.train.resident import ResidentEngine

Elo = Callable[..., tuple[int, str]]
@pytest.fixture(scope="module", autouse=True)
def _bounded_search() -> Iterator[None]:
    with only_what_is_made_here():
        yield


@pytest.fixture(autouse=True)
def _fast() -> Any:
    ops.configure("auto", CPU)
    yield
    ops.configure("auto", CPU)


# -- the order


@pytest.mark.parametrize(("shallow", "alone"), [(4, 2), (9, 1), (90, 10), (7, 3), (1, 5), (10, 10)])
def test_whole_model_steps_are_spread_evenly_and_end_the_run(shallow: int, alone: int) -> None:
    turns = engine(configured(shallow, alone)).turns
    made = [turns.turn(step) for step in range(turns.steps)]
    kinds = [turn.kind for turn in made]
    assert kinds.count("pretrain") == shallow and kinds.count("align") == alone and kinds[-1] == "align"
    places = [step for step, kind in enumerate(kinds) if kind == "align"]
    distances = [b - a for a, b in zip([-1, *places[:-1]], places, strict=True)]
    assert max(distances) - min(distances) <= 1


def test_rows_and_rates_are_those_of_the_two_stages() -> None:
    config = configured(6, 3)
    turns = engine(config).turns
    made = [turns.turn(step) for step in range(turns.steps)]
    for kind, count, peak in (("pretrain", 6, 2e-2), ("align", 3, 1e-2)):
        own = [turn for turn in made if turn.kind == kind]
        assert [turn.number for turn in own] == list(range(count))
        first = 0 if kind == "pretrain" else 6 * ROWS
        assert [turn.row for turn in own] == [first + n * ROWS for n in range(count)]
        assert max(turn.lr for turn in own) == pytest.approx(peak) and own[-1].lr < own[0].lr


# -- the steps


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("state", ["fp32", "8bit"])
def test_a_whole_step_from_the_start_is_the_resident_one(state: str, tied: bool) -> None:
    """Same gradients, norm, clipping; in fp32 state the same bits everywhere."""
    spec = replace(SPEC, tied=tied)
    made = engine(configured(1, 2, state), spec)
    config = configured(1, 2, state).align.optimizer
    model = whole(spec)
    resident = ResidentEngine(model, MasterAdamW(model, config, seed=7), 2)
    rows = step_rows(0)
    tokens = int((rows.labels_BT >= 0).sum())
    outcomes = [one.step(rows, tokens, 1e-2, first=True, should_stop=never) for one in (made.whole, resident)]
    assert outcomes[0].loss_sum == outcomes[1].loss_sum
    assert outcomes[0].norm == pytest.approx(outcomes[1].norm, rel=1e-6)  # added up in another order
    mine, theirs = made.optimizer.weights(), resident.optimizer.weights()
    assert mine.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert torch.allclose(mine[name], weight, rtol=0, atol=1e-6), name


def test_a_shallow_step_changes_the_detached_layers_alone_and_both_models_see_it() -> None:
    made = engine()
    before = everything(made)
    run(made, 0, 1)
    after = everything(made)
    changed = {name for name in differing(before, after) if name.startswith("model.")}
    assert changed and all(name.startswith(("model.layers.0.", "model.layers.4.")) for name in changed)
    assert len(changed) == 2 * 9
    for index, position in ((0, 0), (4, 1)):
        for key, tensor in made.shallow.model.layers[position].items():
            assert tensor is made.model.layers[index][key]
    assert not any(name.startswith("rest.") for name in after), "the others have not been counted"


def test_each_kind_of_weight_has_its_own_count_of_steps() -> None:
    """Bias correction of the middle layers' first update is that of a first update."""
    made = engine(configured(4, 2))
    kinds = [made.turns.turn(step).kind for step in range(6)]
    run(made, 0, 6)
    found = everything(made)
    assert int(found["step"]) == 6 and int(found["rest.step"]) == kinds.count("align") == 2
    alone = engine(configured(4, 2))
    weight = "model.layers.2.mlp.down_proj.weight"
    before = alone.optimizer.weights()[weight].clone()
    run(alone, 0, 3)  # two shallow steps and the first whole one
    moved = (alone.optimizer.weights()[weight] - before * (1 - 1e-2 * 0.1)).abs()
    assert float(moved.median()) == pytest.approx(alone.turns.turn(2).lr, rel=0.02), "lr * m / sqrt(v) of a first step"


def test_the_detached_layers_have_one_optimizer_state() -> None:
    """A whole-model step goes on from the moments of the shallow ones."""
    made, name = engine(configured(4, 2)), "exp_avg.model.layers.0.mlp.down_proj.weight"
    run(made, 0, 2)
    before = made.optimizer.moments()[name].clone()
    run(made, 2, 3)
    after = made.optimizer.moments()[name]
    gradient = dict(made.optimizer.of("align").gradients())[name.removeprefix("exp_avg.")]
    assert gradient is not None
    # the clip has scaled the gradient in place
    assert torch.allclose(after, 0.9 * before + 0.1 * gradient, atol=1e-7)


def test_bf16_keeps_masters_and_both_kinds_learn() -> None:
    config = configured(6, 3, "8bit")
    made = engine(config, dtype=torch.bfloat16)
    before = everything(made)
    outcomes = run(made, 0, 9)
    assert all(outcome.updated for outcome in outcomes)
    names = {name for name in differing(before, everything(made)) if name.startswith("model.")}
    assert names == {name for name in before if name.startswith("model.")}


# -- the bridge


def test_the_bridge_follows_the_whole_model() -> None:
    """After a whole step it is the fit to the window's tokens, of which the newest are that step's own."""
    made = engine(configured(4, 2))
    model, moving = made.model, made.whole._bridge
    gap = gaps(5, LAYERS)[0]
    expected = seen(model, 100, 101)[gap]
    run(made, 0, 2)
    states = seen(model, 2)[gap]
    before = [tensor.clone() for tensor in made.shallow.model.bridge_tensors]
    run(made, 2, 3)
    window, tokens = 4 * ROW_TOKENS, states.tokens
    expected.scale(min(1.0, (window - tokens) / expected.tokens))
    expected.merge(states)
    fitted = expected.fit(made.whole._bridge._ridge).bridge
    now = made.shallow.model.bridge_tensors
    for mine, wanted, old in zip(now, (fitted.matrix_DD, fitted.bias_D), before, strict=True):
        assert torch.allclose(mine, wanted, atol=1e-6) and not torch.allclose(mine, old, atol=1e-6)
    assert moving._statistics[gap].tokens == pytest.approx(min(window, 2 * ROW_TOKENS + tokens), rel=0.02)


def test_the_window_forgets() -> None:
    made = engine(configured(4, 20))
    for number in range(12):
        run(made, number, number + 1)
    (known,) = made.whole._bridge._statistics.values()
    assert known.tokens <= 4 * ROW_TOKENS * (1 + 1e-9)


def test_a_step_that_is_given_up_or_skipped_leaves_the_bridge() -> None:
    made = engine(configured(4, 2))
    run(made, 0, 2)
    before = everything(made)
    bridge = [tensor.clone() for tensor in made.shallow.model.bridge_tensors]
    asked = iter([False, False, True])
    rows = step_rows(2)
    assert made.whole.step(rows, ROW_TOKENS, 1e-2, first=False, should_stop=lambda: next(asked)) is None
    norm = made.model.norm_D.detach()
    kept = norm.clone()
    norm[0] = torch.inf
    outcome = made.whole.step(rows, ROW_TOKENS, 1e-2, first=False, should_stop=never)
    norm.copy_(kept)
    assert outcome is not None and not outcome.updated
    assert {name for name in differing(before, everything(made)) if name.startswith(("model.", "bridge."))} == set()
    assert all(torch.equal(a, b) for a, b in zip(bridge, made.shallow.model.bridge_tensors, strict=True))
    assert made.model.observers == {}


@pytest.mark.parametrize("state", ["fp32", "8bit"])
@pytest.mark.parametrize("bridge", ["linear", "none"])
def test_a_snapshot_continues_bit_for_bit(bridge: str, state: str) -> None:
    config = configured(6, 3, state)
    config = config.model_copy(update={"detach": config.detach.model_copy(update={"bridge": bridge})})
    for cut in (1, 2, 4):  # before the first whole step, after it, between
        straight, resumed = engine(config), engine(config)
        run(straight, 0, cut)
        saved = everything(straight)
        resumed.optimizer.load(
            {name: t for name, t in saved.items() if name.startswith("model.")},
            {name: t for name, t in saved.items() if not name.startswith("model.")},
        )
        assert run(straight, cut, 9) == run(resumed, cut, 9)
        assert differing(everything(straight), everything(resumed)) == []


# -- configuration and whole runs


@pytest.mark.parametrize(
    ("align", "pretrain", "match"),
    [
        ({"optimizer": {"state": "8bit"}}, {}, r"one optimizer state .* pretrain\.optimizer\.state is fp32"),
        ({}, {"optimizer": {"betas": [0.9, 0.99]}}, r"optimizer\.betas"),
    ],
)
def test_what_cannot_be_interleaved_is_refused_by_name(align: Any, pretrain: Any, match: str) -> None:
    from elo_engine.errors import UsageError

    tree = {
        "model": "x", "output": "y", "data": {"shards": {"ja": "z"}},
        "align": {"when": "interleaved"} | align, "pretrain": pretrain,
    }  # fmt: skip
    with pytest.raises(UsageError, match=match):
        make_config(tree)


def test_the_choice_is_made_as_for_any_alignment() -> None:
    """Where the whole model does not fit, its steps are streamed, and the shallow model is counted beside them."""
    config, spec = configured(), replace(SPEC, layers=40)
    whole_there = choose(config, spec, "cuda", "fp32", Room(1 << 40, "free"), None, None)
    assert whole_there.engine == "resident" and whole_there.resident_bytes is not None
    found = choose(config, spec, "cuda", "fp32", Room(whole_there.resident_bytes - 1, "free"), None, None)
    assert found.engine == "streamed" and found.setting.turns == whole_there.setting.turns is not None
    alone = Needs.of(replace(found.setting, turns=None)).device
    together, shallow = Needs.of(found.setting).device, predict_memory(shallow_of(found.setting, found.setting.turns))
    assert max(alone, shallow.peak_bytes) < together < alone + shallow.peak_bytes


@pytest.mark.parametrize("wide", [False, True], ids=["whole steps decide", "shallow steps decide"])
def test_the_predicted_peak_is_the_traced_one(wide: bool) -> None:
    """Over whole-model steps and shallow ones, with the sums of the bridge and of the step."""
    from elo_engine.levers import stage_setting
    from elo_engine.measure.planner import predict_memory
    from elo_engine.measure.tensor_trace import traced_tensor_bytes

    spec = replace(SPEC, D=128, F=352, V=3000, H=2, K=2, E=64)
    config = configured(4, 4)
    parts = {"pretrain": {"micro_batch": 6 if wide else 1}, "align": {"micro_batch": 1}}
    tree = config.model_dump()
    for name, fields in parts.items():
        tree[name] |= fields
    tree["detach"]["bridge_tokens"] = 640
    config = make_config(tree)
    made = engine(config, spec)
    run(made, 0, 2)
    with traced_tensor_bytes() as trace:
        run(made, 2, 6)
    predicted = predict_memory(stage_setting(config, "align", spec, "cpu", "fp32"))
    ratio = predicted.peak_bytes / trace.peak_bytes
    assert 1.0 <= ratio <= 1.08, (ratio, predicted)


@pytest.fixture
def tree(run_tree: dict[str, Any]) -> dict[str, Any]:
    run_tree["align"] |= {"when": "interleaved", "recompute": "none"}
    run_tree["detach"] = {"bridge": "linear", "bridge_tokens": 512}
    return run_tree


def final(run_folder: Path) -> dict[str, Tensor]:
    newest = max((run_folder / "align").glob("step-*"))
    assert newest.name == "step-00000009"
    files = (run_folder / "model").glob("*.safetensors")
    found = {f"file {path.name}": torch.tensor(list(path.read_bytes())) for path in files}
    for name in ("weights.safetensors", "optimizer.safetensors"):
        found |= {f"{name} {key}": tensor for key, tensor in load_file(newest / name).items()}
    return found


def test_a_run_trains_everything_and_its_records_tell_the_kinds_apart(
    tree: dict[str, Any], write_config: Callable[..., Path], elo: Elo
) -> None:
    from transformers import AutoModelForCausalLM

    status, shown = elo("run", write_config(tree))
    assert status == 0, shown
    folder = Path(tree["output"])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [(line["stage"], line["step"], line["at"]) for line in lines if "step_s" in line]
    shallow = [step for step in steps if step[0] == "pretrain"]
    assert [step for _, step, _ in shallow] == list(range(1, 7))
    assert [step for stage, step, _ in steps if stage == "align"] == [1, 2, 3]
    assert [at for *_, at in steps] == list(range(1, 10)) and steps[-1][0] == "align"
    evaluated = {(line["at"], line["model"]) for line in lines if "heldout_loss_nats" in line}
    assert evaluated == {(3, "whole"), (6, "whole")}
    report = json.loads((folder / "report.json").read_text())
    assert report["stages"]["pretrain"]["tokens_total"] == 768 and report["stages"]["align"]["tokens_total"] == 384
    assert report["stages"]["pretrain"]["steps"] == 6 and report["stages"]["align"]["steps"] == 3
    assert set(report["evaluations"]) == {"base", "aligned"}
    assert not (folder / "reattached").exists()
    assert "Steps of both kinds took turns" in (folder / "model" / "README.md").read_text()
    AutoModelForCausalLM.from_pretrained(folder / "model")
    for verb in ("pretrain", "reattach"):
        status, shown = elo(verb, folder if verb == "reattach" else write_config(tree | {"output": str(folder) + verb}))
        assert status == 2 and "align.when is interleaved" in shown, shown


KILLED = """
import os, signal, sys
from elo_engine.train import interleaved
step, calls, nth = interleaved.ResidentEngine.step, [0], int(sys.argv[1])
def counted(self, *args, **options):
    calls[0] += 1
    if calls[0] == nth:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args, **options)
interleaved.ResidentEngine.step = counted
sys.argv = ["elo", *sys.argv[2:]]
from elo_engine.cli import main
main()
"""


def test_a_run_moves_its_bridge(tree: dict[str, Any], write_config: Callable[..., Path], elo: Elo) -> None:
    """Through the loop and not by a step alone: what the bridge is fitted to is no longer what it began with."""
    assert elo("run", write_config(tree | {"evaluate": {"every": 0}}))[0] == 0
    run = Path(tree["output"])
    began = load_file(run / "pretrain" / "bridge.safetensors")
    ended = load_file(max((run / "align").glob("step-*")) / "optimizer.safetensors")
    moved = {name: ended["bridge." + name.replace(".statistics", "")] for name in began if ".statistics." in name}
    assert moved and not any(torch.equal(began[name], moved[name]) for name in moved if began[name].dim() > 1)


@pytest.mark.parametrize("nth", [2, 6])
def test_killed_and_resumed_it_ends_with_the_same_bits(
    nth: int, tree: dict[str, Any], write_config: Callable[..., Path], elo: Elo, tmp_path: Path, forked: Forked
) -> None:
    straight = tree | {"output": str(tmp_path / "straight"), "evaluate": {"every": 0}}
    cut = tree | {"evaluate": {"every": 0}}
    assert elo("run", write_config(straight, "straight.yaml"))[0] == 0
    config = write_config(cut)
    ended = forked(KILLED, nth, "run", config, environment=os.environ | {"OMP_NUM_THREADS": "1"})
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    status, shown = elo("run", config, "--resume", "auto")
    assert status == 0, shown
    assert differing(final(tmp_path / "straight"), final(Path(tree["output"]))) == []
