"""COMMIT.json: a published folder's files with their sizes and hashes, written last and checked first."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

from elo_engine.checkpoint.header import strict_json
from elo_engine.checkpoint.syscalls import SYSCALLS, io_failure, open_regular, write_all
from elo_engine.errors import FailedError, RefusedError

COMMIT_NAME = "COMMIT.json"
_HASH_BYTES = 1 << 20
_ADVICE = "Do not use this folder: make or fetch it again."


def write_commit(folder: Path, extra: dict[str, Any]) -> None:
    """Sync and hash every file below `folder`, then write COMMIT.json and sync the folder.

    Raises FailedError: an I/O error (a failed sync is never tried again, because the kernel may report it
    only once), something that is not a plain file, `extra` that is not JSON.
    """
    current = folder
    try:
        files = _files(folder)
        if COMMIT_NAME in files:
            raise FailedError(
                f"{folder / COMMIT_NAME}: is written by `publish` alone. Give that file another name."
            )
        hashes = {}
        for name, current in files.items():
            hashes[name] = _hash(current, sync=True)
        for base, _, _ in os.walk(folder, topdown=False):
            current = Path(base)
            sync_folder(current)
        current = folder / COMMIT_NAME
        write_file(current, _sealed_text({"format": 1, "files": hashes, "extra": extra}, current), sync=True)
        current = folder
        sync_folder(folder)
    except OSError as error:
        raise io_failure(error, current, None, "syncing it to the disk") from error


def verify_commit(folder: Path, deep: bool = True) -> dict[str, Any]:
    """Check a published folder against its COMMIT.json and return that.

    Its keys: format, files {name: {size, sha256}}, extra, commit_sha256 (over the rest). deep: hash every
    byte; otherwise compare names and sizes only. Raises FailedError naming the file: no COMMIT, a missing or
    an extra file, another size or hash, a COMMIT that is not exactly what was written.
    """
    folder = Path(folder)
    try:
        body = _read(folder / COMMIT_NAME)
        present = _files(folder)
        present.pop(COMMIT_NAME)
        listed = body["files"]
        for name in sorted(listed.keys() - present.keys()):
            raise FailedError(f"{folder / name}: missing, but {COMMIT_NAME} lists it. {_ADVICE}")
        for name in sorted(present.keys() - listed.keys()):
            raise FailedError(
                f"{folder / name}: an extra file, which {COMMIT_NAME} does not list. Remove it."
            )
        for name, wanted in listed.items():
            size = present[name].stat().st_size
            if size != wanted["size"]:
                raise FailedError(
                    f"{folder / name}: has {size} bytes, {COMMIT_NAME} says {wanted['size']}. {_ADVICE}"
                )
        for name, wanted in listed.items() if deep else ():
            if _hash(present[name], sync=False) != wanted:
                raise FailedError(
                    f"{folder / name}: its bytes changed: sha256 differs from {COMMIT_NAME}. {_ADVICE}"
                )
    except OSError as error:
        raise io_failure(error, folder, None, "reading it back") from error
    return body


def _read(path: Path) -> dict[str, Any]:
    try:
        fd = open_regular(str(path), None, str(path))
    except FileNotFoundError:
        raise FailedError(
            f"{path}: missing, so the folder was never published completely. {_ADVICE}"
        ) from None
    with open(fd, "rb") as file:
        raw = file.read()
    body = strict_json(raw, str(path), integers_only=False)
    # Written again it has to give the same bytes, so that a flipped bit is found wherever it is.
    if not isinstance(body, dict) or not _well_formed(body.get("files")) or _sealed_text(body, path) != raw:
        raise FailedError(f"{path}: was changed after it was written. {_ADVICE}")
    return body


def _well_formed(files: Any) -> bool:
    return isinstance(files, dict) and all(
        isinstance(v, dict) and v.keys() == {"size", "sha256"} for v in files.values()
    )


def _text(body: dict[str, Any]) -> bytes:
    return (json.dumps(body, indent=1, sort_keys=True) + "\n").encode()


def _sealed_text(body: dict[str, Any], path: Path) -> bytes:
    """The file's bytes: the body as plain JSON with a sha256 over the rest of itself."""
    try:
        # There and back first: keys that are not text sort differently once they are.
        plain = json.loads(json.dumps(body))
    except (TypeError, ValueError) as error:
        raise FailedError(f"{path}: its extra part is not plain JSON: {error}.") from error
    plain.pop("commit_sha256", None)
    return _text({**plain, "commit_sha256": hashlib.sha256(_text(plain)).hexdigest()})


def _files(folder: Path) -> dict[str, Path]:
    """Every file below the folder by its relative name; FailedError for links and special files."""
    found: dict[str, Path] = {}
    for base, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(base, name)
            mode = path.lstat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise FailedError(
                    f"{path}: an output holds plain files only, not links or special files. Remove it."
                )
            if stat.S_ISREG(mode):
                found[path.relative_to(folder).as_posix()] = path
    return dict(sorted(found.items()))


def _hash(path: Path, *, sync: bool) -> dict[str, Any]:
    """Size and sha256 of a file, after it reached the disk when `sync`."""
    digest = hashlib.sha256()
    size = 0
    buffer = memoryview(bytearray(_HASH_BYTES))
    fd = open_regular(str(path), None, str(path))
    try:
        if sync:
            SYSCALLS.fsync(fd)
        while count := os.readv(fd, [buffer]):
            digest.update(buffer[:count])
            size += count
    finally:
        os.close(fd)
    return {"size": size, "sha256": digest.hexdigest()}


def sync_folder(folder: Path) -> None:
    """fsync a folder, so that the names in it survive a power loss."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        SYSCALLS.fsync(fd)
    finally:
        os.close(fd)


def create_file(path: Path) -> int:
    """Descriptor of a new file, to write, with the umask's mode; RefusedError when it exists."""
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except FileExistsError:
        raise RefusedError(
            f"{path}: exists, and nothing is ever written over. Choose another name."
        ) from None
    except OSError as error:
        raise io_failure(error, path, None, "creating it") from error


def write_file(path: Path, data: bytes, *, sync: bool = False) -> None:
    """Write a new small file with the umask's mode; RefusedError when it exists, FailedError on errors."""
    fd = create_file(path)
    try:
        write_all(fd, data, path)
        if sync:
            SYSCALLS.fsync(fd)
    finally:
        os.close(fd)
