"""The jobs of `elo search`: its candidates, each with each seed, its controls, and what they found on the disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elo_engine.config import RunConfig
from elo_engine.detach import Source
from elo_engine.errors import FailedError, RefusedError, UsageError
from elo_engine.model.spec import choose_layers
from elo_engine.search_report import Kind, label_of
from elo_engine.search_trial import Layers


def default_candidates(layers: int) -> tuple[Layers, ...]:
    """Pairs at the ends, in the middle and across, and both ends' pairs together, of a model with so many layers.

    All of them read equally many tokens, the four layers too: halving theirs would show a candidate that has read less
    text, and their price is shown beside them.
    """
    n, middle = layers, layers // 2
    sets = [{0, n - 1}, {0, 1}, {n - 2, n - 1}, {middle - 1, middle}, {0, middle}, {middle, n - 1}]
    sets.append({0, 1, n - 2, n - 1})
    inside = [tuple(sorted(max(0, min(n - 1, index)) for index in chosen)) for chosen in sets]
    return tuple(dict.fromkeys(tuple(sorted(set(chosen))) for chosen in inside))


def choose_candidates(text: str | None, layers: int) -> tuple[Layers, ...]:
    """`0,29;first,1;0-1,-1` -> layer indices of each candidate; each is written as `detach.layers` is.

    Raises:
        UsageError: one that cannot be read, names a layer that does not exist, or is there twice.
    """
    if text is None:
        return default_candidates(layers)
    found: dict[Layers, str] = {}
    for piece in text.split(";"):
        try:
            chosen = choose_layers([item.strip() for item in piece.split(",")], layers)
        except UsageError as error:
            raise UsageError(f"elo search --layers: candidate {piece.strip()!r}: {error}") from None
        if chosen in found:
            raise UsageError(
                f"elo search --layers: {piece.strip()!r} and {found[chosen]!r} are the same layers, {list(chosen)}; "
                "give each candidate once"
            )
        found[chosen] = piece.strip()
    return tuple(found)


def target_of(config: RunConfig) -> str:
    """The language that candidates are ranked by: the largest share of `data.mix`, the first of `data.shards` among
    equals or without a mix.

    Raises:
        UsageError: it has no held-out text.
    """
    mix = config.data.mix or dict.fromkeys(config.data.shards, 1.0)
    target = max(config.data.shards, key=lambda language: mix[language])
    if target not in config.evaluate.shards:
        raise UsageError(
            f"elo search: candidates are ranked by the held-out loss of {target}, and evaluate.shards has "
            f"{', '.join(config.evaluate.shards) or 'nothing'}; add evaluate.shards.{target}=DIR, made by elo data"
        )
    return target


# -- jobs


@dataclass(frozen=True)
class Job:
    """One candidate with one seed, or a control."""

    kind: Kind
    layers: Layers
    seed: int
    config: RunConfig
    settings: dict[str, Any]  # everything that its numbers depend on

    @property
    def name(self) -> str:
        """Its file below the output folder."""
        if self.kind == "base":
            return "results/base.json"
        what = "-".join(["layers", *map(str, self.layers)]) if self.layers else "alignment-alone"
        return f"results/{what}-seed{self.seed}.json"

    def title(self, of: int) -> str:
        """For a person."""
        if self.kind == "base":
            return "the base model"
        return f"{label_of(self.layers, of) if self.layers else 'alignment alone'}, seed {self.seed}"

    def result(self, out: Path) -> dict[str, Any] | None:
        """What it found; None: it is not done.

        Raises:
            RefusedError: it was done with other settings. FailedError: its file is damaged.
        """
        path = out / self.name
        if not path.exists():
            return None
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            before: dict[str, Any] = found["settings"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FailedError(
                f"{path}: cannot be read as a result ({error}); remove it, and it is made again"
            ) from error
        keys = sorted(key for key in before | self.settings if before.get(key) != self.settings.get(key))
        if keys:
            told = "; ".join(f"{key}: then {before.get(key)!r}, now {self.settings.get(key)!r}" for key in keys[:3])
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise RefusedError(
                f"{path}: was made with other settings ({told}{more}); go on with those, or choose another --out"
            )
        return found


# Where files lie, and what is kept where, change no number; the checkpoint's identity and the shards' hashes stand for
# what is in the files.
_FREE = (
    "model", "revision", "output", "device", "dtype", "hard_links", "seed", "data.shards", "detach.layers",
    "evaluate.shards", "evaluate.every", "evaluate.whole", "snapshot", "align.engine", "align.stream",
)  # fmt: skip


def common_settings(config: RunConfig, source: Source) -> dict[str, Any]:
    """What all jobs' numbers depend on, by dotted key."""

    def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(node, dict) or prefix == "data.mix":
            return {prefix: node}
        flat: dict[str, Any] = {}
        for key, value in node.items():
            name = f"{prefix}.{key}" if prefix else str(key)
            flat |= {} if name in _FREE else flatten(value, name)
        return flat

    found = flatten(config.model_dump(mode="json"))
    found |= {"checkpoint": source.index.identity(), "device": source.device.type, "dtype": str(source.dtype)}
    for what, shards in (("data", config.data.shards), ("held-out", config.evaluate.shards)):
        for language, folder in shards.items():
            manifest = (Path(folder) / "manifest.json").read_bytes()
            found[f"{what} {language}"] = hashlib.sha256(manifest).hexdigest()
    return found


def make_jobs(config: RunConfig, source: Source, candidates: Iterable[Layers], seeds: int) -> list[Job]:
    """The base, then seed by seed alignment alone and every candidate, so that a search that is cut can be compared."""
    common = common_settings(config, source)
    jobs = [Job("base", (), config.seed, config, common)]
    for seed in range(config.seed, config.seed + seeds):
        for layers in ((), *candidates):
            detached = config.detach.model_copy(update={"layers": list(layers)}) if layers else config.detach
            own = config.model_copy(update={"seed": seed, "detach": detached})
            settings = common | {"seed": seed, "layers": list(layers)}
            jobs.append(Job("candidate" if layers else "alone", layers, seed, own, settings))
    return jobs
