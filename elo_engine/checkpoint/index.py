"""A checkpoint folder, opened strictly: which tensor lies where. Reads JSON and headers, no tensors.

The folder's contents are somebody else's: names from the index are matched against a plain basename and
opened relative to the folder's descriptor, never joined into paths. Containment is not tested with realpath,
because in a hub cache every file is a link into `../../blobs`.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elo_engine.checkpoint.header import TensorEntry, damaged, header_length, parse_header, strict_json
from elo_engine.checkpoint.partial import PARTIAL_SUFFIX, PartialStore
from elo_engine.checkpoint.partial_record import PARTIAL_NAME, SHARD_NAME
from elo_engine.checkpoint.syscalls import open_folder, open_regular, read_exactly
from elo_engine.errors import EloError, FailedError, RefusedError, UsageError

__all__ = [
    "INDEX_NAME",
    "SINGLE_NAME",
    "CheckpointIndex",
    "ShardInfo",
    "TensorEntry",
    "check_unchanged",
    "open_checkpoint",
    "open_shard",
    "parse_header",
    "wanted_shards",
    "weights_complete",
]

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_PICKLE_NAME = re.compile(r"pytorch_model.*\.bin|.*\.(pt|pth|ckpt)")
_MAX_JSON_BYTES = 100_000_000


@dataclass(frozen=True)
class ShardInfo:
    """One shard file as it was when opened; `header_bytes` is all that precedes the tensors (8 + JSON).

    `file` is its name on disk: `name`, or for a shard of which only some bytes are there, name.partial, whose
    `mtime_ns` is None because it changes while more bytes arrive.
    """

    name: str
    size: int
    header_bytes: int
    mtime_ns: int | None
    inode: int
    file: str


@dataclass(frozen=True)
class CheckpointIndex:
    """Every tensor of a checkpoint. `entries` is in (shard, offset) order, `shards` sorted by name.

    `remote` is there when not all bytes are on disk yet: `remote.ensure(entries)` fetches those of tensors that
    are about to be read. Reading others would give zeros.
    """

    folder: Path
    entries: dict[str, TensorEntry]
    shards: dict[str, ShardInfo]
    config: dict[str, Any]
    metadata: dict[str, dict[str, str]]
    headers_sha256: str = field(default="", repr=False)
    remote: PartialStore | None = field(default=None, repr=False, compare=False)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors, headers not counted."""
        return sum(entry.nbytes for entry in self.entries.values())

    def entry(self, name: str) -> TensorEntry:
        """The entry of one tensor; UsageError naming the nearest one when there is none."""
        if name not in self.entries:
            near = difflib.get_close_matches(name, self.entries, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else " `elo inspect` lists its layers."
            raise UsageError(f"{self.folder}: the checkpoint has no tensor {name!r}.{hint}")
        return self.entries[name]

    def bytes_of(self, names: Iterable[str]) -> int:
        """Bytes of these tensors, each counted once."""
        return sum(self.entry(name).nbytes for name in set(names))

    def identity(self) -> str:
        """sha256 (hex) over config.json, shard names, sizes and raw headers; blind to the tensors' values."""
        return self.headers_sha256

    def completed(self, progress: Callable[[int, int], None] | None = None) -> CheckpointIndex:
        """This index if all bytes are on disk; otherwise fetch the rest and open the finished folder.

        progress(done, total) counts the bytes fetched. Raises as `PartialStore.ensure`, and FailedError when what
        was finished is another checkpoint than this one.
        """
        if self.remote is None:
            return self
        self.remote.complete(progress)
        finished = open_checkpoint(self.folder)
        if finished.remote is not None or finished.identity() != self.identity():
            raise FailedError(
                f"{self.folder}: is not the checkpoint that was opened any more. Run the command again."
            )
        return finished


def open_checkpoint(folder: Path) -> CheckpointIndex:
    """Read config, index and headers of a safetensors checkpoint.

    A shard of which a hub's cache folder has only some bytes counts as there when its header is. Raises
    UsageError (no such folder, no config.json, no weights), RefusedError (pickle only, code of its own,
    quantised) or FailedError (a missing, extra, truncated or malformed shard; an index that is stale).
    """
    folder = Path(folder)
    with open_folder(folder) as dir_fd:
        names = set(os.listdir(dir_fd))
        if "config.json" not in names:
            raise UsageError(
                f"{folder}: no config.json in this folder. Give the folder that holds config.json and the "
                "weights (in a hub cache: snapshots/<revision>)."
            )
        raw_config = _read_small("config.json", dir_fd, folder)
        config = _config(raw_config, folder)
        store = PartialStore.load(folder) if PARTIAL_NAME in names else None
        if store is None and PARTIAL_NAME in names:  # another process has just finished the folder
            names = set(os.listdir(dir_fd))
        begun = {name for name in store.shards if name + PARTIAL_SUFFIX in names} if store is not None else set()
        weight_map = _weight_map(names | begun, dir_fd, folder)
        wanted = sorted(set(weight_map.values())) if weight_map is not None else [SINGLE_NAME]
        _check_shard_set(wanted, names | begun, folder)
        digest = hashlib.sha256(_framed(raw_config))
        entries: dict[str, TensorEntry] = {}
        shards: dict[str, ShardInfo] = {}
        metadata: dict[str, dict[str, str]] = {}
        for name in wanted:
            partial = store if name not in names else None
            info, found, metadata[name], blob = _read_shard(name, dir_fd, folder, partial)
            shards[name] = info
            digest.update(_framed(name.encode()) + info.size.to_bytes(8, "little") + _framed(blob))
            for entry in found.values():
                if entry.name in entries:
                    damaged(
                        str(folder),
                        f"tensor {entry.name!r} is in two shards: {entries[entry.name].shard}, {name}",
                    )
                entries[entry.name] = entry
        if weight_map is not None:
            _check_both_ways(weight_map, entries, folder)
    remote = store if any(info.file != name for name, info in shards.items()) else None
    return CheckpointIndex(folder, entries, shards, config, metadata, digest.hexdigest(), remote)


def wanted_shards(folder: Path) -> list[str]:
    """The shards that the folder's index file names, or the single file without one; raises as `open_checkpoint`.

    They need not be there: this is for a folder that is being filled.
    """
    with open_folder(folder) as dir_fd:
        weight_map = _weight_map(set(os.listdir(dir_fd)) | {SINGLE_NAME}, dir_fd, folder)
    return sorted(set(weight_map.values())) if weight_map is not None else [SINGLE_NAME]


def weights_complete(folder: Path) -> bool:
    """Whether config.json and every shard that the index file names are there; says nothing of their content."""
    if not folder.is_dir() or (folder / PARTIAL_NAME).exists():
        return False
    try:
        wanted = wanted_shards(folder)
    except EloError:
        return False
    return all((folder / name).is_file() for name in ("config.json", *wanted))


def open_shard(info: ShardInfo, dir_fd: int, folder: Path) -> int:
    """Descriptor of a shard of an opened checkpoint, read-only; FailedError when it has gone.

    One that was partial may have been finished since by another process, which only renames it: that it is the
    same file is for `check_unchanged` to say.
    """
    for name in dict.fromkeys((info.file, info.name)):
        try:
            return open_regular(name, dir_fd, str(folder / name))
        except FileNotFoundError:
            continue
    raise FailedError(f"{folder / info.file}: has gone since the checkpoint was opened. Fetch it again.")


def check_unchanged(fd: int, info: ShardInfo, folder: Path, when: str) -> None:
    """FailedError unless the open file is still the one `info` describes, so that two versions never mix.

    A partial shard may get more bytes (other times), never another size or another file.
    """
    status = os.fstat(fd)
    mtime_ns = None if info.mtime_ns is None else status.st_mtime_ns
    if (status.st_size, mtime_ns, status.st_ino) != (info.size, info.mtime_ns, info.inode):
        how = (
            f"truncated from {info.size} to {status.st_size} bytes"
            if status.st_size < info.size
            else "changed"
        )
        raise FailedError(
            f"{folder / info.file}: was {how} {when}. Another program writes to this checkpoint: stop it, "
            "make sure that the checkpoint is whole, and run the command again."
        )


def _framed(data: bytes) -> bytes:
    return len(data).to_bytes(8, "little") + data


def _read_small(name: str, dir_fd: int, folder: Path) -> bytes:
    where = str(folder / name)
    try:
        fd = open_regular(name, dir_fd, where)
    except FileNotFoundError:
        raise FailedError(f"{where}: a link to a file that is gone. Fetch the model again.") from None
    try:
        size = os.fstat(fd).st_size
        if size > _MAX_JSON_BYTES:
            damaged(where, f"{size} bytes are too many for a JSON file of a checkpoint")
        buffer = bytearray(size)
        read_exactly(fd, memoryview(buffer), 0, where)
        return bytes(buffer)
    finally:
        os.close(fd)


def _config(raw: bytes, folder: Path) -> dict[str, Any]:
    where = folder / "config.json"
    config = strict_json(raw, str(where), integers_only=False)
    if not isinstance(config, dict):
        damaged(str(where), "is not a JSON object")
    # Models of several parts keep one configuration a part, one level down.
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if part.get("auto_map"):
            raise RefusedError(
                f"{where}: `auto_map` names Python code that comes with the model, and code from a "
                "checkpoint is never run. Use a model of a family that transformers itself supports."
            )
        for key in ("quantization_config", "compression_config"):
            if part.get(key) is not None:
                raise RefusedError(
                    f"{where}: `{key}` says that the weights are quantised, and quantised weights cannot be "
                    "trained or written back in place. Use the model's unquantised checkpoint (bf16, fp16 "
                    "or fp32)."
                )
    return config


def _weight_map(names: set[str], dir_fd: int, folder: Path) -> dict[str, str] | None:
    """Tensor -> shard from the index file; None when the weights are one file without an index."""
    if INDEX_NAME not in names:
        if SINGLE_NAME in names:
            return None
        pickles = sorted(name for name in names if _PICKLE_NAME.fullmatch(name))
        if pickles:
            raise RefusedError(
                f"{folder}: the weights are only there as pickle ({pickles[0]}), which can run code when it "
                "is opened and is never loaded. Convert them once, where you trust the source: "
                "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER), which "
                "writes safetensors, and give the new folder."
            )
        raise UsageError(
            f"{folder}: no weights: neither {SINGLE_NAME} nor {INDEX_NAME}. Give a folder with a complete "
            "safetensors checkpoint."
        )
    where = str(folder / INDEX_NAME)
    index = strict_json(_read_small(INDEX_NAME, dir_fd, folder), where, integers_only=False)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        damaged(where, "has no `weight_map` object, or an empty one")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not SHARD_NAME.fullmatch(shard):
            damaged(
                where,
                f"weight_map gives tensor {tensor[:200]!r} the shard {str(shard)[:200]!r}, which is not a "
                "plain file name ending in .safetensors",
            )
    return weight_map


def _check_shard_set(wanted: list[str], names: set[str], folder: Path) -> None:
    missing = [name for name in wanted if name not in names]
    if missing:
        raise FailedError(
            f"{folder}: missing shard {', '.join(missing)} ({len(missing)} of {len(wanted)}), named by "
            f"{INDEX_NAME}. The download is incomplete: fetch the model again."
        )
    extra = sorted(name for name in names - set(wanted) if name.endswith(".safetensors"))
    if extra:
        owner = INDEX_NAME if INDEX_NAME in names else f"the single file {SINGLE_NAME}"
        raise FailedError(
            f"{folder}: extra shard {', '.join(extra)}, which {owner} does not mention. Two versions of the "
            "model are mixed, or the file belongs to something else: move it out of the folder."
        )


def _read_shard(
    name: str, dir_fd: int, folder: Path, partial: PartialStore | None
) -> tuple[ShardInfo, dict[str, TensorEntry], dict[str, str], bytes]:
    file = name if partial is None else name + PARTIAL_SUFFIX
    where = str(folder / file)
    try:
        fd = open_regular(file, dir_fd, where)
    except FileNotFoundError:
        if partial is not None:  # another process has just finished it
            return _read_shard(name, dir_fd, folder, None)
        raise FailedError(
            f"{where}: missing shard: a link to a file that is gone. Fetch the model again."
        ) from None
    try:
        status = os.fstat(fd)
        _check_fetched(name, 8, status.st_size, partial)
        first = bytearray(min(8, status.st_size))
        read_exactly(fd, memoryview(first), 0, where)
        blob = bytearray(8 + header_length(bytes(first), where, status.st_size))
        _check_fetched(name, len(blob), status.st_size, partial)
        read_exactly(fd, memoryview(blob), 0, where)
        entries, metadata = parse_header(bytes(blob), shard=name, file_size=status.st_size, where=where)
        mtime_ns = status.st_mtime_ns if partial is None else None
        info = ShardInfo(name, status.st_size, len(blob), mtime_ns, status.st_ino, file)
        check_unchanged(fd, info, folder, "while its header was read")
        return info, entries, metadata, bytes(blob)
    finally:
        os.close(fd)


def _check_fetched(name: str, end: int, file_size: int, partial: PartialStore | None) -> None:
    """FailedError unless the first `end` bytes of a partial shard are on disk; a hole reads as zeros."""
    if partial is None:
        return
    if file_size != partial.shards[name].size or not partial.has(name, 0, min(end, file_size)):
        raise FailedError(
            f"{partial.folder / name}: its header was not fetched yet, or the file was truncated. Name the model by "
            "its hub id: that fetches what is missing."
        )


def _check_both_ways(weight_map: dict[str, str], entries: dict[str, TensorEntry], folder: Path) -> None:
    where = folder / INDEX_NAME
    advice = "The index is stale: write it anew from the shards, or fetch the model again."
    for tensor, shard in weight_map.items():
        if tensor not in entries:
            raise FailedError(
                f"{where}: names the tensor {tensor!r} in {shard}, but no shard has it. {advice}"
            )
        if entries[tensor].shard != shard:
            raise FailedError(
                f"{where}: puts the tensor {tensor!r} in {shard}, but it is in {entries[tensor].shard}. "
                f"{advice}"
            )
    for tensor, entry in entries.items():
        if tensor not in weight_map:
            raise FailedError(f"{where}: lacks the tensor {tensor!r}, which {entry.shard} has. {advice}")
