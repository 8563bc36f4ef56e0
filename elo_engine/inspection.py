"""`elo inspect`: what a checkpoint is, from its headers alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from elo_engine import console
from elo_engine.checkpoint import COMMIT_NAME, CheckpointIndex, open_checkpoint, resolve_model, verify_commit
from elo_engine.checkpoint.pieces import ShardReader
from elo_engine.measure.meter import human_bytes
from elo_engine.model import names
from elo_engine.model.full import check_shapes
from elo_engine.model.spec import ModelSpec, choose_layers, read_spec

_CHUNK_BYTES = 4 << 20


def inspect_model(model: str, *, verify: bool = False) -> dict[str, Any]:
    """Family, layers, ties, bytes per part and per shard; shapes are always checked. `verify` reads every byte.

    Of a model on a hub only headers are fetched; `verify` fetches all the rest and compares it with the hub's hashes.
    "fetched" says how many bytes of the shards are on disk then. A folder that has a COMMIT.json is compared with
    that. "verified_hashes" says which of the two it was, or None: that the bytes can be read is all that is known.

    Raises:
        UsageError, RefusedError, FailedError: as `open_checkpoint`, `read_spec` and, with `verify`, reading do.
    """
    folder = resolve_model(model)
    index = open_checkpoint(folder)
    spec = read_spec(index.config)
    check_shapes(index, spec, names.expected_shapes(spec))
    found: dict[str, Any] = {
        "folder": str(folder),
        "family": spec.family,
        "layers": spec.layers,
        "parameters": spec.parameters,
        "shapes": {"V": spec.V, "D": spec.D, "F": spec.F, "H": spec.H, "K": spec.K, "E": spec.E},
        "tied_head": spec.tied,
        "rotary": {"theta": spec.rope.theta, "type": spec.rope.kind},
        "windows": [spec.kind(layer).window for layer in range(spec.layers)] if spec.windows else None,
        "dtypes": sorted({entry.dtype for entry in index.entries.values()}),
        "bytes": _parts(index, spec),
        "shards": {name: shard.size for name, shard in index.shards.items()},
        "identity": index.identity(),
    }
    if index.remote is not None:
        found["fetched"] = index.remote.present_bytes
    if verify:
        found["verified_hashes"] = None
        if index.remote is not None:
            with console.bytes_bar(f"fetch {model}") as progress:
                index = index.completed(progress)
            found["fetched"] = sum(shard.size for shard in index.shards.values())
            found["verified_hashes"] = "hub"
        commit = index.folder / COMMIT_NAME
        # A hub cache has links, which no published folder has: there it is a file of the model like any other.
        committed = commit.exists() and not commit.is_symlink()
        if committed:
            verify_commit(index.folder)  # which reads every byte
            found["verified_hashes"] = COMMIT_NAME
        found["verified_bytes"] = _read_everything(index, read=not committed)
    return found


def _parts(index: CheckpointIndex, spec: ModelSpec) -> dict[str, int]:
    outer = names.outer_names(spec)
    ends = choose_layers(["first", "last"], spec.layers)
    detached = [name for layer in ends for name in names.layer_names(spec, layer)]
    layers = [name for layer in range(spec.layers) for name in names.layer_names(spec, layer)]
    known = {*outer, *layers}
    return {
        "total": index.total_bytes,
        "embedding": index.bytes_of([names.EMBEDDING]),
        "head": 0 if spec.tied else index.bytes_of([names.HEAD]),
        "layer": index.bytes_of(names.layer_names(spec, 0)),
        "read_by_detach": index.bytes_of([*outer, *detached]),
        "other": index.bytes_of([name for name in index.entries if name not in known]),
    }


def _read_everything(index: CheckpointIndex, *, read: bool) -> int:
    """Through one small buffer: a tensor may be larger than the memory. Returns the bytes of tensors.

    Without `read`, for what has just been read, the checkpoint is only compared with what it was when opened.
    """
    buffer, done = np.empty(_CHUNK_BYTES, np.uint8), 0
    total = sum(info.size - info.header_bytes for info in index.shards.values())
    with ShardReader(index) as reader, console.bytes_bar("verify") as progress:
        for info in index.shards.values() if read else ():
            for offset in range(info.header_bytes, info.size, _CHUNK_BYTES):
                piece = buffer[: min(_CHUNK_BYTES, info.size - offset)]
                reader.read(info.name, piece.data, offset)
                done += len(piece)
                progress(done, total)
        reader.check()
    return total


def describe_inspection(found: dict[str, Any]) -> list[str]:
    """The same for a person."""
    shapes = " ".join(f"{key}={value}" for key, value in found["shapes"].items())
    size = found["bytes"]
    share = 100 * size["read_by_detach"] / size["total"]
    lines = [
        f"{found['folder']}",
        f"  family {found['family']}, {found['layers']} layers, {found['parameters'] / 1e6:.1f}M parameters, "
        f"{'tied' if found['tied_head'] else 'untied'} head, {', '.join(found['dtypes'])}",
        f"  {shapes}, rotary {found['rotary']['type']} theta {found['rotary']['theta']:g}",
        f"  {human_bytes(size['total'])} in {len(found['shards'])} shard(s): embedding "
        f"{human_bytes(size['embedding'])}, head "
        f"{human_bytes(size['head'])}, each layer {human_bytes(size['layer'])}, other {human_bytes(size['other'])}",
        f"  detaching first and last layer reads {human_bytes(size['read_by_detach'])} ({share:.1f} %)",
    ]
    if "fetched" in found:
        whole = sum(found["shards"].values())
        rest = "; the rest is fetched when it is read" if found["fetched"] < whole else ""
        lines.append(f"  fetched from the hub: {human_bytes(found['fetched'])} of {human_bytes(whole)}{rest}")
    if "verified_bytes" in found:
        hashes = {
            None: "there are no hashes to compare them with",
            "hub": "their hashes are the hub's",
            COMMIT_NAME: f"the hash of every file is that of {COMMIT_NAME}",
        }[found["verified_hashes"]]
        lines.append(
            f"  verified: all {human_bytes(found['verified_bytes'])} of tensors could be read and have the right "
            f"shapes; {hashes}"
        )
    return lines
