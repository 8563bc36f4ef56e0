"""From what a person writes as `model:` to a folder, and which of its files an output has to carry along."""

from __future__ import annotations

import fnmatch
import os
import warnings
from pathlib import Path

from elo_engine.checkpoint.hub_listing import HubFile, HubUnreachable, Listing, list_files, recorded_commit
from elo_engine.checkpoint.index import INDEX_NAME, SINGLE_NAME, wanted_shards, weights_complete
from elo_engine.checkpoint.partial import PartialStore, cache_folder
from elo_engine.checkpoint.partial_record import (
    COMMIT_HASH,
    HUB_ID,
    PARTIAL_NAME,
    SHARD_NAME,
    PartialShard,
    Record,
    locked,
    replace_file,
)
from elo_engine.checkpoint.publish import preflight_space
from elo_engine.checkpoint.ranges import RemoteFile, hub_client, hub_url
from elo_engine.errors import FailedError, RefusedError, UsageError

# What makes a checkpoint usable besides its weights; without the model card, for an output is another model.
_TRAVELLING = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*",
    "*.model",
    "*.tiktoken",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
)
# Pickle and code stay where they are, whatever they are called.
_NEVER = ("*.bin", "*.pkl", "*.pickle", "*.pt", "*.pth", "*.ckpt", "*.py", "*.so", "*.safetensors", "*.partial")


def model_files(folder: Path) -> list[Path]:
    """The non-weight files that travel to an output byte for byte, sorted: config, tokenizer, licence, ...

    The safetensors index is not among them, because it is written last. Links (hub caches) are followed; a
    FIFO or a folder of such a name is skipped.
    """
    folder = Path(folder)
    found = [*folder.iterdir(), *(folder / "additional_chat_templates").glob("*")]
    return sorted(path for path in found if _travels(path.relative_to(folder).as_posix()) and path.is_file())


def _travels(name: str) -> bool:
    def matches(patterns: tuple[str, ...]) -> bool:
        # fnmatch lets `*` cross a slash, so the depth is compared as well.
        return any(fnmatch.fnmatchcase(name, p) and name.count("/") <= p.count("/") for p in patterns)

    return matches(_TRAVELLING) and not any(fnmatch.fnmatchcase(name.lower(), p) for p in _NEVER)


def resolve_model(model: str, revision: str | None = None) -> Path:
    """The folder of a model: an existing folder as it is, or the hub id `owner/name`, begun or found in a cache.

    A complete copy in huggingface_hub's cache is used as it is. Otherwise the folder lies in elo's own cache, for
    one pinned commit: configuration, tokenizer, licence and the shards' headers are fetched now, the weights range
    by range when they are read (`CheckpointIndex.remote`, `CheckpointIndex.completed`). Pickle and code never are.
    `revision` is a branch, tag or commit; a branch is looked up again each time, and when the hub cannot be reached
    means what it meant the last time.

    Raises UsageError (neither a folder nor a reachable hub id; says what was tried), RefusedError (the repository
    has no safetensors weights, not enough disk space) and FailedError (an answer that is not what was asked for).
    """
    folder = Path(os.path.expanduser(model))
    if folder.is_dir():
        if revision is not None:
            raise UsageError(
                f"{model} is a folder on disk, which has no revision {revision!r}: leave the revision out."
            )
        return folder
    if folder.exists():
        raise UsageError(
            f"{model} is a file. Give the folder that holds config.json and the safetensors weights."
        )
    if not HUB_ID.fullmatch(model):
        raise UsageError(
            f"{model!r} is neither a folder on disk (tried {folder.absolute()}) nor a hub id of the form "
            "owner/name. Check the spelling of the path."
        )
    tried = f"{model!r}: no such folder (tried {folder.absolute()})"
    try:
        import huggingface_hub  # noqa: F401
    except ImportError:
        raise UsageError(
            f"{tried}, and huggingface_hub is not installed: pip install huggingface_hub."
        ) from None
    snapshot = _snapshot(model, revision)
    if snapshot is not None and weights_complete(snapshot):
        return snapshot
    root = cache_folder() / "hub" / model.replace("/", "--")
    commit = revision if revision is not None and COMMIT_HASH.fullmatch(revision) else None
    if commit is None or not _begun(root / commit):
        try:
            listing = list_files(model, revision, root, tried)
        except HubUnreachable as error:
            commit = commit or recorded_commit(root, revision)
            if commit is None or not _begun(root / commit):
                raise _unreachable(model, revision, tried, snapshot, error) from error
            if commit != revision:
                warnings.warn(
                    f"{model}: the hub could not be reached, so {_at(revision)} is taken for the commit {commit}, "
                    f"which it was the last time ({error})",
                    stacklevel=1,  # one place for all callers, so that it is said once
                )
        else:
            commit = listing.commit
            if not _begun(root / commit):
                _begin(listing, root / commit)
    store = PartialStore.load(root / commit)
    if store is not None:
        store.fetch_headers()
    return root / commit


def commit_of(model: str, folder: Path) -> str | None:
    """The commit of a hub's model in the folder that `resolve_model` gave for it; None when the model is a folder."""
    if Path(os.path.expanduser(model)).is_dir() or not COMMIT_HASH.fullmatch(folder.name):
        return None
    return folder.name


def _snapshot(model: str, revision: str | None) -> Path | None:
    """The model's folder in huggingface_hub's cache, if it is there; shards may be missing in it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except HFValidationError as error:
        raise UsageError(f"{model!r} is not a hub id: {error} Check the spelling.") from error
    except (LocalEntryNotFoundError, OSError):  # not there, or not readable: elo's own cache serves
        return None


def _begun(folder: Path) -> bool:
    return (folder / PARTIAL_NAME).exists() or weights_complete(folder)


def _at(revision: str | None) -> str:
    return f"revision {revision}" if revision else "the default revision"


def _unreachable(
    model: str, revision: str | None, tried: str, snapshot: Path | None, error: HubUnreachable
) -> RefusedError | UsageError:
    at = _at(revision)
    if snapshot is not None and not any(snapshot.glob("*.safetensors")):
        return _no_weights(model, at)
    return UsageError(
        f"{tried}, and the hub could not be reached while {at} is not in the local cache. Fetch the model where "
        f"there is a network and give its folder. ({error})"
    )


def _no_weights(model: str, at: str) -> RefusedError:
    return RefusedError(
        f"{model} ({at}) has no safetensors weights on the hub. Pickle weights are never loaded: convert them where "
        "you trust the source (AutoModelForCausalLM.from_pretrained(...).save_pretrained(NEW_FOLDER)) and give the "
        "new folder."
    )


def _begin(listing: Listing, folder: Path) -> None:
    """Fetch the small files and write the record of the shards, last: until it is there, this begins again."""
    model, at = listing.repo, f"revision {listing.commit}"
    shards = {name for name in listing.files if SHARD_NAME.fullmatch(name) and not name.startswith("consolidated")}
    if not shards:
        raise _no_weights(model, at)
    if INDEX_NAME not in listing.files and SINGLE_NAME not in shards:
        raise UsageError(f"{model} ({at}): no weights of a whole model: neither {SINGLE_NAME} nor {INDEX_NAME}.")
    if "config.json" not in listing.files:
        raise UsageError(f"{model} ({at}): no config.json, so it is not a model that can be trained here.")
    small = [name for name in sorted(listing.files) if _fetched_at_once(name)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder}: cannot be made: {error.strerror}. Set ELO_CACHE to another folder.") from error
    with locked(folder):
        if _begun(folder):  # by another process meanwhile
            return
        missing = [name for name in small if not _there(folder / name, listing.files[name].size)]
        preflight_space(folder, sum(listing.files[name].size for name in missing))
        _fetch_small(listing, missing, folder)
        wanted = wanted_shards(folder)
        absent = [name for name in wanted if name not in listing.files]
        if absent:
            raise FailedError(f"{model} ({at}): {INDEX_NAME} names {absent[0]}, which the repository does not have.")
        record = {name: _to_fetch(listing.files[name], f"{model} ({at}): {name}") for name in wanted}
        Record(model, listing.commit, listing.endpoint, record).write(folder)


def _to_fetch(on_hub: HubFile, label: str) -> PartialShard:
    if on_hub.sha256 is None and (on_hub.blob is None or len(on_hub.blob) != 40):
        raise FailedError(
            f"{label}: the hub lists no hash of it, so what arrives could not be verified. Fetch the model with "
            "another program and give its folder."
        )
    return PartialShard(on_hub.size, on_hub.sha256, blob=on_hub.blob)


def _fetched_at_once(name: str) -> bool:
    """What travels, and all other JSON at the top, where some tokenizers and processors keep theirs."""
    parts = name.split("/")
    plain = all(part not in ("", ".", "..") and part.isprintable() and "\\" not in part for part in parts)
    json_file = len(parts) == 1 and name.endswith(".json") and name != PARTIAL_NAME
    return plain and (json_file or _travels(name))


def _there(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _fetch_small(listing: Listing, names: list[str], folder: Path) -> None:
    if not names:
        return
    with hub_client() as client:
        for name in names:
            on_hub = listing.files[name]
            label = f"{listing.repo}@{listing.commit[:12]}: {name}"
            url = hub_url(listing.repo, name, listing.commit)
            data = client.fetch_small(RemoteFile(label, url, listing.commit, on_hub.size))
            on_hub.check(data, label)
            (folder / name).parent.mkdir(exist_ok=True)
            replace_file(folder / name, data)
