"""Small interleaved runs for tests: their configuration, their engines, and steps of their own plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from stream_cases import CPU, ROWS, SPEC, T, never, random_tensors, step_rows
from torch import Tensor

from elo_engine.config import RunConfig, make_config
from elo_engine.measure.setting import Streaming
from elo_engine.model.bridge import Collector, GapStatistics, gaps
from elo_engine.model.decoder import Decoder
from elo_engine.model.spec import ModelSpec
from elo_engine.stream.engine import open_streamed
from elo_engine.stream.interleaved import StreamedInterleaving, WholeTurn
from elo_engine.train.interleaved import InterleavedEngine
from elo_engine.train.loop import to_batch

LAYERS = (0, 4)
ROW_TOKENS = ROWS * T



def configured(pretrain: int = 4, align: int = 2, state: str = "fp32", **more: Any) -> RunConfig:
    """As `elo run` would have it, with these steps of either kind."""
    optimizer = {"state": state, "clip": 0.5, "lr": 1e-2, "weight_decay": 0.1}
    stage = {"tokens_per_step": ROW_TOKENS, "micro_batch": 2, "recompute": "none", "optimizer": optimizer}
    return make_config(
        {
            "model": "x", "output": "y", "seed": 7, "data": {"shards": {"ja": "z"}, "sequence_length": T},
            "detach": {"layers": list(LAYERS), "bridge": "linear", "bridge_tokens": 4 * ROW_TOKENS},
            "pretrain": stage | {"tokens": pretrain * ROW_TOKENS, "optimizer": optimizer | {"lr": 2e-2}},
            "align": stage | {"tokens": align * ROW_TOKENS, "when": "interleaved"},
        }
        | more
    )


def whole(spec: ModelSpec = SPEC, dtype: torch.dtype = torch.float32) -> Decoder:
    """With everything trained."""
    return Decoder(spec, random_tensors(spec, dtype), tuple(range(spec.layers)), train_outer=True)


def seen(model: Decoder, *numbers: int) -> dict[Any, GapStatistics]:
    """Statistics of the gaps over some steps' rows, collected by whole passes."""
    collector = Collector({gap: GapStatistics(model.spec.D, CPU) for gap in gaps(model.spec.layers, LAYERS)})
    model.observers = collector.observers
    for number in numbers:
        with torch.no_grad():
            model.hidden_states(to_batch(step_rows(number, model.spec), CPU))
    model.observers = {}
    return collector.statistics


def engine(config: RunConfig | None = None, spec: ModelSpec = SPEC, dtype: torch.dtype = torch.float32) -> Any:
    """Everything on the device."""
    config = config or configured()
    bridges, statistics = fitted(config, spec, dtype)
    return InterleavedEngine(whole(spec, dtype), LAYERS, config, bridges=bridges, statistics=statistics)


def streamed(
    config: RunConfig | None = None, spec: ModelSpec = SPEC, dtype: torch.dtype = torch.float32,
    folder: Path | None = None, **streaming: Any,
) -> StreamedInterleaving:  # fmt: skip
    """The same model in a store."""
    config = config or configured()
    made = open_streamed(
        spec, dtype, config.align, CPU, Streaming(**streaming), T, seed=config.seed, folder=folder, apart=LAYERS,
        kind=WholeTurn,
    )  # fmt: skip
    assert isinstance(made, WholeTurn)
    made.store.fill(random_tensors(spec, dtype))
    bridges, statistics = fitted(config, spec, dtype)
    return StreamedInterleaving(made, LAYERS, config, bridges=bridges, statistics=statistics)


def fitted(config: RunConfig, spec: ModelSpec, dtype: torch.dtype) -> tuple[Any, Any]:
    """Bridges and their statistics, of other rows than those of the steps."""
    if config.detach.bridge == "none":
        return {}, {}
    statistics = seen(whole(spec, dtype), 100, 101)
    return {gap: known.fit(config.detach.ridge).bridge for gap, known in statistics.items()}, statistics


def run(made: Any, first: int, last: int) -> list[Any]:
    """Steps of its own plan on the rows of their number."""
    found = []
    for number in range(first, last):
        turn, rows = made.turns.turn(number), step_rows(number, made.model.spec)
        tokens = int((rows.labels_BT >= 0).sum())
        outcome = turn.engine.step(rows, tokens, turn.lr, first=turn.number == 0, should_stop=never)
        assert outcome is not None and outcome.updated
        found.append(outcome)
    return found


def everything(made: Any) -> dict[str, Tensor]:
    """Weights and moments as a snapshot has them."""
    return {name: tensor.clone() for name, tensor in (made.optimizer.weights() | made.optimizer.moments()).items()}
