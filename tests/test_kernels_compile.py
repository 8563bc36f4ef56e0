"""Every kernel compiles for five kinds of cards, spills nothing, and costs what kernels/README.md says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed; pip install 'elo-engine[gpu]'")

import triton

from elo_engine.kernels import arguments, compiled, specimens

if arguments.INTERPRETED:
    pytest.skip("TRITON_INTERPRET is set: there is no compiler in this process", allow_module_level=True)


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def table() -> str:
    made: str = compiled.table()
    return made


def named(name: str) -> compiled.Specimen:
    return next(specimen for specimen in specimens.specimens() if specimen.name == name)


def test_the_readme_holds_the_compiled_numbers(table: str) -> None:
    written = compiled.written_table()
    made_with = re.match(r"triton (\S+):", written)
    assert made_with is not None, "the table in kernels/README.md does not begin with the version of triton"
    if made_with[1] != triton.__version__:
        pytest.skip(f"the table is of triton {made_with[1]}, this is {triton.__version__}")
    assert written == table, "run: python -m elo_engine.kernels.compiled --write"


def test_nothing_spills_at_the_width_of_the_table(table: str) -> None:
    cells = re.findall(r"(\d+) / (\d+) / (\d+)", table)
    wanted = [(made, target) for made in specimens.specimens() for target in compiled.TARGETS if target >= made.least]
    assert len(cells) == len(wanted) == 28 * 5 + 8 * 3  # 8-bit floats begin with sm_89
    assert table.count("| none |") + table.count("| none | none |") == 8 * 2
    assert {spilled for _, spilled, _ in cells} == {"0"}
    # 48 KiB is what a program may use on every card without asking.
    assert max(int(shared) for _, _, shared in cells) <= 48 * 1024


@pytest.mark.parametrize("capability", [80, 120])
def test_fp32_compiles_without_spills(capability: int) -> None:
    for specimen in specimens.specimens("fp32"):
        if capability < specimen.least:
            continue
        assert compiled.compile_for(specimen, capability).spill_bytes == 0, specimen.name


@pytest.mark.parametrize("width", [64, 576, 2048, 8192])
def test_norms_of_other_widths_compile_without_spills(width: int) -> None:
    """A q/k norm, SmolLM2-135M, Llama-3.2-1B, Llama-3.1-70B."""
    norms = [specimen for specimen in specimens.specimens(width=width) if "rms_norm" in specimen.name]
    assert len(norms) >= 5
    for specimen in norms:
        assert compiled.compile_for(specimen, 80).spill_bytes == 0, specimen.name


def test_a_spill_would_be_seen() -> None:
    """The widest norm is known to spill a little: the numbers above can be other than 0."""
    backward = next(s for s in specimens.specimens(width=16384) if s.name == "rms_norm backward")
    assert 0 < compiled.compile_for(backward, 80).spill_bytes < 512


FRESH = """
import time
from elo_engine.kernels.compiled import _compile
from elo_engine.kernels.specimens import specimens
began = time.process_time(), time.perf_counter()
names = [_compile(specimen, 90) and specimen.name for specimen in specimens()]
print(len(names), time.perf_counter() - began[1])
"""


def test_all_kernels_compile_within_a_minute_on_a_fresh_machine(tmp_path: Path) -> None:
    """For one card, with an empty cache: more than any first step wants. Nothing is tuned by trial, so this is all."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", FRESH], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    count, seconds = done.stdout.split()
    assert int(count) >= 28 and len(list(tmp_path.glob("*/*.cubin"))) >= int(count) and float(seconds) < 60
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "kernels").glob("*.py")]
    assert not any("autotune" in source for source in sources)


def test_no_atomics_and_wide_loads() -> None:
    """Sums in the order of arrival would differ from run to run; narrow loads would halve the bandwidth."""
    for specimen in specimens.specimens():
        ptx = compiled.ptx_for(specimen, 90)
        assert not re.search(r"\b(atom|red)\.(global|shared)?", ptx), f"{specimen.name} has atomics"
        # The others are a single program, or one a tensor, which reads a few thousand sums.
        if not specimen.name.startswith("adamw norm"):
            assert re.search(r"ld\.global\.v4\.b32", ptx), f"{specimen.name} loads less than 16 bytes at once"


def test_what_ptxas_says_reaches_the_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    nonsense = ".version 8.0\n.target sm_80\nnonsense;"
    monkeypatch.setattr(compiled, "ptx_for", lambda specimen, capability: nonsense)
    with pytest.raises(RuntimeError, match=r"swiglu forward for sm_80: ptxas said: .*[Ss]yntax error"):
        compiled.compile_for(named("swiglu forward"), 80)
