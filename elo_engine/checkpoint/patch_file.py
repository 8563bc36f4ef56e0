"""A patch file: for each changed tensor the XOR of the base's and the changed tensor's bytes, with hashes.

One safetensors file that any reader of the format opens. XOR because one copy serves both directions:
base ^ patch = changed, changed ^ patch = base. A tensor is stored under its own name and shape as U8, U16, U32 or
U64, whichever has the width of its elements. `__metadata__` holds

    elo_patch      the version of this format, "1"
    base           CheckpointIndex.identity() of the base, which is that of the changed checkpoint too
    contents       JSON: {"tensors": {name: {"dtype", "before", "after", "xor"}}, "shards": {name: {"size", "before",
                   "after"}}}, hashes as sha256 in hex; every shard of the checkpoint is listed
    seal           sha256 over all of the above and the names, dtypes and shapes: a flipped bit is found

The seal is no signature: whoever can write the file can seal it, so each field is checked as well.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from elo_engine.checkpoint.header import MAX_HEADER_BYTES, TORCH_DTYPES, TensorEntry, damaged, strict_json
from elo_engine.checkpoint.pieces import check_same, read_header
from elo_engine.checkpoint.syscalls import open_regular, read_exactly
from elo_engine.errors import FailedError, RefusedError, UsageError

VERSION = "1"
_HASH = re.compile(r"[0-9a-f]{64}")
_KEYS = {"elo_patch", "base", "contents", "seal"}
_ADVICE = "The patch is damaged or was not made by `elo patch`: make or fetch it again."


@dataclass(frozen=True)
class TensorHashes:
    """sha256 of one changed tensor's bytes in the base and in the changed checkpoint, and of their XOR."""

    dtype: str
    before: str
    after: str
    xor: str


@dataclass(frozen=True)
class ShardHashes:
    """Size and sha256 of one whole shard file in the base and in the changed checkpoint."""

    size: int
    before: str
    after: str


@dataclass(frozen=True)
class PatchContents:
    """What a patch says about itself. `tensors`: the changed ones alone; `shards`: all of the checkpoint's."""

    base: str
    tensors: dict[str, TensorHashes]
    shards: dict[str, ShardHashes]


def stored_dtype(entry: TensorEntry) -> str:
    """The unsigned integer of the width of the tensor's elements. RefusedError for the packed sub-byte dtypes."""
    return f"U{8 * entry.torch_dtype.itemsize}"


def safetensors_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...], int]], metadata: dict[str, str]
) -> bytes:
    """The bytes before the first tensor, for tensors (name, dtype, shape, bytes) that follow one another in this
    order: length and JSON, padded with spaces to a multiple of 8 as the format's own writer does.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    position = 0
    for name, dtype, shape, nbytes in tensors:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + nbytes]}
        position += nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise RefusedError(f"a header of {len(text)} bytes is more than the format allows ({MAX_HEADER_BYTES}).")
    return len(text).to_bytes(8, "little") + text


def patch_header(entries: list[TensorEntry], contents: PatchContents) -> bytes:
    """The bytes before the XOR data, which follow in the order of `entries` (the base's). All hashes have one width,
    so its length is known before they are.
    """
    told = {
        "tensors": {name: vars(hashes) for name, hashes in contents.tensors.items()},
        "shards": {name: vars(hashes) for name, hashes in contents.shards.items()},
    }
    tensors = [(entry.name, stored_dtype(entry), entry.shape, entry.nbytes) for entry in entries]
    metadata = {"elo_patch": VERSION, "base": contents.base, "contents": json.dumps(told, sort_keys=True)}
    seal = _seal(metadata, [(name, dtype, shape) for name, dtype, shape, _ in tensors])
    return safetensors_header(tensors, metadata | {"seal": seal})


def _seal(metadata: dict[str, str], tensors: list[tuple[str, str, tuple[int, ...]]]) -> str:
    parts = [metadata["elo_patch"], metadata["base"], metadata["contents"], [[n, d, list(s)] for n, d, s in tensors]]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class PatchFile:
    """An open patch, every field of its header checked. Context manager; `check` is for before anything is made of what
    was read.

    Raises UsageError: no such file. FailedError: damaged, or hostile. RefusedError: a safetensors file that is no
    patch, or one of another version.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        try:
            self._fd = open_regular(str(self.path), None, str(self.path))
        except FileNotFoundError:
            raise UsageError(f"{self.path}: no such patch. Check the path; `elo patch diff` makes one.") from None
        try:
            self.entries, metadata, self._seen = read_header(self._fd, self.path)
            self.contents = _contents(self.entries, metadata, str(self.path))
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> PatchFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)

    def check(self) -> None:
        """FailedError when the file is no longer what it was."""
        check_same(self._fd, self._seen, self.path)

    def read(self, name: str, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with the XOR of the tensor `name` from its byte `offset` on."""
        entry = self.entries[name]
        assert offset + len(buffer) <= entry.nbytes
        read_exactly(self._fd, buffer, entry.begin + offset, f"{self.path}: tensor {name!r}")

    def check_payload(self, name: str, digest: str) -> None:
        """FailedError unless `digest` is what the XOR of the tensor `name` was when the patch was made."""
        if digest != self.contents.tensors[name].xor:
            raise FailedError(f"{self.path}: tensor {name!r}: its bytes changed since the patch was made. {_ADVICE}")


def _contents(entries: dict[str, TensorEntry], metadata: dict[str, str], where: str) -> PatchContents:
    if "elo_patch" not in metadata:
        raise RefusedError(f"{where}: a safetensors file, but not a patch made by `elo patch diff`.")
    if metadata["elo_patch"] != VERSION:
        raise RefusedError(
            f"{where}: a patch of format {metadata['elo_patch'][:20]!r}; this version reads {VERSION!r}. Use the "
            "version of elo that made it."
        )
    if metadata.keys() != _KEYS:
        raise FailedError(f"{where}: its metadata has not exactly the keys {sorted(_KEYS)}. {_ADVICE}")
    if metadata["seal"] != _seal(metadata, [(e.name, e.dtype, e.shape) for e in entries.values()]):
        raise FailedError(f"{where}: its header was changed after it was written: the seal differs. {_ADVICE}")
    if not _HASH.fullmatch(metadata["base"]):
        raise FailedError(f"{where}: the base's identity is not a sha256. {_ADVICE}")
    told = strict_json(metadata["contents"].encode(), f"{where}: contents", integers_only=True)
    if not isinstance(told, dict) or told.keys() != {"tensors", "shards"}:
        raise FailedError(f"{where}: contents has not exactly the keys tensors and shards. {_ADVICE}")
    tensors = _table(told["tensors"], {"dtype", "before", "after", "xor"}, f"{where}: tensor")
    shards = _table(told["shards"], {"size", "before", "after"}, f"{where}: shard")
    if tensors.keys() != entries.keys():
        odd = sorted(tensors.keys() ^ entries.keys())[0]
        raise FailedError(f"{where}: tensor {odd[:200]!r} is in the contents or in the file, not in both. {_ADVICE}")
    for name, fields in tensors.items():
        dtype = TORCH_DTYPES.get(fields["dtype"]) if isinstance(fields["dtype"], str) else None
        if dtype is None or entries[name].dtype != f"U{8 * dtype.itemsize}":
            told_dtype = str(fields["dtype"])[:40]
            damaged(where, f"tensor {name[:200]!r} of dtype {told_dtype!r} is stored as {entries[name].dtype}")
    for name, fields in shards.items():
        if type(fields["size"]) is not int:
            damaged(where, f"shard {name[:200]!r} has no size in bytes")
    return PatchContents(
        metadata["base"],
        {name: TensorHashes(**fields) for name, fields in tensors.items()},
        {name: ShardHashes(**fields) for name, fields in shards.items()},
    )


def _table(found: Any, keys: set[str], what: str) -> dict[str, dict[str, Any]]:
    """{name: fields}, with exactly these keys, and a sha256 wherever one has to be."""
    if not isinstance(found, dict):
        raise FailedError(f"{what}s are not a JSON object. {_ADVICE}")
    for name, fields in found.items():
        if not isinstance(fields, dict) or fields.keys() != keys:
            raise FailedError(f"{what} {name[:200]!r} has not exactly the keys {sorted(keys)}. {_ADVICE}")
        for key in keys & {"before", "after", "xor"}:
            if not isinstance(fields[key], str) or not _HASH.fullmatch(fields[key]):
                raise FailedError(f"{what} {name[:200]!r}: {key} is not a sha256. {_ADVICE}")
    return found
