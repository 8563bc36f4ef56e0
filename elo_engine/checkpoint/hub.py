"""From what a person writes as `model:` to a folder, and which of its files an output has to carry along."""

from __future__ import annotations

import fnmatch
import os
import re
from pathlib import Path

from elo_engine.errors import RefusedError, UsageError

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
_NEVER = ("*.bin", "*.pkl", "*.pickle", "*.pt", "*.pth", "*.ckpt", "*.py", "*.so", "*.safetensors")
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


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
    """The folder of a model: an existing folder as it is, or the hub id `owner/name`, fetched to its cache.

    Only safetensors, JSON, tokenizer and licence files are fetched, never pickle or code. Raises UsageError
    (neither a folder nor a reachable hub id; says what was tried) and RefusedError (the repository has no
    safetensors weights).
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
    if not _HUB_ID.fullmatch(model):
        raise UsageError(
            f"{model!r} is neither a folder on disk (tried {folder.absolute()}) nor a hub id of the form "
            "owner/name. Check the spelling of the path."
        )
    return _fetch(model, revision, folder)


def _fetch(model: str, revision: str | None, folder: Path) -> Path:
    tried = f"{model!r}: no such folder (tried {folder.absolute()})"
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise UsageError(
            f"{tried}, and huggingface_hub is not installed: pip install huggingface_hub."
        ) from None
    at = f"revision {revision}" if revision else "the default revision"
    try:
        # The hub's patterns let `*` cross a slash as well: `*/*` keeps copies in other formats in subfolders
        # out, and `consolidated*` is a second copy of the same weights in some repositories.
        got = snapshot_download(
            model,
            revision=revision,
            allow_patterns=[*_TRAVELLING, "*.safetensors", "*.json"],
            ignore_patterns=["*/*.safetensors", "*/*.json", "consolidated*", *_NEVER[:-1]],
        )
    except LocalEntryNotFoundError as error:
        raise UsageError(
            f"{tried}, and the hub could not be reached while {at} is not in the local cache. Fetch the "
            f"model where there is a network and give its folder. ({_first_line(error)})"
        ) from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise UsageError(
            f"{tried}, and the hub has no {at} of it for you: {_first_line(error)} Check the spelling; for a "
            "gated model accept its licence on the hub and log in with `hf auth login`."
        ) from error
    except Exception as error:  # the hub's client has more error classes, and other ones in every release
        raise UsageError(
            f"{tried}, and fetching {at} from the hub failed: {type(error).__name__}: {_first_line(error)} "
            "Try again; what was fetched so far is kept in the hub cache."
        ) from error
    if not any(Path(got).glob("*.safetensors")):
        raise RefusedError(
            f"{model} ({at}) has no safetensors weights on the hub. Pickle weights are never loaded: convert "
            "them where you trust the source "
            "(AutoModelForCausalLM.from_pretrained(...).save_pretrained(NEW_FOLDER)) and give the new "
            "folder."
        )
    return Path(got)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
