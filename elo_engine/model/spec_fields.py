"""Fields of a `config.json`, each of its kind: whoever wrote it, nothing but a usable number or flag gets past."""

from __future__ import annotations

from typing import Any

from elo_engine.errors import RefusedError, shown

# Far above every model: what is larger would be allocated before anybody misses its weights.
_LARGEST = {"num_hidden_layers": 1 << 16}
_LARGEST_SIZE = 1 << 31
_LARGEST_NUMBER = 1e15


def require(config: dict[str, Any], key: str, kind: type = int) -> Any:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
        raise RefusedError(
            f"config.json: {key} is {shown(value)}; a {kind.__name__} is needed to know the model's maths"
        )
    return value


def positive(config: dict[str, Any], key: str) -> int:
    value: int = require(config, key)
    if value <= 0:
        raise RefusedError(f"config.json: {key} is {shown(value)}; a positive number is needed")
    if value > _LARGEST.get(key, _LARGEST_SIZE):
        raise RefusedError(f"config.json: {key} is {shown(value)}, more than any model has; is the file damaged?")
    return value


def flag(config: dict[str, Any], key: str, missing: bool = False) -> bool:
    """true or false as such: the text "false" would count as true."""
    value = config.get(key)
    if value is not None and value not in (True, False):
        raise RefusedError(f"config.json: {key} is {shown(value)}; true or false is needed")
    return missing if value is None else bool(value)


def number(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < _LARGEST_NUMBER:
        raise RefusedError(f"config.json: {key} is {shown(value)}; a positive number is needed")
    return float(value)
