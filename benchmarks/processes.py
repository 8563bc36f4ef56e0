"""Arms as processes: started with a setting, told when to step, ended with their evidence. Whatever happens to one is a
row of the result and not the end of the comparison.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from elo_engine.benchmarks.contestants import Contestant
from elo_engine.errors import FailedError

PATIENCE_S = 900  # no step of any arm takes that long; a process that is silent for longer hangs


class ArmFailed(Exception):
    """Out of memory, a crash, silence: the message is the row's `why`."""

    def __init__(self, why: str, out_of_memory: bool = False) -> None:
        super().__init__(why)
        self.out_of_memory = out_of_memory


class ArmProcess:
    """One arm alive. Usable as a context; leaving it ends the process however it stands. With `wait` in its SPEC it
    stops before it touches the device, until `go` (waiting.py).
    """

    def __init__(self, contestant: Contestant, spec: dict[str, Any], scratch: Path) -> None:
        self.contestant = contestant
        self._waits = bool(spec.get("wait"))
        self._ready: dict[str, Any] = {}
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process, in `kill`
        path = scratch / f"{contestant.name}-{time.monotonic_ns()}.json"
        path.write_text(json.dumps(spec), encoding="utf-8")
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"elo_engine.benchmarks.{'waiting' if self._waits else 'arm'}", str(path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            env=os.environ | _one_gpu() | contestant.environment,
            start_new_session=True,  # Ctrl-C is the harness's to handle: an arm still has its evidence to give
        )  # fmt: skip
        self._buffer = b""
        self._described: dict[str, Any] | None = None

    def __enter__(self) -> ArmProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def ready(self) -> dict[str, Any]:
        """Wait until a process that waits stands still: `began_s` and `ready_s` of its imports by the monotonic clock,
        `on_device` (it has a context on the GPU). The same when asked again.

        Raises:
            ArmFailed: it died, now or before.
        """
        if not self._ready:
            self._ready = self._read()["waiting"]
        return self._ready

    def go(self) -> None:
        """Let a process that waits go on to its model; nothing for one that does not wait, or goes already."""
        if self._waits:
            self.ready()
            self._write("go")
            self._waits = False

    def described(self) -> dict[str, Any]:
        """What it runs on. Waits until the model is made; the same when asked again."""
        if self._described is None:
            self.go()
            self._described = self._read()
        return self._described

    def step(self, command: str = "step") -> dict[str, Any]:
        """Run one step and wait for its figures."""
        self._write(command)
        return self._read()

    def finish(self) -> dict[str, Any]:
        """End it; its evidence and peaks."""
        self._write("finish")
        last = self._read()
        while "evidence" not in last:  # the answer to a step that was under way
            last = self._read()
        with contextlib.suppress(subprocess.TimeoutExpired):  # then it is killed
            self.process.wait(timeout=60)
        return last

    def kill(self) -> None:
        """End it now."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # a command that nobody reads any more
                    pipe.close()
        self._errors.close()

    def _write(self, command: str) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(command.encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise ArmFailed(self._last_words(), self.process.returncode == -9) from None

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        fd, until = self.process.stdout.fileno(), time.monotonic() + PATIENCE_S
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([fd], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                raise ArmFailed(f"no answer in {PATIENCE_S} s")
            more = os.read(fd, 1 << 16)
            if not more:
                raise ArmFailed(self._last_words(), self.process.returncode == -9)
            self._buffer += more
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError:
            raise ArmFailed(f"said something that is no answer: {line[:200]!r}") from None
        if "failed" in answer:
            raise ArmFailed(answer["failed"], answer.get("out_of_memory", False))
        return answer

    def _last_words(self) -> str:
        status = self.process.wait()
        if status == -9:
            return "killed by the system, most likely for want of memory"
        self._errors.seek(0)
        lines = [line for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()]
        named = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line)]
        said = (named or lines or ["without a word"])[-1]
        return f"ended with status {status}: {said}"[:400]


def _one_gpu() -> dict[str, str]:
    """The first visible GPU alone: on several the Trainer would split every micro-batch among them."""
    return {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}


def spec_of(
    contestant: Contestant, model: str, lr: float, cap_bytes: int | None = None, *, wait: bool = False
) -> dict[str, Any]:
    """What `arm.py` reads; `wait`: what `waiting.py` reads first."""
    setting = contestant.setting
    keys = ("arm", "sequence_length", "micro_batch", "micro_batches", "dtype", "state", "recompute", "device", "fp8",
            "graph")  # fmt: skip
    spec: dict[str, Any] = {key: getattr(setting, key) for key in keys} | {"streaming": vars(setting.streaming)}
    return spec | {"model": model, "layers": list(setting.layers), "lr": lr, "cap_bytes": cap_bytes, "wait": wait}


def ceilings_of(device: str, dtype: str) -> dict[str, Any]:
    """The run's own matmul and copy rates, from a process of its own that leaves no memory behind.

    Raises:
        FailedError: it could not be measured.
    """
    program = (
        "import json, sys, torch\n"
        "from elo_engine.measure.roofline import measure_ceilings\n"
        "kinds = {'bf16': torch.bfloat16, 'fp32': torch.float32}\n"
        "print(json.dumps(measure_ceilings(torch.device(sys.argv[1]), kinds[sys.argv[2]], 8).record()))"
    )
    done = subprocess.run([sys.executable, "-c", program, device, dtype], capture_output=True, text=True)
    if done.returncode:
        raise FailedError(f"the matmul ceiling could not be measured: {done.stderr.strip()[-500:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    kept = ("matmul_flop_per_s", "copy_bytes_per_s", "matmul_dtype")
    kinds = {"float32": "fp32", "bfloat16": "bf16"}
    return {name: kinds.get(found[name], found[name]) for name in kept}
