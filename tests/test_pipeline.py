"""The whole method on a tiny real checkpoint, through the command line, and the promises about bytes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from elo_engine.checkpoint import open_checkpoint

Elo = Callable[..., tuple[int, str]]


def fingerprint(folder: Path) -> dict[str, tuple[str, int]]:
    """Hash and modification time of every file below a folder."""
    return {
        str(path.relative_to(folder)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update(load_file(path))
    return found


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().view(torch.uint8).numpy().tobytes())


@pytest.fixture(params=["tied", "untied"])
def source(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)  # type: ignore[no-any-return]


def test_run_makes_a_model_that_transformers_loads_with_the_same_loss(
    source: Path, run_tree: dict[str, Any], write_config: Callable[..., Path], elo: Elo, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    before = fingerprint(source)
    run_tree["model"] = str(source)
    status, shown = elo("run", write_config(run_tree))
    assert status == 0, shown
    assert fingerprint(source) == before, "the source's bytes and times never change"
    run = Path(run_tree["output"])
    for name in (
        "config.resolved.yaml",
        "environment.json",
        "plan.json",
        "metrics.jsonl",
        "log.txt",
        "STATUS",
        "report.md",
        "report.json",
    ):
        assert (run / name).stat().st_size > 0, name
    assert json.loads((run / "STATUS").read_text())["state"] == "finished"
    assert any((run / "tensorboard").iterdir()), "tensorboard is part of the test set-up"
    assert "layers [0, 3] of 4" in (run / "model" / "README.md").read_text()
    assert "trains: 18 tensors" in shown and "absent:" in shown

    old, reattached, aligned = tensors(source), tensors(run / "reattached"), tensors(run / "model")
    assert set(old) == set(reattached) == set(aligned), "names in = names out"
    trained = {name for name in old if ".layers.0." in name or ".layers.3." in name}
    for name, tensor in old.items():
        same = raw(tensor) == raw(reattached[name])
        assert same == (name not in trained), name
        assert reattached[name].dtype == aligned[name].dtype == tensor.dtype
    assert any(raw(old[name]) != raw(aligned[name]) for name in old if ".layers.1." in name), (
        "alignment trains the middle"
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        assert (source / name).read_bytes() == (run / "model" / name).read_bytes()

    # the loss that `elo eval` prints is the one transformers finds, document by document
    folder = run_tree["evaluate"]["shards"]["ja"]
    status, shown = elo(
        "eval", run / "model", "--tokens", folder, "--sequence-length", 256, "--dtype", "fp32", "--json"
    )
    assert status == 0, shown
    ours = json.loads(shown)[folder]["loss_nats"]
    model = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    AutoTokenizer.from_pretrained(run / "model")
    from elo_engine.data import TokenStore

    store = TokenStore(Path(folder))
    total, count, position = 0.0, 0, 0
    for number in range(store.documents):
        ids = torch.from_numpy(store.document(number).astype("int64"))
        while len(ids):  # a document that crosses the end of a row of 256 starts anew in the next
            room = 256 - position % 256
            piece, following = ids[:room], ids[room : room + 1]
            labels = torch.cat([piece[1:], following if len(following) else torch.tensor([-100])])
            logits = model(input_ids=piece[None]).logits[0]
            total += float(
                torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100).detach()
            )
            count += int((labels >= 0).sum())
            position += len(piece)
            ids = ids[room:]
    assert ours == pytest.approx(total / count, abs=1e-3)


@pytest.mark.parametrize(("state", "dtype"), [("fp32", "fp32"), ("8bit", "fp32"), ("fp32", "bf16"), ("8bit", "bf16")])
def test_training_lowers_the_loss_of_the_target(
    state: str, dtype: str, run_tree: dict[str, Any], write_config: Callable[..., Path], elo: Elo
) -> None:
    """The same bound for every state and type: 8-bit moments and rounded weights teach as much."""
    run_tree["pretrain"]["tokens"], run_tree["align"]["tokens"] = 128 * 20, 128 * 20
    run_tree["dtype"] = dtype
    for stage in ("pretrain", "align"):
        run_tree[stage]["optimizer"]["state"] = state
    status, shown = elo("run", write_config(run_tree), "evaluate.every=0")
    assert status == 0, shown
    found = json.loads((Path(run_tree["output"]) / "report.json").read_text())["evaluations"]
    assert found["aligned"]["ja"]["loss_nats"] < found["base"]["ja"]["loss_nats"] - 0.25
    plan = json.loads((Path(run_tree["output"]) / "plan.json").read_text())
    assert plan["dtype"] == {"fp32": "float32", "bf16": "bfloat16"}[dtype]


def test_detach_and_reattach_without_training_is_byte_identical(
    source: Path, run_tree: dict[str, Any], write_config: Callable[..., Path], elo: Elo
) -> None:
    """A learning rate of zero is no configuration, so the zero steps are made by snapshotting the untouched layers."""
    from elo_engine.config import load_config
    from elo_engine.detach import detach, open_source
    from elo_engine.reattach import write_model
    from elo_engine.run_dir import RunDir
    from elo_engine.train.optim import MasterAdamW

    run_tree["model"] = str(source)
    config = load_config(write_config(run_tree))
    found = open_source(config)
    with RunDir.create(config) as run:
        optimizer = MasterAdamW(detach(found, run), config.pretrain.optimizer)
        write_model(run, found.index, optimizer.weights(), run.folder("reattached"), {})
    made = Path(run_tree["output"]) / "reattached"
    for path in source.iterdir():
        assert path.read_bytes() == (made / path.name).read_bytes(), path.name
    assert {path.name for path in made.iterdir()} == {path.name for path in source.iterdir()} | {"COMMIT.json"}


def test_detach_reads_only_what_it_needs(
    make_checkpoint: Callable[..., Path], run_tree: dict[str, Any], write_config: Callable[..., Path]
) -> None:
    """Bytes that the process read from the checkpoint's files, as the kernel counts them, against the detached
    tensors'.
    """
    from elo_engine.checkpoint import CheckpointReader
    from elo_engine.model.shallow import shallow_names
    from elo_engine.model.spec import read_spec

    folder = make_checkpoint(tied=False, shards=4, hidden_size=192, intermediate_size=512, num_hidden_layers=12)
    index = open_checkpoint(folder)
    wanted = shallow_names(read_spec(index.config), (0, 11))

    def read_so_far() -> int:
        return next(
            int(line.split()[1]) for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("rchar")
        )

    if not os.path.exists("/proc/self/io"):
        pytest.skip("the kernel of this machine does not count a process's reads")
    with CheckpointReader(index) as reader:
        before = read_so_far()
        reader.read(wanted)
        taken = read_so_far() - before
    needed = index.bytes_of(wanted)
    assert needed <= taken <= 1.05 * needed + 4096, f"{taken} bytes read for {needed} wanted"
    assert reader.bytes_read <= 1.05 * needed
    assert needed < 0.5 * index.total_bytes


def test_stages_one_by_one_equal_the_chain(
    run_tree: dict[str, Any], write_config: Callable[..., Path], elo: Elo, tmp_path: Path
) -> None:
    chain = dict(run_tree, output=str(tmp_path / "chain"))
    assert elo("run", write_config(chain, "chain.yaml"))[0] == 0
    config = write_config(run_tree)
    assert elo("pretrain", config)[0] == 0
    moved = Path(run_tree["output"]).rename(tmp_path / "moved")  # a run folder is complete in itself
    for arguments in (("reattach", moved), ("align", moved)):
        status, shown = elo(*arguments)
        assert status == 0, shown
    left, right = tensors(tmp_path / "chain" / "model"), tensors(moved / "model")
    for name, tensor in left.items():
        assert raw(tensor) == raw(right[name]), name


def test_full_continual_pretraining_is_the_same_loop(
    run_tree: dict[str, Any], write_config: Callable[..., Path], elo: Elo
) -> None:
    status, shown = elo("align", write_config(run_tree))
    assert status == 0, shown
    assert "full continual pretraining" in shown
    assert "Full continual pretraining" in (Path(run_tree["output"]) / "model" / "README.md").read_text()
    source, made = tensors(Path(run_tree["model"])), tensors(Path(run_tree["output"]) / "model")
    assert all(raw(source[name]) != raw(made[name]) for name in source), "every tensor learns"


def test_dry_run_writes_nothing(run_tree: dict[str, Any], write_config: Callable[..., Path], elo: Elo) -> None:
    status, shown = elo("run", write_config(run_tree), "--dry-run")
    assert status == 0, shown
    assert "ideal pipeline speedup" in shown and "6 steps" in shown
    assert not Path(run_tree["output"]).exists()
