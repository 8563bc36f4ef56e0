"""Small random models and steps for the tests of the streamed engine, and the two engines on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from elo_engine.config import OptimizerConfig, StageConfig
from elo_engine.data import RowBatch
from elo_engine.measure.setting import Streaming
from elo_engine.model import names
from elo_engine.model.decoder import Decoder
from elo_engine.model.presets import preset_spec
from elo_engine.model.spec import ModelSpec
from elo_engine.stream.engine import StreamedEngine, open_streamed
from elo_engine.train.loop import StepOutcome
from elo_engine.train.optim import MasterAdamW
from elo_engine.train.resident import ResidentEngine

CPU = torch.device("cpu")
T, ROWS = 16, 6
SPEC = replace(preset_spec("smollm2-135m"), D=64, F=96, V=512, H=4, K=2, E=16, layers=5)


def never() -> bool:
    """Nobody asks for a stop."""
    return False


def step_rows(step: int, spec: ModelSpec = SPEC) -> RowBatch:
    """Random tokens; the second row is two documents, the third has few labels."""
    ids_BT = np.random.default_rng([1, step]).integers(0, spec.V, (ROWS, T), dtype=np.int64)
    labels_BT = np.concatenate((ids_BT[:, 1:], np.full((ROWS, 1), -100)), axis=1)
    labels_BT[2, 3:] = -100
    positions_BT = np.tile(np.arange(T), (ROWS, 1))
    positions_BT[1, 5:] = np.arange(T - 5)
    starts = np.sort(np.append(np.arange(ROWS + 1) * T, T + 5))
    return RowBatch(ids_BT, labels_BT, positions_BT, starts, ("x",) * ROWS)


def random_tensors(spec: ModelSpec, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights by checkpoint name."""
    generator = torch.Generator().manual_seed(3)
    found = {}
    for name, shape in names.expected_shapes(spec).items():
        weight = torch.ones(shape) if len(shape) == 1 else torch.empty(shape).normal_(0, 0.05, generator=generator)
        found[name] = weight.to(dtype)
    return found


@dataclass
class Case:
    """What is trained, and how."""

    spec: ModelSpec = SPEC
    dtype: torch.dtype = torch.float32
    optimizer: OptimizerConfig = OptimizerConfig(clip=0.5, weight_decay=0.1)  # noqa: RUF009 (frozen)
    micro_batch: int = 2
    lr: float = 1e-2

    def resident(self) -> ResidentEngine:
        """The whole model on the device, layers run again in the backward pass."""
        tensors = random_tensors(self.spec, self.dtype)
        model = Decoder(self.spec, tensors, tuple(range(self.spec.layers)), train_outer=True, recompute="layer")
        return ResidentEngine(model, MasterAdamW(model, self.optimizer, seed=7), self.micro_batch)

    def streamed(self, folder: Path | None = None, **streaming: Any) -> StreamedEngine:
        """The same model in a store."""
        section = StageConfig(
            tokens=10**6, tokens_per_step=ROWS * T, micro_batch=self.micro_batch, optimizer=self.optimizer
        )
        engine = open_streamed(
            self.spec, self.dtype, section, CPU, Streaming(**streaming), T, seed=7, folder=folder
        )
        engine.store.fill(random_tensors(self.spec, self.dtype))
        return engine

    def steps(
        self, engine: Any, first: int, last: int, stops: dict[int, int] | None = None
    ) -> list[StepOutcome]:
        """Steps `first` to `last`; stops: steps that are given up once, after so many questions whether to."""
        found = []
        for number in range(first, last):
            rows = step_rows(number, self.spec)
            tokens = int((rows.labels_BT >= 0).sum())
            if stops and number in stops:
                asked = counter(stops[number])
                given_up = engine.step(rows, tokens, self.lr, first=False, should_stop=asked)
                assert given_up is None, f"step {number} ended"
            outcome = engine.step(rows, tokens, self.lr, first=number == 0, should_stop=never)
            assert outcome is not None
            found.append(outcome)
        return found


def counter(times: int) -> Callable[[], bool]:
    """False so many times, then True."""
    left = [times]

    def ask() -> bool:
        left[0] -= 1
        return left[0] < 0

    return ask


def everything(engine: Any) -> dict[str, Tensor]:
    """Weights and moments as a snapshot has them."""
    return {name: tensor.clone() for name, tensor in (engine.optimizer.weights() | engine.optimizer.moments()).items()}


def differing(left: dict[str, Tensor], right: dict[str, Tensor]) -> list[str]:
    """Names whose bits are not equal, or that only one has."""
    return sorted(
        name for name in left.keys() | right.keys()
        if name not in left or name not in right or not torch.equal(left[name], right[name])
    )  # fmt: skip
