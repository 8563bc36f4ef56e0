"""`elo bench card`: everything about one GPU that there is no figure for yet, within a given time, whatever fails.

Each part is a process of its own with a time limit, what matters most first (card_plan.py). A part that fails, hangs or
is killed is a row that says so and costs nothing but its own time. Every row is on the disk before the next part
begins, in a folder of this run's own: `card.json` (the machine and what was asked), `rows.jsonl`, `logs/`. So what was
known when the run itself was killed is shown, and kept, by `elo bench card --finish FOLDER`. Records of the comparisons
that parts run are kept as those of `elo bench speedup`, `memory` and `kernels`, and named by the rows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from elo_engine import console
from elo_engine.benchmarks import card_plan
from elo_engine.benchmarks.card_plan import Machine
from elo_engine.benchmarks.card_process import GRACE_S, Part, row_of, run_part
from elo_engine.benchmarks.card_table import asked, judged, with_ratios
from elo_engine.benchmarks.recording import card_name, write_record
from elo_engine.errors import FailedError, RefusedError, UsageError

USUAL_MINUTES = 10.0  # that the parts' limits are written for
PROBE_S = 120.0
ROWS, CARD = "rows.jsonl", "card.json"
SCALES = ("full", "tiny")


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    minutes: float = USUAL_MINUTES
    only: str | None = None
    device: str = "cuda"
    scale: str = "full"


def probe(device: str) -> tuple[Machine, dict[str, Any]]:
    """-> the machine, and its environment for the record. Asked in a process of its own, since a context on the card
    would take memory of it from the parts.

    Raises:
        RefusedError: there is no such device. FailedError: the question itself failed.
    """
    if device == "cpu":
        from elo_engine.measure.environment import describe_environment, device_name
        from elo_engine.measure.machine import host_room

        return Machine("cpu", device_name("cpu"), "", host_room().bytes), describe_environment()
    program = (
        "import json, torch\n"
        "from elo_engine.measure.cards import card_of_device\n"
        "from elo_engine.measure.environment import describe_environment\n"
        "if not torch.cuda.is_available():\n"
        "    print(json.dumps({'none': f'torch {torch.__version__}, built for {torch.version.cuda or \"no CUDA\"}'}))\n"
        "else:\n"
        "    name, room = torch.cuda.get_device_name(), torch.cuda.mem_get_info()\n"
        "    card = card_of_device(name, room[1])\n"
        "    (torch.ones(8, device='cuda') + 1).tolist()\n"
        "    print(json.dumps({'name': name, 'free': room[0], 'card': card.name if card else '',\n"
        "                      'environment': describe_environment()}))"
    )
    try:
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PROBE_S)
        found = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        raise FailedError(f"the GPU did not answer within {PROBE_S:.0f} s; look at nvidia-smi") from None
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["without a word"])[-1]
        raise FailedError(f"the GPU could not be asked what it is: {last}; `elo doctor` says more") from None
    if "none" in found:
        raise RefusedError(
            f"elo bench card measures a GPU, and torch sees none here ({found['none']}). To see that its parts run, at "
            "sizes whose figures say nothing: elo bench card --device cpu --scale tiny"
        )
    # the context that asked is gone again, and the next one takes as much
    free = found["free"] + card_plan.CONTEXT_BYTES
    return Machine("cuda", found["name"], found["card"], free), found["environment"]


def run_command(
    options: Options, work: Path, records: Path | None, command: list[str], say: Callable[[str], None]
) -> tuple[dict[str, Any], Path, bool]:
    """Run the parts, keep the record -> result, its folder, whether Ctrl-C ended it early.

    Args:
        work: a folder of this run is made in it. records: of this run's records; None: in that folder, at sizes that
            say nothing, and at others the caller's.

    Raises:
        UsageError: an unknown part, scale or device. RefusedError: no GPU.
    """
    began = time.monotonic()  # what the probe takes is of the time, and so is what ends the last part
    if options.scale not in SCALES:
        raise UsageError(f"--scale {options.scale!r}: it is one of {', '.join(SCALES)}")
    if options.device not in ("cpu", "cuda"):
        raise UsageError(f"--device {options.device!r}: it is cuda or cpu")
    groups = card_plan.parse_groups(options.only)
    if (options.device == "cpu") != (options.scale == "tiny"):
        raise UsageError("--device cpu goes with --scale tiny: sizes of a card would take a CPU hours, and those of "
                         "seconds say nothing of a card")  # fmt: skip
    machine, environment = probe(options.device)
    parts = card_plan.plan(machine, options.scale, groups)
    folder = _new_folder(work)
    records = folder / "records" if records is None else records
    records.mkdir(parents=True, exist_ok=True)
    about = card_plan.conditions(machine, options.scale, options.minutes) | {
        "parts": {part.name: part.group for part in parts}, "environment": environment, "command": command,
        "options": asdict(options), "records": str(records.resolve()),
    }  # fmt: skip
    (folder / CARD).write_text(json.dumps(about, indent=1), encoding="utf-8")
    say(f"{machine.name}, {machine.free_bytes / 2**30:.1f} GiB free: {len(parts)} parts in up to "
        f"{options.minutes:g} minutes; every row goes to {folder / ROWS}")  # fmt: skip
    given = 60 * options.minutes
    try:
        left = given - min(GRACE_S, given / 20) - (time.monotonic() - began)
        interrupted = run_parts(parts, left, folder, records, say)
    except KeyboardInterrupt:  # between two parts
        interrupted = True
    return *finish(folder), interrupted


def run_parts(parts: list[Part], seconds: float, folder: Path, records: Path, say: Callable[[str], None]) -> bool:
    """One after another, each row written before the next begins -> whether Ctrl-C ended it."""
    began, share = time.monotonic(), seconds / (60 * USUAL_MINUTES)

    def limit(part: Part) -> float:
        """What a part may take grows with the time given."""
        return 0.0 if part.why_not else max(part.least_s, share * part.limit_s)

    interrupted = False
    # a bar of seconds: what is left of it is when all ends at the latest
    with console.progress_bar("card, seconds", int(seconds)) as update:
        for number, part in enumerate(parts):
            left = seconds - (time.monotonic() - began) - part.leaves_s
            where = f"{number + 1} of {len(parts)}, {part.name}"
            if interrupted:
                row = row_of(part, "not run", "interrupted before it")
            elif part.why_not:
                row = row_of(part, "not run", part.why_not)
            elif left < part.least_s:
                needs = f"{part.least_s:.0f} s at least"
                row = row_of(part, "not run", f"{max(0.0, left):.0f} s left, and it takes {needs}")
            else:
                after = sum(map(limit, parts[number + 1 :]))
                allowed = min(left, max(limit(part), left - after))  # what nobody else will want is its own
                coming = min(left, allowed + after)
                longest, end = console.format_seconds(allowed), console.format_seconds(coming)
                say(f"{where}: up to {longest}; all ends within {end}")
                tick = partial(_tick, update, began, where)
                try:
                    row, interrupted = run_part(part, allowed, folder, records, tick)
                except OSError as error:  # no memory for another process, a folder that is gone
                    row = row_of(part, "failed", f"it could not be run: {error}")
            took = f" after {row['seconds']:.0f} s" if row["seconds"] else ""
            say(f"  {part.name}: {row['status']}{took}" + (f": {row['why']}" if row["why"] else ""))
            append(folder / ROWS, row)
    return interrupted


def _tick(update: Callable[[int, str], None], began: float, where: str) -> None:
    update(int(time.monotonic() - began), where)


def append(path: Path, row: dict[str, Any]) -> None:
    """A row, on the disk when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows that were written whole: of a line that a kill or a full disk cut off, nothing is kept."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def finish(folder: Path) -> tuple[dict[str, Any], Path]:
    """The table and the record of what a run's folder has -> result, the record's folder.

    Raises:
        UsageError: it is no such folder. FailedError: the result contradicts itself.
    """
    try:
        about = json.loads((folder / CARD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder}: no run of elo bench card ({CARD}: {error})") from None
    raw = read_rows(folder / ROWS)
    there = {row["part"] for row in raw}
    rows = with_ratios(raw) + [
        row_of(Part(name, group, (), 0, 0), "not run", "the run was ended before it was done")
        for name, group in about["parts"].items()
        if name not in there
    ]
    kept = ("part", "group", "status", "why", "seconds", "allowed_s", "exit_status", "record", "figures", "notes")
    headline = about["headline"]
    result = {
        "schema": 1, "theme": "card", "device": about["device"], "scale": about["scale"], "minutes": about["minutes"],
        "headline": headline, "free_bytes": about["free_bytes"],
        "parts": [{name: row[name] for name in kept} for row in rows],
        "asked": judged(asked(list(about["parts"]), headline, about["card"]), rows, about["scale"]),
    }  # fmt: skip
    name = "card" if about["scale"] == "full" else "card-tiny"
    path = write_record(
        Path(about["records"]), card=card_name(about["device"]["type"], about["environment"]), result=result,
        raw={"rows": raw}, environment=about["environment"], settings=about["options"], command=about["command"],
        name=name,
    )  # fmt: skip
    return result, path


def _new_folder(work: Path) -> Path:
    """A folder of this run alone."""
    base = work / time.strftime("%Y-%m-%dT%H-%M-%S")
    for number in range(1, 1000):
        folder = base if number == 1 else base.with_name(f"{base.name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise FailedError(f"{work}: there are a thousand runs of this second")
