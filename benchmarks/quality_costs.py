"""What the tokens of a method would cost on a larger model, and the figures that a `quality` result is read by: means
and spreads over seeds, differences paired by seed, and the cost ratio at which ELO draws level with full continual
pretraining. All are made from the runs in the result, so the tables cannot say something else.

Unit of cost: a token of full continual pretraining of COST_MODEL at COST_LENGTH tokens a row, by executed operations;
`plain` with all activations kept, `checkpointed` with every layer of a whole model run again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from elo_engine.benchmarks.quality_methods import kept_layers
from elo_engine.config import Recompute
from elo_engine.measure.flops import arm_flops, calibration_flops, shallow_step
from elo_engine.measure.setting import ArmName, Setting
from elo_engine.model.presets import preset_spec
from elo_engine.model.spec import ModelSpec

COST_MODEL, COST_LENGTH = "llama-3.1-8b", 8192
MODES = ("plain", "checkpointed")
_WHOLE_ARM: dict[str, ArmName] = {"elo": "elo_align", "whole": "engine_full", "lora": "lora", "outer": "outer_unfrozen"}


def relative_costs(
    kind: str, layers: tuple[int, ...], of: int, bridged: bool, lora_rank: int, kept: int = 0
) -> dict[str, dict[str, float]]:
    """By mode, the cost of a shallow token, of a token of the whole model, and of one that a bridge is fitted to.

    layers: those detached of a model of `of` layers; as many count from the front and from the back of COST_MODEL.
    kept: frozen layers between them.
    """
    spec = preset_spec(COST_MODEL)
    there = tuple(sorted({min(n, spec.layers - 1) if n < of / 2 else max(0, n - of + spec.layers) for n in layers}))
    between = kept_layers(kept, there)
    bridges = _gap_count(there + between, spec.layers) if bridged else 0
    full = Setting("engine_full", spec, there, COST_LENGTH, 1, lora_rank=lora_rank)
    shallow = replace(full, arm="elo_pretrain", bridges=bridges)
    found = {}
    for mode in MODES:
        recompute: Recompute = "layer" if mode == "checkpointed" else "none"
        one = arm_flops(replace(full, recompute=recompute)).executed.total
        whole = arm_flops(replace(full, arm=_WHOLE_ARM[kind], recompute=recompute)).executed.total
        found[mode] = {
            "shallow": (arm_flops(shallow).executed.total + kept_flops(spec, COST_LENGTH, between)) / one,
            "whole": whole / one,
            "fit": calibration_flops(shallow, 1) / one if bridges else 0.0,
        }
    return found


def _gap_count(present: tuple[int, ...], of: int) -> int:
    return len([a for a, b in pairwise((-1, *sorted(present), of)) if b > a + 1])


def kept_flops(spec: ModelSpec, T: int, kept: tuple[int, ...]) -> float:
    """Operations a token of frozen layers inside the shallow model: forward, and the gradient of what enters."""
    if not kept:
        return 0.0
    with_dw, none = shallow_step(spec, kept, T), shallow_step(spec, (), T)
    linear = (with_dw.linear - none.linear) * 2 / 3
    return linear + with_dw.attention


def equal_cost(spec: ModelSpec, T: int, layers: tuple[int, ...], kept: int) -> float:
    """The share of the shallow tokens for which kept layers and their bridges cost what the detached layers alone do
    with theirs, by operations on the model that is trained.
    """
    between = kept_layers(kept, layers)
    alone = Setting("elo_pretrain", spec, layers, T, 1, bridges=_gap_count(layers, spec.layers))
    more = replace(alone, bridges=_gap_count(layers + between, spec.layers))
    return arm_flops(alone).executed.total / (arm_flops(more).executed.total + kept_flops(spec, T, between))


def cost(method: dict[str, Any], point: dict[str, Any], mode: str) -> float:
    """Of a point of a method's course, in tokens of full continual pretraining; a bridge is paid for at the start."""
    each = method["cost"][mode]
    fit = each["fit"] * method["tokens"]["fit"] if point["shallow"] else 0.0
    return float(each["shallow"] * point["shallow"] + each["whole"] * point["whole"] + fit)


@dataclass(frozen=True)
class Spread:
    """Over the seeds."""

    mean: float
    low: float
    high: float
    count: int

    @property
    def width(self) -> float:
        """From the lowest to the highest."""
        return self.high - self.low

    @classmethod
    def of(cls, values: list[float]) -> Spread | None:
        """None of no value."""
        return cls(sum(values) / len(values), min(values), max(values), len(values)) if values else None


def by_name(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The methods that have a run."""
    return {method["name"]: method for method in result["methods"] if method["runs"]}


def ends(method: dict[str, Any], language: str, what: str = "loss_nats") -> dict[int, float]:
    """By seed, the last point's."""
    return {run["seed"]: run["points"][-1][what][language] for run in method["runs"]}


def end_spread(method: dict[str, Any], language: str, what: str = "loss_nats") -> Spread:
    """Over the seeds, of the last point."""
    found = Spread.of(list(ends(method, language, what).values()))
    assert found
    return found


def paired(method: dict[str, Any], other: dict[str, Any], language: str) -> Spread | None:
    """The method's loss less the other's, seed by seed; below 0: the method is better."""
    ours, theirs = ends(method, language), ends(other, language)
    return Spread.of([ours[seed] - theirs[seed] for seed in ours if seed in theirs])


def clear(method: dict[str, Any], other: dict[str, Any], language: str) -> int:
    """-1: the method's loss is lower by more than the spread of either over the seeds; 1: higher; 0: neither, or there
    are fewer than two seeds.
    """
    found = paired(method, other, language)
    if found is None or found.count < 2:
        return 0
    widest = max(end_spread(method, language).width, end_spread(other, language).width)
    return 0 if abs(found.mean) <= widest else -1 if found.mean < 0 else 1


def seconds_per_token(method: dict[str, Any]) -> dict[str, float | None]:
    """Measured, of a shallow token and of one of the whole model: the medians of their steps, the mean over seeds."""
    found: dict[str, float | None] = {}
    for kind in ("shallow", "whole"):
        each = [run["seconds_per_token"][kind] for run in method["runs"] if run["seconds_per_token"][kind]]
        found[kind] = sum(each) / len(each) if each else None
    return found


# -- where ELO draws level with full continual pretraining


@dataclass(frozen=True)
class Curve:
    """Loss of full continual pretraining by tokens, for one seed: `finished` runs of several budgets, or the course of
    one run, whose learning rate had not yet come down at the earlier points.
    """

    tokens: tuple[float, ...]
    losses: tuple[float, ...]
    finished: bool

    def tokens_for(self, loss: float) -> float | None:
        """The fewest tokens that reach a loss, between points in a straight line; None: no point is that low."""
        pairs = list(zip(self.tokens, self.losses, strict=True))
        if loss >= pairs[0][1]:
            return 0.0
        for (x0, y0), (x1, y1) in pairwise(pairs):
            if y1 <= loss < y0:
                return x0 + (x1 - x0) * (y0 - loss) / (y0 - y1)
        return None

    def loss_at(self, tokens: float) -> float | None:
        """Between points in a straight line; None beyond the last one."""
        pairs = list(zip(self.tokens, self.losses, strict=True))
        for (x0, y0), (x1, y1) in pairwise(pairs):
            if x0 <= tokens <= x1:
                return y0 + (y1 - y0) * (tokens - x0) / (x1 - x0)
        return None


def is_full(method: dict[str, Any]) -> bool:
    """Full continual pretraining with some budget; alignment alone is that with its small one."""
    return bool(method["kind"] == "whole" and not method["overrides"])


def full_curve(result: dict[str, Any], seed: int) -> Curve | None:
    """None without a run of full continual pretraining with this seed."""
    found = {}
    base = result["base"][result["target"]]["loss_nats"]
    methods = [method for method in by_name(result).values() if is_full(method)]
    if not methods:
        return None
    longest = max(methods, key=lambda method: int(method["tokens"]["whole"]))  # with another rate it is another curve
    alike = [method for method in methods if method.get("lr") == longest.get("lr")]
    runs = [run for method in alike for run in method["runs"] if run["seed"] == seed]
    if not runs:
        return None
    finished = len({run["points"][-1]["whole"] for run in runs}) > 1
    points = [run["points"][-1] for run in runs] if finished else runs[0]["points"][1:]
    for point in points:
        found[point["whole"]] = point["loss_nats"][result["target"]]
    tokens = sorted(found)
    return Curve((0.0, *map(float, tokens)), (base, *(found[count] for count in tokens)), finished)


@dataclass(frozen=True)
class BreakEven:
    """Of one ELO method: cost ratios r of a shallow token to one of the whole model by seed, at which the method costs
    as much as full continual pretraining that reaches the same loss. `beyond`: seeds whose loss no measured full
    continual pretraining reaches; for them the ratio is at least what is given, at its largest budget. `fit`: what the
    fit of a bridge, whose cost does not grow with the budget, takes off each ratio.
    """

    ratios: dict[int, float]
    fit: float
    beyond: tuple[int, ...]
    finished: bool

    @property
    def spread(self) -> Spread:
        """Over the seeds."""
        found = Spread.of(list(self.ratios.values()))
        assert found
        return found

    @property
    def without_fit(self) -> Spread:
        """Over the seeds, as if the bridge had cost nothing."""
        found = Spread.of([ratio + self.fit for ratio in self.ratios.values()])
        assert found
        return found


def break_even(result: dict[str, Any], method: dict[str, Any]) -> BreakEven | None:
    """S r + W + fit = the tokens of full continual pretraining for the same loss; the fit of a bridge at COST_MODEL's
    cost, plain. A ratio at or below 0: even if shallow tokens were free, full continual pretraining would cost no more.
    None without one of the two, or for a method without shallow tokens.
    """
    ratios, beyond, finished = {}, [], True
    fit = method["cost"]["plain"]["fit"] * method["tokens"]["fit"]
    for run in method["runs"]:
        curve, end = full_curve(result, run["seed"]), run["points"][-1]
        if curve is None or not end["shallow"]:
            continue
        tokens = curve.tokens_for(end["loss_nats"][result["target"]])
        if tokens is None:
            tokens = curve.tokens[-1]
            beyond.append(run["seed"])
        ratios[run["seed"]] = (tokens - end["whole"] - fit) / end["shallow"]
        finished = finished and curve.finished
    return BreakEven(ratios, fit / method["tokens"]["shallow"], tuple(beyond), finished) if ratios else None


def at_equal_cost(result: dict[str, Any], method: dict[str, Any], mode: str) -> Spread | None:
    """The method's loss less that of full continual pretraining at the same cost, by seed; None where that was not
    measured so far.
    """
    found = []
    for run in method["runs"]:
        curve, end = full_curve(result, run["seed"]), run["points"][-1]
        full = curve.loss_at(cost(method, end, mode)) if curve else None
        if full is not None:
            found.append(end["loss_nats"][result["target"]] - full)
    return Spread.of(found)
