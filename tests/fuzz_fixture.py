"""Mutations of valid files: bytes flipped, put in and taken out, JSON values replaced by what no writer would write."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

PIECES = (
    b"", b"\0", b"\xff", b"\xc3", b"0", b"9" * 30, b"-", b".", b"e", b"e400", b" ", b"\n", b",", b":", b'"', b"\\",
    b"\\ud800",     b"[", b"]", b"{", b"}", b"null", b"NaN", b"\t", b"&a ", b"*a", b"!!", b"'", b"#", b"\xef\xbb\xbf",
    b"[" * 2000, b"{\"a\":" * 600,
)  # fmt: skip
# JSON as text, so that what json.dumps cannot write is among it. Deep ones lie around Python's own limit as well, where
# what can be parsed can no longer be shown or written.
VALUES = (
    "null", "true", "false", "0", "-0", "-1", "1", "2", "7", "0.5", "-0.5", "1e-400", "1e400", "1e9", "NaN", "Infinity",
    "-Infinity", "1" + "0" * 12, str(2**31), str(2**63 - 1), str(2**63), str(2**64), "1" + "0" * 30, "1" + "0" * 310,
    "9" * 4300, "9" * 4301, "-" + "9" * 400, '""', '"x"', '"0"', '"1e9"', '"nan"', '"../x"', '"/"', '"a\\u0000b"',
    '"\\ud800"', '"' + "x" * 5000 + '"', '"' + "\\u3042" * 300 + '"', "[]", "{}", "[[]]", "[null]", '{"": null}',
    '{"a": {}}', '["full_attention"]', '"llama3"', '"yarn"', '{"rope_type": []}',
    '{"rope_type": "yarn", "factor": "x"}',
    '{"rope_type": "linear", "factor": 0}', "[" + "1," * 3000 + "1]",
    *("[" * n + "]" * n for n in (20, 200, 480, 2000)),
    *('{"a":' * n + "1" + "}" * n for n in (20, 100, 300, 480, 2000)),
)  # fmt: skip
_MARK = "\u0001mark\u0001"


def scrambled(raw: bytes, chance: random.Random) -> bytes:
    """Up to three places flipped, cut, doubled, put in or taken out; now and then random bytes alone."""
    if chance.random() < 0.02:
        return chance.randbytes(chance.randint(0, 200))
    data = bytearray(raw)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        at, how = chance.randrange(len(data) + 1), chance.randrange(6)
        if how == 0 and at < len(data):
            data[at] ^= 1 << chance.randrange(8)
        elif how == 1:
            data[at : at + chance.randint(1, 8)] = b""
        elif how == 2:
            del data[at:]
        elif how == 3:
            data[at:at] = data[at : at + chance.randint(1, 40)]
        else:
            data[at : at + chance.randint(0, 2)] = chance.choice(PIECES)
    return bytes(data)


def _places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every path below the root."""
    members = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in members:
        yield (*path, key)
        yield from _places(value, (*path, key))


def _copy(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _copy(value) for key, value in tree.items()}
    return [_copy(value) for value in tree] if isinstance(tree, list) else tree


def other_values(
    tree: Any, chance: random.Random, values: tuple[str, ...] = VALUES, extra: tuple[str, ...] = ()
) -> str:
    """The tree as JSON with one to three members replaced, removed, doubled, renamed or moved; `extra`: keys that may
    come in.
    """
    tree, texts = _copy(tree), {}
    for number in range(chance.choice((1, 1, 1, 2, 3))):
        places = list(_places(tree))
        if not places:
            break
        path = chance.choice(places)
        parent = tree
        for part in path[:-1]:
            parent = parent[part]
        key, mark = path[-1], f"{_MARK}{number}"
        how = chance.randrange(10)
        if how == 0:
            del parent[key]
        elif how == 1 and isinstance(parent, dict):  # twice the same key, with this value and another
            texts[json.dumps(mark)] = f"{json.dumps(parent[key])}, {json.dumps(key)}: {chance.choice(values)}"
            parent[key] = mark
        elif how == 2 and isinstance(parent, dict):
            parent[key + chance.choice(("x", "\0", "\ud800"))] = parent.pop(key)
        elif how == 3:
            parent[key] = _copy(chance.choice([parent, tree]))
        else:
            name = chance.choice(extra) if extra and how == 4 and isinstance(tree, dict) else key
            (tree if name != key or name in extra else parent)[name] = mark
            texts[json.dumps(mark)] = chance.choice(values)
    text = json.dumps(tree)
    for mark, instead in texts.items():
        text = text.replace(mark, instead)
    return text


def mutated(tree: Any, chance: random.Random, **options: Any) -> bytes:
    """Either of the two; a surrogate that stands alone is written as it is."""
    text = json.dumps(tree) if chance.random() < 0.3 else other_values(tree, chance, **options)
    raw = text.encode("utf-8", "surrogatepass")
    return scrambled(raw, chance) if chance.random() < 0.35 else raw
