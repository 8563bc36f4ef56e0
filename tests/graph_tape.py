"""A CUDA graph's stand-in on the CPU: what a step does is taped once and done again, with the same numbers on the same
memory, however Python would do it now.

Taped are torch's operations as they reach the dispatcher, and launches of Triton's interpreter, which do nothing while
they are taped. Done again, an operation is called with the tensors and numbers it had and its result is written over
the first one. So a number of the host that was read, or a tensor that is another one in the next step, stays what it
was, as in a graph. All memory that was asked for while something was taped is one pool, and before anything is done
again every number in it is spoilt, as if another graph had computed there. What this cannot see: the order of streams,
and how CUDA's allocator divides the pool.

Started as a script, under TRITON_INTERPRET=1, it trains a small model with an engine and with a graphed one, and prints
what is the same. The interpreter's time is that of a token and of a launch, so there are few of either: rooms for
documents begin at two, the first step alone is launched, and in all cases but one layers are plain torch: norms,
rotation and activation, none of which reads a number of the step.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import quick_interpreter
import torch
from launching import _round_as_hardware_does as round_as_hardware_does
from planted_graphs import ScaleOfTheHost
from rows_fixture import random_rows
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from elo_engine.config import OptimizerConfig
from elo_engine.data import RowBatch
from elo_engine.model import decoder, names, ops
from elo_engine.model.decoder import Decoder, run_layer
from elo_engine.model.layers import Packing
from elo_engine.model.ops import choice
from elo_engine.model.ops.adamw import AdamwState
from elo_engine.model.ops.adamw_given import addresses_noted
from elo_engine.model.presets import preset_spec
from elo_engine.model.spec import ModelSpec
from elo_engine.train import step_buffers
from elo_engine.train.graphed import GraphedEngine, Graphing
from elo_engine.train.optim import MasterAdamW
from elo_engine.train.resident import ResidentEngine

CPU = torch.device("cpu")
SPEC = replace(preset_spec("smollm2-135m"), D=16, F=16, V=48, H=2, K=1, E=8, layers=3)
T, ROWS = 3, 2
# fp32 numbers: the interpreter does not round a launch's numbers to fp32, as a GPU does; with a decay of 1/8 its
# product with the rate is one too
RATES = [float(np.float32(rate)) for rate in (1e-2, 9e-3, 7e-3, 2e-2, 3e-3, 5e-3)]
DOCUMENTS = (1, 1, 3, 1, 3, 1)  # of each row: two rooms, each taped once and then done again
HALF = 2
SPOILT = 4  # the step with a label that no vocabulary has, whose loss is no number
OCCUR = 6  # different ids: as many as a step has tokens, and not all of them in each


class Tape(TorchDispatchMode):
    """What is done inside of the block; `again` does it again."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[Callable[[], Any]] = []
        self._own: list[Tensor] = []  # asked for inside of the block

    def spoil(self) -> None:
        """What another graph would leave there."""
        for tensor in self._own:
            tensor.detach().fill_(float("nan") if tensor.is_floating_point() else 85)

    def add(self, call: Callable[[], Any]) -> None:
        self._calls.append(call)

    def again(self) -> None:
        with torch.no_grad():
            for call in self._calls:
                call()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a number of the device is read")  # as CUDA does
        out = func(*args, **kwargs)
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        fresh = [x.untyped_storage()._cdata not in given for x in made]
        unwritten = "empty" in func.__name__
        self._own += [x for x, is_fresh in zip(made, fresh, strict=True) if is_fresh]
        if not unwritten and (any(fresh) or func._schema.is_mutable):

            def call() -> None:
                results = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, Tensor)]
                for first, result, is_fresh in zip(made, results, fresh, strict=True):
                    if is_fresh:
                        first.copy_(result)

            self.add(call)
        return out


_tapes: list[Tape] = []


class Taped:
    """`Captures` of tapes, whose memory is one pool."""

    def __init__(self) -> None:
        self.eagerly, self._pool = 0, list[Tape]()

    def eager(self, body: Callable[[], Any]) -> Any:
        self.eagerly += 1
        return body()

    def capture(self, body: Callable[[], None], states: Sequence[AdamwState]) -> Callable[[], None]:
        tape = Tape()
        with addresses_noted(states) as deliver, tape:
            _tapes.append(tape)
            try:
                body()
            finally:
                _tapes.pop()
        held = deliver()
        self._pool.append(tape)

        def replay() -> None:
            assert held
            self._spoil()
            tape.again()

        return replay

    def _spoil(self) -> None:
        with torch.no_grad():
            for tape in self._pool:
                tape.spoil()

    def let_go(self) -> None:
        self._spoil()
        self._pool.clear()


def tape_launches() -> None:
    """Launches of Triton's interpreter are taped whole, and then not made."""
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def taped(self: Any, *args: Any, **kwargs: Any) -> None:
        if _tapes:
            _tapes[-1].add(lambda: launch(self, *args, **kwargs))
        else:
            with _disable_current_modes():
                launch(self, *args, **kwargs)

    GridExecutor.__call__ = taped


def _segments(offsets: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Any:
    """Of each document its place, q, k and v in fp32 by query head, and the probabilities."""
    group, bounds = q.shape[1] // k.shape[1], offsets.tolist()
    for start, stop in pairwise(bounds):
        q_HTE, k_HTE, v_HTE = (x[start:stop].float().transpose(0, 1) for x in (q, k, v))
        k_HTE, v_HTE = k_HTE.repeat_interleave(group, 0), v_HTE.repeat_interleave(group, 0)
        future_TT = torch.ones(stop - start, stop - start, dtype=torch.bool).triu(1)
        scores_HTT = (q_HTE @ k_HTE.mT * scale).masked_fill(future_TT, -torch.inf)
        yield slice(start, stop), q_HTE, k_HTE, v_HTE, scores_HTT.softmax(-1)


@torch.library.custom_op("elo_test::varlen", mutates_args=())
def varlen(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, scale: float) -> Tensor:
    """Attention that reads the documents' bounds from a tensor, empty ones too, as flash attention does."""
    out = torch.zeros_like(q)
    for place, _, _, v_HTE, weights_HTT in _segments(offsets, q, k, v, scale):
        out[place] = (weights_HTT @ v_HTE).transpose(0, 1).to(q.dtype)
    return out


@torch.library.custom_op("elo_test::varlen_backward", mutates_args=())
def varlen_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    group, grads = q.shape[1] // k.shape[1], tuple(torch.zeros_like(x) for x in (q, k, v))
    for place, q_HTE, k_HTE, v_HTE, weights_HTT in _segments(offsets, q, k, v, scale):
        d_HTE = d_out[place].float().transpose(0, 1)
        d_weights_HTT = d_HTE @ v_HTE.mT
        d_scores_HTT = weights_HTT * (d_weights_HTT - (d_weights_HTT * weights_HTT).sum(-1, keepdim=True)) * scale
        parts = d_scores_HTT @ k_HTE, d_scores_HTT.mT @ q_HTE, weights_HTT.mT @ d_HTE
        for grad, part, heads in zip(grads, parts, (1, group, group), strict=True):
            grad[place] = part.unflatten(0, (-1, heads)).sum(1).transpose(0, 1).to(grad.dtype)
    return grads  # type: ignore[return-value]


class Varlen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v, offsets)
        ctx.scale = scale
        return varlen(q, k, v, offsets, scale)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> Any:
        return *varlen_backward(d_out.contiguous(), *ctx.saved_tensors, ctx.scale), None, None


def attention(q: Tensor, k: Tensor, v: Tensor, packing: Packing, scale: float, *rest: Any) -> Tensor:
    return Varlen.apply(q.contiguous(), k.contiguous(), v.contiguous(), packing.offsets, scale)  # type: ignore


def layer_as_defined(*given: Any, **named: Any) -> Tensor:
    """`run_layer` in plain torch, which is taped operation by operation, where its kernels are not what is asked."""
    choice._mode = "reference"
    try:
        return run_layer(*given, **named)
    finally:
        choice._mode = "fused"


def step_rows(step: int) -> RowBatch:
    """So many documents a row as `DOCUMENTS` says, some tokens without a loss, other ones each step."""
    # of these seeds the steps differ in the ids that occur and in the number of labels, those of one room too
    rows = random_rows(120 + step, ROWS, T, DOCUMENTS[step], vocabulary=OCCUR, unlabelled=0.3)
    rows.ids_BT[0, 0] = OCCUR - 1  # the largest always occurs: rows of another step's ids have a place for it
    labels = np.where(rows.labels_BT < 0, -100, 7 * rows.labels_BT)
    if step == SPOILT:
        labels[0, 0] = SPEC.V + 5
    return replace(rows, ids_BT=7 * rows.ids_BT, labels_BT=labels)


def random_tensors(spec: ModelSpec) -> dict[str, Tensor]:
    """bf16, by name."""
    generator = torch.Generator().manual_seed(3)
    return {
        name: (torch.ones(shape) if len(shape) == 1 else torch.empty(shape).normal_(0, 0.2, generator=generator))
        .bfloat16()
        for name, shape in names.expected_shapes(spec).items()
    }  # fmt: skip


def make(
    graphed: type[GraphedEngine] | None, micro_batch: int, whole: str = "", last: bool = False, **optimizer: Any
) -> ResidentEngine:
    """The shallow model of the first layer, or also the last, or a whole one of a single layer, tied or untied."""
    spec: ModelSpec = replace(SPEC, layers=1, tied=whole == "tied") if whole else SPEC
    model = Decoder(spec, random_tensors(spec), (0, spec.layers - 1) if last else (0,), train_outer=bool(whole))
    made = MasterAdamW(model, OptimizerConfig(weight_decay=0.125, clip=0.5, **optimizer), seed=11)
    if graphed is None:
        return ResidentEngine(model, made, micro_batch)
    engine = graphed(model, made, micro_batch, Graphing(Taped(), said.append))
    engine._eager_left = 1
    return engine


said: list[str] = []


def train(engine: ResidentEngine, first: int, last: int) -> list[Any]:
    """Loss, norm and whether the step was made, of each."""
    found = []
    for step in range(first, last):
        rows = step_rows(step)
        outcome = engine.step(rows, rows.tokens_loss, RATES[step], first=step == 0, should_stop=lambda: False)
        assert outcome is not None
        found.append([outcome.loss_sum if outcome.updated else "not made", outcome.norm if outcome.updated else "",
                      outcome.updated])  # fmt: skip
    return found


def everything(engine: ResidentEngine) -> dict[str, Tensor]:
    optimizer: Any = engine.optimizer
    leaves = {f"leaf {i}": leaf.tensor.detach().clone() for i, leaf in enumerate(engine.model.leaves)}
    return leaves | {name: x.clone() for name, x in (optimizer.weights() | optimizer.moments()).items()}


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    return [name for name in one.keys() | other.keys() if not torch.equal(one[name], other[name])]


class RateOfTheHost(GraphedEngine):
    """Planted: the rate of the step that was captured is in the graph."""

    def step(self, rows: RowBatch, tokens_loss: int, lr: float, **rest: Any) -> Any:
        self.optimizer.step_given = lambda given: self.optimizer._update(lr, 0)  # type: ignore[method-assign]
        return super().step(rows, tokens_loss, lr, **rest)


class TextOfTheHost(GraphedEngine):
    """Planted: every step brings its own token ids to places of their own."""

    def step(self, *args: Any, **rest: Any) -> Any:
        if self._buffers is not None:
            self._buffers._tokens_3N = self._buffers._tokens_3N.clone()
        return super().step(*args, **rest)


class RowsOfTheHost(GraphedEngine):
    """Planted: every step brings the ids that the embedding's gradient has rows for to a place of their own."""

    def step(self, *args: Any, **rest: Any) -> Any:
        if self._buffers is not None and self._buffers.distinct_U is not None:
            self._buffers.distinct_U = self._buffers.distinct_U.clone()
        return super().step(*args, **rest)


PLANTS = RateOfTheHost, TextOfTheHost, ScaleOfTheHost, RowsOfTheHost


def resumed(kind: type[GraphedEngine], saved: tuple[Any, Any], options: dict[str, Any]) -> GraphedEngine:
    """An engine that goes on from a snapshot."""
    engine: Any = make(kind, **options)
    engine.optimizer.load(*saved)
    return engine  # type: ignore[no-any-return]


def compare(case: dict[str, Any]) -> dict[str, Any]:
    """Straight, graphed, graphed from a snapshot in the middle, and with planted errors."""
    decoder.run_layer = run_layer if case.get("kernels") else layer_as_defined  # type: ignore[assignment]
    options = {key: case[key] for key in ("micro_batch", "state", "whole", "last") if key in case}
    plain, graphed = make(None, **options), make(GraphedEngine, **options)
    right, found = train(plain, 0, len(RATES)), train(graphed, 0, HALF)
    optimizer: Any = graphed.optimizer
    parts = optimizer.weights(), optimizer.moments()
    saved = tuple({name: tensor.clone() for name, tensor in part.items()} for part in parts)
    found += train(graphed, HALF, len(RATES))
    told: dict[str, Any] = {"steps": right, "outcomes": found == right}
    told["rooms"] = sorted(room.documents for room in graphed._graphs or {})  # type: ignore[attr-defined]
    told["differing"] = differing(everything(plain), everything(graphed))
    if case.get("resumed"):
        after = resumed(GraphedEngine, saved, options)  # type: ignore[arg-type]
        told["resumed"] = train(after, HALF, len(RATES)) == right[HALF:]
        told["resumed differing"] = differing(everything(plain), everything(after))
    for kind in PLANTS if case.get("plants") else ():
        wrong = resumed(kind, saved, options)  # type: ignore[arg-type]
        wrong._eager_left = 0
        made = train(wrong, HALF, len(RATES))
        told[kind.__name__] = made == right[HALF:] and not differing(everything(plain), everything(wrong))
    return told


def prepare() -> None:
    """This process, for all that is taped in it."""
    from elo_engine.kernels import adamw_plan

    # a program for each tile: of eight, as a GPU has it, all but one would find a tensor's end here
    object.__setattr__(adamw_plan.LAUNCH, "tiles_per_sum", 1)
    round_as_hardware_does()
    quick_interpreter.install()
    choice.configure("fused", CPU)
    ops.attention = attention
    tape_launches()
    step_buffers.FEWEST_DOCUMENTS = 2


if __name__ == "__main__":
    prepare()
    print(json.dumps({name: compare(case) for name, case in json.loads(sys.argv[1]).items()} | {"said": said}))
