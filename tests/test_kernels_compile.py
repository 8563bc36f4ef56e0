"""Every kernel compiles for five kinds of cards, spills nothing, and costs what kernels/README.md says."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("triton", reason="triton is not installed; pip install 'elo-engine[gpu]'")

import triton

from elo_engine.kernels import arguments, compiled, specimens

if arguments.INTERPRETED:
    pytest.skip("TRITON_INTERPRET is set: there is no compiler in this process", allow_module_level=True)


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
    assert len(cells) == len(specimens.specimens()) * len(compiled.TARGETS) == 125
    assert {spilled for _, spilled, _ in cells} == {"0"}
    # 48 KiB is what a program may use on every card without asking.
    assert max(int(shared) for _, _, shared in cells) <= 48 * 1024


@pytest.mark.parametrize("capability", [80, 120])
def test_fp32_compiles_without_spills(capability: int) -> None:
    for specimen in specimens.specimens("fp32"):
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
