"""The weights of a checkpoint, a unit at a time in the order of use, read one unit ahead by a thread."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from elo_engine.checkpoint import CheckpointIndex, CheckpointReader, TensorEntry
from elo_engine.errors import FailedError
from elo_engine.model import names
from elo_engine.model.full import check_shapes
from elo_engine.model.layers import LayerWeights
from elo_engine.model.spec import ModelSpec


class CheckpointWeights:
    """The tensors of a checkpoint, but for those that are given.

    Args:
        dtype: in which the model computes; other floating-point types are cast while they are read.
        layers: by original index, packed as `names.layer_parts` says: used in place of the checkpoint's, rounded to
            its type as if they had been written back. They may change between two passes.
        outer: `embedding`, `norm` and `head` as they are, on the device but for an `embedding` that a model has on the
            host. None: the checkpoint's.
        executor: makes what reads ahead, a thread unless a trace of this thread's memory must see the reading.

    Raises:
        FailedError: a tensor that the spec needs is missing or has another shape.
    """

    def __init__(
        self,
        index: CheckpointIndex,
        spec: ModelSpec,
        device: torch.device,
        dtype: torch.dtype,
        *,
        layers: Mapping[int, LayerWeights] | None = None,
        outer: Mapping[str, Tensor] | None = None,
        executor: Callable[[], Executor] = lambda: ThreadPoolExecutor(1, "elo-read"),
    ) -> None:
        check_shapes(index, spec, names.expected_shapes(spec))
        self.index, self.spec, self.device, self.dtype = index, spec, device, dtype
        self.layers, self.outer = layers or {}, outer
        self.executor = executor

    def wanted(self) -> list[list[str]]:
        """What is read, in the order of use: the names of each unit."""
        spec = self.spec
        first, last = [names.EMBEDDING], [names.FINAL_NORM, names.EMBEDDING if spec.tied else names.HEAD]
        layers = [names.layer_names(spec, number) for number in range(spec.layers) if number not in self.layers]
        return layers if self.outer is not None else [first, *layers, last]

    def _entries(self) -> list[TensorEntry]:
        return [self.index.entry(name) for name in sorted({name for unit in self.wanted() for name in unit})]

    @property
    def outer_comes(self) -> bool:
        """See `scoring.Weights`."""
        return self.outer is None

    @property
    def missing_bytes(self) -> int:
        """Of a hub's model: what would have to be fetched first."""
        remote = self.index.remote
        if remote is None:
            return 0
        return sum(entry.nbytes for entry in self._entries() if not remote.has(entry.shard, entry.begin, entry.end))

    def fetch(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Fetch what is missing, with progress(done, total) in bytes; raises as `PartialStore.ensure`."""
        if self.index.remote is not None:
            self.index.remote.ensure(self._entries(), progress)

    @contextmanager
    def sweep(self) -> Iterator[_CheckpointUnits]:
        """See `scoring.Weights`."""
        ahead = _Ahead(self, self.wanted())
        try:
            ahead.begin()
            yield _CheckpointUnits(self, ahead)
        finally:
            ahead.close()

    def as_written(self, number: int) -> LayerWeights:
        """The given weights of a layer as a checkpoint with them in it would be read."""
        prefix, made = names.layer_prefix(number), {}
        for part in names.layer_parts(self.spec):
            live = self.layers[number][part.key].detach()
            kinds = [self.index.entry(prefix + name).torch_dtype for name in part.names]
            if any(torch.promote_types(kind, live.dtype) != kind for kind in kinds):
                pieces = live.split([shape[0] for shape in part.shapes])
                live = torch.cat([piece.to(kind).to(live.dtype) for piece, kind in zip(pieces, kinds, strict=True)])
            made[part.key] = live
        return made


class _CheckpointUnits:
    """Units in use; what is read comes one unit ahead."""

    vocabulary = None  # embedding and head come whole

    def __init__(self, weights: CheckpointWeights, ahead: _Ahead) -> None:
        self._weights, self._ahead = weights, ahead

    @contextmanager
    def _held(self, unit: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """A unit until the end of the block, when the device has used it: the memory of those that are queued for a
        slow device would add up.
        """
        yield unit
        if self._weights.device.type == "cuda":
            torch.cuda.current_stream(self._weights.device).synchronize()

    def embedding(self) -> AbstractContextManager[dict[str, Tensor]]:
        """See `scoring.Units`."""
        outer = self._weights.outer
        if outer is not None:
            return self._held({"embedding": outer["embedding"].detach()})
        return self._held({"embedding": self._taken()[names.EMBEDDING]})

    def layer(self, number: int) -> AbstractContextManager[LayerWeights]:
        """See `scoring.Units`."""
        if number in self._weights.layers:
            return self._held(self._weights.as_written(number))
        return self._held(self._taken(lambda tensors: _packed(self._weights.spec, number, tensors)))

    def last(self) -> AbstractContextManager[dict[str, Tensor]]:
        """See `scoring.Units`."""
        outer, spec = self._weights.outer, self._weights.spec
        if outer is not None:
            return self._held({key: outer[key].detach() for key in ("norm", "head")})
        tensors = self._taken()
        head = tensors[names.EMBEDDING if spec.tied else names.HEAD]
        return self._held({"norm": tensors[names.FINAL_NORM], "head": head})

    def _taken(self, pack: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict) -> dict[str, Tensor]:
        """What was read, packed; the next unit's reading begins when nothing of this one is held twice."""
        tensors = self._ahead.take()
        unit = pack(tensors)
        del tensors
        self._ahead.begin()
        return unit


def _packed(spec: ModelSpec, number: int, tensors: dict[str, Tensor]) -> LayerWeights:
    """A layer as `Decoder` packs it; the tensors are taken out of their dictionary."""
    weights: LayerWeights = {}
    for part in names.layer_parts(spec):
        pieces = [tensors.pop(names.layer_prefix(number) + name) for name in part.names]
        weights[part.key] = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        del pieces
    return weights


class _GivenUp(Exception):
    """Ends the reading thread's work; seen by nobody."""


class _Ahead:
    """Reads units one after the other, each while the one before is used. The reader is used by one thread only."""

    def __init__(self, weights: CheckpointWeights, wanted: Sequence[list[str]]) -> None:
        self._device, self._dtype = weights.device, weights.dtype
        self._wanted = deque(wanted)
        self._reader = CheckpointReader(weights.index)
        self._executor = weights.executor()
        self._given_up = threading.Event()
        self._coming: Future[dict[str, Tensor]] | None = None
        # of its own, so that the copies do not wait for the computation that is queued
        self._stream: Any = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None

    def begin(self) -> None:
        """Begin to read the next unit, if there is one."""
        if not self._wanted:
            return
        try:
            self._coming = self._executor.submit(self._read, self._wanted.popleft())
        except RuntimeError as error:
            raise FailedError(
                f"{self._reader.index.folder}: the thread that reads ahead cannot be started ({error}); raise the "
                "limit on processes (ulimit -u)"
            ) from error

    def take(self) -> dict[str, Tensor]:
        """The unit that was begun last; raises what reading it raised."""
        coming, self._coming = self._coming, None
        assert coming is not None, "asked for more units than there are"
        tensors = coming.result()
        if self._stream is not None:
            for tensor in tensors.values():  # made on the reading stream, and about to be used on this one
                tensor.record_stream(torch.cuda.current_stream(self._device))
        return tensors

    def _read(self, wanted: list[str]) -> dict[str, Tensor]:
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            return self._reader.read(wanted, device=self._device, dtype=self._dtype, progress=self._go_on)

    def _go_on(self, done: int, total: int) -> None:
        if self._given_up.is_set():
            raise _GivenUp

    def close(self) -> None:
        """End what is under way after its present transfer, and close every file."""
        self._given_up.set()
        self._coming = None
        try:
            self._executor.shutdown(wait=True, cancel_futures=True)
        finally:
            self._reader.close()
