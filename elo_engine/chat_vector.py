"""Chat vector: target + weight x (instruct - base), the paper's last step (Huang et al., arXiv 2310.04799).

`base` is the model that both others were made from: `instruct` by instruction tuning, `target` by teaching it a
language. The difference of the first two, added to the third, gives a model of the language that follows instructions,
without training. It only means something where a number is at the same place for the same reason in all three, so what
does not fit is refused: other shapes, missing tensors, another vocabulary, quantised weights.

The arithmetic is in `checkpoint/task_vector.py`; here are the checks that need to know what a tensor or a file means,
the bar and the words. The output is TARGET's folder with other values: its tokenizer files and config, byte for byte.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from elo_engine import console
from elo_engine.checkpoint import CheckpointIndex, open_checkpoint, resolve_model
from elo_engine.checkpoint.task_vector import ADDABLE, Three, add_task_vector, require_addable
from elo_engine.errors import FailedError, RefusedError, UsageError
from elo_engine.measure.meter import human_bytes
from elo_engine.model import names

# What changes the result of the same weights without changing a shape.
_FORWARD_KEYS = (
    "model_type", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps",
    "sliding_window", "rope_theta", "rope_scaling", "rope_parameters", "tie_word_embeddings",
)  # fmt: skip
_SHOWN = 3  # tokens named in a message


def chat_vector(base: str, instruct: str, target: str, out: Path, weight: float = 1.0) -> str:
    """Write target + weight x (instruct - base) to the new folder `out`; returns the lines to show.

    base, instruct, target: folders or hub ids. With target = base and weight 1 the weights are instruct's, bit for
    bit; with weight 0 the target's.

    Raises:
        UsageError: a weight that is not finite, no such model. RefusedError: the three do not fit together, a sum that
        is not finite, `out` exists or lies in one of them, no room. FailedError: damaged or changing sources, I/O.
    """
    if not math.isfinite(weight):
        raise UsageError(f"elo chat-vector: --weight {weight} is not a finite number; 1 adds the whole difference")
    three = Three(*(_open(model) for model in (base, instruct, target)))
    same_as = check_tensors(three)
    remarks = [*check_vocabularies(three), *_other_settings(three), *_chat_template(three)]
    extra = {"kind": "chat-vector", "weight": weight} | {
        role.lower(): index.identity() for role, index in three.roles()
    }
    with console.bytes_bar(f"write {out.name}") as progress:
        stats = add_task_vector(
            three, out, weight, same_as=same_as, progress=progress, extra=extra,
            files={"README.md": _model_card(base, instruct, target, weight)},
        )  # fmt: skip
    done = f"{out}: target + {weight:g} x (instruct - base), {len(three.target.entries)} tensors, "
    done += f"{human_bytes(stats.bytes_written)} computed and written"
    return "\n".join([done, *remarks])


def _open(model: str) -> CheckpointIndex:
    """A checkpoint of which every byte is on disk; of a hub's model the rest is fetched."""
    folder = resolve_model(model)
    with console.bytes_bar(f"fetch {folder.name}") as progress:
        return open_checkpoint(folder).completed(progress)


def check_tensors(three: Three) -> dict[str, str]:
    """Refuse three checkpoints whose tensors cannot be added; returns {tensor: the one whose sum it gets as well}.

    A tied checkpoint may store its head a second time, or not: a head that is the embedding counts as the embedding,
    so that both stay one matrix.
    """
    target, wanted = three.target, _own_tensors(three.target)
    for role, index in three.roles():
        here = _own_tensors(index)
        for name in sorted(wanted ^ here):
            inside, outside = ("TARGET", role) if name in wanted else (role, "TARGET")
            tie = " (tie_word_embeddings differs between them)" if name == names.HEAD else ""
            raise RefusedError(
                f"{index.folder}: tensor {name!r} is in {inside} and not in {outside}{tie}. BASE must be the model "
                "that INSTRUCT and TARGET were made from: give three checkpoints of one architecture."
            )
    for name in target.entries:
        if name not in wanted:
            _require_copy(target, name)
            continue
        require_addable(three, name)
        for role, index in three.roles():
            _same_shape(role, index, target, name)
    return {name: names.EMBEDDING for name in target.entries if name not in wanted}


def _require_copy(target: CheckpointIndex, name: str) -> None:
    """A head that is the embedding stored again can be written as the embedding is."""
    here, embedding = target.entry(name), target.entry(names.EMBEDDING)
    if here.shape != embedding.shape or here.dtype not in ADDABLE:
        raise RefusedError(
            f"{target.folder}: tensor {name!r} is {here.dtype} {list(here.shape)} and {names.EMBEDDING!r} "
            f"{embedding.dtype} {list(embedding.shape)}, although config.json says that they are tied; give a TARGET "
            "whose head is stored as its embedding is, or not at all"
        )


def _own_tensors(index: CheckpointIndex) -> set[str]:
    """Names of the tensors without a head that is the embedding stored again."""
    copied = index.config.get("tie_word_embeddings") is True and names.EMBEDDING in index.entries
    return set(index.entries) - ({names.HEAD} if copied else set())


def _same_shape(role: str, index: CheckpointIndex, target: CheckpointIndex, name: str) -> None:
    here, wanted = index.entry(name).shape, target.entry(name).shape
    if here == wanted:
        return
    rows = len(here) == len(wanted) == 2 and here[1] == wanted[1] and name in (names.EMBEDDING, names.HEAD)
    if rows:
        more, fewer = (role, "TARGET") if here[0] > wanted[0] else ("TARGET", role)
        raise RefusedError(
            f"{index.folder}: tensor {name!r} has {here[0]} vocabulary rows in {role} and {wanted[0]} in TARGET, and "
            f"is the same otherwise: {more} has tokens added, or its embedding padded, and the rows that {fewer} lacks "
            "have no difference to add. Give models of one vocabulary; where only padding or unused tokens were added, "
            f"cut {more} to {min(here[0], wanted[0])} rows first (resize_token_embeddings in transformers)."
        )
    raise RefusedError(
        f"{index.folder}: tensor {name!r} has shape {here} in {role} and {wanted} in TARGET. BASE must be the model "
        "that INSTRUCT and TARGET were made from: give three checkpoints of one size."
    )


def check_vocabularies(three: Three) -> list[str]:
    """Refuse models whose tokenizer.json give an id to another token; returns remarks on what was not compared."""
    remarks: list[str] = []
    known = three.target.folder / "tokenizer.json"
    for role, index in three.roles()[:2]:
        path = index.folder / "tokenizer.json"
        absent = [place for place in (path, known) if not place.is_file()]
        if absent:
            remarks.append(
                f"the vocabularies of {role} and TARGET were compared by their size alone: {absent[0]} is not there"
            )
        elif path.read_bytes() != known.read_bytes():  # parsed they take ten times the memory
            _same_vocabulary(role, path, known)
    return remarks


def _same_vocabulary(role: str, path: Path, known: Path) -> None:
    here, wanted = _vocabulary(path), _vocabulary(known)
    if here == wanted:
        return
    parts = []
    for holder, tokens, others in ((role, here, wanted), ("TARGET", wanted, here)):
        own = sorted((number, token) for token, number in tokens.items() if token not in others)
        if own:
            shown = ", ".join(f"{token!r} ({number})" for number, token in own[:_SHOWN])
            parts.append(f"{len(own)} tokens are in {holder} alone: {shown}{', ...' if len(own) > _SHOWN else ''}")
    if not parts:
        token = min((token for token in here if here[token] != wanted[token]), key=lambda token: here[token])
        parts.append(f"token {token!r} has id {here[token]} in {role} and {wanted[token]} in TARGET")
    raise RefusedError(
        f"{path}: another vocabulary than {known}: {'; '.join(parts)}. A row of the embedding must be the same token "
        "in all three: give models of one tokenizer."
    )


def _vocabulary(path: Path) -> dict[str, int]:
    """Token -> id of a tokenizer.json, added tokens included."""
    try:
        content = json.loads(path.read_bytes())
        vocabulary = content["model"]["vocab"]
        if isinstance(vocabulary, list):  # a unigram model: (token, score) in the order of the ids
            vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
        added = {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
        return {**vocabulary, **added}
    except (ValueError, KeyError, TypeError) as error:
        raise FailedError(f"{path}: is not a tokenizer.json that can be read ({error!r}). Fetch it again.") from None


def _other_settings(three: Three) -> list[str]:
    """Remarks on settings of INSTRUCT and BASE under which the same weights compute something else."""
    remarks = []
    for role, index in three.roles()[:2]:
        for key in _FORWARD_KEYS:
            here, wanted = index.config.get(key), three.target.config.get(key)
            if here is not None and wanted is not None and here != wanted:
                remarks.append(f"config.json: {key} is {here} in {role} and {wanted} in TARGET, which the output keeps")
    return remarks


def _chat_template(three: Three) -> list[str]:
    if _has_template(three.target.folder) or not _has_template(three.instruct.folder):
        return []
    return [
        "TARGET has no chat template, so neither has the output: take chat_template.jinja or the chat_template of "
        f"tokenizer_config.json, and the end-of-turn token of generation_config.json, from {three.instruct.folder}"
    ]


def _has_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    try:
        settings: Any = json.loads((folder / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and bool(settings.get("chat_template"))


def _model_card(base: str, instruct: str, target: str, weight: float) -> str:
    # a hub id is a model's name; of a folder only its own name means something elsewhere
    base, instruct, target = (
        Path(model).expanduser().resolve().name if Path(model).expanduser().is_dir() else model
        for model in (base, instruct, target)
    )
    return f"""---
tags: [task-arithmetic, chat-vector]
---
# {target} with a chat vector

{target} + {weight:g} x ({instruct} - {base}), tensor by tensor (Chat Vector, arXiv 2310.04799). Made with elo_engine.

Tokenizer and configuration are those of {target}, byte for byte; the licences and limits of all three models hold.
"""
