"""Rotary tables and what turning heads takes. Sizes in bytes."""

from __future__ import annotations

from collections.abc import Iterable

from elo_engine.measure.setting import Setting
from elo_engine.model.spec import ModelSpec


def _half(spec: ModelSpec, rope: int | None) -> int:
    """Columns of a rotary embedding's tables: half of what turns of a head."""
    return 0 if rope is None else -(-int(spec.E * spec.ropes[rope].share) // 2)


def table_bytes(setting: Setting) -> int:
    """Cosine and sine by position, of every rotary embedding of the model; longrope has those of short documents beside
    those of long ones.
    """
    spec, total = setting.spec, 0
    for number, rope in enumerate(spec.ropes):
        both = rope.kind == "longrope" and setting.sequence_length > rope.short
        total += 2 * 4 * _half(spec, number) * (setting.sequence_length + (rope.short if both else 0))
    return total


def rows_bytes(setting: Setting) -> int:
    """Of a micro-batch: where in the tables of longrope its tokens look, if they are not their positions."""
    ropes = setting.spec.ropes
    return sum(8 * setting.N for rope in ropes if rope.kind == "longrope" and setting.sequence_length > rope.short)


def gathered_bytes(setting: Setting, layers: Iterable[int]) -> int:
    """Of a micro-batch, by token: on a CPU, for each rotary embedding that one of these layers has."""
    if setting.device == "cuda":
        return 0
    used = {setting.spec.kind(index).rope for index in layers}
    return 2 * 4 * setting.N * sum(_half(setting.spec, rope) for rope in used)


def turn_bytes(setting: Setting, index: int, *, back: bool) -> int:
    """Turning query and key heads in place: on the CPU half of what turns once more, in bf16 the tables in that type,
    and on the way back the negated sine.
    """
    spec = setting.spec
    half = _half(spec, spec.kind(index).rope)
    if setting.device == "cuda" or not half:
        return 0
    tables = 2 * 2 if setting.width == 2 else 0
    return setting.N * half * (tables + (spec.H + spec.K) * setting.width + (4 if back else 0))
