"""Processes that start with torch and elo_engine imported: forks of one that did nothing else, for one import in all.

The imports take seconds of a core, and what most tests of processes run takes tenths of one. A fork is a process
like any other: it has its own environment, folder, arguments and output, may be killed, and ends as an interpreter
does. Its parent has no threads, so none is missing in it. What looks at the memory of a whole process, at a fresh
interpreter, or at what is imported, starts one of its own instead.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch

# What a run imports, and makes once: its command line, the versions of packages. `WARM` is run where that is to be had.
WARM = """
import elo_engine.align, elo_engine.cli, elo_engine.pipeline, elo_engine.pretrain, elo_engine.stage
import elo_engine.measure.environment, elo_engine.measure.planner, elo_engine.stream.step
import elo_engine.measure.memory_sharded, elo_engine.measure.memory_slack, elo_engine.measure.memory_transformers
import functools, numpy.ctypeslib, numpy.random, pydantic.type_adapter, typer.main
typer.main.get_command = functools.cache(typer.main.get_command)
typer.main.get_command(elo_engine.cli.app)
for package in elo_engine.measure.environment.PACKAGES:
    elo_engine.measure.environment._version(package)
"""
# Of the environment, what elo_engine reads while it is imported: a fork in which that is otherwise imports it anew.
READ = "TRITON_INTERPRET", "ELO_FAULT", "COLUMNS"
SERVER = f"""
import gc, json, os, sys, time
import numpy, pydantic, requests, rich.console, safetensors.torch, torch, torch.distributed, typer, yaml
from pydantic import BaseModel, TypeAdapter  # both bring most of pydantic, which its own name does not
import torch.fx.experimental.symbolic_shapes  # and so sympy, as the first backward pass does
try:
    import torch.utils.tensorboard  # as every run does, where it is installed
except ImportError:
    pass
torch.set_num_threads(1)
{WARM}
read = {{name: os.environ.get(name) for name in {READ}}}
gc.collect()
gc.freeze()
children = {{}}
for line in sys.stdin:
    asked = json.loads(line)
    if "wait" in asked:
        number, deadline = asked["wait"], time.monotonic() + asked["for_s"]
        while number in children:
            ended, status = os.waitpid(number, os.WNOHANG)
            if ended:
                del children[number]
                print(os.waitstatus_to_exitcode(status), flush=True)
            elif time.monotonic() > deadline:
                print("null", flush=True)
                break
            else:
                time.sleep(0.002)
        continue
    streams = [os.open(asked.get("in", os.devnull), os.O_RDONLY)]
    streams += [os.open(asked[place], os.O_WRONLY | os.O_CREAT | os.O_APPEND) for place in ("out", "err")]
    number = os.fork()
    if number:
        for stream in streams:
            os.close(stream)
        children[number] = True
        print(number, flush=True)
        continue
    for place, stream in enumerate(streams):
        os.dup2(stream, place)
        os.close(stream)
    os.environ.clear()
    os.environ.update(asked["environment"])
    for folder in reversed(asked["environment"].get("PYTHONPATH", "").split(os.pathsep)):
        sys.path.insert(1, folder)
    os.chdir(asked["folder"])
    if any(os.environ.get(name) != value for name, value in read.items()):
        for module in [name for name in sys.modules if name.partition(".")[0] == "elo_engine"]:
            if module != "elo_engine._csrc":  # what is compiled is there once, and reads nothing
                del sys.modules[module]
    torch.set_num_threads(asked["threads"])
    sys.argv = asked["arguments"]
    program = asked["program"]
    break
else:
    sys.exit()
del children, line, number, package, read, streams, stream, place, folder
exec(compile(program, "<forked>", "exec"), {{"__name__": "__main__"}})
"""
NO_PICTURE = "from elo_engine import report; report._plot = lambda *of: False\n"  # as conftest.py has it
PYTEST = "import sys, pytest; sys.exit(pytest.main(['-q', '-n', '0', '-p', 'no:cacheprovider', *sys.argv[1:]]))"
ELO = f"{NO_PICTURE}from elo_engine.cli import main; main()"


class Child:
    """A process that runs; signals may be sent to `pid` until it is known to have ended.

    Attributes:
        returncode: as `poll` found it.
    """

    def __init__(self, forked: Forked, pid: int, out: Path, err: Path) -> None:
        self.pid, self._forked, self._out, self._err = pid, forked, out, err
        self.returncode: int | None = None

    def poll(self, for_s: float = 0.0) -> int | None:
        """Exit status, negative: the signal that ended it; None: it runs still after so many seconds."""
        if self.returncode is None:
            self.returncode = self._forked.ask(wait=self.pid, for_s=for_s)
        return self.returncode

    def kill(self) -> None:
        """SIGKILL, if it runs."""
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
        """Exit status and what was printed.

        Raises:
            AssertionError: it did not end; it is killed then.
        """
        status = self.poll(timeout_s)
        if status is None:
            self.kill()
            self.poll(60)
            raise AssertionError(f"no end within {timeout_s} s: {self._err.read_text(errors='replace')[-2000:]}")
        out, err = (path.read_text(errors="replace") for path in (self._out, self._err))
        return subprocess.CompletedProcess("forked", status, out, err)


class Piped:
    """In place of subprocess.Popen with pipes to and from it."""

    def __init__(self, child: Child, stdin: IO[bytes], stdout: IO[bytes]) -> None:
        self.stdin, self.stdout, self.poll, self.kill, self._child = stdin, stdout, child.poll, child.kill, child

    @property
    def returncode(self) -> int | None:
        """As `poll` or `wait` found it."""
        return self._child.returncode

    def wait(self, timeout: float = 120.0) -> int:
        """Exit status; raises subprocess.TimeoutExpired."""
        status = self._child.poll(timeout)
        if status is None:
            raise subprocess.TimeoutExpired("forked", timeout)
        return status


class Forked:
    """`forked(program, *arguments)` runs a program as `python -c program *arguments` would.

    first: what is imported too before anything is forked, for programs that all need it; environment: what theirs has
    beside this process's.
    """

    def __init__(self, folder: Path, first: str = "", environment: Mapping[str, str] | None = None) -> None:
        self._folder, self._number, self._first = folder, 0, first
        self._environment = os.environ | {"OMP_NUM_THREADS": "1"} | dict(environment or {})
        self._server: subprocess.Popen[str] | None = None

    def ask(self, **what: Any) -> Any:
        """The answer of the process that forks, which is started by the first question."""
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, "-c", f"{self._first}\n{SERVER}"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self._environment,
            )  # fmt: skip
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(what) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def start(
        self, program: str, *arguments: object, environment: Mapping[str, str] | None = None,
        folder: Path | None = None, places: Mapping[str, str] | None = None,
    ) -> Child:  # fmt: skip
        """The process, while it runs. environment: all of it, else this process's; folder: where it works; places:
        of its standard streams `in`, `out` and `err`, else nothing and files of its own.
        """
        self._number += 1
        environment = dict(os.environ if environment is None else environment)
        own = {place: str(self._folder / f"{self._number}.{place}") for place in ("out", "err")} | dict(places or {})
        number = self.ask(
            program=program, arguments=["-c", *map(str, arguments)], environment=environment,
            folder=str(folder or Path.cwd()),
            threads=int(environment.get("OMP_NUM_THREADS") or torch.get_num_threads()), **own,
        )  # fmt: skip
        return Child(self, number, Path(own["out"]), Path(own["err"]))

    def popen(
        self, command: list[str], *, env: Mapping[str, str], stdout: IO[bytes] | None = None,
        stderr: IO[bytes] | None = None, first: str = "", **streams: Any,
    ) -> Child:  # fmt: skip
        """In place of subprocess.Popen for `python -m module arguments`, with a program that runs first.

        stdout, stderr: files that what it prints goes to, else it is kept here.
        """
        module, *arguments = command[2:]
        program = f"{first}\nimport runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
        places = {place: stream.name for place, stream in (("out", stdout), ("err", stderr)) if stream is not None}
        return self.start(program, *arguments, environment=env, places=places)

    def piped(self, command: list[str], *, env: Mapping[str, str], stderr: IO[bytes], **streams: Any) -> Piped:
        """In place of subprocess.Popen for `python -m module arguments` that is asked and answers through pipes."""
        asks, answers = os.pipe(), os.pipe()
        own, module = f"/proc/{os.getpid()}/fd", command[2]
        program = f"import runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
        places = {"in": f"{own}/{asks[0]}", "out": f"{own}/{answers[1]}", "err": f"{own}/{stderr.fileno()}"}
        child = self.start(program, *command[3:], environment=env, places=places)
        os.close(asks[0])
        os.close(answers[1])
        return Piped(child, os.fdopen(asks[1], "wb"), os.fdopen(answers[0], "rb"))

    def __call__(self, program: str, *arguments: object, timeout_s: float = 120.0, **where: Any) -> Any:
        """Exit status, standard output and error; where: as of `start`."""
        return self.start(program, *arguments, **where).wait(timeout_s)

    def ranks(
        self, count: int, program: str, *arguments: object, port: int, environment: Mapping[str, str]
    ) -> subprocess.CompletedProcess[str]:
        """As torchrun starts them on one machine: when one has failed, the others are ended; the first failure is the
        status, and what they printed is in the order of ranks.
        """
        told = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port)}  # fmt: skip
        children = [
            self.start(program, *arguments, environment={**environment, **told, "RANK": str(i), "LOCAL_RANK": str(i)})
            for i in range(count)
        ]
        status, running, deadline = 0, list(children), time.monotonic() + 180
        while running and time.monotonic() < deadline:
            for child in list(running):
                ended = child.poll(0.02)
                if ended is not None:
                    running.remove(child)
                    if ended and not status:
                        status = ended
                        for other in running:
                            os.kill(other.pid, signal.SIGTERM)
        for child in running:
            os.kill(child.pid, signal.SIGKILL)
            child.poll(60)
        assert not running, "no end within 180 s"
        out, err = ("".join(path.read_text(errors="replace") for path in paths) for paths in
                    ([child._out for child in children], [child._err for child in children]))  # fmt: skip
        return subprocess.CompletedProcess("forked", status, out, err)

    def close(self) -> None:
        """End the process that forks."""
        if self._server is not None:
            self._server.communicate(timeout=60)
