"""YAML with one meaning: what other readers would take differently, or nobody could mean, is refused by its line.

PyYAML keeps the last of two equal keys, lets anchors multiply a few lines into gigabytes, and answers a tag or a date
that its text does not fit with whatever Python's own conversion raises.
"""

from __future__ import annotations

from typing import Any

import yaml

from elo_engine.errors import UsageError

_LONGEST = 1 << 20  # characters
_DEEPEST = 32
_MOST_NODES = 20_000  # with what anchors repeat; a configuration has some hundred
_LARGEST = 1 << 63


def read_yaml(text: str, where: str) -> Any:
    """The document as plain data. UsageError naming `where`: not YAML, the same key twice, nested or repeated beyond
    reason, an integer beyond 64 bits, text with characters that no file name or message can hold.
    """
    if len(text) > _LONGEST:
        raise UsageError(f"{where}: {len(text)} characters are too many for a configuration")
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_nodes(node, where)
            tree = loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise UsageError(f"{where}: not valid YAML: {error}") from error
    except RecursionError:
        raise UsageError(f"{where}: not valid YAML: nested too deeply") from None
    except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{where}: not valid YAML: a value does not fit its tag or its form ({error})") from error
    _check_values(tree, where)
    return tree


def _check_nodes(root: yaml.Node, where: str) -> None:
    waiting, count = [(root, 1)], 0
    while waiting:
        node, depth = waiting.pop()
        count += 1
        if depth > _DEEPEST or count > _MOST_NODES:
            what = "nested too deeply" if depth > _DEEPEST else "too large, with what its anchors repeat"
            raise UsageError(f"{where}: line {node.start_mark.line + 1}: not a configuration: {what}")
        if isinstance(node, yaml.MappingNode):
            seen: set[tuple[str, str]] = set()
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode):
                    if (key.tag, key.value) in seen:
                        raise UsageError(
                            f"{where}: line {key.start_mark.line + 1}: the key {key.value[:80]!r} is given twice; "
                            "remove one of the two"
                        )
                    seen.add((key.tag, key.value))
                waiting += [(key, depth + 1), (value, depth + 1)]
        elif isinstance(node, yaml.SequenceNode):
            waiting += [(value, depth + 1) for value in node.value]


def _check_values(tree: Any, where: str) -> None:
    waiting = [tree]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple, set)):
            waiting += value
        elif isinstance(value, int) and not -_LARGEST <= value < _LARGEST:
            raise UsageError(f"{where}: an integer of {value.bit_length()} bits; 64 are the most that anything takes")
        elif isinstance(value, str) and any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value):
            raise UsageError(f"{where}: {value[:80]!r} holds a zero byte or half of a surrogate pair: that is no text")
