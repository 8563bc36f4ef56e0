"""Strict opening of a folder: config, index and shards have to agree, and nothing in it is trusted."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from elo_engine.checkpoint.index import open_checkpoint, wanted_shards, weights_complete
from elo_engine.errors import EloError, FailedError, RefusedError, UsageError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards, an index and a config, as transformers writes them."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "rope_theta": 1e4}))
    shards = {"model-00001-of-00002.safetensors": ["a", "b"], "model-00002-of-00002.safetensors": ["c"]}
    for shard, names in shards.items():
        save_file(
            {name: torch.full((2, 3), ord(name) / 8) for name in names}, folder / shard, {"format": "pt"}
        )
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return folder


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def edit_index(folder: Path, **changes: Any) -> None:
    """Set (or with None remove) entries of the weight map."""
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"].update(changes)
    index["weight_map"] = {name: shard for name, shard in index["weight_map"].items() if shard is not None}
    path.write_text(json.dumps(index))


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_open_sharded(folder: Path) -> None:
    index = open_checkpoint(folder)
    assert list(index.entries) == ["a", "b", "c"]
    assert {name: entry.shard for name, entry in index.entries.items()} == {
        "a": FIRST,
        "b": FIRST,
        "c": SECOND,
    }
    assert index.total_bytes == 3 * 24 and index.bytes_of(["a", "c", "a"]) == 48
    assert index.metadata == {FIRST: {"format": "pt"}, SECOND: {"format": "pt"}}
    assert index.config == {"model_type": "llama", "rope_theta": 1e4}
    info = index.shards[FIRST]
    assert (info.size, info.inode) == ((folder / FIRST).stat().st_size, (folder / FIRST).stat().st_ino)
    assert info.header_bytes == index.entries["a"].begin == info.size - 48
    for entry in index.entries.values():
        raw = (folder / entry.shard).read_bytes()[entry.begin : entry.end]
        assert raw == torch.full((2, 3), ord(entry.name) / 8).numpy().tobytes()
    with pytest.raises(UsageError, match=r"has no tensor 'bb'. Did you mean 'b'"):
        index.bytes_of(["bb"])


def test_open_single_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert list(open_checkpoint(tmp_path).shards) == ["model.safetensors"]


def test_identity(folder: Path, tmp_path: Path) -> None:
    first = open_checkpoint(folder).identity()
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    assert open_checkpoint(copy).identity() == first  # neither path nor time are part of it
    (copy / "config.json").write_text(json.dumps({"model_type": "llama", "rope_theta": 1e5}))
    changed_config = open_checkpoint(copy).identity()
    save_file({"a": torch.zeros(3, 2), "b": torch.zeros(2, 3)}, copy / FIRST, {"format": "pt"})
    assert len({first, changed_config, open_checkpoint(copy).identity()}) == 3


def test_hub_cache_symlinks_are_followed(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "cache" / "snapshots" / "rev"
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        blob = tmp_path / "cache" / "blobs" / path.name
        blob.parent.mkdir(exist_ok=True)
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert open_checkpoint(snapshot).identity() == open_checkpoint(folder).identity()
    (tmp_path / "cache" / "blobs" / SECOND).unlink()
    with pytest.raises(FailedError, match="missing shard: a link to a file that is gone"):
        open_checkpoint(snapshot)


def test_missing_folder_file_and_config(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="not a folder"):
        open_checkpoint(folder / FIRST)
    (folder / "config.json").unlink()
    with pytest.raises(UsageError, match=r"no config\.json"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "pickle", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"]
)
def test_pickle_only(tmp_path: Path, pickle: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="no weights"):
        open_checkpoint(tmp_path)
    (tmp_path / pickle).write_bytes(b"\x80\x02")
    with pytest.raises(RefusedError, match=r"only there as pickle.*save_pretrained.*writes safetensors"):
        open_checkpoint(tmp_path)


def test_pickle_beside_safetensors_is_ignored(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")
    assert open_checkpoint(folder).entries


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ('{"auto_map": {"AutoModel": "modeling.M"}}', RefusedError, "`auto_map` names Python code"),
        ('{"quantization_config": {"quant_method": "gptq"}}', RefusedError, "`quantization_config` says"),
        ('{"compression_config": {}}', RefusedError, "`compression_config` says"),
        ('{"text_config": {"quantization_config": {}}}', RefusedError, "`quantization_config` says"),
        ('{"text_config": {"auto_map": {"AutoModel": "m.M"}}}', RefusedError, "`auto_map` names Python code"),
        ('{"a": 1, "a": 2}', FailedError, "duplicate key 'a'"),
        ("[]", FailedError, "is not a JSON object"),
        ("{", FailedError, "not valid JSON"),
        ("", FailedError, "not valid JSON"),
    ],
)
def test_bad_config(folder: Path, config: str, error: type[EloError], message: str) -> None:
    (folder / "config.json").write_text(config)
    with pytest.raises(error, match=message) as caught:
        open_checkpoint(folder)
    assert "config.json" in str(caught.value)


def test_null_quantization_is_none(folder: Path) -> None:
    (folder / "config.json").write_text('{"quantization_config": null, "auto_map": null}')
    assert open_checkpoint(folder).entries


@pytest.mark.parametrize(
    "shard",
    [
        "../model/model-00001-of-00002.safetensors",
        "/etc/passwd",
        "/tmp/x.safetensors",
        "sub/model.safetensors",
        "..\\x.safetensors",
        "x.safetensors\n",
        "x.safetensors\0",
        ".safetensors/../x",
        "model.bin",
        "",
        "mødel.safetensors",
        7,
    ],
)
def test_weight_map_values_are_plain_basenames(folder: Path, shard: Any) -> None:
    edit_index(folder, a=shard)
    with pytest.raises(FailedError, match="is not a plain file name") as caught:
        open_checkpoint(folder)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {}}', '{"weight_map": []}', "[]"])
def test_index_without_map(folder: Path, index: str) -> None:
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(FailedError, match="has no `weight_map` object"):
        open_checkpoint(folder)


def test_index_with_a_duplicate(folder: Path) -> None:
    text = f'{{"weight_map": {{"a": "{FIRST}", "a": "{SECOND}", "b": "{FIRST}", "c": "{SECOND}"}}}}'
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(FailedError, match=r"index\.json: duplicate key 'a'"):
        open_checkpoint(folder)


def test_missing_and_extra_shard(folder: Path) -> None:
    (folder / SECOND).rename(folder / "other.safetensors")
    with pytest.raises(FailedError, match=f"missing shard {SECOND} \\(1 of 2\\)"):
        open_checkpoint(folder)
    shutil.copy(folder / "other.safetensors", folder / SECOND)
    with pytest.raises(FailedError, match=r"extra shard other\.safetensors"):
        open_checkpoint(folder)


def test_extra_shard_beside_a_single_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for name in ("model.safetensors", "consolidated.safetensors"):
        save_file({"a": torch.zeros(2)}, tmp_path / name)
    with pytest.raises(FailedError, match=r"extra shard consolidated\.safetensors"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d": FIRST}, f"names the tensor 'd' in {FIRST}, but no shard has it. The index is stale"),
        ({"b": None}, f"lacks the tensor 'b', which {FIRST} has. The index is stale"),
        ({"b": SECOND}, f"puts the tensor 'b' in {SECOND}, but it is in {FIRST}. The index is stale"),
    ],
)
def test_stale_index(folder: Path, change: dict[str, Any], message: str) -> None:
    edit_index(folder, **change)
    with pytest.raises(FailedError, match=message):
        open_checkpoint(folder)


def test_tensor_in_two_shards(folder: Path) -> None:
    save_file({"c": torch.zeros(2), "b": torch.zeros(1)}, folder / SECOND)
    with pytest.raises(FailedError, match=f"tensor 'b' is in two shards: {FIRST}, {SECOND}"):
        open_checkpoint(folder)


@pytest.mark.parametrize("keep", [0, 5, 8, 40, -1])
def test_truncated_shard(folder: Path, keep: int) -> None:
    size = (folder / SECOND).stat().st_size
    os.truncate(folder / SECOND, keep if keep >= 0 else size + keep)
    with pytest.raises(FailedError, match=f"{SECOND}: truncated"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", FIRST])
@pytest.mark.parametrize("kind", ["FIFO", "folder", "device"])
def test_special_files_are_refused_and_do_not_hang(folder: Path, name: str, kind: str) -> None:
    path = folder / name
    path.unlink()
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with at_most(5), pytest.raises(FailedError, match=f"{name}: is a {kind}, not a regular file"):
        open_checkpoint(folder)


def test_link_to_itself_and_to_a_foreign_file(folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("password=hunter2\n")
    (folder / FIRST).unlink()
    (folder / FIRST).symlink_to(secret)
    with pytest.raises(FailedError) as caught:
        open_checkpoint(folder)
    assert "hunter2" not in str(caught.value)
    (folder / FIRST).unlink()
    (folder / FIRST).symlink_to(FIRST)
    with pytest.raises(FailedError, match="cannot be opened"):
        open_checkpoint(folder)


def test_no_descriptor_is_left_open(folder: Path) -> None:
    before = os.listdir("/proc/self/fd")
    open_checkpoint(folder)
    os.truncate(folder / SECOND, 20)
    with pytest.raises(FailedError):
        open_checkpoint(folder)
    assert os.listdir("/proc/self/fd") == before


def test_a_partial_file_without_its_record_is_no_shard(folder: Path) -> None:
    assert {name: info.file for name, info in open_checkpoint(folder).shards.items()} == {FIRST: FIRST, SECOND: SECOND}
    (folder / SECOND).rename(folder / f"{SECOND}.partial")
    with pytest.raises(FailedError, match=f"missing shard {SECOND}"):
        open_checkpoint(folder)


def test_a_checkpoint_on_disk_is_completed_already(folder: Path) -> None:
    index = open_checkpoint(folder)
    assert index.remote is None and index.completed() is index
    assert wanted_shards(folder) == [FIRST, SECOND] and weights_complete(folder)
    (folder / SECOND).unlink()
    assert wanted_shards(folder) == [FIRST, SECOND] and not weights_complete(folder)
    assert not weights_complete(folder / "nowhere")
