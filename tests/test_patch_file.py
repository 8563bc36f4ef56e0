"""The patch file's header: a flipped bit is found, and no field of a hostile one gets through."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from elo_engine.checkpoint import apply_patch, verify_patch
from elo_engine.checkpoint import patch_file as format_module
from elo_engine.checkpoint.patch_file import PatchFile, safetensors_header
from elo_engine.errors import FailedError, RefusedError

from .checkpoint_fixture import leftovers, state
from .patch_fixture import base, changed, make_changed, patch  # noqa: F401

# ruff: noqa: F811 (fixtures are parameters of their own name)


def test_every_flipped_bit_is_found(base: Path, changed: Path, patch: Path, tmp_path: Path) -> None:
    """Every byte of the header, and one in every tensor's payload."""
    good = patch.read_bytes()
    start = 8 + int.from_bytes(good[:8], "little")
    with PatchFile(patch) as opened:
        payload = [entry.begin + entry.nbytes // 2 for entry in opened.entries.values()]
    assert len(payload) == 4
    for position in [*range(start), *payload]:
        bad = bytearray(good)
        bad[position] ^= 1 << position % 8
        patch.write_bytes(bad)
        if position < start:
            with pytest.raises((FailedError, RefusedError)), PatchFile(patch):
                pass
            continue
        with pytest.raises(FailedError, match="its bytes changed since the patch was made"):
            verify_patch(base, patch)
        with pytest.raises(FailedError, match="its bytes changed since the patch was made"):
            apply_patch(base, patch, tmp_path / "out")
        assert not (tmp_path / "out").exists() and not leftovers(tmp_path)
    for cut in (0, 7, start - 1, start, len(good) - 1):
        patch.write_bytes(good[:cut])
        with pytest.raises(FailedError), PatchFile(patch):
            pass


def resealed(patch: Path, change: Callable[[dict[str, Any], dict[str, Any], dict[str, str]], object]) -> None:
    """Change what a patch says (tensors' fields, contents, metadata) and seal it as a hostile author would."""
    raw = patch.read_bytes()
    length = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:length])
    metadata = header.pop("__metadata__")
    contents = json.loads(metadata["contents"])
    contents = change(header, contents, metadata) or contents
    metadata["contents"] = contents if isinstance(contents, str) else json.dumps(contents)
    shapes = [(name, fields["dtype"], tuple(fields["shape"])) for name, fields in header.items()]
    if "elo_patch" in metadata:
        metadata["seal"] = format_module._seal(metadata, shapes)
    sizes = [(n, d, s, f["data_offsets"][1] - f["data_offsets"][0]) for (n, d, s), f in zip(shapes, header.values())]  # noqa: B905
    patch.write_bytes(safetensors_header(sizes, metadata) + raw[length:])


def _set(*path: str, value: object) -> Callable[[dict[str, Any], dict[str, Any], dict[str, str]], None]:
    def change(header: dict[str, Any], contents: dict[str, Any], metadata: dict[str, str]) -> None:
        node: Any = {"header": header, "contents": contents, "metadata": metadata}
        for part in path[:-1]:
            node = node[part]
        if value is None:
            node.pop(path[-1])
        else:
            node[path[-1]] = value

    return change


W, S = ("contents", "tensors", "layers.0.weight"), ("contents", "shards", "s-1.safetensors")
GHOST = dict.fromkeys(("dtype", "before", "after", "xor"), "0" * 64)
EVIL = {"size": 1, "before": "0" * 64, "after": "0" * 64}
HOSTILE: list[tuple[str, Any]] = [
    (r"another version|a patch of format '2'", _set("metadata", "elo_patch", value="2")),
    ("not a patch made by", _set("metadata", "elo_patch", value=None)),
    ("exactly the keys", _set("metadata", "more", value="x")),
    ("identity is not a sha256", _set("metadata", "base", value="../../etc")),
    ("not valid JSON", lambda h, c, m: "{"),
    ("duplicate key", lambda h, c, m: '{"tensors": {}, "tensors": {}, "shards": {}}'),
    ("exactly the keys tensors and shards", lambda h, c, m: "[]"),
    ("exactly the keys tensors and shards", _set("contents", "code", value="x")),
    ("tensors are not a JSON object", _set("contents", "tensors", value=[])),
    ("in the contents or in the file, not in both", _set(*W, value=None)),
    ("in the contents or in the file", _set("contents", "tensors", "ghost", value=GHOST)),
    ("exactly the keys", _set(*W, "dtype", value=None)),
    ("exactly the keys", _set(*W, "more", value="x")),
    ("before is not a sha256", _set(*W, "before", value="0" * 63)),
    ("after is not a sha256", _set(*W, "after", value=["0"])),
    ("xor is not a sha256", _set(*W, "xor", value="A" * 64)),
    ("of dtype 'F32' is stored as U16", _set(*W, "dtype", value="F32")),
    ("of dtype 'F4' is stored as U16", _set(*W, "dtype", value="F4")),
    ("is stored as U16", _set(*W, "dtype", value=["BF16"])),
    ("shards are not a JSON object", _set("contents", "shards", value="x")),
    ("has no size in bytes", _set(*S, "size", value=True)),
    ("where only non-negative integers", lambda h, c, m: json.dumps(c).replace('"size": ', '"size": -', 1)),
    ("before is not a sha256", _set(*S, "before", value="")),
    ("other names or sizes", _set(*S, value=None)),
    ("other names or sizes", _set("contents", "shards", "../evil.safetensors", value=EVIL)),
    ("another", _set("header", "layers.0.weight", "shape", value=[12, 8])),
    ("BF16", _set(*W, "dtype", value="F16")),
    ("headers of its shards are not those", _set("metadata", "base", value="0" * 64)),
    ("does not become|is neither|differs from both", _set(*W, "after", value="0" * 64)),
    ("its bytes changed", _set(*W, "xor", value="0" * 64)),
    ("differs from both", _set(*S, "before", value="0" * 64)),
    ("written with bytes other than", _set(*S, "after", value="0" * 64)),
]


@pytest.mark.parametrize(("message", "change"), HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_patch_is_refused(base: Path, patch: Path, tmp_path: Path, message: str, change: Any) -> None:
    resealed(patch, lambda *_: None)
    apply_patch(base, patch, tmp_path / "good")  # the tool that seals does seal
    before = state(base)
    resealed(patch, change)
    with pytest.raises((FailedError, RefusedError), match=message):
        apply_patch(base, patch, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not leftovers(tmp_path) and state(base) == before


def test_a_safetensors_file_of_somebody_else_is_no_patch(base: Path, tmp_path: Path) -> None:
    save_file({"layers.0.weight": torch.zeros(8, 12)}, tmp_path / "weights.safetensors", {"format": "pt"})
    for path in (tmp_path / "weights.safetensors", base / "s-1.safetensors"):
        with pytest.raises(RefusedError, match="not a patch made by"):
            verify_patch(base, path)
