"""Loading the detached tensors, file to memory: this engine, its peers and the machine's ceilings, cold and warm.

    elo bench loading --preset llama-2b --model FOLDER [--rounds 5] [--device cuda] [--records FOLDER] [--no-record]

Every measurement is a process of its own (loading_arms.py), and arms take turns in shuffled order within each round and
state, so that a machine whose speed drifts drifts for all; ratios are taken round by round. Cold: the shards' pages are
dropped from the page cache, checked by mincore. Warm: every wanted byte was read just before (the whole checkpoint for
transformers), checked likewise. The process has imported its libraries before either.

Fresh memory is primed: as much as an arm may fill is held by this process and let go just before the clock starts. A
virtual machine with free page reporting gives free memory back to its host, and taking it again cost 3 to 5 s a GiB, a
primed page 0.1 s a GiB (2 cores, 2026-11): more than a loader takes, and paid by whichever arm comes first.

Below a virtual machine the host may cache as well; the disk's ceiling, measured in the same rounds, bounds what that
gives.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import mmap
import os
import random
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from elo_engine.benchmarks.loading_arms import BUILD, PAGE
from elo_engine.benchmarks.loading_report import summarise
from elo_engine.benchmarks.loading_table import loading_tables, make_result
from elo_engine.benchmarks.synthetic import PRESETS, make_checkpoint
from elo_engine.checkpoint import open_checkpoint
from elo_engine.checkpoint.reader import coalesce
from elo_engine.console import progress_bar
from elo_engine.errors import EloError, FailedError, Interrupted, RefusedError
from elo_engine.measure.environment import choose_device, describe_environment, device_name
from elo_engine.model.shallow import shallow_names
from elo_engine.model.spec import read_spec

STATES = ("cold", "warm")
PEERS = ("fastsafetensors", "runai-model-streamer")
# A ceiling is measured in the state it is the ceiling of.
ONLY_IN = {
    "ceiling_disk": "cold", "ceiling_page_cache_1": "warm", "ceiling_page_cache_n": "warm", "ceiling_link": "warm",
}  # fmt: skip
CUDA_ONLY = ("safetensors_next_prefetch", "ceiling_link")
CPU_ONLY = ("transformers_own",)  # on a GPU every tensor has memory of its own


@dataclass(frozen=True)
class Plan:
    """What is loaded: `ranges` of the wanted tensors, (shard path, begin, end), neighbours joined."""

    folder: Path
    names: tuple[str, ...]
    ranges: tuple[tuple[str, int, int], ...]
    shards: tuple[str, ...]
    total_bytes: int

    @property
    def wanted_bytes(self) -> int:
        return sum(end - begin for _, begin, end in self.ranges)


def make_plan(folder: Path) -> Plan:
    """The tensors that ELO pretraining detaches: first and last layer, embedding, norm and head."""
    index = open_checkpoint(folder)
    spec = read_spec(index.config)
    names = shallow_names(spec, (0, spec.layers - 1))
    entries = sorted({index.entry(name) for name in names}, key=lambda e: (e.shard, e.begin))
    ranges = tuple((str(folder / run[0].shard), run[0].begin, run[-1].end) for run in coalesce(entries))
    shards = tuple(str(folder / name) for name in index.shards)
    return Plan(folder, tuple(names), ranges, shards, index.total_bytes)


def resident_pages(path: str) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which of the file's pages are in the page cache, by mincore."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
        found = np.zeros(-(-len(mapping) // PAGE), dtype=np.uint8)
        first = np.frombuffer(mapping, dtype=np.uint8)  # the only way to a read-only mapping's address
        address, count = ctypes.c_void_p(first.ctypes.data), ctypes.c_size_t(len(mapping))
        code = libc.mincore(address, count, ctypes.c_void_p(found.ctypes.data))
        del first
        if code:
            raise OSError(ctypes.get_errno(), f"mincore {path}")
    return (found & 1).astype(bool)


def residency(ranges: list[tuple[str, int, int]]) -> float:
    """Share of the ranges' pages that are in the page cache."""
    cached = {path: resident_pages(path) for path in {path for path, _, _ in ranges}}
    parts = [cached[path][begin // PAGE : -(-end // PAGE)] for path, begin, end in ranges]
    return float(sum(part.sum() for part in parts)) / sum(len(part) for part in parts)


def make_cold(plan: Plan) -> float:
    """Drop the shards from the page cache; returns the share still resident.

    Everybody's cache (drop_caches) goes only if the shards' own pages do not, because it takes the libraries of the
    process that is about to be measured with it.
    """
    whole = [(path, 0, os.stat(path).st_size) for path in plan.shards]
    for path in plan.shards:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)  # a dirty page stays
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
    left = residency(whole)
    if left >= 0.01 and os.geteuid() == 0:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("1")
        left = residency(whole)
    if left >= 0.01:
        raise FailedError(f"cold state not reached: {100 * left:.1f} % of the shards stay in the page cache")
    return left


def make_warm(plan: Plan, whole: bool) -> float:
    """Read every wanted byte once, or all shards; returns the share of it that is then resident."""
    ranges = [(path, 0, os.stat(path).st_size) for path in plan.shards] if whole else list(plan.ranges)
    buffer = memoryview(bytearray(1 << 20))
    for path, begin, end in ranges:
        fd = os.open(path, os.O_RDONLY)
        try:
            while begin < end:
                begin += os.preadv(fd, [buffer[: end - begin]], begin)
        finally:
            os.close(fd)
    share = residency(ranges)
    if share < 0.99:
        raise FailedError(f"warm state not reached: {100 * share:.1f} % is in the page cache; free some memory")
    return share


class Primed:
    """Memory that is held between measurements, so that the host cannot have it, and let go for each."""

    def __init__(self, count: int) -> None:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024
        self.count = min(count, available // 2)
        self._memory: mmap.mmap | None = None

    def hold(self) -> None:
        """Take and touch it, unless it is held."""
        if self._memory is None and self.count >= PAGE:
            self._memory = mmap.mmap(-1, self.count, flags=mmap.MAP_PRIVATE)
            self._memory.madvise(mmap.MADV_HUGEPAGE)
            np.frombuffer(self._memory, dtype=np.uint8)[::PAGE] = 1

    def let_go(self) -> None:
        """Give it back to the system."""
        if self._memory is not None:
            self._memory.close()
            self._memory = None


class Child:
    """One arm's process: `ready` once its libraries are imported, then one measurement."""

    def __init__(self, arm: str, job: Path, next_folder: Path | None, log: Path, timeout_s: float) -> None:
        environment = dict(os.environ)
        if arm.startswith("safetensors_next"):  # before anything else, so that it is this one that is imported
            environment["PYTHONPATH"] = f"{next_folder}{os.pathsep}{environment.get('PYTHONPATH', '')}"
        self.arm, self.log = arm, log
        with open(log, "wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("loading_arms.py")), arm, str(job)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment,
            )  # fmt: skip
        self.watchdog = threading.Timer(timeout_s, self.process.kill)
        self.watchdog.start()

    def read(self) -> dict[str, Any]:
        """The next line; a process that died is a failure with the last of what it said."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)  # type: ignore[no-any-return]
        status = self.process.wait()
        said = self.log.read_text(errors="replace").strip().splitlines()[-1:]
        return {"failed": f"ended with status {status}: {' '.join(said)[:200]}"}

    def go(self) -> dict[str, Any]:
        """Measure."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.read()

    def close(self) -> None:
        """End the process."""
        self.watchdog.cancel()
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def run_once(arm: str, state: str, plan: Plan, child: Child, primed: Primed) -> dict[str, Any]:
    """One measurement in one state, with what the page cache held before it."""
    try:
        ready = child.read()
        if "failed" in ready:
            return ready
        primed.hold()
        resident = make_cold(plan) if state == "cold" else make_warm(plan, whole=arm.startswith("transformers"))
        primed.let_go()
        return child.go() | {"resident_before": resident}
    except (OSError, EloError) as error:
        return {"failed": str(error)}
    finally:
        child.close()
        primed.hold()


def choose_arms(wanted: list[str] | None, device: str, next_folder: Path | None) -> list[str]:
    """Arms to measure, in the order they are shown; RefusedError for an unknown name."""
    unknown = sorted(set(wanted or []) - set(BUILD))
    if unknown:
        raise RefusedError(f"no such arm: {', '.join(unknown)}; there are {', '.join(BUILD)}")
    arms = [arm for arm in BUILD if wanted is None or arm in wanted]
    arms = [arm for arm in arms if arm not in (CUDA_ONLY if device == "cpu" else CPU_ONLY)]
    return [arm for arm in arms if next_folder or not arm.startswith("safetensors_next")]


def measure(
    plan: Plan, arms: list[str], options: argparse.Namespace, device: str, rows: list[dict[str, Any]]
) -> None:
    """All rounds; appends one row a measurement. An arm that fails keeps its reason and is not tried again in that
    state.
    """
    order, failed = random.Random(options.seed), set()
    # The tensors' own memory, what the page cache takes of a cold checkpoint, and some for buffers.
    largest = plan.total_bytes if any(arm.startswith("transformers") for arm in arms) else plan.wanted_bytes
    primed = Primed(0 if options.no_prime else 2 * largest + plan.wanted_bytes // 2)
    total = options.rounds * sum(1 for state in options.states for arm in arms if ONLY_IN.get(arm, state) == state)
    with tempfile.TemporaryDirectory() as scratch, progress_bar("measurements", total) as update:
        job = Path(scratch) / "job.json"
        fields = {"folder": str(plan.folder), "names": plan.names, "device": device, "ranges": plan.ranges}
        job.write_text(json.dumps(fields | {"threads": options.threads}))
        done = 0
        for number in range(options.rounds):
            for state in options.states:
                here = [arm for arm in arms if ONLY_IN.get(arm, state) == state]
                for arm in order.sample(here, len(here)):
                    if (arm, state) not in failed:
                        log = Path(scratch) / "stderr"
                        child = Child(arm, job, options.safetensors_next, log, options.timeout)
                        result = run_once(arm, state, plan, child, primed)
                        rows.append({"round": number, "state": state, "arm": arm} | result)
                        if "failed" in result:
                            failed.add((arm, state))
                    done += 1
                    update(done, f"round {number + 1} {state} {arm}")
    primed.let_go()


def check_same(rows: list[dict[str, Any]]) -> None:
    """Mark every row whose tensors differ from the engine's as failed: it did not load what was asked for."""
    truth = next((row["checksum"] for row in rows if row["arm"] == "engine" and "checksum" in row), None)
    for row in rows:
        if row.get("checksum") and truth is not None and row["checksum"] != truth:
            row["failed"] = "its tensors differ from the engine's"


def describe(plan: Plan, options: argparse.Namespace, device: str, environment: dict[str, Any]) -> dict[str, Any]:
    """What a reader of the result needs beside the figures; the peers' versions go into the environment as well."""
    for name in PEERS:
        try:
            environment["packages"][name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            environment["packages"][name] = None
    if options.safetensors_next:
        found = [d.version for d in importlib.metadata.distributions(path=[str(options.safetensors_next)])]
        environment["packages"]["safetensors (next)"] = ", ".join(found)
    named = ("safetensors", "safetensors (next)", *PEERS, "transformers")
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    inside = [(len(at), kind) for at, kind in mounts if plan.folder.resolve().is_relative_to(at)]
    return {
        "model": options.preset or plan.folder.name, "device": device, "device_name": device_name(options.device),
        "peers": {name: environment["packages"][name] for name in named if environment["packages"].get(name)},
        "rounds": options.rounds, "seed": options.seed,
        "ceiling_threads": options.threads, "memory_primed": not options.no_prime,
        "filesystem": max(inside)[1], "shards": len(plan.shards),
        "checkpoint_bytes": plan.total_bytes, "wanted_bytes": plan.wanted_bytes, "tensors": len(plan.names),
        "ranges": len(plan.ranges),
    }  # fmt: skip


def keep(
    result: dict[str, Any], rows: list[dict[str, Any]], environment: dict[str, Any], options: argparse.Namespace,
    command: list[str],
) -> Path:  # fmt: skip
    """Write the record, as recording.py keeps every benchmark's; its folder."""
    from elo_engine.bench import records_folder
    from elo_engine.benchmarks.recording import card_name, write_record
    from elo_engine.benchmarks.speedup import slug

    settings = {name: value for name, value in vars(options).items() if name not in ("record", "records")}
    return write_record(
        records_folder(options.records), card=card_name(options.device, environment), result=result,
        raw={"measurements": rows}, environment=environment, settings=settings, command=command,
        name=f"loading-{slug(result['results']['model'])}",
    )  # fmt: skip


def main(arguments: list[str] | None = None, command: list[str] | None = None) -> None:
    """Measure, print the tables, keep the record; `arguments`: in place of the command line's, which for the record is
    `command`.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder; made there with --preset")
    parser.add_argument("--preset", choices=sorted(PRESETS), help="make this synthetic checkpoint if it is not there")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--arms", nargs="+", metavar="ARM", help=f"default: all of {' '.join(BUILD)}")
    parser.add_argument("--states", nargs="+", choices=STATES, default=list(STATES))
    parser.add_argument("--safetensors-next", type=Path, help="folder with another safetensors (pip install --target)")
    parser.add_argument("--threads", type=int, default=2, help="of the page cache's second ceiling")
    parser.add_argument("--no-prime", action="store_true", help="leave fresh memory to the machine (see above)")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds after which a measurement is given up")
    parser.add_argument("--seed", type=int, default=0, help="of the arms' order")
    parser.add_argument("--record", action=argparse.BooleanOptionalAction, default=True, help="keep a record")
    parser.add_argument("--records", type=Path, help="folder of records (default: benchmarks/records of the tree)")
    options = parser.parse_args(arguments)
    try:
        device = str(choose_device(options.device)) + (":0" if options.device == "cuda" else "")
        arms = choose_arms(options.arms, device, options.safetensors_next)
        if options.preset:
            make_checkpoint(options.model, PRESETS[options.preset])
        plan = make_plan(options.model.resolve())
    except EloError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_status)
    rows: list[dict[str, Any]] = []
    interrupted = False
    try:
        measure(plan, arms, options, device, rows)
    except KeyboardInterrupt:  # what was measured is kept
        interrupted = True
        print(f"interrupted after {len(rows)} measurements", file=sys.stderr)
    check_same(rows)
    if rows:
        environment = describe_environment()
        described = describe(plan, options, device, environment)
        try:
            result = make_result(described, summarise(rows, arms, plan.wanted_bytes), rows)
            print("\n\n".join(loading_tables(result)))
            if options.record:
                print(f"record: {keep(result, rows, environment, options, command or sys.argv)}", file=sys.stderr)
        except EloError as error:
            print(error, file=sys.stderr)
            sys.exit(error.exit_status)
    if interrupted:
        sys.exit(Interrupted.exit_status)
    if any("failed" in row for row in rows if row["arm"] == "engine"):
        sys.exit(1)


if __name__ == "__main__":
    main()
