"""Whole steps, evaluations and readings on `fake_cuda`; started as a script with the library made of `fake_cuda.cpp`,
it prints one JSON line a case: `error`, `waits` of the step or pass that counts, and how many kernels were `launched`.
"""

from __future__ import annotations

import ctypes
import sys

if __name__ == "__main__" and len(sys.argv) > 1:
    ctypes.CDLL(sys.argv[1])  # before torch

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from fake_cuda import HERE, AtOnce, fake_cuda, install
from fake_streams import World
from interleaved_cases import LAYERS, configured, fitted
from safetensors.torch import save_file
from stream_cases import ROWS, SPEC, T, never, random_tensors, step_rows
from torch import Tensor

from elo_engine.checkpoint import open_checkpoint
from elo_engine.config import OptimizerConfig, StageConfig
from elo_engine.measure.setting import Streaming
from elo_engine.model import names
from elo_engine.model.bridge import Bridge
from elo_engine.model.decoder import Decoder
from elo_engine.model.full import load_full
from elo_engine.model.ops.adamw import AdamwState
from elo_engine.model.ops.adamw_given import addresses_noted
from elo_engine.model.shallow import load_shallow
from elo_engine.model.spec import ModelSpec, read_spec
from elo_engine.stream import device as stream_device
from elo_engine.stream.engine import StreamedEngine, open_streamed
from elo_engine.stream.interleaved import StreamedInterleaving, WholeTurn
from elo_engine.stream.lanes import Fence, Lanes
from elo_engine.stream.reading import CheckpointWeights
from elo_engine.stream.scoring import LayerMajorScorer
from elo_engine.train.graphed import CudaCaptures, Graphing
from elo_engine.train.interleaved import InterleavedEngine
from elo_engine.train.loop import to_batch
from elo_engine.train.optim import MasterAdamW
from elo_engine.train.resident import ResidentEngine

LLAMA: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "hidden_act": "silu",
    "rms_norm_eps": 1e-5, "rope_theta": 1e4, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip
UNTIED = LLAMA | {"tie_word_embeddings": False}
QWEN3 = LLAMA | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 16}
OLMO2 = LLAMA | {"model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"]}
GEMMA2 = LLAMA | {
    "model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "head_dim": 16, "sliding_window": 8,
    "hidden_activation": "gelu_pytorch_tanh", "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    "query_pre_attn_scalar": 16,
}  # fmt: skip
BF16 = torch.bfloat16
SMALL = replace(SPEC, layers=3)


def step(engine: Any, number: int, spec: ModelSpec) -> None:
    rows = step_rows(number, spec)
    assert engine.step(rows, rows.tokens_loss, 1e-3, first=number == 0, should_stop=never) is not None


def resident(
    config: dict[str, Any], *, whole: bool = False, recompute: Any = "none", bridge: bool = False, host: bool = False,
    fp8: Any = "none", dtype: torch.dtype = BF16, **optimizer: Any,
) -> ResidentEngine:  # fmt: skip
    spec = read_spec(config)
    tensors = {name: torch.empty(s, dtype=dtype, device=HERE) for name, s in names.expected_shapes(spec).items()}
    if host:
        tensors[names.EMBEDDING] = torch.zeros(spec.V, spec.D, dtype=dtype)
    layers = tuple(range(spec.layers)) if whole else (0, spec.layers - 1)
    D, gap = spec.D, (0, spec.layers - 1)
    bridges = {gap: Bridge(torch.zeros(D, D), torch.zeros(D))} if bridge else {}
    model = Decoder(spec, tensors, layers, train_outer=whole, recompute=recompute, bridges=bridges)
    model.use_fp8(fp8)
    return ResidentEngine(model, MasterAdamW(model, OptimizerConfig(**optimizer)), 3)


def trained(config: dict[str, Any], **how: Any) -> Callable[[World], None]:
    """Two steps, of which the second counts, a snapshot's tensors, an evaluation."""

    def run(world: World) -> None:
        engine = resident(config, **how)
        step(engine, 0, engine.model.spec)
        world.waits.clear()
        step(engine, 1, engine.model.spec)
        waits = list(world.waits)
        assert engine.optimizer.weights() and engine.optimizer.moments() and engine.held()
        engine.model.token_losses(to_batch(step_rows(2), HERE, engine.model.host_embedding_VD))
        world.waits = waits

    return run


def streamed(state: Any = "8bit", *, tied: bool = True, **streaming: Any) -> StreamedEngine:
    spec, optimizer = replace(SMALL, tied=tied), OptimizerConfig(state=state)
    section = StageConfig(tokens=10**6, tokens_per_step=ROWS * T, micro_batch=3, optimizer=optimizer)
    engine = open_streamed(spec, BF16, section, HERE, Streaming(**streaming), T, seed=7)
    engine.store.fill(random_tensors(spec, BF16))
    return engine


def aligned(*of: Any, **how: Any) -> Callable[[World], None]:
    """Two steps, of which the second counts, one that is given up, a snapshot's tensors, an evaluation."""

    def run(world: World) -> None:
        engine = streamed(*of, **how)
        for number in range(2):
            world.waits.clear()
            step(engine, number, engine.spec)
        waits, rows, asked = list(world.waits), step_rows(3, engine.spec), iter([False, False, False, True])
        if not engine.at_once:
            assert engine.step(rows, 1, 1e-3, first=False, should_stop=lambda: next(asked)) is None
        assert engine.optimizer.weights() and engine.optimizer.moments() and engine.held()
        engine.scorer.losses_of([to_batch(step_rows(m), HERE) for m in range(2)], lambda share: None)
        world.waits = waits

    return run


def interleaved(**streaming: Any) -> Callable[[World], None]:
    """Both kinds of steps, and a bridge that moves; the last counts."""

    def run(world: World) -> None:
        config = configured(pretrain=2, align=1)
        bridges, statistics = fitted(config, SPEC, torch.float32)
        for known in statistics.values():
            known._sums = {name: total.to(HERE) for name, total in known._sums.items()}
        whole = open_streamed(
            SPEC, BF16, config.align, HERE, Streaming(**streaming), T, seed=7, apart=LAYERS, kind=WholeTurn
        )
        whole.store.fill(random_tensors(SPEC, BF16))
        made = StreamedInterleaving(whole, LAYERS, config, bridges=bridges, statistics=statistics)
        kinds = set()
        for number in range(3):
            turn, rows = made.turns.turn(number), step_rows(number)
            world.waits.clear()
            assert turn.engine.step(rows, rows.tokens_loss, turn.lr, first=turn.number == 0, should_stop=never)
            kinds.add(turn.kind)
        assert kinds == {"pretrain", "align"}
        waits = list(world.waits)
        assert made.optimizer.weights() and made.optimizer.moments()
        world.waits = waits

    return run


class Repeated(CudaCaptures):
    """In place of graphs: a step that is captured is made where eager ones are, and repeated where graphs are launched,
    on the current stream.
    """

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream(HERE)

    def capture(self, body: Callable[[], None], states: Sequence[AdamwState]) -> Callable[[], None]:
        with addresses_noted(states) as deliver:
            self.eager(body)
        held = deliver()
        return lambda: body() if held else None

    def let_go(self) -> None:
        """Nothing is held."""


def in_turns(
    kinds: tuple[bool, bool], bridge: bool, captures: type[Repeated] = Repeated, **optimizer: Any
) -> Callable[[World], None]:
    """Steps of these kinds as graphs: of each one that is launched, and one that is captured and repeated, which
    counts.
    """

    def run(world: World) -> None:
        config = configured(2, 2, **optimizer)
        bridges, statistics = fitted(config, SPEC, torch.float32) if bridge else ({}, {})
        for known in statistics.values():
            known._sums = {name: total.to(HERE) for name, total in known._sums.items()}
        tensors = {name: t.to(HERE) for name, t in random_tensors(SPEC, BF16).items()}
        model = Decoder(SPEC, tensors, tuple(range(SPEC.layers)), train_outer=True)
        first = Graphing(captures(), lambda text: None)
        how = first if kinds[0] else None, first.beside(first.say, True, "align.graph") if kinds[1] else None
        made = InterleavedEngine(model, LAYERS, config, bridges=bridges, statistics=statistics, how=how)
        for engine in (made.shallow, made.whole):
            vars(engine)["_eager_left"] = 1
        for number in range(4):
            turn, rows = made.turns.turn(number), step_rows(number)
            if number == 2:
                world.waits.clear()
            assert turn.engine.step(rows, rows.tokens_loss, turn.lr, first=turn.number == 0, should_stop=never)
        waits = list(world.waits)
        assert [bool(getattr(one, "_graphs", None)) for one in (made.shallow, made.whole)] == list(kinds)
        assert made.optimizer.weights() and made.optimizer.moments()
        made.let_go()
        made.scorer.token_losses(to_batch(step_rows(7), HERE))
        world.waits = waits

    return run


class NotWaitedFor(Repeated):
    """What is launched on the graphs' stream begins before what was launched outside of it is done."""

    def eager(self, body: Callable[[], Any]) -> Any:
        with torch.cuda.stream(self._stream):
            return body()


def read(world: World) -> None:
    """A checkpoint of bf16 that is read as it is and in fp32, whole, in part and layer by layer."""
    spec, dtypes = read_spec(LLAMA), (BF16, torch.float32)
    with tempfile.TemporaryDirectory() as name:
        save_file(random_tensors(spec, BF16), Path(name, "model.safetensors"), {"format": "pt"})
        Path(name, "config.json").write_text(json.dumps(LLAMA))
        index = open_checkpoint(Path(name))
        batches = [to_batch(step_rows(m), HERE) for m in range(2)]
        for dtype in dtypes:
            model = load_full(index, spec, device=HERE, dtype=dtype)[0]
            assert all(leaf.tensor.is_cuda and leaf.tensor.dtype == dtype for leaf in model.leaves)
            shallow = load_shallow(index, spec, (0, 2), device=HERE, dtype=dtype, host_embedding=True)[0]
            assert shallow.host_embedding_VD is not None
            live = dict(zip(shallow.layer_indices, shallow.layers, strict=True))
            for layers in ({}, live):
                weights = CheckpointWeights(index, spec, HERE, dtype, layers=layers, executor=AtOnce)
                found = LayerMajorScorer(weights).losses_of(batches, lambda share: None)
                assert all(losses.is_cuda for losses in found)


# -- planted errors


def planted(place: type, name: str, wrong: Any, case: Callable[[World], None]) -> Callable[[World], None]:
    """A case with something wrong in it."""

    def run(world: World) -> None:
        right = vars(place)[name]
        setattr(place, name, wrong)
        try:
            case(world)
        finally:
            setattr(place, name, right)

    return run


def observed(plant: Callable[[Tensor], Any]) -> Callable[[World], None]:
    """A step in which this is done to the hidden states."""

    def run(world: World) -> None:
        engine = resident(LLAMA)
        step(engine, 0, engine.model.spec)
        world.waits.clear()
        engine.model.observers = {2: plant}
        step(engine, 1, engine.model.spec)

    return run


def kernel_of_the_host(hidden_ND: Tensor) -> None:
    from elo_engine.kernels import rms_norm

    check, rms_norm.check_device = rms_norm.check_device, lambda **tensors: None
    try:
        rms_norm.rms_norm_forward(hidden_ND, torch.ones(64), 1e-5)
    finally:
        rms_norm.check_device = check


def overwritten(self: Any, number: int, grads: list[Tensor]) -> Any:
    """`send` as it was: what is on its way is let go of without a wait."""
    self._leaving = None
    return SEND(self, number, grads)


SEND = stream_device.DeviceUnits.send
RACING = aligned(vocabulary="sliced")

CASES: dict[str, Callable[[World], None]] = {
    "pretraining": trained(LLAMA),
    "pretraining in fp32": trained(LLAMA, dtype=torch.float32),
    "bridge, layer made again": trained(LLAMA, bridge=True, recompute="layer"),
    "8-bit state, 24 bits": trained(LLAMA, state="8bit", master="24", recompute="selective"),
    "norms of heads, host's embedding": trained(QWEN3 | {"tie_word_embeddings": False}, host=True),
    "norms behind": trained(OLMO2),
    "soft-caps and windows": trained(GEMMA2),
    "8-bit products": trained(LLAMA, fp8="all"),
    "whole model": trained(LLAMA, whole=True, recompute="layer"),
    "whole model, untied": trained(UNTIED, whole=True),
    "streamed": aligned(),
    "streamed, untied, fp32 state, inputs on the host": aligned("fp32", tied=False, inputs="host"),
    "streamed in slices": RACING,
    "streamed in slices, untied, inputs on the host": aligned(tied=False, inputs="host", vocabulary="sliced"),
    "streamed, updated at once": aligned(tied=False, update="at_once", inputs="host"),
    "interleaved": interleaved(),
    "in turns, graphs of both kinds": in_turns((True, True), False, state="8bit"),
    "in turns, graphs of whole-model steps and a bridge": in_turns((False, True), True),
    "read": read,
    "planted: a tensor of the host": observed(lambda hidden: hidden + torch.ones(64)),
    "planted: a kernel's tensor of the host": observed(kernel_of_the_host),
    "planted: a wait": observed(lambda hidden: float(hidden.sum())),
    "planted: a pageable copy": observed(lambda hidden: torch.ones(64).to(hidden.device, non_blocking=True)),
    "planted: readers do not wait": planted(Fence, "before_reading", lambda self: [], aligned()),
    "planted: writers do not wait for readers": planted(Fence, "before_writing", Fence.before_reading, aligned()),
    "planted: the graphs' stream does not wait": in_turns((True, False), False, NotWaitedFor),
    "planted: memory is not kept": planted(Lanes, "keep_until_read", lambda self, *pieces: None, aligned()),
    "planted: a gradient is let go of": planted(stream_device.DeviceUnits, "send", overwritten, RACING),
}


def main() -> None:
    install()
    for name, case in CASES.items():
        error = ""
        with fake_cuda() as world:
            try:
                case(world)
            except Exception as failed:
                error = f"{type(failed).__name__}: {failed}"[:500]
        print(json.dumps({"case": name, "error": error, "waits": world.waits, "launched": len(world.launched)}))


if __name__ == "__main__":
    main()
