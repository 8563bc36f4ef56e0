"""A step as one CUDA graph: what the host launched kernel by kernel is captured once and launched whole, so a GPU waits
for no launch within a step. Of ELO pretraining, and of the whole model where it is on the device.

Captured is the whole optimizer step: all micro-batches forward and backward, the clip and AdamW. It reads nothing but
`StepBuffers`, which each step fills before it; weights, moments and the powers of the betas are updated where they lie.
The first steps of a process run as they are, on the stream that captures: they are steps of the training like any
other, compile what is to be compiled, and have the same bits as a graph's.

Gradients need no places that are prepared: autograd's own lie in the graphs' memory, at the addresses that the capture
found. The table of them that AdamW's kernels read is sent after it (`addresses_noted`).

**One memory.** The graphs of an engine, for other rooms, and of two engines whose steps take turns
(`train/interleaved.py`) compute in one pool, so that together they hold what the largest of them does. A capture is
given whatever of the pool no tensor of Python's holds, so addresses of one graph are those of another, and a replay
writes over all that an earlier one of another graph has left. It is right as long as

* replays are ordered: all are launched on one stream, and what is launched beside them waits for it and is waited for;
* no graph reads what it has not written itself since its replay began, but for what lies outside: weights, moments and
  powers, the buffers and the bounds, rotary tables, the bridge, AdamW's plans, partial sums and tables, and what
  libraries keep for a stream. All of those are made before a capture begins, by the launched steps or by
  `addresses_noted`, and a graph keeps those of them that nobody else does (`_Captured`);
* what is read behind a replay lies outside too: the step's numbers, and the sums that a bridge is fitted to.

Gradients are the ones that look as if they lasted. A leaf that both kinds of steps train has one `.grad`, or one place
aside, and after a capture that is a tensor in the pool, whose numbers are another graph's temporaries by the next
replay. So nobody reads it: every step, captured or launched, drops the gradients before its first backward pass
(`_make`, `ResidentEngine.step`), and autograd never adds to one of the step before. They are dropped before a capture
as well, so that it can have their memory. What is launched between two graphs computes outside of the pool.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor

from elo_engine.data import RowBatch
from elo_engine.errors import FailedError
from elo_engine.model.decoder import Decoder
from elo_engine.model.ops.adamw import AdamwState, StepResult
from elo_engine.model.ops.adamw_given import addresses_noted
from elo_engine.train.guards import scale_of
from elo_engine.train.loop import StepOutcome
from elo_engine.train.resident import Optimizer, ResidentEngine, check_first_gradients
from elo_engine.train.step_buffers import Room, StepBuffers

T = TypeVar("T")

# Steps of a process that are launched kernel by kernel before one is captured, so that kernels are compiled, libraries
# have what they make at first use, and the optimizer has its plan: nothing of that can be captured.
EAGER_STEPS = 3
# Steps of a kind that are launched besides, waiting for those of another kind, each of which would let go of a graph
# made before it: that many launched steps cost a small model less than one capture, and of whole-model steps among up
# to 21 times as many shallow ones all are through by then. Rarer ones are not waited for.
AWAITED_STEPS = 64


class Captures(Protocol):
    """How work is captured and repeated."""

    def eager(self, body: Callable[[], T]) -> T:
        """Run it now, in the order of the current stream, where `capture` would."""

    def capture(self, body: Callable[[], None], states: Sequence[AdamwState]) -> Callable[[], None]:
        """Note what it launches, without doing it -> does it, in the order of the current stream.

        Args:
            body: makes a step with these states, of `addresses_noted`, after `eager` has made some.

        Raises:
            RuntimeError: it cannot be captured, or there is no memory for it; nothing was changed.
        """

    def let_go(self) -> None:
        """Give back the memory of what was captured, which nobody holds any more."""


@dataclass(frozen=True)
class _Captured:
    """A graph, and what its launches read besides the buffers."""

    graph: torch.cuda.CUDAGraph
    table: object

    def replay(self) -> None:
        """Launch it."""
        self.graph.replay()


class CudaCaptures:
    """CUDA graphs that share their memory, as the module's text argues that they can."""

    def __init__(self, device: torch.device) -> None:
        # Its own, because the legacy default stream cannot be captured, and the same for both, because autograd adds a
        # leaf's gradient up on the stream where it first met the leaf.
        self._stream, self._pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        self._failed: list[torch.cuda.CUDAGraph] = []

    def eager(self, body: Callable[[], T]) -> T:
        """See `Captures`."""
        outside = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(outside)
        with torch.cuda.stream(self._stream):
            made = body()
        outside.wait_stream(self._stream)
        return made

    def capture(self, body: Callable[[], None], states: Sequence[AdamwState]) -> Callable[[], None]:
        """See `Captures`; waits for the device, and gives the memory of the eager steps back to it first."""
        graph, outside = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._stream.device)
        gc.collect()
        collects = gc.isenabled()
        gc.disable()  # a graph or an event that is collected meanwhile would be destroyed in the middle of a capture
        try:
            with addresses_noted(states) as deliver, torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                body()
        except BaseException:
            self._tidy(graph)
            raise
        finally:
            torch.cuda.set_stream(outside)  # torch leaves its own in place where a capture fails
            if collects:
                gc.enable()
        return _Captured(graph, deliver()).replay

    def let_go(self) -> None:
        """See `Captures`; waits for the device."""
        # A replay may be under way, on another stream than the captures', and with expandable segments torch waits for
        # that one alone before it unmaps memory.
        torch.cuda.synchronize(self._stream.device)
        self._pool = torch.cuda.graph_pool_handle()  # one that nothing uses any more cannot be taken up again
        torch.cuda.empty_cache()

    def _tidy(self, graph: torch.cuda.CUDAGraph) -> None:
        """After a capture that failed: before 2.12 torch's allocator goes on believing in it (pytorch#180395), and then
        fails an assertion of its own when it gives memory back.
        """
        device = self._stream.device_index
        try:
            torch._C._cuda_endAllocateToPool(device, self._pool)
        except RuntimeError as error:
            if "not currently recording" not in str(error):
                raise
            if _ended(graph):  # as where memory ran out, which ends a capture as if it were whole
                graph.reset()  # gives the pool's memory up, which nothing else could use
                return
        self._failed.append(graph)  # the allocator for pinned memory still asks it whether a stream is captured
        torch._C._cuda_releasePool(device, self._pool)


def _ended(graph: torch.cuda.CUDAGraph) -> bool:
    """Whether torch holds this graph's capture to have ended."""
    try:
        graph.pool()
    except RuntimeError:
        return False
    return True


def first_cause(error: BaseException) -> BaseException:
    """What went wrong first: ending a capture that was invalidated raises an error of its own."""
    while error.__context__ is not None:
        error = error.__context__
    return error


@dataclass(frozen=True)
class Graphing:
    """How steps become graphs.

    Attributes:
        captures: what captures them. say: told once what is captured, and once why nothing is.
        must: a capture that fails is an error, which names `key` of the configuration; else the steps go on as they
            were.
        engines: all whose graphs share the captures' memory; whoever has one of another kind of steps beside these
            passes them on (`beside`).
    """

    captures: Captures
    say: Callable[[str], None]
    must: bool = False
    key: str = "pretrain.graph"
    engines: WeakSet[GraphedEngine] = field(default_factory=WeakSet, repr=False, compare=False)

    def beside(self, say: Callable[[str], None], must: bool, key: str) -> Graphing:
        """Of another kind of steps, which take turns with these."""
        return Graphing(self.captures, say, must, key, self.engines)


class GivenOptimizer(Optimizer, Protocol):
    """What a captured step asks of `MasterAdamW`, which see, besides."""

    @property
    def states(self) -> Sequence[AdamwState]: ...

    def next_given(self, lr: float) -> Tensor: ...

    def step_given(self, given: Tensor) -> StepResult: ...


class GraphedEngine(ResidentEngine):
    """`ResidentEngine` with the steps as graphs.

    A graph has room for a number of documents a micro-batch and of tokens a document, `StepBuffers.room`: one graph for
    each pair of powers of two that the text asks for, all of them in the memory of one.

    Args:
        model: without observers.
    """

    optimizer: GivenOptimizer

    def __init__(self, model: Decoder, optimizer: GivenOptimizer, micro_batch: int, how: Graphing) -> None:
        super().__init__(model, optimizer, micro_batch)
        assert not model.observers and model.host_embedding_VD is None
        self._captures, self._say, self._must, self._key = how.captures, how.say, how.must, how.key
        self._sharing = how.engines
        self._sharing.add(self)
        self._eager_left, self._told = EAGER_STEPS, False
        self._graphs: dict[Room, Callable[[], None]] | None = {}  # None: capturing has failed
        self._buffers: StepBuffers | None = None
        self._numbers_3 = torch.zeros(3, dtype=torch.float32, device=model.device)

    def step(
        self, rows: RowBatch, tokens_loss: int, lr: float, *, first: bool, should_stop: Callable[[], bool]
    ) -> StepOutcome | None:
        """See `Engine`; `should_stop` is asked once, since a graph ends when it is through."""
        if should_stop():
            return None
        if self._buffers is None:
            count, length = rows.ids_BT.shape
            learnt = self.model.spec.V if self.model.embedding_VD.requires_grad else None
            self._buffers = StepBuffers(count, length, self._micro_batch, self.device, learnt)
        self.model.round_fp8(self.optimizer.attempts)
        room = self._buffers.room(rows)
        self._buffers.fill(rows, room, self.optimizer.next_given(lr), tokens_loss)
        replay = None if first or self._eager_left > 0 or self._awaits_others() else self._graph(room)
        if replay is not None:
            replay()
        else:
            if any(engine._graphs for engine in self._sharing if engine is not self):
                self.let_go()  # a launched step has memory of its own, and no more is there than for one of both kinds
            self._captures.eager(lambda: self._make(room, first=first))
            self._eager_left -= 1
        return StepOutcome(self._numbers_3)

    def _awaits_others(self) -> bool:
        """Whether steps of another kind are still to be launched, for which a graph made now would be let go of."""
        others = (engine for engine in self._sharing if engine is not self and engine._graphs is not None)
        return self._eager_left > -AWAITED_STEPS and any(engine._eager_left > 0 for engine in others)

    def let_go(self) -> None:
        """Give the graphs' memory back, in which nothing but they can compute, before something else needs room: with
        it go the graphs of all engines that share it. The next step is captured anew, at the price of a wait for the
        device and of asking for its memory again.
        """
        if any(engine._graphs for engine in self._sharing):
            self._drop_all()

    def _drop_all(self) -> None:
        for engine in self._sharing:
            engine.optimizer.zero_grad()  # these lie in it
            if engine._graphs:
                engine._graphs.clear()
        self._captures.let_go()

    def _give_up(self, why: str) -> None:
        """No more graphs, unless they must be."""
        if self._graphs is not None and not self._must:
            self._say(f"steps are launched kernel by kernel from here on: {why}")
            self._graphs = None

    def _graph(self, room: Room) -> Callable[[], None] | None:
        """The graph with this room, captured if there is none yet; None where capturing has failed."""
        if self._graphs is None or room in self._graphs:
            return None if self._graphs is None else self._graphs[room]
        self.optimizer.zero_grad()  # the last gradients' memory can be the graph's
        try:
            replay = self._captures.capture(lambda: self._make(room), self.optimizer.states)
        except RuntimeError as error:  # whatever CUDA or a library finds wrong with it, memory too
            cause = first_cause(error)
            if self._must and isinstance(cause, torch.OutOfMemoryError):
                raise cause from None  # explained where it arrives
            if self._must:
                raise FailedError(
                    f"{self._key}: on, but the step cannot be captured: {cause}; set {self._key}: off, or auto, which "
                    "goes on without"
                ) from error
            self._give_up(f"capturing them failed ({cause})")
        if self._graphs is None:
            self.model.drop_step()
            self._drop_all()  # here, where the error holds no tensors any more
            for engine in self._sharing:  # what is launched lets the graphs of others go before each step
                engine._give_up("capturing those that they take turns with failed")
            return None
        if not self._told:
            self._told = True
            self._say(
                f"steps are CUDA graphs from here on; this one is for up to {room.documents} documents a micro-batch, "
                f"of up to {room.longest} tokens, and there is one more for each pair of powers of two that is met"
            )
        self._graphs[room] = replay
        return replay

    def _make(self, room: Room, *, first: bool = False) -> None:
        """A step of what is in the buffers: no number of the host's that changes, no shape that depends on the text."""
        model, optimizer, buffers = self.model, self.optimizer, self._buffers
        assert buffers is not None
        optimizer.zero_grad()
        if buffers.distinct_U is not None:
            model.begin_step(buffers.distinct_U, distinct=True)
        loss_sum = torch.zeros((), dtype=torch.float32, device=model.device)
        for batch in buffers.batches(room):
            loss = model.loss_sum(batch)
            # The same bits as those of (loss / tokens).backward(scale): its first factor is this one.
            loss.backward(scale_of(loss) * buffers.inverse)
            loss_sum += loss.detach()
        optimizer.take(model.outer_gradients(buffers.inverse))
        if first:
            check_first_gradients(model, optimizer)
        result = optimizer.step_given(buffers.given)
        self._numbers_3.copy_(torch.stack((loss_sum, result.norm, result.updated)))
