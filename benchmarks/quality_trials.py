"""Other stand-ins for the missing middle, and other seams between the two kinds of steps, tried in memory beside the
recipes that a run can have: what `elo bench quality` calls a trial.

Stand-ins: some middle layers stay in the shallow model, frozen, with a bridge in every gap between; of their own
weights, or all of those of one layer (Offsite-Tuning's and CRaSh's kept and shared layers, arXiv 2302.04870 and
2310.15477). Their bridges are fitted one after another, each from the states that the shallow model itself makes before
its gap to those of the whole model behind it, so that no gap inherits what the one before it could not explain.

Seams: whole-model steps with an optimizer state of their own; alignment that goes on with the moments of ELO
pretraining; detached layers that every shallow step pulls back to the base model's.

Rows, learning rates, order of steps and optimizer are those of the recipe that a trial departs from.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from elo_engine import console
from elo_engine.benchmarks.quality_methods import Evaluations, Outcome, Trial, bits_per_nat, kept_layers
from elo_engine.calibrate import calibration_rows
from elo_engine.config import RunConfig
from elo_engine.corpora import make_mixture, open_heldout
from elo_engine.data import Mixture, RowBatch
from elo_engine.detach import Source
from elo_engine.errors import Interrupted
from elo_engine.evaluate import Stopped, evaluate_all
from elo_engine.model.bridge import Bridge, Collector, Gap, GapStatistics, gaps
from elo_engine.model.decoder import Batch, Decoder, embedding_rows
from elo_engine.model.full import load_full
from elo_engine.model.layers import decoder_layer, scale_embedded
from elo_engine.model.ops.adamw import StepResult, adamw_update, leaf_norms, step_numbers
from elo_engine.train.interleaved import Interleaving, MovingBridge
from elo_engine.train.leaf_state import LeafState
from elo_engine.train.loop import (
    Hooks,
    Progress,
    StepOutcome,
    StopSignal,
    Straight,
    micro_batches,
    to_batch,
    train_turns,
)
from elo_engine.train.optim import fresh_state
from elo_engine.train.resident import Optimizer, ResidentEngine
from elo_engine.train.shared_adamw import SharedAdamW


def shallow_with(whole: Decoder, detached: tuple[int, ...], kept: tuple[int, ...], *, shared: bool) -> Decoder:
    """The shallow model made of the whole one's tensors, in which the kept layers learn nothing; shared: each has the
    weights of the one in their middle.
    """
    present = tuple(sorted({*detached, *kept}))
    blank = Bridge(torch.zeros(whole.spec.D, whole.spec.D), torch.zeros(whole.spec.D))
    model = whole.shallow(present, bridges=dict.fromkeys(gaps(whole.spec.layers, present), blank))
    frozen: set[int] = set()
    for place, layer in enumerate(present):
        if layer in kept:
            frozen |= {id(tensor) for tensor in model.layers[place].values()}
            weights = whole.layers[kept[len(kept) // 2] if shared else layer]
            model.layers[place] = {key: tensor.detach() for key, tensor in weights.items()}
    model.leaves = [leaf for leaf in model.leaves if id(leaf.tensor) not in frozen]
    return model


class FollowingBridges:
    """The bridges of a shallow model, each fitted to the states that this model makes before its gap.

    Args:
        window: tokens that the sums weigh at most; what was counted earlier fades.
    """

    def __init__(self, shallow: Decoder, *, ridge: float, window: int) -> None:
        self._shallow, self._ridge, self._window = shallow, ridge, window
        D = shallow.spec.D
        self.known = {gap: GapStatistics(D, shallow.device) for gap in gaps(shallow.spec.layers, shallow.layer_indices)}

    def ends(self) -> dict[int, list[Tensor]]:
        """For what the whole model makes behind each gap, by layer: `watch` fills it."""
        return {gap[1]: [] for gap in self.known}

    @torch.no_grad()
    def fit(self, batches: Sequence[Batch], truth: Mapping[int, Sequence[Tensor]]) -> None:
        """Go through the shallow model once, and fit and take each bridge when its gap is reached."""
        model, spec = self._shallow, self._shallow.spec
        ropes = [model._rope.gather(batch.packing, batch.longest) for batch in batches]
        states = [scale_embedded(spec, embedding_rows(batch.ids_N, model.embedding_VD)) for batch in batches]
        behind, at = {gap[1]: gap for gap in self.known}, dict(zip(model.layer_indices, model.layers, strict=True))
        for layer in (*model.layer_indices, spec.layers):
            if layer in behind:
                bridge = self._one(behind[layer], states, truth[layer])
                states = [bridge(state_ND) for state_ND in states]
            if layer in at:
                both = zip(states, ropes, batches, strict=True)
                states = [decoder_layer(spec, layer, at[layer], x, rope, batch.packing) for x, rope, batch in both]

    def _one(self, gap: Gap, states: Sequence[Tensor], truth: Sequence[Tensor]) -> Bridge:
        known, new = self.known[gap], GapStatistics(self._shallow.spec.D, self._shallow.device)
        for x_ND, y_ND in zip(states, truth, strict=True):
            new.add(x_ND, y_ND)
        known.scale(min(1.0, max(0.0, self._window - new.tokens) / max(known.tokens, 1.0)))
        known.merge(new)
        bridge = self._shallow._bridges[gap]
        bridge.copy_(known.fit(self._ridge).bridge)
        return bridge


class TwoStates(SharedAdamW):
    """Whole-model steps have moments of their own for the detached layers too; the weights are one."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        detached = self._groups[0]
        state = fresh_state(detached._leaves, self._configs[1])
        same = {"weights": detached.state.weights, "leaves": detached.state.leaves}
        self._own = LeafState(detached._leaves, replace(state, **same))

    def step(self, lr: float, *, whole: bool) -> StepResult:
        """See `SharedAdamW`."""
        if not whole:
            return super().step(lr, whole=False)
        config, grads = self._configs[1], self._grads.of_one_type()
        parts = [[grad for i in places if (grad := grads[i]) is not None] for places in self._places]
        norms, first = leaf_norms([*parts[0], *parts[1]]), 0
        result: StepResult | None = None
        for state, part in zip((self._own.state, self._groups[1].state), parts, strict=True):
            numbers = step_numbers(
                state.powers, norms, bits=32, lr=lr, eps=config.eps, weight_decay=config.weight_decay, clip=config.clip
            )
            adamw_update(state, part, numbers, first=first)
            first, result = len(part), numbers.result
        self._groups[1].attempt()
        assert result is not None
        return result


class _Watched(ResidentEngine):
    """Whole-model steps that show what the middle does: `watch` gives the observers of a step, `moved` ends it."""

    def __init__(
        self, model: Decoder, optimizer: Optimizer, micro_batch: int,
        watch: Callable[[], tuple[dict[int, Any], Callable[[RowBatch], None]]],
    ) -> None:  # fmt: skip
        super().__init__(model, optimizer, micro_batch)
        self._watch = watch

    def step(self, rows: RowBatch, *arguments: Any, **options: Any) -> StepOutcome | None:
        """See `Engine`."""
        self.model.observers, moved = self._watch()
        try:
            outcome = super().step(rows, *arguments, **options)
        finally:
            self.model.observers = {}
        if outcome is not None and outcome.updated:
            moved(rows)
        return outcome


class _Anchored(ResidentEngine):
    """Shallow steps after each of which the masters go a share of their way back to where they began."""

    def __init__(self, model: Decoder, optimizer: Any, micro_batch: int, state: Any, share: float) -> None:
        super().__init__(model, optimizer, micro_batch)
        self._adamw, self._share, self._base = state, share, [weight.clone() for weight in state.weights]

    def step(self, rows: RowBatch, *arguments: Any, **options: Any) -> StepOutcome | None:
        """See `Engine`."""
        outcome = super().step(rows, *arguments, **options)
        if outcome is None or not outcome.updated:
            return outcome
        with torch.no_grad():
            for place, (weight, base) in enumerate(zip(self._adamw.weights, self._base, strict=True)):
                weight.lerp_(base, self._share)
                if self._adamw.leaves is not None:
                    self._adamw.leaves[place].copy_(weight)
        return outcome


class TrialRun:
    """One trial with one seed, held in memory."""

    def __init__(self, trial: Trial, config: RunConfig, source: Source, base: Evaluations) -> None:
        self.trial, self.config, self.source, self._base = trial, config, source, base
        self.whole, _ = load_full(source.index, source.spec, device=source.device, dtype=source.dtype)
        self.kept = kept_layers(trial.kept, source.layers)
        self.mixture: Mixture = make_mixture(config, source.folder, source.spec.V)
        self.heldout = open_heldout(config, source.folder, source.spec.V)
        self.step_s: dict[str, list[float]] = {"shallow": [], "whole": []}
        self.points: list[dict[str, Any]] = []
        self.fit_seconds, self.stop = 0.0, StopSignal()

    def _batches(self, rows: RowBatch) -> list[Batch]:
        return [to_batch(piece, self.whole.device) for piece in micro_batches(rows, 1)]

    @torch.no_grad()
    def _observe(self, batches: Sequence[Batch], observers: Mapping[int, Any]) -> None:
        self.whole.observers = dict(observers)
        for batch in batches:
            self.whole.hidden_states(batch)
        self.whole.observers = {}

    def _shallow(self) -> tuple[Decoder, Callable[[], tuple[dict[int, Any], Callable[[RowBatch], None]]]]:
        """The shallow model with its first bridges, and how whole-model steps renew them."""
        config, began = self.config, time.perf_counter()
        shallow = shallow_with(self.whole, self.source.layers, self.kept, shared=self.trial.shared)
        fitted = self._batches(self.mixture.rows(0, calibration_rows(config)[0]))
        ridge, window = config.detach.ridge, config.detach.bridge_tokens
        if self.kept:
            following = FollowingBridges(shallow, ridge=ridge, window=window)
            truth = following.ends()
            self._observe(fitted, {layer: found.append for layer, found in truth.items()})
            following.fit(fitted, truth)

            def watch() -> tuple[dict[int, Any], Callable[[RowBatch], None]]:
                seen = following.ends()
                observers = {layer: found.append for layer, found in seen.items()}
                return observers, lambda rows: following.fit(self._batches(rows), seen)
        else:
            missing = gaps(self.source.spec.layers, self.source.layers)
            first = Collector({gap: GapStatistics(shallow.spec.D, shallow.device) for gap in missing})
            self._observe(fitted, first.observers)
            shallow.replace_bridges({gap: known.fit(ridge).bridge for gap, known in first.statistics.items()})
            moving = MovingBridge.of(shallow, first.statistics, config)

            def watch() -> tuple[dict[int, Any], Callable[[RowBatch], None]]:
                seen = Collector(moving.fresh())
                return seen.observers, lambda rows: moving.move(seen.statistics)

        self.fit_seconds = time.perf_counter() - began
        return shallow, watch

    def run(self) -> Outcome:
        """Train to the end.

        Raises:
            Interrupted: a signal came; nothing is kept, the next start begins again.
        """
        self._point("base", {language: one["loss_nats"] for language, one in self._base.items()})
        with self.stop.installed():
            try:
                (self._after if self.config.align.when == "after" else self._interleaved)()
                self._score("end")
            except Stopped:
                raise Interrupted("a trial was interrupted; it begins again when the comparison is resumed") from None
        steps = {kind: len(times) for kind, times in self.step_s.items()}
        fit = calibration_rows(self.config)[0] * self.config.data.sequence_length
        return Outcome(
            self.points, steps, self._tokens() | {"fit": fit}, self.points[-1]["seconds"], self.fit_seconds, self.step_s
        )

    def _interleaved(self) -> None:
        config, whole = self.config, self.whole
        shallow, watch = self._shallow()
        kind = TwoStates if self.trial.states == "two" else SharedAdamW
        configs = config.pretrain.optimizer, config.align.optimizer
        shared = kind(whole, shallow, configs, seed=config.seed, bridge=None)
        engine: ResidentEngine = ResidentEngine(shallow, shared.of("pretrain"), config.pretrain.rows_at_once)
        if self.trial.anchor:
            state, rows = shared._groups[0].state, config.pretrain.rows_at_once
            engine = _Anchored(shallow, shared.of("pretrain"), rows, state, self.trial.anchor)
        other = _Watched(whole, shared.of("align"), config.align.rows_at_once, watch)
        self._train(Interleaving.of(engine, other, config), "")
        shared.of("align").zero_grad()

    def _after(self) -> None:
        """ELO pretraining, then alignment that goes on with its moments and counts."""
        config, T = self.config, self.config.data.sequence_length
        shallow, _ = self._shallow()
        configs = config.pretrain.optimizer, config.align.optimizer
        shared = SharedAdamW(self.whole, shallow, configs, seed=config.seed, bridge=None)
        engine = ResidentEngine(shallow, shared.of("pretrain"), config.pretrain.rows_at_once)
        self._train(Straight(engine, config.pretrain, config.steps("pretrain"), T), "shallow")
        shared.of("pretrain").zero_grad()
        self._score("reattached")
        engine = ResidentEngine(self.whole, shared.of("align"), config.align.rows_at_once)
        row = config.steps("pretrain") * config.pretrain.tokens_per_step // T
        self._train(Straight(engine, config.align, config.steps("align"), T, row), "whole")
        shared.of("align").zero_grad()

    def _train(self, turns: Any, kind: str) -> None:
        with console.progress_bar(kind or "interleaved", turns.steps) as bar:

            def on_step(at: Progress, metrics: dict[str, Any]) -> None:
                which = kind or ("whole" if metrics["kind"] == "align" else "shallow")
                self.step_s[which].append(metrics["step_s"])
                bar(at.step, f"loss {metrics['loss_nats']:.3f}")

            if not train_turns(turns, self.mixture, Progress(), Hooks(on_step=on_step, should_stop=self.stop)):
                raise Stopped

    def _tokens(self) -> dict[str, int]:
        sections = {"shallow": self.config.pretrain, "whole": self.config.align}
        return {kind: len(times) * sections[kind].tokens_per_step for kind, times in self.step_s.items()}

    def _score(self, moment: str) -> None:
        found = evaluate_all(self.whole, self.heldout, self.stop)
        self._point(moment, {language: one.loss_nats for language, one in found.items()})

    def _point(self, moment: str, losses: dict[str, float]) -> None:
        per_byte = bits_per_nat(self._base)
        self.points.append({
            "moment": moment, **self._tokens(), "seconds": sum(map(sum, self.step_s.values())) + self.fit_seconds,
            "loss_nats": losses, "bits_per_byte": {name: loss * per_byte[name] for name, loss in losses.items()},
        })  # fmt: skip

