"""Steps in turns as tapes (graph_tape.py), of one kind alone and of both, against launched ones; started as a script
under TRITON_INTERPRET=1, it prints what is the same.

Four steps of either kind alternate. The first two are launched, and what a snapshot has then is where the others go on
from: of either kind one room is captured, another one, and the first is repeated. So each tape of one kind has had
others of both kinds between its own repetitions, whose memory is the same pool.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from graph_tape import CPU, OCCUR, ROWS, SPEC, T, Taped, layer_as_defined, prepare, random_tensors, said
from rows_fixture import random_rows
from turns_cases import NAMED, Case, captures_of, differing, gradients_left, graphs_of

from elo_engine.data import RowBatch
from elo_engine.errors import FailedError
from elo_engine.model import decoder
from elo_engine.model.bridge import Collector
from elo_engine.model.layers import Packing
from elo_engine.train import graphed

HALF = 2
RATES = [float(np.float32(rate)) for rate in (1e-2, 9e-3, 7e-3, 2e-2, 3e-3, 5e-3, 8e-3, 6e-3)]
DOCUMENTS = (1, 1, 1, 1, 3, 3, 1, 1)  # of each row
SPOILT = 5  # a whole-model step, after which the bridge is what it was


def step_rows(step: int) -> RowBatch:
    """Some tokens without a loss, other ones each step; the largest id always occurs."""
    rows = random_rows(120 + step, ROWS, T, DOCUMENTS[step], vocabulary=OCCUR, unlabelled=0.3)
    rows.ids_BT[0, 0] = OCCUR - 1
    return replace(rows, ids_BT=7 * rows.ids_BT, labels_BT=np.where(rows.labels_BT < 0, -100, 7 * rows.labels_BT))


def case_of(state: str, bridge: bool) -> Case:
    """The first layer of two is detached, and the bridge leads to the final norm."""
    return Case(
        replace(SPEC, layers=2), random_tensors, CPU, (0,), T, ROWS, step_rows, RATES, SPOILT, Taped,
        {"state": state, "weight_decay": 0.125, "clip": 0.5}, {"weight_decay": 0.25}, bridge, say=said.append,
    )  # fmt: skip


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


def compare(asked: dict[str, Any]) -> dict[str, Any]:
    """Launched, the kinds that are asked for taped, and with planted errors."""
    case = case_of(asked["state"], asked.get("bridge", True))
    plain = case.engine()
    right = list(case.steps(plain, 0, HALF))
    saved = case.snapshot(plain)
    right += case.steps(plain, HALF)

    def resumed(name: str) -> Any:
        engine = case.engine(NAMED[name])
        engine.optimizer.load(*saved)
        for one in (engine.shallow, engine.whole):
            vars(one)["_eager_left"] = 0
        # which the first launched step makes, outside of the pool
        engine.model._rope.gather(Packing([0], torch.zeros(T, dtype=torch.int64)), T)
        return engine

    told: dict[str, Any] = {"as planned": [[kind, made] for kind, _, _, made in right] == case.made, "kinds": {}}
    for name in asked["kinds"]:
        engine = resumed(name)
        same = list(case.steps(engine, HALF)) == right[HALF:]
        graphs, pool = graphs_of(engine), len(captures_of(engine)._pool)
        engine.let_go()  # spoils what was in the pool
        told["kinds"][name] = {
            "same": same, "differing": differing(plain, engine), "graphs": graphs, "pool": pool,
            "eagerly": captures_of(engine).eagerly,
            "let go": not (gradients_left(engine) or captures_of(engine)._pool or any(graphs_of(engine))),
        }  # fmt: skip
    for plant in PLANTS if asked.get("plants") else ():
        engine = resumed("both")
        plant(engine)
        try:
            same = all(one == other for one, other in zip(case.steps(engine, HALF), right[HALF:], strict=True))
            told[plant.__name__] = same and not differing(plain, engine)
        except FailedError:  # what was counted is no number
            told[plant.__name__] = False
    return told


def as_on_a_card(asked: dict[str, Any]) -> dict[str, Any]:
    """The tests of CUDA's graphs with tapes in their place, on few tokens: that they are sound."""
    from tests import test_graphed_cuda_turns as there

    pools: list[Taped] = []

    def captures() -> Taped:
        pools.append(Taped())
        return pools[-1]

    def reserved() -> int:
        return sum(tensor.nbytes for pool in pools for tape in pool._pool for tensor in tape._own)

    own = {
        "DEVICE": CPU, "SPEC": replace(SPEC, layers=3), "T": T, "MICRO_BATCH": ROWS, "EAGER_STEPS": 1,
        "RATES": RATES[:4], "SPOILT": 3, "step_rows": step_rows, "captures": captures, "reserved": reserved,
        "allocations": lambda: 0, "no_waits": nullcontext, "synchronize": lambda: None,
    }  # fmt: skip
    vars(there).update(own)
    graphed.EAGER_STEPS = 1
    found: dict[str, Any] = {}
    for name, arguments in asked["tests"].items():
        try:
            with redirect_stdout(sys.stderr):
                getattr(there, name)(*arguments)
            found[name] = "passed"
        except AssertionError as error:
            found[name] = str(error)[:300] or "failed"
    return found


if __name__ == "__main__":
    prepare()
    decoder.run_layer = layer_as_defined  # type: ignore[assignment]
    asked = json.loads(sys.argv[1])
    print(json.dumps({n: (as_on_a_card if "tests" in c else compare)(c) for n, c in asked.items()} | {"said": said}))
