"""SIGKILL while snapshots are saved and retired, and at moments of whole runs: faults 1 to 8 and 19."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fault_fixture import Processes, differing, final_state, leftovers, records
from snapshot_fixture import IDENTITY, Numbers, newest, save

from elo_engine.data import Mixture, TokenStore
from elo_engine.errors import RefusedError
from elo_engine.train import state
from elo_engine.train.loop import Progress

Tree = dict[str, Any]

# Saves steps 2, 4, 6 and 8 where two are kept, and dies at the nth call of all that touches the disk while 8 is saved.
SAVES = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from elo_engine.checkpoint import SYSCALLS
import snapshot_fixture
stage = Path({stage!r})
for step in (2, 4, 6):
    snapshot_fixture.save(stage, step)
calls = []
def counted(owner, name):
    plain = getattr(owner, name)
    def call(*args, **options):
        calls.append(name)
        if len(calls) == {nth}:
            if name in ("write", "pwrite"):
                plain(args[0], args[1][: len(args[1]) // 2], *args[2:])  # half of a tensor reaches the file
            os.kill(os.getpid(), signal.SIGKILL)
        result = plain(*args, **options)
        if name == "rename" and {nth} == -2:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, call)
for name in ("write", "pwrite", "fsync", "rename"):
    counted(SYSCALLS, name)
for name in ("unlink", "rmdir", "mkdir"):
    counted(os, name)
snapshot_fixture.save(stage, 8)
(stage.parent / "calls").write_text(" ".join(calls))
"""


def test_killed_at_every_call_of_saving_and_retiring(processes: Processes, tmp_path: Path) -> None:
    """Faults 1 to 4: what a resume finds is the old snapshot or the new one, whole; then it goes on, and nothing
    is left over."""

    def run(nth: int) -> tuple[int, Path]:
        stage = tmp_path / str(nth) / "pretrain"
        stage.parent.mkdir()
        patch = SAVES.format(tests=str(Path(__file__).parents[1]), stage=str(stage), nth=nth)
        return processes(patch=patch)[0], stage

    status, stage = run(-1)
    assert status == 0, processes._shown.read_text()
    calls = (stage.parent / "calls").read_text().split()
    assert newest(stage) == 8 and sorted(path.name for path in stage.iterdir()) == ["step-00000006", "step-00000008"]
    assert {"write", "fsync", "rename", "unlink", "rmdir"} <= set(calls)
    found = []
    for nth in [-2, *range(1, len(calls) + 1)]:
        status, stage = run(nth)
        assert status == -9, (nth, processes._shown.read_text())
        found.append(newest(stage))
        renamed = nth == -2 or "rename" in calls[: nth - 1]
        assert found[-1] == (8 if renamed else 6), (nth, calls[nth - 1])
        assert len(leftovers(stage)) <= 1
        state.clear_leftovers(stage)
        assert leftovers(stage) == []
        for step in (7, 8, 10, 12):  # what the resumed run does
            if step > found[-1]:
                save(stage, step)
        assert newest(stage) == 12
        assert sorted(path.name for path in stage.iterdir()) == ["step-00000010", "step-00000012"], "retired in the end"
    assert found[0] == 8 and set(found) == {6, 8}


def test_leftovers_of_a_step_that_is_not_reached_again_are_removed(tmp_path: Path) -> None:
    """SIGTERM saves in between, a kill leaves that folder, and the resumed run saves elsewhere."""
    save(tmp_path, 4)
    left = tmp_path / ".step-00000005.tmp-1-00112233"
    foreign = [tmp_path / name for name in (".notes.tmp-1-00112233", "step-00000005.tmp-1-00112233", "thesis")]
    for folder in (left, *foreign):
        folder.mkdir()
        (folder / "x").touch()
    state.clear_leftovers(tmp_path)
    assert not left.exists() and all((folder / "x").exists() for folder in foreign)


def test_the_newest_step_is_the_greatest_number_that_verifies(tmp_path: Path) -> None:
    """Fault 19: 9 before 10, a newest one without COMMIT, another run's."""
    state.save_snapshot(tmp_path, Numbers(9), Progress(9), IDENTITY, {}, keep=9)
    state.save_snapshot(tmp_path, Numbers(10), Progress(10), IDENTITY, {}, keep=9)
    shutil.copytree(tmp_path / "step-00000009", tmp_path / "step-9")
    shutil.copytree(tmp_path / "step-00000010", tmp_path / "step-00000011")
    (tmp_path / "step-00000011" / "COMMIT.json").unlink()
    (tmp_path / "step-00000012").mkdir()
    told: list[str] = []
    found = state.latest_snapshot(tmp_path, told.append)
    assert found is not None and found.name == "step-00000010"
    assert len(told) == 2 and all("passed over" in text for text in told)
    with pytest.raises(RefusedError, match="run_id"):
        state.read_progress(found, {"run_id": "b"})


# The process dies at the nth micro-batch of a stage, or at the nth write of a file.
DIES = """
from elo_engine.checkpoint import SYSCALLS
from elo_engine.model.decoder import Decoder
from elo_engine.stream.step import Step
after({owner}, {name!r}, {nth}, send(signal.SIGKILL))
"""
# Small numbers, so that a run of nine steps is killed several times before it ends: each of them gets past a snapshot.
MOMENTS = {
    "micro-batch": ("Decoder", "loss_sum", 6), "write": ("SYSCALLS", "write", 6), "fsync": ("SYSCALLS", "fsync", 9),
    "poll": ("Step", "poll", 40),
}  # fmt: skip


@pytest.mark.parametrize(
    ("engine", "when"), [("resident", "after"), ("streamed", "after"), ("resident", "interleaved")]
)
def test_killed_at_random_moments_again_and_again(
    engine: str, when: str, run_tree: Tree, write_config: Callable[..., Path], processes: Processes,
    straight: Callable[..., dict[str, bytes]],
) -> None:  # fmt: skip
    """Faults 5, 6 and 8: wherever it dies, in pretraining, in reattaching, in alignment, and however often."""
    run_tree["align"] |= {"engine": engine, "when": when}
    run_tree["evaluate"] = {"every": 0}
    wanted = straight()
    config, chance, killed = write_config(run_tree), random.Random(f"{engine} {when}"), 0
    source = {path.name: path.read_bytes() for path in Path(run_tree["model"]).iterdir()}
    kinds = [kind for kind in MOMENTS if kind != "poll" or engine == "streamed"]
    for attempt in range(8):
        owner, name, most = MOMENTS[kinds[attempt % len(kinds)]]
        patch = DIES.format(owner=owner, name=name, nth=chance.randint(1, most))
        status, shown = processes("run", config, "--resume", "auto", patch=patch)
        assert status in (-9, 0), shown
        killed += status == -9
        assert len(leftovers(Path(run_tree["output"]))) <= 1
        if status == 0:
            break
    else:
        status, shown = processes("run", config, "--resume", "auto")
        assert status == 0, shown
    assert killed >= 3, "the faults were hardly reached"
    run = Path(run_tree["output"])
    assert differing(wanted, final_state(run)) == []
    assert leftovers(run) == []
    assert {path.name: path.read_bytes() for path in Path(run_tree["model"]).iterdir()} == source
    resumed = [record for record in records(run) if record.get("event") == "resumed"]
    assert resumed and all(record["bit_exact"] for record in resumed)
    done = [(record["stage"], record["step"]) for record in records(run) if "lr" in record]
    repeated = len(done) - len(set(done))
    assert repeated <= killed * run_tree["snapshot"]["every"], "no more than that is lost by a kill"


def test_killed_in_the_middle_of_an_epoch_with_a_remainder(
    run_tree: Tree, write_config: Callable[..., Path], processes: Processes, straight: Callable[..., dict[str, bytes]]
) -> None:
    """Fault 7: 45 tokens a row leave a remainder in each epoch; steps of 5 rows in micro-batches of 2, 2 and 1; the
    kill is in the middle of a step behind the turn of an epoch."""
    run_tree["data"] |= {"sequence_length": 45, "mix": {"ja": 3, "en": 1}}
    run_tree["pretrain"] |= {"tokens": 225 * 40, "tokens_per_step": 225}
    run_tree["align"] |= {"tokens": 225, "tokens_per_step": 225}
    run_tree["evaluate"], run_tree["snapshot"] = {"every": 0}, {"every": 3, "keep": 1}
    stores = {name: TokenStore(Path(run_tree["data"]["shards"][name])) for name in ("ja", "en")}
    mixture = Mixture(stores, {"ja": 3, "en": 1}, 45, 42)
    assert stores["ja"].tokens_total % 45, "the fixture leaves a remainder"
    origins = [mixture.origins(5 * step, 5) for step in range(40)]
    epochs = [{origin.epoch for origin in one if origin.language == "ja"} for one in origins]
    assert {0} in epochs and {1} in epochs
    turn = epochs.index({1})
    wanted = straight()
    config = write_config(run_tree)
    for step in (turn - 2, turn + 2):  # micro-batches of the whole run: a resumed process counts from its snapshot
        done = step if step < turn else step - (turn - 2) // 3 * 3
        patch = DIES.format(owner="Decoder", name="loss_sum", nth=3 * done + 2)
        status, shown = processes("run", config, "--resume", "auto", patch=patch)
        assert status == -9, shown
    status, shown = processes("run", config, "--resume", "auto")
    assert status == 0, shown
    assert differing(wanted, final_state(Path(run_tree["output"]))) == []
    done = [record for record in records(Path(run_tree["output"])) if "lr" in record]
    steps = [record["step"] for record in done if record["stage"] == "pretrain"]
    assert sorted(set(steps)) == list(range(1, 41)) and len(steps) > 40


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_killed_while_the_run_folder_is_made(
    nth: int, run_tree: Tree, write_config: Callable[..., Path], processes: Processes
) -> None:
    """What is there then is no run yet, and the same command begins it."""
    config = write_config(run_tree)
    patch = f"from elo_engine import run_dir\nafter(run_dir, '_write_durably', {nth}, send(signal.SIGKILL))"
    assert processes("pretrain", config, patch=patch)[0] == -9
    assert {path.name for path in Path(run_tree["output"]).iterdir()} >= {".lock"}
    status, shown = processes("pretrain", config, "--resume", "auto")
    assert status == 0, shown
    assert json.loads((Path(run_tree["output"]) / "run.json").read_text())["run_id"]
    assert processes("pretrain", config)[0] == 3, "a run that has begun is in the way"
