"""A stage's state on disk: weights and moments in safetensors, the rest in JSON, published whole or not at all.

`STAGE/step-XXXXXXXX/` holds `weights.safetensors` (fp32 masters under the checkpoint's names; with 8-bit optimizer
state, which has none, the weights as they are), `optimizer.safetensors`, `state.json` and `COMMIT.json`. A snapshot
counts only if its COMMIT verifies; steps are ordered as numbers.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import load_file
from torch import Tensor

from elo_engine.checkpoint import (
    StoredTensor,
    preflight_space,
    publish,
    remove_leftovers,
    stored_tensors,
    strict_json,
    verify_commit,
    write_safetensors,
)
from elo_engine.errors import FailedError, RefusedError, shown
from elo_engine.train.loop import Progress

_STEP = re.compile(r"step-(\d{8,})")
MAY_DIFFER = {"data", "seed"}  # what of a snapshot's identity a run may change where it is told to


def clear_leftovers(stage_folder: Path) -> None:
    """Remove what a process that was killed while it saved has left, of whatever step: a resumed run may not come by
    that step again. To be called by the one process that holds the run's lock.
    """
    if stage_folder.is_dir():
        remove_leftovers(stage_folder, _STEP.pattern)


def snapshot_folder(stage_folder: Path, step: int) -> Path:
    """`STAGE/step-XXXXXXXX`."""
    return stage_folder / f"step-{step:08d}"


def _steps(stage_folder: Path) -> list[tuple[int, Path]]:
    if not stage_folder.is_dir():
        return []
    found = [(_STEP.fullmatch(path.name), path) for path in stage_folder.iterdir()]
    return sorted((int(match.group(1)), path) for match, path in found if match and path.is_dir())


class Saved(Protocol):
    """Weights and moments by name, as `LeafState` has them."""

    def weights(self) -> dict[str, Tensor]: ...

    def moments(self) -> dict[str, Tensor]: ...

    @property
    def snapshot_bytes(self) -> int: ...


class Restored(Saved, Protocol):
    """What can also take them back."""

    def load(self, weights: dict[str, Tensor], moments: dict[str, Tensor]) -> None: ...


def save_snapshot(
    stage_folder: Path,
    optimizer: Saved,
    progress: Progress,
    identity: dict[str, Any],
    numerics: dict[str, Any],
    keep: int,
) -> Path:
    """Publish the state after `progress.step` steps, then retire all but the newest `keep` snapshots.

    Raises:
        FailedError, RefusedError: not enough space, or the disk refuses; earlier snapshots stay.
    """
    target = snapshot_folder(stage_folder, progress.step)
    if target.exists():
        try:
            verify_commit(target)
            return target
        except FailedError:  # passed over when the run resumed; set aside for whoever wants to look
            number = sum(path.name.startswith(f"damaged-{target.name}") for path in stage_folder.iterdir())
            target.rename(stage_folder / f"damaged-{target.name}-{number}")
    stage_folder.mkdir(parents=True, exist_ok=True)
    weights = {name: view.detach().cpu().contiguous() for name, view in optimizer.weights().items()}
    moments = {name: view.detach().cpu().contiguous() for name, view in optimizer.moments().items()}
    preflight_space(target, sum(t.numel() * t.element_size() for t in (*weights.values(), *moments.values())))
    with publish(target) as folder:
        write_safetensors(folder / "weights.safetensors", weights)
        write_safetensors(folder / "optimizer.safetensors", moments)
        state = {"format": 1, "progress": asdict(progress), "identity": identity, "numerics": numerics}
        (folder / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    for _, old in _steps(stage_folder)[:-keep]:
        _retire(old)
    return target


def _retire(folder: Path) -> None:
    """COMMIT goes first: a removal that is cut half-way leaves a folder that does not count."""
    (folder / "COMMIT.json").unlink(missing_ok=True)
    shutil.rmtree(folder)


def latest_snapshot(stage_folder: Path, report: Callable[[str], None]) -> Path | None:
    """The newest snapshot that verifies; each one passed over is reported with its reason."""
    for _, folder in reversed(_steps(stage_folder)):
        try:
            verify_commit(folder)
        except FailedError as error:
            report(f"snapshot {folder.name} is passed over: {error}")
            continue
        return folder
    return None


def read_progress(
    folder: Path, identity: dict[str, Any], may_differ: Collection[str] = ()
) -> tuple[Progress, dict[str, Any], dict[str, Any]]:
    """The progress a snapshot stands at, the numerics it was made with, and what differs of its identity and this
    run's ([then, now] by key): only keys of `may_differ`.

    Raises:
        RefusedError: it belongs to another run, model, data or environment; the differing keys are named.
    """
    state = read_state(folder)
    saved = state["identity"]
    different = {
        key: [saved.get(key), identity.get(key)]
        for key in sorted(saved.keys() | identity.keys())
        if saved.get(key) != identity.get(key)
    }
    refused = [key for key in different if key not in may_differ]
    if refused:
        named = [(key, different[key]) for key in refused]
        told = "; ".join(f"{key}: snapshot {shown(then)}, now {shown(now)}" for key, (then, now) in named)
        ways = "restore what changed, or start a new run in another output folder"
        if set(refused) <= MAY_DIFFER:
            ways += ", or go on with --resume anyway, which is recorded as not exact"
        raise RefusedError(f"{folder}: this snapshot does not continue this run ({told}); {ways}")
    return _progress(folder, state["progress"]), state["numerics"], different


def read_state(folder: Path) -> dict[str, Any]:
    """state.json: format, progress, identity, numerics. FailedError: not what `save_snapshot` writes."""
    path = folder / "state.json"
    try:
        state = strict_json(path.read_bytes(), str(path), integers_only=False)
    except OSError as error:
        raise FailedError(f"{path}: cannot be read ({error.strerror}); resume from another snapshot") from error
    sections = ("progress", "identity", "numerics")
    if not isinstance(state, dict) or not all(isinstance(state.get(section), dict) for section in sections):
        raise FailedError(f"{path}: has not the sections {', '.join(sections)}; resume from another snapshot")
    return state


def _progress(folder: Path, told: dict[str, Any]) -> Progress:
    """Of the values' own kinds: a step that is text, or too many, would be noticed far from here."""

    def count(value: Any) -> bool:
        return type(value) is int and 0 <= value < 1 << 62

    path, usual = folder / "state.json", asdict(Progress())
    for key, value in told.items():
        if key not in usual:
            raise FailedError(f"{path}: progress has the unknown key {shown(key)}; use the version that wrote it")
        if key == "loss_tokens_of":
            fits = isinstance(value, dict) and all(count(one) for one in value.values())
        elif key == "spreads":
            fits = isinstance(value, dict) and all(
                isinstance(one, list) and all(type(x) in (int, float) for x in one) for one in value.values()
            )
        else:
            fits = count(value)
        if not fits:
            raise FailedError(f"{path}: progress has {shown(value)} as {key}; resume from another snapshot")
    return Progress(**told)


def restore(folder: Path, optimizer: Restored) -> None:
    """Load weights and moments of a verified snapshot into the optimizer and its model."""
    optimizer.load(load_file(folder / "weights.safetensors"), load_file(folder / "optimizer.safetensors"))


def stored_weights(folder: Path) -> dict[str, StoredTensor]:
    """The weights of a snapshot that `latest_snapshot` has verified, by checkpoint name, left in their file: read
    piece by piece by whoever writes them on. Raises FailedError: no weights there, or a damaged header.
    """
    return stored_tensors(folder / "weights.safetensors")
