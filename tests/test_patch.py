"""Patches: small, exact both ways, averaged as values, refused where they do not belong."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from elo_engine.checkpoint import (
    apply_patch,
    average_patches,
    diff_checkpoints,
    open_checkpoint,
    revert_patch,
    verify_commit,
    verify_patch,
)
from elo_engine.errors import FailedError, RefusedError, UsageError

from .checkpoint_fixture import leftovers, state
from .patch_fixture import CHANGES, base, changed, edit, make_changed, patch, same_weights  # noqa: F401

# ruff: noqa: F811 (fixtures are parameters of their own name)


def test_a_patch_holds_the_changed_tensors_alone(base: Path, changed: Path, patch: Path) -> None:
    index = open_checkpoint(base)
    with safe_open(patch, "np") as file:  # by the format's own reader
        assert set(file.keys()) == set(CHANGES) and file.metadata()["base"] == index.identity()
        for name in CHANGES:
            entry = index.entries[name]
            before = np.frombuffer((base / entry.shard).read_bytes()[entry.begin : entry.end], np.uint8)
            after = np.frombuffer((changed / entry.shard).read_bytes()[entry.begin : entry.end], np.uint8)
            stored = file.get_tensor(name)
            assert stored.shape == entry.shape and stored.dtype == np.dtype(f"u{entry.torch_dtype.itemsize}")
            assert (stored.reshape(-1).view(np.uint8) == (before ^ after)).all()
    raw = patch.read_bytes()
    assert int.from_bytes(raw[:8], "little") % 8 == 0
    payload = index.bytes_of(CHANGES)
    assert len(raw) == 8 + int.from_bytes(raw[:8], "little") + payload


def test_apply_then_revert_is_byte_identical(base: Path, changed: Path, patch: Path, tmp_path: Path) -> None:
    before, seen = state(base), []
    stats = apply_patch(base, patch, tmp_path / "new", lambda *told: seen.append(told))
    assert same_weights(tmp_path / "new", changed)
    assert stats.bytes_written == open_checkpoint(base).bytes_of(CHANGES)
    revert_patch(tmp_path / "new", patch, tmp_path / "old")
    assert same_weights(tmp_path / "old", base)
    for out in ("new", "old"):
        verify_commit(tmp_path / out)
    total = sum(info.size for info in open_checkpoint(base).shards.values())
    assert ("checking the checkpoint", total, total) in seen and seen[-1] == ("writing new", total, total)
    assert state(base) == before


def test_equal_checkpoints_give_an_empty_patch(base: Path, tmp_path: Path) -> None:
    stats = diff_checkpoints(base, base, tmp_path / "empty.safetensors")
    assert (stats.tensors, stats.payload_bytes) == (0, 0)
    assert load_file(tmp_path / "empty.safetensors") == {}
    assert verify_patch(base, tmp_path / "empty.safetensors") == "base"
    apply_patch(base, tmp_path / "empty.safetensors", tmp_path / "a")
    revert_patch(base, tmp_path / "empty.safetensors", tmp_path / "b")
    assert same_weights(tmp_path / "a", base) and same_weights(tmp_path / "b", base)


def test_verify_names_the_side(base: Path, changed: Path, patch: Path, tmp_path: Path) -> None:
    assert (verify_patch(base, patch), verify_patch(changed, patch)) == ("base", "patched")
    cases = {
        r"tensor 'layers\.0\.weight' is neither": {"layers.0.weight": lambda t: t + 1},
        r"tensor 'float8' is that of the base, but 'layers\.0\.weight' that of the patched": {
            "layers.0.weight": CHANGES["layers.0.weight"]
        },
        r"s-2\.safetensors differs from both in a tensor that the patch does not hold": {"layers.1.norm": torch.neg},
    }
    for number, (message, change) in enumerate(cases.items()):
        folder = tmp_path / f"third-{number}"
        shutil.copytree(base, folder)
        edit(folder, change)
        with pytest.raises(FailedError, match=message):
            verify_patch(folder, patch)
        for function in (apply_patch, revert_patch):
            with pytest.raises(RefusedError, match=message):
                function(folder, patch, tmp_path / "out")
    with pytest.raises(RefusedError, match="the patch is already in it"):
        apply_patch(changed, patch, tmp_path / "out")
    with pytest.raises(RefusedError, match="the patch is not in it"):
        revert_patch(base, patch, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not leftovers(tmp_path)


@pytest.mark.parametrize(
    ("message", "other"),
    [
        (r"tensor 'a' has dtype F32 and BF16", {"a": torch.zeros(4).bfloat16(), "b": torch.zeros(2)}),
        (r"tensor 'a' has shape \(4,\) and \(2, 2\)", {"a": torch.zeros(2, 2), "b": torch.zeros(2)}),
        (r"tensor 'c' is in one of them only", {"a": torch.zeros(4), "b": torch.zeros(2), "c": torch.zeros(1)}),
        (r"written differently", None),
        (r"config\.json: n is 1 and 2", {"a": torch.zeros(4), "b": torch.zeros(2)}),
    ],
)
def test_checkpoints_of_another_layout_are_refused(
    tmp_path: Path, message: str, other: dict[str, Tensor] | None
) -> None:
    for name, tensors in (("one", None), ("two", other)):
        (tmp_path / name).mkdir()
        n = 2 if name == "two" and "config" in message else 1
        (tmp_path / name / "config.json").write_text(json.dumps({"n": n}))
        plain = {"a": torch.zeros(4), "b": torch.zeros(2)}
        metadata = {"format": "np" if name == "two" and other is None else "pt"}
        save_file(tensors or plain, tmp_path / name / "model.safetensors", metadata)
    with pytest.raises(RefusedError, match=message):
        diff_checkpoints(tmp_path / "one", tmp_path / "two", tmp_path / "p")
    diff_checkpoints(tmp_path / "one", tmp_path / "one", tmp_path / "empty")
    with pytest.raises(RefusedError):
        apply_patch(tmp_path / "two", tmp_path / "empty", tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["empty", "one", "two"]


def test_outputs_are_new_and_outside_of_their_sources(base: Path, changed: Path, patch: Path, tmp_path: Path) -> None:
    before = state(base), state(changed), patch.read_bytes()
    for out in (base / "x.safetensors", changed / "deep" / "x.safetensors"):
        with pytest.raises(RefusedError, match="lies in its source"):
            diff_checkpoints(base, changed, out)
    with pytest.raises(RefusedError, match="the output exists"):
        diff_checkpoints(base, changed, patch)
    for out, message in ((base / "out", "lies in its source"), (changed, "the output exists")):
        with pytest.raises(RefusedError, match=message):
            apply_patch(base, patch, out)
    with pytest.raises(UsageError, match="no such patch"):
        apply_patch(base, tmp_path / "no", tmp_path / "out")
    assert (state(base), state(changed), patch.read_bytes()) == before


def test_files_that_a_patch_cannot_hold_are_named(base: Path, changed: Path, tmp_path: Path) -> None:
    (changed / "tokenizer.json").write_text("{}")
    (changed / "generation_config.json").write_text("{}")
    stats = diff_checkpoints(base, changed, tmp_path / "p")
    assert stats.other_files == ("generation_config.json", "tokenizer.json")


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o007, 0o660)])
def test_modes_follow_the_umask(base: Path, changed: Path, tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        diff_checkpoints(base, changed, tmp_path / "p")
        apply_patch(base, tmp_path / "p", tmp_path / "out")
    finally:
        os.umask(before)
    files = [tmp_path / "p", *(tmp_path / "out").iterdir()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {mode}


def average_case(base: Path, tmp_path: Path, changes: list[dict[str, Callable[[Tensor], Tensor]]]) -> list[Path]:
    patches = []
    for number, change in enumerate(changes):
        folder = tmp_path / f"v{number}"
        shutil.copytree(base, folder)
        edit(folder, change)
        diff_checkpoints(base, folder, tmp_path / f"v{number}.patch")
        patches.append(tmp_path / f"v{number}.patch")
    return patches


def weights_of(folder: Path) -> dict[str, Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def test_average_is_of_values_in_fp64(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elo_engine.checkpoint.patch_writer.CHUNK_BYTES", 64)
    monkeypatch.setattr("elo_engine.checkpoint.patch_average.CHUNK_BYTES", 64)
    third = {"layers.0.weight": lambda t: t / 3, "ids": lambda t: t + 7}
    patches = average_case(
        base,
        tmp_path,
        [
            {"layers.0.weight": lambda t: t * 3, "half": lambda t: t + 1, "ids": lambda t: t + 7},
            {"layers.0.weight": lambda t: t - 5, "layers.3.norm": torch.exp, "ids": lambda t: t + 7},
            third,
        ],
    )
    weights = [0.5, 0.2, 0.3]
    average_patches(base, patches, tmp_path / "mean.patch", weights)
    apply_patch(base, tmp_path / "mean.patch", tmp_path / "mean")
    versions, got = [weights_of(tmp_path / f"v{k}") for k in range(3)], weights_of(tmp_path / "mean")
    for name, tensor in got.items():
        first = versions[0][name]
        if all(torch.equal(first.view(torch.uint8), v[name].view(torch.uint8)) for v in versions[1:]):
            expected = first
        else:
            expected = torch.stack([w * v[name].double() for w, v in zip(weights, versions, strict=True)]).sum(0)
        slack = 0 if tensor.dtype != torch.float32 else 1e-12  # another order of summation in fp64, before the cast
        assert torch.allclose(tensor.double(), expected.to(tensor.dtype).double(), rtol=slack * 1e5, atol=0), name
    assert torch.equal(got["ids"], torch.arange(4) + 7)
    assert torch.equal(got["half"], torch.full((5,), 1.5).half())  # a tensor that one changes counts with the base
    one = average_patches(base, patches[:1], tmp_path / "one.patch")
    assert one.tensors == 3 and (tmp_path / "one.patch").read_bytes() == patches[0].read_bytes()


def test_average_refuses_what_has_none(base: Path, tmp_path: Path) -> None:
    patches = average_case(
        base,
        tmp_path,
        [
            {"ids": lambda t: t + 1, "layers.0.norm": torch.neg},
            {"layers.0.norm": torch.exp},
            {"layers.0.norm": lambda t: t * float("inf")},
        ],
    )
    out = tmp_path / "mean"
    for weights, message in (
        ([0.5], "1 weights for 2 patches"),
        ([0.5, 0.4], "sum to 0.9, not to 1"),
        ([float("nan"), 1.0], "not all finite"),
        ([0.5, 0.500002], "not to 1"),
    ):
        with pytest.raises(UsageError, match=message):
            average_patches(base, patches[1:], out, weights)
    with pytest.raises(UsageError, match="at least one"):
        average_patches(base, [], out)
    with pytest.raises(RefusedError, match=r"tensor 'ids' is I64 and differs between the patches"):
        average_patches(base, patches[:2], out)
    with pytest.raises(FailedError, match=r"tensor 'layers\.0\.norm': the average \S+ at position 0 is not finite"):
        average_patches(base, patches[1:], out)
    with pytest.raises(RefusedError, match=r"is not the base of .*: the patch is already in it"):
        average_patches(tmp_path / "v1", patches[1:2], out)
    shutil.copytree(base, tmp_path / "other")
    edit(tmp_path / "other", {"layers.1.norm": torch.neg})
    foreign = average_case(tmp_path / "other", tmp_path / "other-patches", [{"layers.0.norm": torch.exp}])
    with pytest.raises(RefusedError, match="from another base"):
        average_patches(base, [patches[1], *foreign], out)
    assert average_patches(base, patches[1:2], out, [1 - 5e-7]).tensors == 1 and not leftovers(tmp_path)
