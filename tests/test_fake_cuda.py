"""The ways through the engine that only a GPU takes, on tensors that say they are on one (`fake_cuda.py`): nothing
mixes the host's memory with the device's, no step waits, and streams that share memory wait for each other.

Where tests/test_no_sync.py has meta tensors, which no branch on `cuda` sees and which mix with the host's, these have a
device. All cases run in one process that the library must be loaded into before torch.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda_cases import CASES
from forked import Forked

from elo_engine import doctor

pytest.importorskip("triton")

HERE = Path(__file__).parent
SEEN = {
    "a tensor of the host": "found at least two devices",
    "a kernel's tensor of the host": "gamma_ptr is on cpu",
    "readers do not wait": "Race: copy_.default on stream",
    "writers do not wait for readers": "Race: copy_.default on stream",
    "the graphs' stream does not wait": "Race: ",
    "memory is not kept": "is given back to compute, which does not wait for copy",
    "a gradient is let go of": "is given back to compute, which does not wait for copy",
}
SEEN_AS_WAITS = {"a wait": "a number is read", "a pageable copy": "a copy of pageable memory"}
# A bridge is fitted anew, and a whole-model step ends with the same in the store and on the device; who reads a
# checkpoint waits for it.
MAY_WAIT = {"interleaved", "read"} | {name for name in CASES if name.endswith("and a bridge")}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stand-in's answers to autograd."""
    if torch.version.cuda or torch.version.hip:
        pytest.skip("torch is built for a GPU here, and the stand-in is for builds that are not")
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler for the stand-in's answers to autograd")
    made, root = tmp_path_factory.mktemp("fake_cuda") / "fake_cuda.so", Path(torch.__file__).parent
    subprocess.run(
        [compiler, "-std=c++20", "-O0", "-w", "-shared", "-fPIC", f"-I{root / 'include'}", HERE / "fake_cuda.cpp",
         "-o", made, f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{root / 'lib'}"], check=True,
    )  # fmt: skip
    return made


Answers = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def answers(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Answers]:
    """`answers(script, *arguments)`: what it printed, in a fork of a process that loaded the library before torch."""
    forked = Forked(tmp_path_factory.mktemp("forked"), f"import ctypes; ctypes.CDLL({str(library)!r})")

    def call(script: str, *arguments: str) -> list[dict[str, Any]]:
        program = f"import runpy, sys; sys.path[:0] = [{str(HERE)!r}]; runpy.run_path({script!r}, run_name='__main__')"
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = forked(program, library, *arguments, environment=environment, folder=HERE, timeout_s=590)
        assert done.returncode == 0, done.stderr[-3000:]
        return [json.loads(line) for line in done.stdout.splitlines()]

    yield call
    forked.close()


@pytest.fixture(scope="module")
def found(answers: Answers) -> dict[str, dict[str, Any]]:
    """What each case came to."""
    return {line["case"]: line for line in answers("fake_cuda_cases.py")}


@pytest.mark.parametrize("case", [name for name in CASES if not name.startswith("planted")])
def test_the_way_of_a_gpu(case: str, found: dict[str, dict[str, Any]]) -> None:
    assert found[case]["error"] == ""
    assert found[case]["launched"] > 50, "this was not the way of a GPU"
    assert case in MAY_WAIT or found[case]["waits"] == []


@pytest.mark.parametrize("what", SEEN)
def test_a_planted_error_is_seen(what: str, found: dict[str, dict[str, Any]]) -> None:
    assert SEEN[what] in found[f"planted: {what}"]["error"]


@pytest.mark.parametrize("what", SEEN_AS_WAITS)
def test_a_planted_wait_is_seen(what: str, found: dict[str, dict[str, Any]]) -> None:
    line = found[f"planted: {what}"]
    assert line["error"] == "" and line["waits"] and all(SEEN_AS_WAITS[what] in wait for wait in line["waits"])


def test_no_planted_error_is_left_out() -> None:
    assert {f"planted: {what}" for what in [*SEEN, *SEEN_AS_WAITS]} == {n for n in CASES if n.startswith("planted")}


def test_the_method_from_the_command_line(
    answers: Answers, run_tree: dict[str, Any], write_config: Callable[..., Path]
) -> None:
    """Planned, trained resident and streamed, written and scored as on a card, with numbers that mean nothing."""
    run_tree |= {"device": "cuda", "dtype": "auto"}
    run_tree["detach"] = {"bridge": "linear", "bridge_tokens": 512}
    run_tree["pretrain"] |= {"tokens": 256, "optimizer": {"state": "8bit"}}
    run_tree["align"] |= {"tokens": 256, "engine": "streamed", "stream": {"inputs": "host"}}
    run_tree["evaluate"]["every"] = 1
    run_tree["snapshot"]["every"] = 1
    calls = ["doctor"], ["run", str(write_config(run_tree))]
    said, run = answers("fake_cuda_run.py", *map(json.dumps, calls))
    assert said["status"] == run["status"] == 0
    assert all(part in said["said"] for part in ("gpu: NVIDIA H200", "default: cuda, bf16", "C compiler: "))
    folder = Path(run_tree["output"])
    assert json.loads((folder / "STATUS").read_text())["state"] == "finished"
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in metrics if "step_s" in line] == ["pretrain"] * 2 + ["align"] * 2
    assert json.loads((folder / "plan.json").read_text())["device"] == "cuda"


def test_doctor_names_what_triton_cannot_launch_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(sysconfig, "get_path", lambda name, scheme: str(tmp_path))
    assert "Python.h is missing, and Triton launches no kernel" in doctor._compiler()
    (tmp_path / "Python.h").touch()
    assert doctor._compiler() == "C compiler: /usr/bin/gcc (for the launchers of Triton's kernels)"
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert doctor._compiler().startswith("! C compiler: none")
