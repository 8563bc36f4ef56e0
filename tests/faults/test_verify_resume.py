"""`elo verify-resume`: what it says of a run that continues exactly, and of one that does not."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forked import Forked
from safetensors.torch import load_file, save_file

from elo_engine import console, verify_resume
from elo_engine.config import load_config
from elo_engine.errors import FailedError, UsageError

Tree = dict[str, Any]
Elo = Callable[..., tuple[int, str]]


@pytest.fixture
def children_fork(forked: Forked, monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes that train need not import torch."""
    monkeypatch.setattr(verify_resume, "subprocess", SimpleNamespace(Popen=forked.popen, DEVNULL=None))


@pytest.mark.parametrize(
    ("override", "stages"),
    [
        ("pretrain.optimizer.state=fp32", [("pretrain", 4, 2), ("align", 4, 2)]),
        ("align.when=interleaved", [("align", 8, 4)]),
        ("align.engine=streamed", [("pretrain", 4, 2), ("align", 4, 2)]),
    ],
)
def test_a_run_that_continues_exactly(
    override: str, stages: list[tuple[str, int, int]], elo: Elo, run_tree: Tree, write_config: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    if override != "align.when=interleaved":  # once its processes are interpreters of their own
        request.getfixturevalue("children_fork")
    monkeypatch.setattr(console, "PLAIN_INTERVAL_S", math.inf)  # else a slow machine's progress, on stderr, is behind
    run_tree["pretrain"]["tokens_per_step"] = run_tree["pretrain"]["tokens"]  # a trial has shorter steps
    run_tree["align"] |= {"recompute": "auto", "micro_batch": "auto"}
    status, shown = elo("verify-resume", write_config(run_tree), override, "--json")
    assert status == 0, shown
    found = json.loads(shown[shown.index("[") :])
    assert [(one["stage"], one["steps"], one["cut"]) for one in found] == stages
    assert all(one["exact"] and one["tensors"] > 30 and one["bytes"] > 10_000 for one in found)
    output = Path(run_tree["output"])
    assert not output.exists() and not Path(f"{output}-verify").exists(), "nothing is left"


# Inside the processes that train: the resumed one does not begin where the killed one had stood.
FORGETS = """
import elo_engine.train.state as state
plain = state.restore
def restore(folder, optimizer):
    plain(folder, optimizer)
    for tensor in optimizer.moments().values():
        if tensor.is_floating_point():
            tensor.zero_()
state.restore = restore
"""
# A device that adds in another order each time.
SHAKES = """
import os
from elo_engine.train.resident import ResidentEngine
plain = ResidentEngine.step
def step(self, rows, tokens_loss, lr, **options):
    return plain(self, rows, tokens_loss, lr * (1 + os.getpid() % 1000 * 1e-3), **options)
ResidentEngine.step = step
"""


@pytest.mark.parametrize(
    ("first", "said"), [(FORGETS, "so what differs comes from resuming"), (SHAKES, "two straight runs differ too")]
)
def test_a_run_that_does_not(
    first: str, said: str, elo: Elo, run_tree: Tree, write_config: Callable[..., Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, forked: Forked,
) -> None:  # fmt: skip
    """The first tensor that differs is named, and whether it is the resume or the device; what was written stays."""
    popen = partial(forked.popen, first=first)
    monkeypatch.setattr(verify_resume, "subprocess", SimpleNamespace(Popen=popen, DEVNULL=None))
    work = tmp_path / "trial"
    status, shown = elo("verify-resume", write_config(run_tree), "--stage", "pretrain", "--work", work)
    assert status == 1 and "NOT the same" in shown and said in shown, shown
    assert "weights.safetensors: model.layers.0." in shown and "values, by" in shown
    assert (work / "pretrain" / "cut" / "metrics.jsonl").exists()
    status, shown = elo("verify-resume", write_config(run_tree), "--work", work)
    assert status == 3 and str(work) in shown


def test_a_process_that_fails_is_quoted(
    elo: Elo, run_tree: Tree, write_config: Callable[..., Path], children_fork: None
) -> None:
    run_tree["pretrain"]["optimizer"]["lr"] = 1e30
    run_tree["pretrain"]["schedule"] = {"decay": "constant", "warmup": 0}
    status, shown = elo("verify-resume", write_config(run_tree), "--stage", "pretrain", "--steps", "16")
    assert status == 1 and "ended with status 4" in shown and "not finite" in shown, shown


def test_stages_and_budgets(run_tree: Tree, write_config: Callable[..., Path]) -> None:
    config = load_config(write_config(run_tree))
    assert verify_resume.stages_of(config, None) == ["pretrain", "align"]
    interleaved = load_config(write_config(run_tree), ["align.when=interleaved"])
    with pytest.raises(UsageError, match="use align; interleaved"):
        verify_resume.stages_of(interleaved, "pretrain")
    trial = verify_resume.trial_config(config, 6, Path("there"))
    assert trial.steps("pretrain") == trial.steps("align") == 6 and trial.snapshot.every == 3
    assert trial.pretrain.tokens_per_step == 2 * 2 * 32 and trial.pretrain.optimizer == config.pretrain.optimizer
    assert trial.evaluate.every == 0 and not trial.evaluate.shards and trial.output == "there"


def test_every_kind_of_difference_is_seen(
    elo: Elo, run_tree: Tree, write_config: Callable[..., Path], tmp_path: Path
) -> None:
    """Two equal runs, then one of them is changed: a value of a weight, a NaN, a missing moment, a loss, the place."""
    config = write_config(run_tree)
    runs = [tmp_path / name for name in ("one", "two")]
    for run in runs:
        assert elo("pretrain", config, f"output={run}")[0] == 0
    assert verify_resume.compare(*runs, "pretrain")["exact"]
    newest = runs[1] / "pretrain" / "step-00000006"

    def change(name: str, act: Callable[[dict[str, torch.Tensor]], object]) -> list[str]:
        path = newest / name
        before = path.read_bytes()
        tensors = load_file(path)
        act(tensors)
        save_file(tensors, path)
        commit = (newest / "COMMIT.json").read_text()
        rewrite_commit(newest)
        found = verify_resume.compare(*runs, "pretrain")["differences"]
        path.write_bytes(before)
        (newest / "COMMIT.json").write_text(commit)
        assert verify_resume.compare(*runs, "pretrain")["exact"]
        return list(found)

    name = "model.layers.0.mlp.up_proj.weight"
    assert change("weights.safetensors", lambda t: t[name][3, 5].add_(0.25)) == [
        f"weights.safetensors: {name} differs in 1 of 3840 values, by 0.25 at most"
    ]
    first = change("weights.safetensors", lambda t: t[name][0, 0].fill_(torch.nan))[0]
    assert name in first and "1 of 3840" in first
    moment = next(iter(load_file(newest / "optimizer.safetensors")))
    assert change("optimizer.safetensors", lambda t: t.pop(moment)) == [
        f"optimizer.safetensors: {moment} is in one of both alone"
    ]
    records = (runs[1] / "metrics.jsonl").read_text()
    (runs[1] / "metrics.jsonl").write_text(records.replace('"step": 3, "loss_nats": ', '"step": 3, "loss_nats": 1', 1))
    found = verify_resume.compare(*runs, "pretrain")["differences"]
    assert len(found) == 1 and found[0].startswith("step 3 of pretrain: loss_nats is "), found


def rewrite_commit(folder: Path) -> None:
    """COMMIT.json for what is in the folder now."""
    from elo_engine.checkpoint.commit import write_commit

    extra = {k: v for k, v in json.loads((folder / "COMMIT.json").read_text()).items() if k == "extra"}
    (folder / "COMMIT.json").unlink()
    write_commit(folder, extra.get("extra", {}))


def test_a_child_that_was_not_killed_in_time_is_no_success(
    run_tree: Tree, write_config: Callable[..., Path], tmp_path: Path, children_fork: None
) -> None:
    """A kill that does not come would compare a straight run with itself."""
    config = load_config(write_config(run_tree))
    with pytest.raises(FailedError, match="ended with status 0, before step 100"):
        verify_resume._process(config, "pretrain", 2, tmp_path / "x", 99, False, lambda n: None)
