"""What a captured step could get wrong, planted, for the tests that must see it."""

from __future__ import annotations

from typing import Any

from elo_engine.data import RowBatch
from elo_engine.train.graphed import GraphedEngine
from elo_engine.train.step_buffers import Room


class ScaleOfTheHost(GraphedEngine):
    """The head's gradient is scaled by the tokens of the step that was captured."""

    def _make(self, room: Room, *, first: bool = False) -> None:
        given = self.model.outer_gradients
        self.model.outer_gradients = lambda scale: given(1 / self.tokens)  # type: ignore[method-assign]
        super()._make(room, first=first)
        self.model.outer_gradients = given  # type: ignore[method-assign]

    def step(self, rows: RowBatch, tokens_loss: int, lr: float, **rest: Any) -> Any:
        self.tokens = tokens_loss
        return super().step(rows, tokens_loss, lr, **rest)
