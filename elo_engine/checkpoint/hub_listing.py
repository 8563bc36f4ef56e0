"""What a hub says of a repository: which commit a branch or tag is now, and the files of that commit."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elo_engine.checkpoint.header import strict_json
from elo_engine.checkpoint.partial_record import COMMIT_HASH, blob_hash, locked, replace_file
from elo_engine.checkpoint.ranges import TRANSFER
from elo_engine.errors import EloError, FailedError, UsageError

_REFS_NAME = "refs.json"
_AGAIN = (429, 500, 502, 503, 504)


class HubUnreachable(Exception):
    """The hub did not answer, or not with an answer; what is in the cache may serve instead."""


@dataclass(frozen=True)
class HubFile:
    """A file of a commit: its size and, where the hub says them, its sha256 (LFS) or git blob hash."""

    size: int
    sha256: str | None
    blob: str | None

    def check(self, data: bytes, label: str) -> None:
        """FailedError unless these are the file's bytes."""
        wanted = self.sha256 or self.blob
        got = wanted
        if self.sha256:
            got = hashlib.sha256(data).hexdigest()
        elif self.blob and len(self.blob) == 40:
            digest = blob_hash(len(data))
            digest.update(data)
            got = digest.hexdigest()
        if len(data) != self.size or got != wanted:
            raise FailedError(f"{label}: has the hash {got} and {wanted} on the hub. It was not kept: try again.")


@dataclass(frozen=True)
class Listing:
    """The files of one commit of one repository on one hub."""

    repo: str
    commit: str
    endpoint: str
    files: dict[str, HubFile]


def list_files(repo: str, revision: str | None, root: Path, tried: str) -> Listing:
    """Ask the hub; remembers below `root` which commit the revision is.

    Raises HubUnreachable, UsageError (the hub has no such repository or revision for this user; `tried` begins the
    message) and FailedError (an answer that makes no sense).
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if constants.HF_HUB_OFFLINE:
        raise HubUnreachable("HF_HUB_OFFLINE is set")
    at = f"revision {revision}" if revision else "the default revision"
    for attempt in range(TRANSFER.attempts):
        try:
            info = HfApi(endpoint=constants.ENDPOINT).model_info(
                repo, revision=revision, files_metadata=True, timeout=TRANSFER.timeout_s
            )
            break
        except (HfHubHTTPError, HFValidationError) as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            if status not in _AGAIN:
                raise UsageError(
                    f"{tried}, and the hub has no {at} of it for you: {_first_line(error)} Check the spelling; for a "
                    "gated model accept its licence on the hub and log in with `hf auth login`."
                ) from error
            if attempt == TRANSFER.attempts - 1:
                raise HubUnreachable(_first_line(error)) from error
            time.sleep(min(TRANSFER.backoff_s * 2**attempt, TRANSFER.longest_wait_s))
        except Exception as error:  # the HTTP libraries beneath have their own, and other ones in every release
            raise HubUnreachable(f"{type(error).__name__}: {_first_line(error)}") from error
    where = f"{repo} on {constants.ENDPOINT}"
    if not isinstance(info.sha, str) or not COMMIT_HASH.fullmatch(info.sha):
        raise FailedError(f"{where}: the hub gives no commit for {at}. Fetch the model with another program.")
    if revision is not None and COMMIT_HASH.fullmatch(revision) and info.sha != revision:
        raise FailedError(f"{where}: the commit {revision} was asked for, and the hub answers with {info.sha}.")
    files = {}
    for sibling in info.siblings or []:
        if type(sibling.size) is not int or sibling.size < 0:
            raise FailedError(f"{where}: the hub does not give the size of {sibling.rfilename[:200]!r}.")
        sha256 = sibling.lfs.sha256 if sibling.lfs is not None else None
        files[sibling.rfilename] = HubFile(sibling.size, sha256, sibling.blob_id if sha256 is None else None)
    _remember(root, revision, info.sha)
    return Listing(repo, info.sha, constants.ENDPOINT, files)


def recorded_commit(root: Path, revision: str | None) -> str | None:
    """What commit the revision was the last time that this hub said so."""
    from huggingface_hub import constants

    commit = _recorded(root).get(constants.ENDPOINT, {}).get(revision or constants.DEFAULT_REVISION)
    return commit if isinstance(commit, str) and COMMIT_HASH.fullmatch(commit) else None


def _remember(root: Path, revision: str | None, commit: str) -> None:
    from huggingface_hub import constants

    if recorded_commit(root, revision) == commit:
        return
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{root}: cannot be made: {error.strerror}. Set ELO_CACHE to another folder.") from error
    with locked(root):
        found = _recorded(root)
        here = found.setdefault(constants.ENDPOINT, {})
        if here.get(revision or constants.DEFAULT_REVISION) != commit:
            here[revision or constants.DEFAULT_REVISION] = commit
            replace_file(root / _REFS_NAME, (json.dumps(found, indent=1, sort_keys=True) + "\n").encode())


def _recorded(root: Path) -> dict[str, dict[str, Any]]:
    """{endpoint: {revision: commit}}; nothing when it cannot be read, because the hub can say it again."""
    try:
        found = strict_json((root / _REFS_NAME).read_bytes(), str(root / _REFS_NAME), integers_only=True)
    except (OSError, EloError):
        return {}
    return {k: v for k, v in found.items() if isinstance(v, dict)} if isinstance(found, dict) else {}


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
