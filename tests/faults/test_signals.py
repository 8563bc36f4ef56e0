"""SIGTERM and SIGINT in every phase, a second one, signs of life, and an interpreter that ends: faults 9, 10 and 34."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fault_fixture import Processes, differing, final_state, leftovers, status_of
from forked import Forked
from mover_fixture import KINDS

from elo_engine.command import verb
from elo_engine.config import load_config
from elo_engine.run_dir import RunDir

Tree = dict[str, Any]
Elo = Callable[..., tuple[int, str]]

IMPORTS = """
from elo_engine import evaluate, reattach, run_dir
from elo_engine.checkpoint import SYSCALLS
from elo_engine.model.decoder import Decoder
from elo_engine.run_dir import RunDir
from elo_engine.stream.step import Step
beats = {}
def while_it_is(doing, nth, *signals):
    # in the nth sign of life of a phase
    plain = RunDir.beat
    def beat(self, now=None):
        plain(self, now)
        if now == doing:
            beats[doing] = beats.get(doing, 0) + 1
            if beats[doing] == nth:
                send(*signals)()
    RunDir.beat = beat
"""
# From the stage on: what is scored before is no part of it.
EVALUATION = """
from elo_engine import pretrain
plain = pretrain.run_stage
def run_stage(*args, **options):
    after(Decoder, "token_losses", 2, send(signal.{0}))
    return plain(*args, **options)
pretrain.run_stage = run_stage
"""
PHASES = {
    "load": ("while_it_is('loading', 1, signal.{0})", 0),
    "step": ("after(Decoder, 'loss_sum', 5, send(signal.{0}))", 2),  # the first half of the third step, given up
    "evaluation": (EVALUATION, 3),
    "save": ("while_it_is('saving', 2, signal.{0})", 4),
    "write": ("while_it_is('writing', 2, signal.{0})", 6),
    "load again": ("while_it_is('loading', 3, signal.{0})", 6),
    "sweep": ("after(Step, 'poll', 30, send(signal.{0}))", 6),
}


@pytest.mark.parametrize(("phase", "number"), [(phase, ("SIGTERM", "SIGINT")[i % 2]) for i, phase in enumerate(PHASES)])
def test_a_signal_in_any_phase_ends_cleanly(
    phase: str, number: str, run_tree: Tree, write_config: Callable[..., Path], processes: Processes,
    straight: Callable[..., dict[str, bytes]],
) -> None:  # fmt: skip
    """Exit status 130, nothing half made, at most the step in hand lost, and the same end."""
    run_tree["align"]["engine"] = "streamed" if phase == "sweep" else "resident"
    wanted = straight()
    code, stood_at = PHASES[phase]
    config = write_config(run_tree)
    status, shown = processes("run", config, patch=IMPORTS + code.format(number))
    assert status == 130, shown
    run = Path(run_tree["output"])
    assert status_of(run)["state"] == "interrupted" and leftovers(run) == []
    kept = sorted(int(path.name[5:]) for path in (run / "pretrain").glob("step-*"))
    assert (kept or [0])[-1] == stood_at, shown
    status, shown = processes("run", config, "--resume", "auto")
    assert status == 0, shown
    assert differing(wanted, final_state(run)) == []


@pytest.mark.parametrize("second", ["SIGTERM", "SIGINT"])
def test_a_second_signal_during_the_save_changes_nothing(
    second: str, run_tree: Tree, write_config: Callable[..., Path], processes: Processes
) -> None:
    config = write_config(run_tree)
    patch = f"""
def again():
    after(SYSCALLS, 'write', 1, send(signal.{second}))
    after(SYSCALLS, 'fsync', 2, send(signal.{second}, signal.SIGINT))
    after(SYSCALLS, 'rename', 1, send(signal.{second}))
    send(signal.SIGTERM)()
after(Decoder, 'loss_sum', 5, again)
"""
    status, shown = processes("pretrain", config, "snapshot.every=100", "evaluate.every=0", patch=IMPORTS + patch)
    assert status == 130 and "continue from step-00000002" in shown, shown
    run = Path(run_tree["output"])
    assert [path.name for path in (run / "pretrain").iterdir()] == ["step-00000002"]
    status, shown = processes("pretrain", run, "snapshot.every=100", "evaluate.every=0")
    assert status == 0 and "resumed at step 2" in shown, shown


def test_a_second_signal_while_a_model_is_given_up_leaves_nothing(
    run_tree: Tree, write_config: Callable[..., Path], processes: Processes
) -> None:
    """Outside the loop the first one unwinds; the next ones, within seconds, do not cut the cleaning short."""
    config = write_config(run_tree)
    assert processes("pretrain", config, "evaluate.every=0")[0] == 0
    patch = """
import shutil
after(os, 'unlink', 1, send(signal.SIGINT))
after(os, 'rmdir', 1, send(signal.SIGTERM))
while_it_is('writing', 2, signal.SIGTERM)
"""
    run = Path(run_tree["output"])
    status, shown = processes("reattach", run, patch=IMPORTS + patch)
    assert status == 130, shown
    assert leftovers(run) == [] and not (run / "reattached").exists()
    assert processes("reattach", run)[0] == 0


def test_a_later_signal_unwinds_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks a second time after the grace is heard, and the handlers are put back."""
    monkeypatch.setattr("elo_engine.command.GRACE_S", 0.2)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    seen: list[str] = []

    @verb
    def body() -> None:
        for wait in (0.0, 0.0, 0.25):
            time.sleep(wait)
            try:
                signal.raise_signal(signal.SIGTERM)
                seen.append("let pass")
            except KeyboardInterrupt:
                seen.append("unwound")

    body()
    assert seen == ["unwound", "let pass", "unwound"]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_handlers_are_restored_after_a_run_of_any_end(
    run_tree: Tree,
    write_config: Callable[..., Path],
    elo: Callable[..., tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGBUS)
    before = [signal.getsignal(number) for number in numbers]
    config = write_config(run_tree)
    assert elo("pretrain", config, "evaluate.every=0")[0] == 0
    assert [signal.getsignal(number) for number in numbers] == before
    assert elo("pretrain", config)[0] == 3
    monkeypatch.setattr("elo_engine.pretrain.run_stage", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        elo("pretrain", config, "--resume", "auto", "evaluate.every=0")
    assert [signal.getsignal(number) for number in numbers] == before


EXITS = """
import os, sys
from pathlib import Path
from elo_engine.checkpoint import CheckpointReader, open_checkpoint
from elo_engine.checkpoint.mover import NativeMover, PythonMover, using
kind, folder, where = sys.argv[1:]
index = open_checkpoint(Path(folder))
if where == "transfer":  # under way when the interpreter ends, and nobody waits for them
    mover = (NativeMover if kind == "native" else PythonMover)(4, 1 << 16, 2)
    shard = next(Path(folder).glob("*.safetensors"))
    fd = os.open(shard, os.O_RDONLY)
    for _ in range(4):
        mover.fill(mover.acquire(), fd, 0, 1 << 14)
    sys.exit(7)
with using(kind), CheckpointReader(index, "pread") as reader:
    reader.read(list(index.entries), progress=lambda done, total: sys.exit(7))
"""


@pytest.mark.parametrize("where", ["progress", "transfer"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_interpreter_that_ends_in_the_middle_of_a_read(
    kind: str, where: str, untied: Path, forked: Forked
) -> None:
    """Fault 34: no hang, no crash, the status that was asked for. Transfers end at other moments each time."""
    for _ in range(6 if where == "transfer" else 1):
        done = forked(EXITS, kind, untied, where, timeout_s=60)
        assert done.returncode == 7, (done.returncode, done.stderr[-2000:])


WAITED = """
import os, sys, time
from pathlib import Path
from elo_engine.checkpoint import python_mover
from elo_engine.checkpoint.mover import PythonMover
folder, mark, planted = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
def slow(*of):
    time.sleep(0.7)
    mark.write_text("ended")
    raise OSError("planted")
python_mover._read = slow
python_mover._PATIENCE_S = 0.0 if planted == "planted" else 30.0
mover = PythonMover(4, 1 << 16, 2)
fd = os.open(next(folder.glob("*.safetensors")), os.O_RDONLY)
mover.fill(mover.acquire(), fd, 0, 1 << 14)
time.sleep(0.2)
def late():
    try:
        mover.fill(mover.acquire(), fd, 0, 1 << 14)
    except RuntimeError as error:
        print(error)
import atexit
atexit.unregister(python_mover._end)
atexit.register(late)
atexit.register(python_mover._end)
sys.exit(7)
"""


def test_a_transfer_under_way_is_waited_for_and_none_is_begun(untied: Path, tmp_path: Path, forked: Forked) -> None:
    """Nothing is left to chance: it takes longer than an interpreter's end, which a wait of no time shows."""
    done = forked(WAITED, untied, tmp_path / "one", "", timeout_s=60)
    assert (done.returncode, (tmp_path / "one").exists()) == (7, True), done.stderr[-2000:]
    assert "no transfer is begun any more" in done.stdout
    forked(WAITED, untied, tmp_path / "other", "planted", timeout_s=60)
    assert not (tmp_path / "other").exists()


def test_status_beats_while_work_goes_on(
    run_tree: Tree, write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time and step; renewed at once where something else begins, else no more often than it says."""
    monkeypatch.setattr("elo_engine.run_dir._BEAT_S", 0.15)
    with RunDir.create(load_config(write_config(run_tree))) as run:
        run.status(state="running", stage="pretrain", step=3, doing="stepping")
        first = status_of(run.path)
        assert first["step"] == 3 and abs(first["heartbeat_s"] - time.time()) < 5
        run.beat()
        assert status_of(run.path) == first
        run.beat("saving")
        saving = status_of(run.path)
        assert saving["doing"] == "saving" and saving["step"] == 3 and saving["heartbeat_s"] > first["heartbeat_s"]
        time.sleep(0.2)
        run.beating("saving", lambda done, total: None)(1, 2)
        assert status_of(run.path)["heartbeat_s"] > saving["heartbeat_s"] + 0.15


def test_every_phase_of_a_run_gives_signs_of_life(
    run_tree: Tree,
    write_config: Callable[..., Path],
    elo: Callable[..., tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[str, str]] = []
    plain = RunDir.status

    def status(self: RunDir, **fields: Any) -> None:
        plain(self, **fields)
        found = json.loads((self.path / "STATUS").read_text())
        seen.append((str(found.get("stage")), str(found.get("doing"))))

    monkeypatch.setattr(RunDir, "status", status)
    assert elo("run", write_config(run_tree), "evaluate.every=2")[0] == 0
    for stage in ("pretrain", "align"):
        assert {(stage, doing) for doing in ("stepping", "saving", "evaluating")} <= set(seen)
    assert {doing for _, doing in seen} >= {"loading", "writing"}
