"""Whole-model training in layer-major order: layers outside, micro-batches inside.

A resident step takes each micro-batch through all layers; here each layer is brought to the device once for the
forward and once for the backward pass of ALL micro-batches of a step (L2L, Pudipeddi et al. 2020, arXiv 2002.05645), so
the link carries a layer's weights twice a step and not twice a micro-batch. The operations and their order within every
sum are the resident engine's, so on a CPU in fp32 a run is the same to the last bit.

`update: lazy` (default): a layer's gradient waits on the host until the norm of all is known, and its update is made
when the layer is brought for the next step. A step that is given up, or whose norm is not finite, has changed nothing.
`update: at_once`: a layer is updated when its gradient is complete; clipping, if any, is by each unit's own norm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from elo_engine.config import OptimizerConfig, StageConfig
from elo_engine.data import RowBatch
from elo_engine.errors import FailedError
from elo_engine.measure.setting import Streaming
from elo_engine.model.bridge import Gap, GapStatistics
from elo_engine.model.layers import RopeTable
from elo_engine.model.spec import ModelSpec
from elo_engine.stream.device import DeviceUnits
from elo_engine.stream.hidden import AHEAD, SUMS_AHEAD, DeviceHidden, Hidden, HostHidden
from elo_engine.stream.lanes import Lanes
from elo_engine.stream.scoring import LayerMajorScorer, store_scorer
from elo_engine.stream.slabs import Slab
from elo_engine.stream.sliced import SlicedStep
from elo_engine.stream.state import StreamedState
from elo_engine.stream.step import Step, Stopped
from elo_engine.stream.store import Store
from elo_engine.train.loop import StepOutcome, micro_batches, to_batch


def open_streamed(
    spec: ModelSpec, dtype: torch.dtype, section: StageConfig, device: torch.device, streaming: Streaming,
    sequence_length: int, *, seed: int = 42, folder: Path | None = None, apart: tuple[int, ...] = (),
    kind: type[StreamedEngine] | None = None,
) -> StreamedEngine:  # fmt: skip
    """An engine with an empty store, for a stage of this configuration; `engine.store.load` fills it.

    folder: on whose disk the store is, where it is on one. apart: see `Store`. kind: of engine.

    Raises:
        RefusedError: the host does not have the memory, or the disk the room. FailedError: it cannot be registered.
    """
    lanes = Lanes(device)
    at_once = streaming.update == "at_once"
    where = folder if streaming.store == "disk" else None
    sliced = streaming.vocabulary == "sliced"
    assert not (sliced and at_once), "StreamConfig refuses it"
    store = Store(spec, dtype, section.optimizer, device, folder=where, waits=not at_once, sliced=sliced, apart=apart)

    def host(places: int, kind: torch.dtype, ahead: int) -> Hidden:
        tokens = section.tokens_per_step
        slab = Slab(places * tokens * spec.D * kind.itemsize, folder=where, pin=device.type == "cuda")
        return HostHidden(lanes, places, tokens, spec.D, kind, slab, ahead=ahead)

    hidden: Hidden = DeviceHidden()
    sums: Hidden = DeviceHidden()
    if streaming.inputs == "host":
        hidden = host(spec.layers + 2, dtype, AHEAD)
        sums = host(1, torch.float32, SUMS_AHEAD) if sliced else sums
    return (kind or StreamedEngine)(
        store, lanes, hidden, section.optimizer, micro_batch=section.rows_at_once, seed=seed, at_once=at_once, sums=sums
    )


class StreamedEngine:
    """A model in a store and AdamW, as `train` takes them.

    Args:
        hidden: where the layers' inputs are kept. sums: where the gradients of the final norm's output add up over the
            slices of the head, in fp32.
        micro_batch: rows that go through a layer at once.
        at_once: see above.

    Attributes:
        attempts: the number of the step to come, taken or skipped, which its random bits depend on.
        watched: gaps whose ends are counted in the forward pass.
    """

    def __init__(
        self,
        store: Store,
        lanes: Lanes,
        hidden: Hidden,
        optimizer: OptimizerConfig,
        *,
        micro_batch: int,
        seed: int = 42,
        at_once: bool = False,
        sums: Hidden | None = None,
    ) -> None:
        self.sums = sums or DeviceHidden()
        self.store, self.spec = store, store.spec
        self.lanes, self.hidden, self.config = lanes, hidden, optimizer
        self._micro_batch, self.seed, self.at_once = micro_batch, seed, at_once
        self.device_units = DeviceUnits(store, lanes)
        self._rope = RopeTable(store.spec, store.device)
        self.optimizer = StreamedState(store, self.flush)
        self.broken = ""
        self.watched: Mapping[Gap, GapStatistics] = {}

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.store.device

    @property
    def dtype(self) -> torch.dtype:
        """In which it computes."""
        return self.store.dtype

    @property
    def scorer(self) -> LayerMajorScorer:
        """Whose held-out losses are scored: the model as it is after the last step."""
        return store_scorer(self)

    @property
    def attempts(self) -> int:
        """See above."""
        return self.optimizer.attempts

    def held(self) -> dict[str, int]:
        """Bytes on the device by component, between the steps."""
        return self.device_units.held()

    def trainable(self) -> dict[str, Tensor]:
        """Checkpoint names of what learns -> the weights on the host, as they are there now."""
        return self.optimizer.leaf_views()

    def flush(self) -> None:
        """Make every update that waits, so that the store holds the model as it is.

        Raises:
            FailedError: a step of `update: at_once` broke off half-way.
        """
        if self.broken:
            raise FailedError(self.broken)
        for number in sorted(self.device_units.waiting):
            self.device_units.bring(number)
        self.lanes.finish()

    def step(
        self, rows: RowBatch, tokens_loss: int, lr: float, *, first: bool, should_stop: Callable[[], bool]
    ) -> StepOutcome | None:
        """See `Engine`. With `update: at_once` a step can be given up only before its backward pass."""
        if self.broken:
            raise FailedError(self.broken)
        pieces = [to_batch(piece, self.device) for piece in micro_batches(rows, self._micro_batch)]
        batches = [(batch, self._rope.gather(batch.packing, batch.longest)) for batch in pieces]
        kind, ids = SlicedStep if self.store.sliced else Step, torch.from_numpy(rows.ids_BT)
        step = kind(self, batches, ids, tokens_loss, lr, first=first, should_stop=should_stop)
        with torch.no_grad():
            try:
                self.hidden.begin([len(batch.ids_N) for batch in pieces])
                self.sums.begin([len(batch.ids_N) for batch in pieces])
                step.forward()
                step.observe(self.watched)
                step.head()
                step.backward()
            except Stopped:
                self._give_up()
                return None
            except BaseException:
                if self.at_once:
                    self.broken = "a step of align.stream.update=at_once broke off half-way; continue from a snapshot"
                raise
            return step.finish()

    def _give_up(self) -> None:
        """What waited and has been made since is the step before; what waits still waits."""
        self.hidden.begin([])
        self.sums.begin([])
        self.device_units.forget()
        self.lanes.finish()
