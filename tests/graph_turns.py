"""Steps in turns as tapes (graph_tape.py), shallow ones alone and those of both kinds, against launched ones; started
as a script under TRITON_INTERPRET=1, it prints what is the same.

Four steps of either kind alternate. The first two are launched, and what a snapshot has then is where the others go on
from: of either kind one room is captured, another one, and the first is repeated. So each tape of one kind has had
others of both kinds between its own repetitions, whose memory is the same pool.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from graph_tape import CPU, OCCUR, ROWS, SPEC, T, Taped, differing, layer_as_defined, prepare, random_tensors, said
from rows_fixture import random_rows
from torch import Tensor

from elo_engine.config import make_config
from elo_engine.data import RowBatch
from elo_engine.errors import FailedError
from elo_engine.model import decoder
from elo_engine.model.bridge import Collector, GapStatistics, gaps
from elo_engine.model.decoder import Decoder
from elo_engine.model.layers import Packing
from elo_engine.train.graphed import Graphing
from elo_engine.train.interleaved import InterleavedEngine

STEPS, HALF = 8, 2
RATES = [float(np.float32(rate)) for rate in (1e-2, 9e-3, 7e-3, 2e-2, 3e-3, 5e-3, 8e-3, 6e-3)]
DOCUMENTS = (1, 1, 1, 1, 3, 3, 1, 1)  # of each row
SPOILT = 5  # a whole-model step, after which the bridge is what it was


def step_rows(step: int) -> RowBatch:
    """Some tokens without a loss, other ones each step; the largest id always occurs."""
    rows = random_rows(120 + step, ROWS, T, DOCUMENTS[step], vocabulary=OCCUR, unlabelled=0.3)
    rows.ids_BT[0, 0] = OCCUR - 1
    labels = np.where(rows.labels_BT < 0, -100, 7 * rows.labels_BT)
    if step == SPOILT:
        labels[0, 0] = SPEC.V + 5
    return replace(rows, ids_BT=7 * rows.ids_BT, labels_BT=labels)


def make(kinds: tuple[bool, bool], state: str, bridge: bool = True) -> InterleavedEngine:
    """Shallow steps of the first layer of two, and of the whole model, which move the bridge to the final norm.

    kinds: whether shallow and whole-model steps are taped.
    """
    optimizer = {"state": state, "weight_decay": 0.125, "clip": 0.5}
    stage = {"tokens": 4 * ROWS * T, "tokens_per_step": ROWS * T, "micro_batch": ROWS, "recompute": "none"}
    config = make_config(
        {
            "model": "x", "output": "y", "seed": 11, "data": {"shards": {"ja": "z"}, "sequence_length": T},
            "detach": {"layers": [0], "bridge": "linear", "bridge_tokens": 12 * ROWS * T},
            "pretrain": stage | {"optimizer": optimizer},
            "align": stage | {"optimizer": optimizer | {"weight_decay": 0.25}, "when": "interleaved"},
        }
    )
    spec = replace(SPEC, layers=2)
    model = Decoder(spec, random_tensors(spec), (0, 1), train_outer=True)
    known, bridges = {}, {}
    for gap in gaps(spec.layers, (0,)) if bridge else ():
        known[gap] = GapStatistics(spec.D, CPU)
        before_ND, after_ND = torch.randn(2, 4 * spec.D, spec.D, generator=torch.Generator().manual_seed(5))
        known[gap].add(before_ND, after_ND)
        bridges[gap] = known[gap].fit(config.detach.ridge).bridge
    first = Graphing(Taped(), said.append)
    how = first if kinds[0] else None, first.beside(said.append, False, "align.graph") if kinds[1] else None
    engine = InterleavedEngine(model, (0,), config, bridges=bridges, statistics=known, how=how)
    for one in (engine.shallow, engine.whole):
        vars(one)["_eager_left"] = 0
    # which the first launched step makes, outside of the pool
    model._rope.gather(Packing([0], torch.zeros(T, dtype=torch.int64)), T)
    return engine


def steps(engine: InterleavedEngine, first: int, last: int) -> Iterator[list[Any]]:
    """Kind, loss, norm and whether the step was made, of each."""
    for step in range(first, last):
        turn, rows = engine.turns.turn(step), step_rows(step)
        outcome = turn.engine.step(rows, rows.tokens_loss, RATES[step], first=step == 0, should_stop=lambda: False)
        assert outcome is not None
        made = outcome.updated
        yield [turn.kind, outcome.loss_sum if made else "", outcome.norm if made else "", made]


def everything(engine: InterleavedEngine) -> dict[str, Tensor]:
    """Leaves, what a snapshot has, and the bridge."""
    leaves = {f"leaf {i}": leaf.tensor.detach() for i, leaf in enumerate(engine.model.leaves)}
    bridge = {f"bridge {i}": tensor for i, tensor in enumerate(engine.shallow.model.bridge_tensors)}
    return leaves | bridge | engine.optimizer.weights() | engine.optimizer.moments()


def another_bridge(engine: Any) -> None:
    """The bridge is another tensor whenever it is fitted."""
    engine.shallow.model.replace_bridges = engine.shallow.model._set_bridges


def gradients_kept(engine: Any) -> None:
    """A whole-model step adds its gradients to what there is: a tensor that a shallow step has left in the pool."""
    engine.whole.optimizer.zero_grad = lambda: None


def sums_in_the_pool(engine: Any) -> None:
    """The states of the middle are counted in sums that a capture asks for; the host has those of the last one."""
    make = engine.whole._make

    def made(*args: Any, **rest: Any) -> None:
        engine.whole._seen = Collector(engine.whole._bridge.fresh())
        make(*args, **rest)

    engine.whole._make = made


def decay_of_the_other_kind(engine: Any) -> None:
    """A whole-model step is given the decay of a shallow one."""
    engine.optimizer._configs = (engine.optimizer._configs[0],) * 2


PLANTS = another_bridge, gradients_kept, sums_in_the_pool, decay_of_the_other_kind


def compare(case: dict[str, Any]) -> dict[str, Any]:
    """Launched, the kinds of the case taped, and with planted errors."""
    given = case["state"], case.get("bridge", True)
    plain = make((False, False), *given)
    right = list(steps(plain, 0, HALF))
    saved = [{name: tensor.clone() for name, tensor in part.items()}
             for part in (plain.optimizer.weights(), plain.optimizer.moments())]  # fmt: skip
    right += steps(plain, HALF, STEPS)

    def resumed(kinds: tuple[bool, bool]) -> InterleavedEngine:
        engine = make(kinds, *given)
        engine.optimizer.load(*saved)
        return engine

    told: dict[str, Any] = {"steps": right, "kinds": {}}
    for name in case["kinds"]:
        engine: Any = resumed((name != "whole", name != "shallow"))
        same = list(steps(engine, HALF, STEPS)) == right[HALF:]
        captures = (engine.shallow if name != "whole" else engine.whole)._captures
        graphs = [len(getattr(one, "_graphs", ())) for one in (engine.shallow, engine.whole)]
        pool = len(captures._pool)
        engine.let_go()  # spoils what was in the pool
        left = [one for _, one in engine.optimizer.of("align").gradients() if one is not None]
        told["kinds"][name] = {
            "same": same, "differing": differing(everything(plain), everything(engine)), "graphs": graphs, "pool": pool,
            "eagerly": captures.eagerly, "let go": not left and not captures._pool,
        }  # fmt: skip
    for plant in PLANTS if case.get("plants") else ():
        engine = resumed((True, True))
        plant(engine)
        try:
            same = all(one == other for one, other in zip(steps(engine, HALF, STEPS), right[HALF:], strict=True))
            told[plant.__name__] = same and not differing(everything(plain), everything(engine))
        except FailedError:  # what was counted is no number
            told[plant.__name__] = False
    return told


if __name__ == "__main__":
    prepare()
    decoder.run_layer = layer_as_defined  # type: ignore[assignment]
    print(json.dumps({name: compare(case) for name, case in json.loads(sys.argv[1]).items()} | {"said": said}))
