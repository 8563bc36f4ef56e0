"""Memory by component, measured: bytes of weights, gradients and optimizer state, counted from the tensors themselves
when the optimizer steps, and what the peak is above them; beside the planner's figures of the same four.

A storage counts once, however many tensors show it: a tied head, the views of a packed leaf. What weights, gradients
and optimizer state take together is a lower bound of the peak, since all three live at that moment. What the peak is
above them is not attributed further. It stands for activations and workspaces, although the peak may come before the
last gradients have arrived and more of them fit then: the prediction's share is formed in the same way, with its slack.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from elo_engine.measure import planner
from elo_engine.measure.ledger import Ledger
from elo_engine.measure.setting import Setting

HELD = ("weights", "gradients", "optimizer")
REST = "activations and workspaces"
REST_OF_PROCESS = "activations, workspaces and process"  # of resident memory: code, libraries, gaps of the heap as well

PeakWhat = Literal["tensors", "allocated", "resident"]  # traced on a CPU; torch's on a GPU; of a process on a CPU


def rest_name(peak: PeakWhat) -> str:
    """What a measured peak has above weights, gradients and optimizer state."""
    return REST_OF_PROCESS if peak == "resident" else REST


def predicted_held(setting: Setting) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer state when the optimizer steps, as the planner's ledger has them then.
    (At the predicted peak itself fewer gradients may be there: `MemoryPlan.components`.)
    """
    ledger = Ledger()
    planner.run_step(setting, ledger)
    kept = planner.between_turns(setting)
    return {name: ledger.live(name) + kept[name] for name in HELD}


def storages(tensors: Iterable[Tensor | None], device: torch.device) -> dict[int, int]:
    """Address -> bytes of each storage on `device` that the tensors show; empty ones are left out."""
    found: dict[int, int] = {}
    for tensor in tensors:
        if tensor is None:
            continue
        if hasattr(tensor, "__tensor_flatten__"):  # a wrapper, such as torchao's 8-bit state: its parts have the bytes
            parts, _ = tensor.__tensor_flatten__()
            found |= storages((getattr(tensor, part) for part in parts), device)
        elif tensor.device.type == device.type:
            storage = tensor.untyped_storage()
            if storage.nbytes():
                found[storage.data_ptr()] = storage.nbytes()
    return found


def tensors_in(thing: Any) -> Iterator[Tensor]:
    """Every tensor reachable from an object by attributes, lists, tuples and values of dictionaries; gradients of
    tensors are not.
    """
    todo, seen = [thing], set[int]()
    while todo:
        one = todo.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            yield one
        elif isinstance(one, Mapping):
            todo += one.values()
        elif isinstance(one, list | tuple):
            todo += one
        elif hasattr(one, "__dict__") and not isinstance(one, type):
            todo += vars(one).values()


def held_bytes(
    weights: Iterable[Tensor], gradients: Iterable[Tensor | None], optimizer: Any, device: torch.device
) -> dict[str, int]:
    """Bytes on `device` of each of `HELD`, to be taken while the gradients of a step are there and after the optimizer
    has made its state, so after the first step and before gradients are dropped.

    Args:
        weights: everything the model holds, frozen or not. gradients: None where a tensor has none.
        optimizer: an object or dictionary from which its state is reachable, fp32 masters included; weights and
            gradients that are reachable from it too are not counted again.
    """
    of_weights = storages(weights, device)
    of_gradients = {at: size for at, size in storages(gradients, device).items() if at not in of_weights}
    state = storages(tensors_in(optimizer), device)
    own = {at: size for at, size in state.items() if at not in of_weights and at not in of_gradients}
    return {name: sum(part.values()) for name, part in zip(HELD, (of_weights, of_gradients, own), strict=True)}


def by_component(
    setting: Setting, predicted_bytes: int, held: Mapping[str, int], measured_bytes: int, peak: PeakWhat
) -> dict[str, Any]:
    """Predicted and measured peak in four parts each, whose sums are the peaks.

    Args:
        held: of `held_bytes`. peak: what `measured_bytes` are. Resident memory less that of the process before the
            model was loaded can be below what is held, where memory of before served again: the last part is then
            negative.
    """
    planned = predicted_held(setting)
    return {
        "predicted": planned | {REST: predicted_bytes - sum(planned.values())},
        "measured": {name: held[name] for name in HELD}
        | {rest_name(peak): measured_bytes - sum(held[name] for name in HELD)},
        "peak": peak,
    }


def component_faults(found: Mapping[str, Any], predicted_bytes: int | None, measured_bytes: int | None) -> list[str]:
    """Where a result of `by_component` contradicts itself or the peaks beside it."""
    said = []
    peak = found["peak"]
    for side, rest, total in (
        ("predicted", REST, predicted_bytes), ("measured", rest_name(peak), measured_bytes)
    ):  # fmt: skip
        parts = found[side]
        if set(parts) != {*HELD, rest}:
            said.append(f"{side} has the parts {', '.join(parts)}; of {peak} bytes they are {', '.join((*HELD, rest))}")
        elif sum(parts.values()) != total:
            said.append(f"the {side} parts add up to {sum(parts.values())} bytes, and the peak is {total}")
        elif min(parts.values()) < 0 and not (side == "measured" and peak == "resident"):
            said.append(f"a {side} part is less than nothing: {min(parts, key=parts.__getitem__)}")
    return said
