"""`elo bench card`: parts that crash, hang, leave processes behind or are killed cost nothing but themselves, and every
row is on the disk before the next part begins. The parts here are planted modules of a few lines.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from elo_engine.benchmarks import card, card_process
from elo_engine.benchmarks.card import ROWS, append, finish, read_rows, run_parts
from elo_engine.benchmarks.card_plan import Machine, conditions
from elo_engine.benchmarks.card_process import MARK, Part, row_of, run_part
from elo_engine.benchmarks.recording import read_record
from elo_engine.benchmarks.reporting import make_report
from elo_engine.errors import UsageError

Elo = Callable[..., tuple[int, str]]
FIGURES = "import json, pathlib, sys; pathlib.Path(sys.argv[1]).write_text(json.dumps({'figures': {'failed': 0.0}}))"
PLANTED = {
    "works": FIGURES,
    "crashes": f"{FIGURES}\nraise RuntimeError('CUDA error: an illegal memory access was encountered')",
    "dies": "import os, signal; print('the last that was heard', flush=True); os.kill(os.getpid(), signal.SIGSEGV)",
    "refuses": "import sys; print('error: this card has none'); sys.exit(3)",
    "says_nothing": "",
    "lies": "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text('{\"figures\"')",
    "hangs": f"{FIGURES}\nimport time\nprint('hanging', flush=True)\nwhile True: time.sleep(60)",
    # deaf to what asks it to end, with a child in a session of its own, as an arm of a comparison is
    "deaf": "import signal, subprocess, sys, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
            "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\n"
            "print(child.pid, flush=True)\nwhile True: time.sleep(60)",
    "orphans": f"{FIGURES}\nimport subprocess\nsleep = [sys.executable, '-c', 'import time; time.sleep(600)']\n"
               "print(subprocess.Popen(sleep, start_new_session=True).pid, flush=True)",
}  # fmt: skip


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted")
    for name, source in PLANTED.items():
        (folder / f"planted_{name}.py").write_text(source, encoding="utf-8")
    return folder


@pytest.fixture
def part(planted: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Part]:
    monkeypatch.setattr(card_process, "GRACE_S", 0.5)
    monkeypatch.setattr(card_process, "TICK_S", 0.05)

    def make(kind: str, limit_s: float = 20.0, least_s: float = 0.0, **more: Any) -> Part:
        command = (f"planted_{kind}", "{out}")
        return Part(f"correct {kind}", "correct", command, limit_s, least_s, {"PYTHONPATH": str(planted)}, **more)

    return make


def alive(pid: int) -> bool:
    """Whether a process still runs; one that has ended and that nobody asked for is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def quiet(line: str) -> None:
    """Nothing is said."""


@pytest.mark.parametrize(
    ("kind", "status", "why", "figures"),
    [
        ("works", "ran", "", {"failed": 0.0}),
        ("crashes", "failed", "exit status 1: RuntimeError: CUDA error: an illegal memory access", {"failed": 0.0}),
        ("dies", "failed", "killed by SIGSEGV: the last that was heard", {}),
        ("refuses", "cannot run", "this card has none", {}),
        ("says_nothing", "failed", "it ended well and left no figure", {}),
        ("lies", "failed", "what it left cannot be read: JSONDecodeError", {}),
    ],
)
def test_however_a_part_ends_is_its_row(
    part: Callable[..., Part], tmp_path: Path, kind: str, status: str, why: str, figures: dict[str, float]
) -> None:
    row, interrupted = run_part(part(kind), 20.0, tmp_path, tmp_path)
    assert not interrupted and (row["status"], row["figures"]) == (status, figures)
    assert why in row["why"] and bool(row["why"]) == bool(why)
    assert (tmp_path / "logs" / f"correct-{kind}.txt".replace("_", "-")).exists()


def test_a_part_that_hangs_is_ended_at_its_limit_with_all_that_it_started(
    part: Callable[..., Part], tmp_path: Path
) -> None:
    began = time.monotonic()
    row, _ = run_part(part("deaf"), 1.5, tmp_path, tmp_path)
    assert row["status"] == "timed out" and "its limit of 2 s" in row["why"] and 1.5 < row["seconds"] < 10
    assert time.monotonic() - began < 10
    child = int(row["last_lines"][0])
    assert not alive(child), "a process that would stay on the card"
    row, _ = run_part(part("hangs"), 1.5, tmp_path, tmp_path)
    assert row["status"] == "timed out" and "what it had measured by then is kept" in row["why"]
    assert row["figures"] == {"failed": 0.0}


def test_what_a_part_leaves_behind_is_ended(part: Callable[..., Part], tmp_path: Path) -> None:
    row, _ = run_part(part("orphans"), 20.0, tmp_path, tmp_path)
    assert row["status"] == "ran" and not alive(int(row["last_lines"][0]))
    assert MARK not in os.environ


def test_a_failure_costs_its_own_part_alone(part: Callable[..., Part], tmp_path: Path) -> None:
    """Rows of all, in order; what does not fit the card or the time is not begun, and says so."""
    parts = [part("dies"), part("hangs", 0.5), part("works"), part("refuses", why_not="not one row fits"),
             part("lies", least_s=1000.0)]  # fmt: skip
    said: list[str] = []
    assert not run_parts(parts, 600.0, tmp_path, tmp_path, said.append)
    rows = read_rows(tmp_path / ROWS)
    assert [row["status"] for row in rows] == ["failed", "timed out", "ran", "not run", "not run"]
    assert rows[3]["why"] == "not one row fits" and "s left, and it takes 1000 s at least" in rows[4]["why"]
    assert "1 of 5, correct dies: up to" in said[0] and "all ends within" in said[0]


def test_a_part_that_cannot_be_begun_costs_its_own_row(
    part: Callable[..., Part], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begun(one: Part, *more: Any, right: Any = card.run_part) -> Any:
        if one.name == "correct dies":
            raise OSError(12, "Cannot allocate memory")
        return right(one, *more)

    monkeypatch.setattr(card, "run_part", begun)
    assert not run_parts([part("dies"), part("works")], 600.0, tmp_path, tmp_path, quiet)
    first, second = read_rows(tmp_path / ROWS)
    assert first["status"] == "failed" and "could not be run: [Errno 12] Cannot allocate memory" in first["why"]
    assert second["status"] == "ran"


def test_time_that_others_leave_over_is_for_those_that_follow(
    part: Callable[..., Part], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Limits are of ten minutes and grow with them; a part has its own, or more where the others' do not fill the time.
    """
    allowed: list[float] = []

    def taken(one: Part, allowed_s: float, *more: Any) -> tuple[dict[str, Any], bool]:
        allowed.append(allowed_s)
        return row_of(one, "ran", ""), False

    monkeypatch.setattr(card, "run_part", taken)
    parts = [part("works", 400.0), part("works", 300.0), part("works", 50.0)]
    run_parts(parts, 600.0, tmp_path, tmp_path, quiet)
    assert allowed == pytest.approx([400.0, 550.0, 600.0], abs=1.0)  # the first two took no time
    allowed.clear()
    run_parts([part("works", 400.0, leaves_s=250.0), part("works", 50.0)], 600.0, tmp_path, tmp_path, quiet)
    assert allowed == pytest.approx([350.0, 600.0], abs=1.0)
    allowed.clear()
    run_parts(parts, 1200.0, tmp_path, tmp_path, quiet)
    assert allowed == pytest.approx([800.0, 1100.0, 1200.0], abs=1.0)


DRIVER = """
import sys
from pathlib import Path
from elo_engine.benchmarks import card_process
from elo_engine.benchmarks.card import run_parts
from elo_engine.benchmarks.card_process import Part
card_process.GRACE_S = 0.5
folder, planted = Path(sys.argv[1]), {"PYTHONPATH": sys.argv[2]}
parts = [Part(f"correct {n}", "correct", (f"planted_{n}", "{out}"), 60, 0, planted) for n in ("works", "hangs", "dies")]
print(run_parts(parts, 600.0, folder, folder, lambda line: None))
"""


@pytest.fixture
def driven(planted: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A run of three parts in a process of its own, whose second part hangs by now."""
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path), str(planted)], stdout=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a shell ignores for what is beside it
    )  # fmt: skip
    until, log = time.monotonic() + 60, tmp_path / "logs" / "correct-hangs.txt"
    while "hanging" not in (log.read_text() if log.exists() else ""):
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.05)
    yield process
    process.kill()
    process.wait()
    for folder in Path("/proc").glob("[0-9]*"):  # of a driver that was killed: the part that it left
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"planted_hangs" in words and str(tmp_path).encode() in b" ".join(words):
            os.kill(int(folder.name), signal.SIGKILL)


def about(folder: Path, scale: str = "full") -> None:
    machine = Machine("cpu", "Imaginary CPU, 2 cores", "", 8 * 2**30)
    names = {"correct works": "correct", "correct hangs": "correct", "correct dies": "correct"}
    environment = {"cpu": "Imaginary CPU", "cpu_cores": 2, "cpu_threads_used": 2, "gpus": [], "packages": {}}
    found = conditions(machine, "tiny", 10.0) | {
        "scale": scale, "parts": names, "environment": environment, "command": ["elo", "bench", "card"], "options": {},
        "records": str(folder / "records"),
    }  # fmt: skip
    (folder / "records").mkdir(exist_ok=True)
    (folder / card.CARD).write_text(json.dumps(found), encoding="utf-8")


def test_killed_in_the_middle_what_was_before_is_on_the_disk(driven: subprocess.Popen[str], tmp_path: Path) -> None:
    driven.kill()
    driven.wait()
    rows = read_rows(tmp_path / ROWS)
    assert [(row["part"], row["status"]) for row in rows] == [("correct works", "ran")]
    with (tmp_path / ROWS).open("a") as file:
        file.write('{"part": "correct hangs", "stat')  # a line that was cut off
    about(tmp_path)
    result, path = finish(tmp_path)
    assert [part["status"] for part in result["parts"]] == ["ran", "not run", "not run"]
    assert {part["why"] for part in result["parts"][1:]} == {"the run was ended before it was done"}
    assert [one["verdict"] for one in result["asked"] if one["figure"] == "failed"] == ["met", "not run", "not run"]
    assert read_record(path).result == result


def test_interrupted_what_is_there_is_kept_and_nothing_more_is_begun(
    driven: subprocess.Popen[str], tmp_path: Path
) -> None:
    driven.send_signal(signal.SIGINT)
    said, _ = driven.communicate(timeout=30)
    assert said.strip() == "True"
    rows = read_rows(tmp_path / ROWS)
    assert [row["status"] for row in rows] == ["ran", "interrupted", "not run"]
    assert rows[1]["figures"] == {"failed": 0.0} and rows[2]["why"] == "interrupted before it"


def test_the_whole_command_on_a_cpu(elo: Elo, tmp_path: Path) -> None:
    """A part that really runs and one that needs a card, and the record of both in the report."""
    work, records = tmp_path / "work", tmp_path / "records"
    status, said = elo(
        "bench", "card", "--device", "cpu", "--scale", "tiny", "--only", "compile,bias", "--work", str(work),
        "--record", str(records),
    )  # fmt: skip
    assert status == 0, said
    (folder,), (record,) = work.iterdir(), records.iterdir()
    result = json.loads((record / "result.json").read_text())
    assert [(part["group"], part["status"]) for part in result["parts"]] == [("bias", "cannot run"), ("compile", "ran")]
    assert [row["part"] for row in read_rows(folder / ROWS)] == [part["part"] for part in result["parts"]]
    asked = {one["figure"]: one for one in result["asked"]}
    assert asked["first_step_s"]["measured"] > 0 and asked["first_step_s"]["verdict"] == "not judged"
    bias = asked["llama-3.1-8b, share_of_bound"]
    assert (bias["verdict"], bias["why"]) == ("not run", "a cpu has no such products")
    assert "not run: a cpu has no such products" in said and "2 of 2, compile" in said
    make_report(records, tmp_path / "docs", None)
    assert "Everything asked of a card" in (tmp_path / "docs" / "benchmarks.md").read_text()


def test_interrupted_it_exits_130_and_has_the_record(
    elo: Elo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(parts: list[Part], seconds: float, folder: Path, *more: Any) -> bool:
        append(folder / ROWS, row_of(parts[0], "interrupted", "interrupted"))
        assert 60 * 10 - 60 < seconds < 60 * 10 - card_process.GRACE_S - 0.3, "the probe's time is of the ten minutes"
        return True

    def slow(device: str, right: Any = card.probe) -> Any:
        time.sleep(0.3)
        return right(device)

    monkeypatch.setattr(card, "probe", slow)
    monkeypatch.setattr(card, "run_parts", interrupted)
    arguments = ("bench", "card", "--device", "cpu", "--scale", "tiny", "--only", "bias", "--work", str(tmp_path))
    status, said = elo(*arguments)
    assert status == 130 and "interrupted; what was measured until then is above" in said
    (folder,) = tmp_path.iterdir()
    assert len(list((folder / "records").iterdir())) == 1  # of a trial: not among the measurements
    status, said = elo("bench", "card", "--finish", str(folder))
    assert status == 0 and len(list((folder / "records").iterdir())) == 2, said


@pytest.mark.parametrize(
    ("more", "status", "said"),
    [
        (("--only", "speed"), 2, "no such part: speed; there are correct, speedup"),
        (("--device", "cpu"), 2, "--device cpu goes with --scale tiny"),
        (("--scale", "huge"), 2, "--scale 'huge'"),
        (("--device", "tpu"), 2, "--device 'tpu'"),
        (("--finish", "nowhere"), 2, "no run of elo bench card"),
        ((), 3, "torch sees none here"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(
    elo: Elo, tmp_path: Path, more: tuple[str, ...], status: int, said: str
) -> None:
    if status == 3:
        pytest.importorskip("torch")
        import torch

        if torch.cuda.is_available():
            pytest.skip("there is a GPU here")
    found, text = elo("bench", "card", "--work", str(tmp_path / "work"), *more)
    assert found == status and said in text, text
    assert not (tmp_path / "work").exists()


def test_a_card_that_does_not_answer_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from elo_engine.errors import FailedError

    monkeypatch.setattr(card.sys, "executable", "/bin/false")
    with pytest.raises(FailedError, match="could not be asked what it is: without a word"):
        card.probe("cuda")
    with pytest.raises(UsageError, match="no run"):
        finish(Path("/nonexistent"))
