"""The checkpoint's own tokenizer, from local files only and never by running code that came with them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elo_engine.errors import FailedError, RefusedError, UsageError

# Without a tokenizer.json these hold the model of the tokenizer; everything else in a folder is settings.
_MODEL_FILES = ("vocab.json", "merges.txt", "vocab.txt", "*.model", "*.tiktoken", "tekken.json")


def tokenizer_hash(folder: Path) -> str:
    """sha256 (hex) of the tokenizer's model: tokenizer.json, or else its model files sorted by name.

    Token folders and checkpoints are matched by it. Raises UsageError when the folder holds no tokenizer.
    """
    single = folder / "tokenizer.json"
    if single.is_file():
        return hashlib.sha256(single.read_bytes()).hexdigest()
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; give the folder of a model or a tokenizer")
    files = sorted({path for pattern in _MODEL_FILES for path in folder.glob(pattern) if path.is_file()})
    if not files:
        raise UsageError(
            f"{folder}: no tokenizer here (looked for tokenizer.json, {', '.join(_MODEL_FILES)}); "
            "give the folder of a model that has its tokenizer files beside the weights"
        )
    digest = hashlib.sha256()
    for path in files:
        content = path.read_bytes()
        digest.update(f"{path.name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


@dataclass(frozen=True)
class Encoder:
    """A loaded tokenizer; `bos_id` is the id that it puts in front of a text, None where it puts none."""

    backend: Any
    sha256: str
    vocab_size: int
    eos_id: int
    bos_id: int | None

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, no special token around them; those of one text never depend on the others."""
        # The call that leaves out character offsets: 1.5 times the speed (tokenizers 0.23, two cores).
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]


def load_encoder(folder: Path) -> Encoder:
    """Load the tokenizer of a local folder through transformers; raises as `load_tokenizer`."""
    return encoder_of(folder, load_tokenizer(folder))


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a local folder as transformers has it: fast, and with an end-of-text token.

    Raises UsageError (no tokenizer, no end-of-text token), RefusedError (needs its own code, has no fast
    form), FailedError (its files cannot be parsed).
    """
    tokenizer_hash(folder)
    for name in ("tokenizer_config.json", "config.json"):
        _refuse_own_code(folder / name)

    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception for a file that it cannot parse
        raise FailedError(f"{folder}: the tokenizer cannot be loaded ({error}); fetch its files again") from error
    if not getattr(tokenizer, "is_fast", False):
        raise RefusedError(f"{folder}: {type(tokenizer).__name__} has no fast form; save it as tokenizer.json first")
    if tokenizer.eos_token_id is None:
        raise UsageError(
            f"{folder}: the tokenizer names no end-of-text token, which has to close every document; "
            "set eos_token in tokenizer_config.json"
        )
    return tokenizer


def encoder_of(folder: Path, tokenizer: Any) -> Encoder:
    """What `load_tokenizer` gave for the folder, as an encoder of plain texts."""
    backend = tokenizer.backend_tokenizer
    # A tokenizer.json can carry the truncation and padding of the day it was saved.
    backend.no_truncation()
    backend.no_padding()
    return Encoder(
        backend=backend,
        sha256=tokenizer_hash(folder),
        vocab_size=max(backend.get_vocab(with_added_tokens=True).values()) + 1,
        eos_id=int(tokenizer.eos_token_id),
        bos_id=_bos_in_front(tokenizer),
    )


def _refuse_own_code(path: Path) -> None:
    try:
        settings = json.loads(path.read_bytes())
    except FileNotFoundError:
        return
    except (ValueError, RecursionError) as error:
        raise FailedError(f"{path}: not JSON ({error}); fetch the file again") from None
    if isinstance(settings, dict) and settings.get("auto_map"):
        raise RefusedError(
            f"{path}: `auto_map` asks to run Python code that came with the model, which is never done here; "
            "use a checkpoint whose tokenizer transformers knows itself, or remove `auto_map` if it does"
        )


def _bos_in_front(tokenizer: Any) -> int | None:
    """The begin-of-text id if encoding as the tokenizer itself would do it puts one in front, else None."""
    bos_id = tokenizer.bos_token_id
    if bos_id is None:
        return None
    plain = tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).ids
    dressed = tokenizer.backend_tokenizer.encode("a", add_special_tokens=True).ids
    return int(bos_id) if dressed[:1] == [bos_id] and plain[:1] != [bos_id] else None
