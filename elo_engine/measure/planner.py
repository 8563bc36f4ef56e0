"""Peak memory of one optimizer step, predicted from shapes alone, by component.

The step is gone through as the code goes through it, op by op, with a ledger of what each allocates and frees:
`memory_engine` for this engine's arms, `memory_streamed` for the one with a few layers on the device, `memory_sharded`
for one process of several that share a model, `memory_transformers` for the others. `tests/test_planner.py` and
`tests/test_planner_processes.py` hold the result against every byte that torch's CPU allocator hands out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

from elo_engine.config import Recompute
from elo_engine.measure.ledger import COMPONENTS, Ledger
from elo_engine.measure.memory_shapes import step_buffer_bytes
from elo_engine.measure.setting import ENGINE, ArmName, Setting, ShallowTurns

STREAMED: ArmName = "elo_align_streamed"
_OF_GRAPHS = ("gradients", "activations", "loss workspace")
_FP64_CHUNK = 64 << 20  # model/bridge.py


@dataclass(frozen=True)
class MemoryPlan:
    """What is live at the highest moment of a step.

    Attributes:
        components: bytes of "weights", "gradients", "optimizer", "activations", "loss workspace" and "slack".
        moment: when that is, such as "backward of layer 3" or "optimizer step".
    """

    components: dict[str, int]
    moment: str

    @property
    def peak_bytes(self) -> int:
        """Sum of the components."""
        return sum(self.components.values())

    def to_json(self) -> dict[str, Any]:
        """As it is written into `plan.json` and the records."""
        return asdict(self) | {"peak_bytes": self.peak_bytes}


def run_step(setting: Setting, ledger: Ledger) -> None:
    """Enter one steady optimizer step of any arm: what lives when it ends stays on the device."""
    from elo_engine.measure import memory_engine, memory_sharded, memory_streamed, memory_transformers

    if setting.arm == STREAMED:
        memory_streamed.run_step(setting, ledger)
    elif setting.sharded:
        memory_sharded.run_step(setting, ledger)
    else:
        (memory_engine if setting.arm in ENGINE else memory_transformers).run_step(setting, ledger)


def predict_memory(setting: Setting) -> MemoryPlan:
    """Peak of one steady step (moments and masters there, no gradient yet when it begins)."""
    from elo_engine.measure.memory_slack import slack_bytes

    ledger = Ledger()
    run_step(setting, ledger)
    components = {name: ledger.at_peak[name] for name in COMPONENTS}
    components["slack"] += slack_bytes(setting, ledger)
    found = MemoryPlan(components, ledger.peak_moment)
    return found if setting.turns is None else _with_turns(setting, setting.turns, found)


def shallow_of(setting: Setting, turns: ShallowTurns) -> Setting:
    """The shallow steps of interleaved alignment, as a stage of their own."""
    return replace(setting, arm="elo_pretrain", turns=None, **vars(turns))


def between_turns(setting: Setting) -> dict[str, int]:
    """By component, what the shallow steps of interleaved alignment leave on the device during a whole-model step:
    where the model is there anyway only the bridge and its sums, beside a streamed one also the shallow model and its
    state.
    """
    found = dict.fromkeys(COMPONENTS, 0)
    if setting.turns is None:
        return found
    if setting.arm == STREAMED:
        ledger = Ledger()
        run_step(shallow_of(setting, setting.turns), ledger)
        found = {name: ledger.live(name) for name in COMPONENTS} | {"gradients": 0}  # those are let go of
    else:
        found["weights"] = setting.turns.bridges * (setting.spec.D + 1) * setting.spec.D * setting.width
    found["optimizer"] += sums_bytes(setting)
    return found


def sums_bytes(setting: Setting) -> int:
    """Statistics of the bridges of interleaved alignment, fp64."""
    return 0 if setting.turns is None else setting.turns.bridges * 16 * setting.spec.D * (setting.spec.D + 2)


def _with_turns(setting: Setting, turns: ShallowTurns, whole: MemoryPlan) -> MemoryPlan:
    """The higher of two peaks: of a whole-model step that takes the sums of its bridges, and of a shallow step beside
    what the other kind keeps: weights and optimizer state of the whole model, or the room of a streamed one.

    What graphs computed in stays theirs, beside launched steps of the other kind, whose gradients are gone when one is
    repeated. Graphs of both kinds have one memory between them, the larger one's, and each its buffers; what is left
    over there where a block of one kind is no size of the other's is not counted.
    """
    from elo_engine.measure.memory_streamed import step_of

    D, kept, sums = setting.spec.D, between_turns(setting), sums_bytes(setting)
    first = {name: whole.components[name] + kept[name] for name in COMPONENTS}
    solving = 8 * 8 * D**2 if turns.bridges else 0  # for a map
    if turns.bridges:  # the sums of the step; states in fp64 as they are counted, or what solving takes
        first["activations"] += sums + max(16 * min(setting.N * D, _FP64_CHUNK // 16), solving)
    alone = shallow_of(setting, turns)
    shallow = predict_memory(alone)
    second = dict(shallow.components)
    if turns.graph and setting.graph:
        first["activations"] += step_buffer_bytes(alone)
        second["activations"] += step_buffer_bytes(setting) + sums + solving  # outside of what graphs hold
    elif turns.graph:
        first = {name: first[name] + (shallow.components[name] if name in _OF_GRAPHS else 0) for name in COMPONENTS}
    elif setting.graph:
        second = {name: second[name] + (first[name] if name in _OF_GRAPHS else 0) for name in COMPONENTS}
    if setting.arm == STREAMED:
        room = Ledger()
        step_of(setting, room).standing()
        second = {name: second[name] + room.live(name) for name in COMPONENTS}
        second["optimizer"] += sums
    else:
        second |= {name: first[name] for name in ("weights", "optimizer")}
    if sum(first.values()) >= sum(second.values()):
        return MemoryPlan(first, whole.moment)
    return MemoryPlan(second, f"shallow step: {shallow.moment}")


def fits(setting: Setting, cap_bytes: int) -> bool:
    """Whether the predicted peak is within `cap_bytes`."""
    return predict_memory(setting).peak_bytes <= cap_bytes


def least_recompute(setting: Setting, fit: Callable[[Setting], bool]) -> Setting:
    """The setting with the least recomputation that fits, from none on; with the most where nothing does.
    `setting.recompute` is not looked at.
    """
    least = setting
    for again in get_args(Recompute):
        least = replace(setting, recompute=again)
        if fit(least):
            break
    return least


def largest_micro_batch(setting: Setting, cap_bytes: int) -> int:
    """The most rows at once that fit; 0 where not even one does. `setting.micro_batch` is not looked at."""

    def fit(rows: int) -> bool:
        return fits(replace(setting, micro_batch=rows), cap_bytes)

    if not fit(1):
        return 0
    most = 1
    while fit(2 * most):  # ends: a row's activations are never free
        most *= 2
    low, high = most, 2 * most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fit(middle) else (low, middle)
    return low
