"""Real processes of `elo` that are killed, signalled or limited at an exact place, for one import in all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from forked import WARM
from safetensors.torch import load_file

# A process that has imported everything, and forks one of itself for each line that it reads.
SERVER = """
import gc, json, os, sys, time
import torch
torch.set_num_threads(1)
import torch.fx.experimental.symbolic_shapes, torch.utils.tensorboard  # the first: as a backward pass does, and sympy
""" + WARM + """
elo_engine.report._plot = lambda *of: False  # as conftest.py has it
gc.collect()
gc.freeze()
for line in sys.stdin:
    asked = json.loads(line)
    pid = os.fork()
    if pid == 0:
        shown = os.open(asked["shown"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(shown, 1)
        os.dup2(shown, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        status = 0
        try:
            exec(asked["patch"], {})
            if asked["arguments"]:
                sys.argv = ["elo", *asked["arguments"]]
                elo_engine.cli.main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        except BaseException:
            import traceback
            traceback.print_exc()
            status = 99
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    ended, deadline = 0, time.monotonic() + asked["kill_after_s"]
    while asked["kill_after_s"] and not ended and time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        time.sleep(0.0005)
    if not ended:
        if asked["kill_after_s"]:
            os.kill(pid, 9)
        status = os.waitpid(pid, 0)[1]
    print(os.waitstatus_to_exitcode(status), flush=True)
"""

# For patches: `after(owner, name, nth, act)` acts before the nth call of a function, counted from 1.
AFTER = """
import functools, os, signal
def after(owner, name, nth, act):
    plain, calls = getattr(owner, name), [0]
    @functools.wraps(plain)
    def counted(*args, **options):
        calls[0] += 1
        if calls[0] == nth:
            act()
        return plain(*args, **options)
    setattr(owner, name, counted)
def send(*signals):
    def act():
        for number in signals:
            os.kill(os.getpid(), number)
    return act
"""


class Processes:
    """`elo` in processes of their own, one at a time, of one thread each."""

    def __init__(self, folder: Path) -> None:
        self._shown = folder / "shown"
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        )  # fmt: skip

    def __call__(self, *arguments: object, patch: str = "", kill_after_s: float = 0.0) -> tuple[int, str]:
        """Exit status (negative: the signal that killed it) and all that it printed.

        patch: Python that runs first, with `after` and `send` at hand. kill_after_s: SIGKILL after so many seconds,
        wherever it is by then; 0: not.
        """
        assert self._server.stdin is not None and self._server.stdout is not None
        asked = {
            "arguments": [str(one) for one in arguments], "patch": AFTER + patch, "shown": str(self._shown),
            "kill_after_s": kill_after_s,
        }  # fmt: skip
        self._server.stdin.write(json.dumps(asked) + "\n")
        self._server.stdin.flush()
        status = int(self._server.stdout.readline())
        return status, self._shown.read_text(errors="replace")

    def close(self) -> None:
        """End the process that forks."""
        self._server.communicate(timeout=60)


def records(run: Path) -> list[dict[str, Any]]:
    """All lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def status_of(run: Path) -> dict[str, Any]:
    """STATUS."""
    found: dict[str, Any] = json.loads((run / "STATUS").read_text())
    return found


def leftovers(folder: Path) -> list[str]:
    """Temporary folders anywhere below."""
    return sorted(path.name for path in folder.rglob(".*.tmp-*"))


def final_state(run: Path) -> dict[str, bytes]:
    """Weights and moments of each stage's newest snapshot, and the model, by name."""
    found: dict[str, bytes] = {}
    for stage in sorted(path for path in (run / "pretrain", run / "align") if path.exists()):
        newest = max(stage.glob("step-*"))
        for name in ("weights.safetensors", "optimizer.safetensors"):
            for key, tensor in load_file(newest / name).items():
                found[f"{stage.name}/{newest.name}/{name}/{key}"] = tensor.numpy().tobytes()
    return found | {path.name: path.read_bytes() for path in sorted((run / "model").glob("*.safetensors"))}


def differing(left: dict[str, bytes], right: dict[str, bytes]) -> list[str]:
    """Names whose bytes are not equal; both must have the same names."""
    assert set(left) == set(right)
    return [name for name in left if left[name] != right[name]]
