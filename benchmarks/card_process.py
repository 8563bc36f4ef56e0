"""One part of `elo bench card`: a process of its own with a time limit and its output in a file. Whatever happens to it
is a row and costs nothing but this part.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elo_engine.benchmarks.card_figures import figures_of
from elo_engine.benchmarks.recording import read_record
from elo_engine.errors import EloError

TICK_S = 1.0
GRACE_S = 15.0  # after the limit, for keeping what was measured, before it is killed
GONE_S = 10.0  # until what was killed is no more; a process that waits for a driver may stay
LAST_LINES = 12
MARK = "ELO_CARD_PART"  # in the environment of a part and all that it starts, so that none is left behind


@dataclass(frozen=True)
class Part:
    """What is run.

    Attributes:
        name: its own; group: what `--only` calls it.
        command: after `python -m`. `{minutes}` becomes what it may take, `{records}` the folder of records, `{out}` the
            file that its figures go to, `{scratch}` an empty folder.
        limit_s: the most it may take of a run of ten minutes. least_s: with less left it is not begun.
        why_not: why it is not run on this card; empty where it is.
        leaves_s: of the time, for what comes after its kind.
    """

    name: str
    group: str
    command: tuple[str, ...]
    limit_s: float
    least_s: float
    environment: dict[str, str] = field(default_factory=dict)
    why_not: str = ""
    leaves_s: float = 0.0

    @property
    def slug(self) -> str:
        """As part of a file's name."""
        return re.sub(r"[^a-z0-9.]+", "-", self.name.lower()).strip("-")


def row_of(part: Part, status: str, why: str, **more: Any) -> dict[str, Any]:
    """A row of the record; `more` is what is known of it."""
    empty = {"seconds": 0.0, "allowed_s": None, "exit_status": None, "last_lines": [], "record": None, "figures": {},
             "notes": {}}  # fmt: skip
    return {"part": part.name, "group": part.group, "status": status, "why": why} | empty | more


def run_part(
    part: Part, allowed_s: float, work: Path, records: Path, tick: Callable[[], None] = lambda: None
) -> tuple[dict[str, Any], bool]:
    """Run it -> its row, and whether Ctrl-C ended it. `tick` is called now and then meanwhile."""
    log, out, scratch = (work / folder / part.slug for folder in ("logs", "found", "scratch"))
    for folder in (log.parent, out.parent, scratch):
        folder.mkdir(parents=True, exist_ok=True)
    log, out = log.with_name(f"{log.name}.txt"), out.with_name(f"{out.name}.json")
    # what a comparison may take, so that it ends by itself: not what its start and its record take
    minutes = max(0.1, round(0.85 * allowed_s / 60, 2))
    words = {"{minutes}": str(minutes), "{records}": str(records), "{out}": str(out), "{scratch}": str(scratch)}
    command = [sys.executable, "-m", *(words.get(word, word) for word in part.command)]
    mark = uuid.uuid4().hex
    own = {name: words.get(value, value) for name, value in part.environment.items()}
    began, late, interrupted = time.monotonic(), False, False
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT,
            env=os.environ | {MARK: mark, "COLUMNS": "120"} | own,
            start_new_session=True,  # Ctrl-C is for whoever started all of this, who then ends the part
        )  # fmt: skip
        try:
            late = not _ends(process, began + allowed_s, tick)
        except KeyboardInterrupt:
            interrupted = True
        left = end(process, mark)
    row = _row(part, process.returncode, log, out) | {
        "seconds": round(time.monotonic() - began, 1), "allowed_s": round(allowed_s, 1)
    }  # fmt: skip
    if late or interrupted:
        kept = "; what it had measured by then is kept" if row["figures"] else ""
        said = "interrupted" if interrupted else f"ended at its limit of {allowed_s:.0f} s"
        row |= {"status": "interrupted" if interrupted else "timed out", "why": said + kept}
    if left:
        row["why"] += f"; {len(left)} of its processes could not be ended and may disturb what follows"
    return row, interrupted


def _ends(process: subprocess.Popen[bytes], until: float, tick: Callable[[], None]) -> bool:
    """Whether it ends before `until` (time.monotonic)."""
    while (left := until - time.monotonic()) > 0:
        tick()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=min(TICK_S, left))
            return True
    return False


def end(process: subprocess.Popen[bytes], mark: str) -> list[int]:
    """End a part if it still runs, first so that it can keep what it has; then all that it started. -> process ids of
    what is there all the same.
    """
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):  # asked again: at once
            process.wait(timeout=GRACE_S)
    until = time.monotonic() + GONE_S
    while left := started_by(mark):
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > until:
            break
        time.sleep(0.05)
        process.poll()
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=GONE_S)
    return left


def started_by(mark: str) -> list[int]:
    """Processes that have a part's mark in their environment: also those whose parent has died."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is somebody else's
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def _row(part: Part, exit_status: int | None, log: Path, out: Path) -> dict[str, Any]:
    """What an ended part left: its record or its file, its last lines, and what its exit status means."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    more: dict[str, Any] = {"exit_status": exit_status, "last_lines": lines[-LAST_LINES:]}
    faults = []
    try:
        if out.exists():
            found = json.loads(out.read_text(encoding="utf-8"))
            more |= {"figures": found["figures"], "notes": found.get("notes", {})}
        elif folders := [line.removeprefix("record: ") for line in lines if line.startswith("record: ")]:
            record = read_record(Path(folders[-1]))
            figures, notes = figures_of(record.result or {})
            more |= {"record": record.path.name, "figures": figures, "notes": notes}
    except (EloError, OSError, ValueError, KeyError, TypeError) as error:
        faults.append(f"what it left cannot be read: {type(error).__name__}: {error}")
    if exit_status == 3:
        return row_of(part, "cannot run", _said(lines), **more)
    if exit_status != 0:
        faults.insert(0, _ended(exit_status, lines))
    elif not faults and not more.get("figures"):
        faults.append("; ".join(dict.fromkeys(more.get("notes", {}).values())) or "it ended well and left no figure")
    return row_of(part, "failed" if faults else "ran", "; ".join(faults), **more)


def _ended(exit_status: int | None, lines: list[str]) -> str:
    if exit_status is not None and exit_status < 0:
        try:
            name = signal.Signals(-exit_status).name
        except ValueError:
            name = f"signal {-exit_status}"
        return f"killed by {name}: {_said(lines)}"
    return f"exit status {exit_status}: {_said(lines)}"


def _said(lines: list[str]) -> str:
    """The line that says what went wrong."""
    named = [line for line in lines if re.match(r"(error: |[\w.]+(Error|Exception|Interrupt|Failed)\b)", line)]
    return (named or lines or ["without a word"])[-1].removeprefix("error: ")[:400]
