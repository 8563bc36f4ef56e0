"""Bad input through the command line: the message says what, where and what to do, the exit status says which kind it
is, and nothing is left behind or lost.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tokenizer

Elo = Callable[..., tuple[int, str]]
Write = Callable[..., Path]
Tree = dict[str, Any]


def refused(elo: Elo, config: Path, status: int, *fragments: str, verb: str = "run") -> str:
    """Run, expect this exit status and every fragment in the message, and no traceback."""
    got, shown = elo(verb, config)
    assert got == status, f"exit {got}, expected {status}: {shown}"
    for fragment in fragments:
        assert fragment in shown, f"{fragment!r} is not in {shown!r}"
    assert "Traceback" not in shown
    return shown


@pytest.fixture
def copy(tied: Path, tmp_path: Path) -> Path:
    """A checkpoint of one's own to damage."""
    return Path(shutil.copytree(tied, tmp_path / "model-copy"))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_no_such_model(run_tree: Tree, write_config: Write, elo: Elo) -> None:
    run_tree["model"] = "/no/such/model"
    refused(elo, write_config(run_tree), 2, "/no/such/model")
    assert not Path(run_tree["output"]).exists()


def test_pickle_only_checkpoint(run_tree: Tree, write_config: Write, elo: Elo, copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    torch.save({}, copy / "pytorch_model.bin")
    run_tree["model"] = str(copy)
    refused(elo, write_config(run_tree), 3, "pytorch_model.bin", "safetensors")


def test_unsupported_family_is_named_with_the_supported_ones(
    run_tree: Tree, write_config: Write, elo: Elo, copy: Path
) -> None:
    edit_config(copy, model_type="mamba")
    run_tree["model"] = str(copy)
    refused(elo, write_config(run_tree), 3, "'mamba'", "llama", "mistral")


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
    ],
)
def test_configuration_that_changes_the_maths_is_refused_by_its_field(
    run_tree: Tree, write_config: Write, elo: Elo, copy: Path, changes: dict[str, Any], fragment: str
) -> None:
    edit_config(copy, **changes)
    run_tree["model"] = str(copy)
    refused(elo, write_config(run_tree), 3, fragment)


def test_shapes_that_contradict_the_configuration(run_tree: Tree, write_config: Write, elo: Elo, copy: Path) -> None:
    edit_config(copy, intermediate_size=96)
    run_tree["model"] = str(copy)
    refused(elo, write_config(run_tree), 1, "mlp.gate_proj.weight", "[80, 48]", "[96, 48]")


def test_missing_shard(run_tree: Tree, write_config: Write, elo: Elo, untied: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(untied, tmp_path / "sharded"))
    victim = sorted(folder.glob("*.safetensors"))[1]
    victim.unlink()
    run_tree["model"] = str(folder)
    refused(elo, write_config(run_tree), 1, victim.name)


def test_stale_index(run_tree: Tree, write_config: Write, elo: Elo, untied: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(untied, tmp_path / "stale"))
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.9.mlp.up_proj.weight"] = next(iter(index["weight_map"].values()))
    path.write_text(json.dumps(index))
    run_tree["model"] = str(folder)
    refused(elo, write_config(run_tree), 1, "model.layers.9.mlp.up_proj.weight")


def test_truncated_shard(run_tree: Tree, write_config: Write, elo: Elo, copy: Path) -> None:
    os.truncate(copy / "model.safetensors", (copy / "model.safetensors").stat().st_size - 100)
    run_tree["model"] = str(copy)
    refused(elo, write_config(run_tree), 1, "model.safetensors")


def test_tokenizer_that_does_not_match_the_shards(run_tree: Tree, write_config: Write, elo: Elo, copy: Path) -> None:
    make_tokenizer(copy, 310)
    run_tree["model"] = str(copy)
    refused(elo, write_config(run_tree), 3, "another tokenizer", "elo data")


def test_ids_outside_the_vocabulary(
    run_tree: Tree, write_config: Write, elo: Elo, make_checkpoint: Callable[..., Path], shards: dict[str, str]
) -> None:
    small = make_checkpoint(vocab_size=300)  # the tokenizer beside it still has 320 entries, as its shards do
    run_tree["model"] = str(small)
    shown = refused(elo, write_config(run_tree), 1, "300")
    assert "position" in shown or "token" in shown


def test_empty_text(tied: Path, tmp_path: Path, elo: Elo) -> None:
    (tmp_path / "empty.txt").write_text("")
    status, shown = elo("data", tmp_path / "empty.txt", "--tokenizer", tied, "--out", tmp_path / "tokens")
    assert status == 2 and "empty.txt" in shown
    assert not (tmp_path / "tokens" / "manifest.json").exists()


def test_text_shorter_than_one_row(run_tree: Tree, write_config: Write, elo: Elo, tied: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("night and day")
    assert elo("data", tmp_path / "short.txt", "--tokenizer", tied, "--out", tmp_path / "short")[0] == 0
    run_tree["data"]["shards"]["en"] = str(tmp_path / "short")
    refused(elo, write_config(run_tree), 2, "en", "32")


def test_shards_that_are_not_there(run_tree: Tree, write_config: Write, elo: Elo, tmp_path: Path) -> None:
    run_tree["data"]["shards"]["ja"] = str(tmp_path / "nowhere")
    refused(elo, write_config(run_tree), 2, "data.shards.ja", "elo data")


def test_unknown_configuration_key_names_the_nearest(run_tree: Tree, write_config: Write, elo: Elo) -> None:
    run_tree["pretrain"]["optimizer"]["learning"] = 1
    run_tree["detach"] = {"layer": ["first"]}
    refused(elo, write_config(run_tree), 2, "detach.layer", "'layers'", "pretrain.optimizer.learning")


@pytest.mark.parametrize(
    ("override", "fragment"),
    [
        ("data.mix={ja: 9}", "same languages"),
        ("pretrain.tokens_per_step=100", "multiple"),
        ("pretrain.tokens=32", "less than one step"),
        ("pretrain.micro_batch=64", "micro_batch"),
        ("align.stream.store=tape", "memory"),
        ("align.when=sometimes", "interleaved"),
        ("detach.bridge=cubic", "detach.bridge"),
        ("detach.ridge=-1", "detach.ridge"),
        ("detach.bridge_tokens=0", "detach.bridge_tokens"),
        ("pretrain.optimizer.state=4bit", "pretrain.optimizer.state"),
        ("pretrain.optimizer.lr=-1", "pretrain.optimizer.lr"),
        ("nonsense", "a.b=c"),
        ("model.deeper=1", "not a section"),
    ],
)
def test_values_that_cannot_be_meant(
    run_tree: Tree, write_config: Write, elo: Elo, override: str, fragment: str
) -> None:
    status, shown = elo("run", write_config(run_tree), override)
    assert status == 2 and fragment in shown, shown


@pytest.mark.parametrize("layers", [[7], ["first", -5], ["0-9"], ["middle"], ["1:1"]])
def test_layer_index_out_of_range(run_tree: Tree, write_config: Write, elo: Elo, layers: list[Any]) -> None:
    run_tree["detach"] = {"layers": layers}
    refused(elo, write_config(run_tree), 2, "detach.layers")


def test_output_folder_that_exists(run_tree: Tree, write_config: Write, elo: Elo) -> None:
    output = Path(run_tree["output"])
    output.mkdir()
    (output / "thesis.txt").write_text("mine")
    refused(elo, write_config(run_tree), 3, str(output), "choose another output")
    assert [path.name for path in output.iterdir()] == ["thesis.txt"]


def test_resume_with_another_configuration(run_tree: Tree, write_config: Write, elo: Elo) -> None:
    config = write_config(run_tree)
    assert elo("pretrain", config)[0] == 0
    assert elo("pretrain", config)[0] == 3, "without --resume an existing run is never touched"
    status, shown = elo("pretrain", config, "seed=43", "--resume", "auto")
    assert status == 3 and "seed" in shown


def test_resume_with_other_data(
    run_tree: Tree, write_config: Write, elo: Elo, shards: dict[str, str], tmp_path: Path
) -> None:
    own = Path(shutil.copytree(shards["ja-train"], tmp_path / "ja"))
    run_tree["data"]["shards"]["ja"] = str(own)
    config = write_config(run_tree)
    assert elo("pretrain", config)[0] == 0
    shutil.rmtree(own)
    shutil.copytree(shards["ja-heldout"], own)
    status, shown = elo("pretrain", config, "--resume", "auto")
    assert status == 3 and "data" in shown


def test_damaged_newest_snapshot_is_passed_over_and_said(run_tree: Tree, write_config: Write, elo: Elo) -> None:
    config = write_config(run_tree)
    assert elo("pretrain", config)[0] == 0
    folder = Path(run_tree["output"]) / "pretrain" / "step-00000006"
    content = bytearray((folder / "weights.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "weights.safetensors").write_bytes(bytes(content))
    status, shown = elo("reattach", run_tree["output"])
    assert status == 2 and "passed over" in shown and "not finished" in shown
    status, shown = elo("pretrain", config, "--resume", "auto")
    assert status == 0 and "resumed at step 4" in shown, shown
    assert elo("reattach", run_tree["output"])[0] == 0, "the advice that was given must work"
    assert [path.name for path in folder.parent.glob("damaged-*")] == ["damaged-step-00000006-0"]


def test_full_disk_while_saving(run_tree: Tree, write_config: Write, elo: Elo, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fills at the second snapshot: exit 1, the first snapshot stands, and the run continues once there is
    room.
    """
    from elo_engine.checkpoint import SYSCALLS

    plain, saved = SYSCALLS.write, []

    def write(fd: int, data: Any) -> int:
        if "step-00000004" in os.readlink(f"/proc/self/fd/{fd}"):
            saved.append(fd)
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(fd, data)

    config = write_config(run_tree)
    with monkeypatch.context() as patch:
        patch.setattr(SYSCALLS, "write", write)
        status, shown = elo("run", config)
    assert saved, "the fault was never reached"
    assert status == 1 and "space" in shown.lower(), shown
    stage = Path(run_tree["output"]) / "pretrain"
    assert [path.name for path in stage.iterdir()] == ["step-00000002"], "no leftovers, nothing lost"
    status, shown = elo("run", config, "--resume", "auto")
    assert status == 0 and "resumed at step 2" in shown, shown


def test_no_room_for_the_model_is_said_before_it_is_written(
    run_tree: Tree, write_config: Write, elo: Elo, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(run_tree)
    assert elo("pretrain", config)[0] == 0
    from elo_engine.checkpoint import publish

    monkeypatch.setattr(publish_module(publish), "free_bytes", lambda path: 1000)
    status, shown = elo("reattach", run_tree["output"])
    assert (status == 3 and "1000" in shown.replace(",", "")) or "KiB" in shown, shown
    assert not (Path(run_tree["output"]) / "reattached").exists()


def publish_module(function: Any) -> Any:
    import sys

    return sys.modules[function.__wrapped__.__module__ if hasattr(function, "__wrapped__") else function.__module__]


def test_two_processes_on_one_run(run_tree: Tree, write_config: Write, elo: Elo) -> None:
    from elo_engine.config import load_config
    from elo_engine.run_dir import RunDir

    config = write_config(run_tree)
    with RunDir.create(load_config(config)):
        status, shown = elo("run", config, "--resume", "auto")
    assert status == 3 and "another process" in shown


def test_eval_without_tokens_and_with_a_strange_device(tied: Path, shards: dict[str, str], elo: Elo) -> None:
    assert elo("eval", tied)[0] == 2
    status, shown = elo("eval", tied, "--tokens", shards["ja-heldout"], "--device", "toaster")
    assert status == 2 and "toaster" in shown
