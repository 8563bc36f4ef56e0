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
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda_cases import CASES

pytest.importorskip("triton")

HERE = Path(__file__).parent
SEEN = {
    "a tensor of the host": "found at least two devices",
    "a kernel's tensor of the host": "gamma_ptr is on cpu",
    "readers do not wait": "Race: copy_.default on stream",
    "writers do not wait for readers": "Race: copy_.default on stream",
    "memory is not kept": "is given back to compute, which does not wait for copy",
    "a gradient is let go of": "is given back to compute, which does not wait for copy",
}
SEEN_AS_WAITS = {"a wait": "a number is read", "a pageable copy": "a copy of pageable memory"}
# A bridge is fitted anew, and a whole-model step ends with the same in the store and on the device; who reads a
# checkpoint waits for it.
MAY_WAIT = {"interleaved", "read"}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What each case came to."""
    if torch.version.cuda or torch.version.hip:
        pytest.skip("torch is built for a GPU here, and the stand-in is for builds that are not")
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler for the stand-in's answers to autograd")
    library, root = tmp_path_factory.mktemp("fake_cuda") / "fake_cuda.so", Path(torch.__file__).parent
    subprocess.run(
        [compiler, "-std=c++20", "-O0", "-w", "-shared", "-fPIC", f"-I{root / 'include'}", HERE / "fake_cuda.cpp",
         "-o", library, f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{root / 'lib'}"], check=True,
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, HERE / "fake_cuda_cases.py", library], stdout=subprocess.PIPE, text=True, check=True, cwd=HERE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return {line["case"]: line for line in map(json.loads, done.stdout.splitlines())}


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
