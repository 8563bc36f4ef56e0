"""`align.engine: streamed` in whole runs: the same files as a resident run, and kills in the middle of a sweep."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Forked
from test_loop import final_state, interrupt_at

Elo = Callable[..., tuple[int, str]]

# A process that kills itself without warning at the nth call of a method of the streamed engine.
KILLED = """
import os, signal, sys
from elo_engine.stream import device, step
owner, name, nth = {"poll": (step.Step, "poll"), "up": (device.DeviceUnits, "_up")}[sys.argv[1]] + (int(sys.argv[2]),)
plain, calls = getattr(owner, name), [0]
def dying(self, *args):
    calls[0] += 1
    if calls[0] == nth:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(self, *args)
setattr(owner, name, dying)
from elo_engine.cli import app
app(sys.argv[3:])
"""


@pytest.fixture
def streamed_tree(run_tree: dict[str, Any]) -> dict[str, Any]:
    run_tree["align"]["engine"] = "streamed"
    run_tree["align"]["micro_batch"] = 1
    run_tree["snapshot"]["every"] = 1
    return run_tree


def differing(left: dict[str, bytes], right: dict[str, bytes]) -> list[str]:
    assert set(left) == set(right)
    return [name for name in left if left[name] != right[name]]


@pytest.mark.parametrize("source", ["tied", "untied"])
@pytest.mark.parametrize(
    "options", [[], ["align.stream.store=disk", "align.stream.inputs=host"]], ids=["memory", "disk"]
)
def test_a_streamed_run_leaves_the_files_of_a_resident_one(
    source: str, options: list[str], request: pytest.FixtureRequest, streamed_tree: dict[str, Any],
    write_config: Callable[..., Path], elo: Elo, tmp_path: Path,
) -> None:  # fmt: skip
    """Snapshots and model to the last byte, and the same metrics: whole-model evaluation during the stage as well."""
    streamed_tree["model"] = str(request.getfixturevalue(source))
    streamed_tree["evaluate"]["every"] = 2
    resident = dict(streamed_tree, output=str(tmp_path / "resident"))
    status, shown = elo("run", write_config(resident, "resident.yaml"), "align.engine=resident", *options)
    assert status == 0, shown
    status, shown = elo("run", write_config(streamed_tree), *options)
    assert status == 0, shown
    run = Path(streamed_tree["output"])
    assert "align: streamed" in (run / "log.txt").read_text()
    assert differing(final_state(tmp_path / "resident"), final_state(run)) == []
    kept = ("stage", "step", "loss_nats", "gradient_norm", "lr", "model", "language", "heldout_loss_nats")
    found = []
    for folder in (tmp_path / "resident", run):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        found.append([{key: line[key] for key in kept if key in line} for line in lines if "step" in line])
    assert found[0] == found[1]
    assert any(line.get("model") == "whole" and line["stage"] == "align" for line in found[1])
    scored = {line["model"] for line in found[1] if line["stage"] == "pretrain" and "model" in line}
    assert scored == {"shallow", "whole"}
    names = [{path.name for path in folder.iterdir()} for folder in (tmp_path / "resident", run)]
    assert names[0] == names[1], "the store leaves nothing behind"


def test_interrupted_and_resumed_twice_it_ends_as_a_resident_run_bit_for_bit(
    streamed_tree: dict[str, Any], write_config: Callable[..., Path], elo: Elo, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Ctrl-C in the first and in the second step of alignment: a snapshot, exit 130, and on from there."""
    straight = dict(streamed_tree, output=str(tmp_path / "straight"))
    assert elo("run", write_config(straight, "straight.yaml"), "align.engine=resident")[0] == 0
    interrupt_at(monkeypatch, [("align", 1), ("align", 2)])
    config = write_config(streamed_tree)
    for _ in range(2):
        status, shown = elo("run", config, "--resume", "auto")
        assert status == 130, shown
    status, shown = elo("run", config, "--resume", "auto")
    assert status == 0, shown
    assert differing(final_state(tmp_path / "straight"), final_state(Path(streamed_tree["output"]))) == []


@pytest.mark.parametrize(
    ("where", "nth"),
    [
        ("poll", 41 + 8),  # in the forward sweep of the second step, with some updates of the first made
        ("poll", 41 + 30),  # in its backward sweep
        ("up", 5),  # between the weights and the state of an update
    ],
)
def test_killed_in_the_middle_of_a_sweep_a_run_resumes_bit_for_bit(
    where: str, nth: int, streamed_tree: dict[str, Any], write_config: Callable[..., Path], elo: Elo, tmp_path: Path,
    forked: Forked,
) -> None:  # fmt: skip
    """Each step asks 1 + 4 x 4 + 4 + 4 x 4 times (layers x micro-batches, forward, head and backward)."""
    straight = dict(streamed_tree, output=str(tmp_path / "straight"))
    assert elo("run", write_config(straight, "straight.yaml"), "evaluate.every=0", "snapshot.every=2")[0] == 0
    config = write_config(streamed_tree)
    options = ["evaluate.every=0", "snapshot.every=2"]
    ended = forked(KILLED, where, nth, "run", config, *options)
    assert ended.returncode == -signal.SIGKILL, ended.stdout + ended.stderr
    run = Path(streamed_tree["output"])
    assert not (run / "model").exists()
    status, shown = elo("run", config, "evaluate.every=0", "snapshot.every=2", "--resume", "auto")
    assert status == 0, shown
    assert differing(final_state(tmp_path / "straight"), final_state(run)) == []


def test_another_engine_goes_on_bit_for_bit(
    streamed_tree: dict[str, Any], write_config: Callable[..., Path], elo: Elo, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A run that no longer fits is continued streamed, with the store on the disk, and later resident again."""
    straight = dict(streamed_tree, output=str(tmp_path / "straight"))
    assert elo("run", write_config(straight, "straight.yaml"), "align.engine=resident")[0] == 0
    interrupt_at(monkeypatch, [("align", 1), ("align", 2)])
    config = write_config(streamed_tree)
    for options, expected in (
        (["align.engine=resident"], 130),
        (["align.engine=streamed", "align.stream.store=disk", "align.stream.inputs=host"], 130),
        (["align.engine=resident"], 0),
    ):
        status, shown = elo("run", config, "--resume", "auto", *options)
        assert status == expected, shown
    assert differing(final_state(tmp_path / "straight"), final_state(Path(streamed_tree["output"]))) == []
    resumed = [
        json.loads(line)
        for line in (Path(streamed_tree["output"]) / "metrics.jsonl").read_text().splitlines()
        if '"resumed"' in line
    ]
    assert [record["bit_exact"] for record in resumed] == [True, True]


def test_full_continual_pretraining_streams_too(
    streamed_tree: dict[str, Any], write_config: Callable[..., Path], elo: Elo, tmp_path: Path
) -> None:
    """`elo align` without a reattached model is the baseline; it takes the same engine."""
    for engine in ("resident", "streamed"):
        output = tmp_path / engine
        status, shown = elo("align", write_config(streamed_tree), f"output={output}", f"align.engine={engine}")
        assert status == 0, shown
    left, right = ({k: v for k, v in final_align(tmp_path / engine).items()} for engine in ("resident", "streamed"))
    assert left and differing(left, right) == []


def final_align(run: Path) -> dict[str, bytes]:
    from safetensors.torch import load_file

    newest = max((run / "align").glob("step-*"))
    found = {path.name: path.read_bytes() for path in sorted((run / "model").glob("*.safetensors"))}
    for name in ("weights.safetensors", "optimizer.safetensors"):
        for key, tensor in load_file(newest / name).items():
            found[f"{name}/{key}"] = bytes(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found
