"""The trials of `elo bench quality`: that a departure without effect is the recipe itself, to the bit, and that each
departs in what it says.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_quality import options

from elo_engine.benchmarks import quality, quality_costs, quality_trials
from elo_engine.benchmarks.quality_methods import TRIALS, Trial, choose_methods, kept_layers, run_method
from elo_engine.benchmarks.quality_trials import FollowingBridges, TrialRun, shallow_with
from elo_engine.benchmarks.schemas import check_result
from elo_engine.detach import open_source
from elo_engine.measure.flops import shallow_step
from elo_engine.model.bridge import Collector, GapStatistics
from elo_engine.model.presets import preset_spec

NAMES = ",".join(method.name for method in TRIALS)


@pytest.fixture(scope="module")
def measured(tied: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[quality.Options, dict[str, Any]]:
    chosen = options(tied, tmp_path_factory.mktemp("trials"), seeds=1, methods=f"elo_interleaved,{NAMES}")
    result, _, missing = quality.measure(chosen)
    assert missing == 0
    return chosen, result


def ends(result: dict[str, Any]) -> dict[str, float]:
    return {one["name"]: one["runs"][0]["points"][-1]["loss_nats"]["ja"] for one in result["methods"]}


def test_each_trial_is_another_training(measured: Any) -> None:
    _, result = measured
    check_result(result, "here")
    assert not any(method["failed"] for method in result["methods"])
    found = ends(result)
    assert len(set(found.values())) == len(found), found
    base = result["base"]["ja"]["loss_nats"]
    assert all(loss < base for loss in found.values()), (base, found)


def trained(measured: Any, trial: Trial, name: str = "elo_interleaved") -> TrialRun:
    chosen, _ = measured
    data = quality.prepare(chosen, Path(str(chosen.model)))
    (method,) = choose_methods(name, ())
    config = quality.configuration(chosen, method, 1, str(chosen.model), data)
    source = open_source(config)
    run = TrialRun(trial, config, source, quality.base_evaluations(source, config))
    run.run()
    return run


def test_a_trial_that_departs_in_nothing_is_the_recipe(measured: Any) -> None:
    """What the trial holds in memory and the ordinary run on disk: the same steps on the same rows."""
    run = trained(measured, Trial())
    assert run.points[-1]["loss_nats"]["ja"] == ends(measured[1])["elo_interleaved"]


def test_an_anchor_that_holds_fast_leaves_the_detached_layers_to_the_whole_steps(measured: Any) -> None:
    free, held = (trained(measured, Trial(anchor=share)) for share in (1e-9, 1.0))
    base = TrialRun(Trial(), free.config, free.source, free._base).whole
    away = []
    for run in (free, held):
        leaves = zip(base.layers[0].values(), run.whole.layers[0].values(), strict=True)
        away.append(sum(float((one - other).detach().norm()) for one, other in leaves))
    assert 0 < away[1] < away[0], "the last step is of the whole model, so even a held layer has moved by it"


def test_kept_layers_do_not_learn_in_shallow_steps_and_shared_ones_are_one(measured: Any) -> None:
    run = trained(measured, Trial(kept=2))
    assert run.kept == (1, 2)
    own, shared = (shallow_with(run.whole, (0, 3), run.kept, shared=kind) for kind in (False, True))
    names = {name for leaf in own.leaves for name in leaf.names}
    assert names and all(name.startswith(("model.layers.0.", "model.layers.3.")) for name in names)
    assert own.layers[1]["gate_up"].data_ptr() != own.layers[2]["gate_up"].data_ptr()
    assert shared.layers[1]["gate_up"].data_ptr() == shared.layers[2]["gate_up"].data_ptr()
    assert not own.layers[1]["gate_up"].requires_grad and own.layers[0]["gate_up"].requires_grad


def test_bridges_that_follow_one_another_leave_less_than_bridges_by_themselves(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """What arrives at the second of two gaps is not what the whole model has there. Least squares on what arrives
    cannot leave more at its other end than a map fitted to the whole model's own states.
    """
    chosen = options(make_checkpoint(num_hidden_layers=7), tmp_path)
    data = quality.prepare(chosen, Path(str(chosen.model)))
    config = quality.configuration(chosen, choose_methods("elo_interleaved", ())[0], 1, str(chosen.model), data)
    source = open_source(config)
    run = TrialRun(Trial(kept=1), config, source, quality.base_evaluations(source, config))
    assert run.kept == (3,)
    batches = run._batches(run.mixture.rows(0, 16))
    shallow = shallow_with(run.whole, (0, 6), run.kept, shared=False)
    following = FollowingBridges(shallow, ridge=1e-9, window=10_000)
    truth = following.ends()
    run._observe(batches, {layer: found.append for layer, found in truth.items()})
    following.fit(batches, truth)

    def left() -> float:
        arrived: list[torch.Tensor] = []
        shallow.observers = {6: arrived.append}
        with torch.no_grad():
            for batch in batches:
                shallow.hidden_states(batch)
        return sum(float((y - y_true).square().sum()) for y, y_true in zip(arrived, truth[6], strict=True))

    follows = left()
    by_themselves = Collector({gap: GapStatistics(source.spec.D, source.device) for gap in following.known})
    run._observe(batches, by_themselves.observers)
    shallow.replace_bridges({gap: known.fit(1e-9).bridge for gap, known in by_themselves.statistics.items()})
    assert follows < 0.99 * left()


def test_equal_cost_counts_what_a_frozen_layer_does() -> None:
    spec = preset_spec("smollm2-135m")
    assert quality_costs.equal_cost(spec, 512, (0, 29), 0) == 1.0
    one = quality_costs.kept_flops(spec, 512, (14,))
    trained_one = shallow_step(spec, (0, 14, 29), 512).total - shallow_step(spec, (0, 29), 512).total
    matrices = spec.layer_parameters - 2 * spec.D
    assert trained_one - one == pytest.approx(2 * matrices), "all but the gradient of its weights"
    share = quality_costs.equal_cost(spec, 512, (0, 29), 5)
    alone = shallow_step(spec, (0, 29), 512).total + 4 * spec.D**2
    assert share == pytest.approx(alone / (alone + 5 * one + 5 * 4 * spec.D**2))
    assert kept_layers(5, (0, 29)) == (5, 10, 14, 19, 24)


def test_carried_moments_are_those_of_pretraining(measured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first whole-model step counts on from the shallow ones, for the detached layers alone."""
    counts: list[tuple[int, int]] = []
    inner = quality_trials.SharedAdamW.step

    def step(self: Any, lr: float, *, whole: bool) -> Any:
        if whole:
            counts.append((self._groups[0].attempts, self._groups[1].attempts))
        return inner(self, lr, whole=whole)

    monkeypatch.setattr(quality_trials.SharedAdamW, "step", step)
    run = trained(measured, Trial(states="carried"), "elo_bridge")
    assert counts[0] == (run.config.steps("pretrain"), 0)


def test_run_method_takes_trials(measured: Any) -> None:
    chosen, result = measured
    data = quality.prepare(chosen, Path(str(chosen.model)))
    (method,) = choose_methods("two_states", ())
    config = quality.configuration(chosen, method, 1, str(chosen.model), data)
    source = open_source(config)
    again = run_method(method, config, quality.base_evaluations(source, config), 2)
    assert again.points[-1]["loss_nats"]["ja"] == ends(result)["two_states"]
