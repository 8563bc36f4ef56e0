"""Resuming with something else than the run was started with: fault 31."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fault_fixture import Processes, differing, final_state, records

from elo_engine.config import load_config

Tree = dict[str, Any]
STOP = "from elo_engine.model.decoder import Decoder\nafter(Decoder, 'loss_sum', 7, send(signal.SIGTERM))"


@pytest.fixture
def started(run_tree: Tree, write_config: Callable[..., Path], processes: Processes) -> Path:
    """The configuration of a run that was stopped after three steps of pretraining."""
    run_tree["evaluate"] = {"every": 0}
    config = write_config(run_tree)
    status, shown = processes("run", config, patch=STOP)
    assert status == 130, shown
    return config


def resumed(run: Path) -> list[dict[str, Any]]:
    return [record for record in records(run) if record.get("event") == "resumed"]


VERSIONS = [
    ("elo_engine", "import elo_engine.stage\nelo_engine.stage.__version__ = '0.0.1'"),
    ("torch", "import torch\ntorch.__version__ = '1.0.0'"),
]
MACHINE = [
    ("threads", "import torch\ntorch.set_num_threads(2)"),
    ("machine", "import platform\nplatform.machine = lambda: 'riscv64'"),
]


@pytest.mark.parametrize(("what", "patch"), [*VERSIONS, *MACHINE])
def test_what_costs_bit_for_bit_equality_is_recorded(
    what: str, patch: str, started: Path, run_tree: Tree, processes: Processes
) -> None:
    how = "anyway" if (what, patch) in VERSIONS else "auto"
    status, shown = processes("run", started, "--resume", how, patch=patch)
    assert status == 0 and "not bit for bit" in shown, shown
    (found,) = resumed(Path(run_tree["output"]))
    assert found["bit_exact"] is False and list(found["changed"]) == [what]


@pytest.mark.parametrize(("what", "patch"), VERSIONS)
def test_another_version_is_refused_unless_told(
    what: str, patch: str, started: Path, run_tree: Tree, processes: Processes
) -> None:
    status, shown = processes("run", started, "--resume", "auto", patch=patch)
    assert status == 3 and f"was made with {what} " in shown and "--resume anyway" in shown, shown
    assert resumed(Path(run_tree["output"])) == []
    assert processes("run", started, "--resume", "auto")[0] == 0, "nothing is lost"


def test_another_configuration_where_told_to(started: Path, run_tree: Tree, processes: Processes) -> None:
    """It is used, both are kept, and every later resume of a snapshot from before says that it is not exact."""
    run = Path(run_tree["output"])
    changes = ("pretrain.optimizer.lr=0.001", "seed=43")
    status, shown = processes("run", started, *changes, "--resume", "anyway", patch=STOP.replace("7", "1"))
    assert status == 130 and "another configuration" in shown, shown
    (changed,) = [record["changed"] for record in records(run) if record.get("event") == "configuration changed"]
    assert changed == {"pretrain.optimizer.lr": [0.003, 0.001], "seed": [42, 43]}
    kept = [load_config(run / name) for name in ("config.resolved-1.yaml", "config.resolved.yaml")]
    assert [(config.pretrain.optimizer.lr, config.seed) for config in kept] == [(3e-3, 42), (1e-3, 43)]
    status, shown = processes("run", started, *changes, "--resume", "auto")  # no snapshot of the new seed is there yet
    assert status == 3 and "seed: snapshot 42, now 43" in shown and "--resume anyway" in shown, shown
    status, shown = processes("run", started, *changes, "--resume", "anyway")
    assert status == 0, shown
    assert [set(record["changed"]) for record in resumed(run)] == [{"seed", "configuration"}] * 2
    assert not any(record["bit_exact"] for record in resumed(run))
    rates = [record["lr"] for record in records(run) if record.get("stage") == "pretrain" and "lr" in record]
    assert rates[2] > 1.5e-3 > rates[3]


@pytest.mark.parametrize("override", ["detach.layers=[last]", "align.when=interleaved"])
def test_what_no_snapshot_can_continue_is_refused_whoever_asks(
    override: str, started: Path, processes: Processes
) -> None:
    status, shown = processes("run", started, override, "--resume", "anyway")
    assert status == 3 and override.split("=")[0] in shown and "anyway" not in shown, shown


def test_with_nothing_changed_it_is_recorded_as_exact(
    started: Path, run_tree: Tree, processes: Processes, straight: Callable[..., dict[str, bytes]]
) -> None:
    status, shown = processes("run", started, "--resume", "auto")
    assert status == 0 and "not bit for bit" not in shown, shown
    run = Path(run_tree["output"])
    assert [(record["bit_exact"], record["step"]) for record in resumed(run)] == [(True, 3)]
    assert differing(straight(), final_state(run)) == []


@pytest.mark.parametrize(
    "override",
    ["seed=43", "pretrain.optimizer.lr=0.001", "data.sequence_length=64", "align.tokens=512", "detach.layers=[last]"],
)
def test_another_configuration_is_refused_by_its_key(
    override: str, started: Path, run_tree: Tree, processes: Processes
) -> None:
    before = {path: path.read_bytes() for path in Path(run_tree["output"]).rglob("*.safetensors")}
    status, shown = processes("run", started, override, "--resume", "auto")
    assert status == 3 and override.split("=")[0] in shown, shown
    assert {path: path.read_bytes() for path in Path(run_tree["output"]).rglob("*.safetensors")} == before


@pytest.mark.parametrize("what", ["data", "checkpoint"])
def test_other_data_or_another_checkpoint_in_the_same_place_is_refused(
    what: str, run_tree: Tree, write_config: Callable[..., Path], processes: Processes,
    make_checkpoint: Callable[..., Path], shards: dict[str, str], tmp_path: Path,
) -> None:  # fmt: skip
    own = {"data": tmp_path / "ja", "checkpoint": tmp_path / "model"}
    shutil.copytree(shards["ja-train"], own["data"])
    shutil.copytree(run_tree["model"], own["checkpoint"])
    run_tree["data"]["shards"]["ja"], run_tree["model"] = str(own["data"]), str(own["checkpoint"])
    config = write_config(run_tree)
    assert processes("run", config, "evaluate.every=0", patch=STOP)[0] == 130
    shutil.rmtree(own[what])
    other = shards["ja-heldout"] if what == "data" else make_checkpoint(intermediate_size=96)
    shutil.copytree(other, own[what])
    status, shown = processes("run", config, "evaluate.every=0", "--resume", "auto")
    assert status == 3 and f"({what}: snapshot" in shown, shown
    status, shown = processes("run", config, "evaluate.every=0", "--resume", "anyway")
    if what == "checkpoint":  # the snapshot's weights are of another model
        assert status == 3 and "anyway" not in shown, shown
    else:
        assert status == 0, shown
        assert [list(record["changed"]) for record in resumed(Path(run_tree["output"]))] == [["data"]]
