"""Every kernel compiles, spills nothing, and costs what kernels/README.md says.

For one kind of card each, in turn, so that all five come; with ALL_TARGETS=1 (`make test-all`) every kernel is compiled
for each of them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed; pip install 'elo-engine[gpu]'")

import triton

from elo_engine.kernels import arguments, compiled, specimens

if arguments.INTERPRETED:
    pytest.skip("TRITON_INTERPRET is set: there is no compiler in this process", allow_module_level=True)


ROOT = Path(__file__).resolve().parents[1]


# Whether each kernel is compiled for every card, and every norm at every width.
ALL = os.environ.get("ALL_TARGETS", "") not in ("", "0")
Pairs = list[tuple[compiled.Specimen, int]]


def in_turn(made: list[compiled.Specimen], targets: tuple[int, ...]) -> Pairs:
    """Each kernel with one card that it is meant for, or with all of them."""
    found = []
    for number, specimen in enumerate(made):
        meant = [target for target in targets if target >= specimen.least]
        found += [(specimen, target) for target in (meant if ALL else [meant[number % len(meant)]])]
    assert {target for _, target in found} == set(targets)
    return found


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    return in_turn(specimens.specimens(), compiled.TARGETS)


@pytest.fixture(scope="module")
def fresh(pairs: Pairs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, float]]:
    """Seconds of CPU time that compiling took, ptxas included, by card, with an empty cache; what was compiled stays in
    it.
    """

    def spent() -> float:
        return sum(os.times()[:4])

    folder, taken = tmp_path_factory.mktemp("triton"), dict.fromkeys(compiled.TARGETS, 0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(folder))
        for specimen, target in pairs:
            began = spent()
            compiled._compile(specimen, target)
            taken[target] += spent() - began
        assert len(list(folder.glob("*/*.cubin"))) >= len(pairs), "they were not compiled here"
        yield taken


@pytest.fixture(scope="module")
def costs(pairs: Pairs, fresh: dict[int, float]) -> dict[tuple[str, int], compiled.Cost]:
    """By kernel and card."""
    return {(specimen.name, target): compiled.compile_for(specimen, target) for specimen, target in pairs}


def named(name: str) -> compiled.Specimen:
    return next(specimen for specimen in specimens.specimens() if specimen.name == name)


Costs = dict[tuple[str, int], compiled.Cost]


def differences(written: str, costs: Costs) -> list[str]:
    """Where a table says something else than what was compiled, or has other rows than there are kernels."""
    head, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in written.splitlines() if "|" in line]
    assert head[2:] == [f"sm_{target}" for target in compiled.TARGETS]
    made = {specimen.name: specimen for specimen in specimens.specimens()}
    found = [] if [row[0] for row in rows[1:]] == list(made) else ["other kernels"]
    for name, warps, *cells in rows[1:]:
        for target, cell in zip(compiled.TARGETS, cells, strict=True):
            cost, specimen = costs.get((name, target)), made.get(name)
            right = cell if cost is None else f"{cost.registers} / {cost.spill_bytes} / {cost.shared_bytes}"
            if specimen is not None and target < specimen.least:
                right = "none"
            if specimen is None or cell != right or warps != str(specimen.num_warps):
                found.append(f"{name}, sm_{target}: {cell}, not {right}")
    return found


def test_the_readme_holds_the_compiled_numbers(costs: Costs) -> None:
    written = compiled.written_table()
    made_with = re.match(r"triton (\S+):", written)
    assert made_with is not None, "the table in kernels/README.md does not begin with the version of triton"
    if made_with[1] != triton.__version__:
        pytest.skip(f"the table is of triton {made_with[1]}, this is {triton.__version__}")
    assert differences(written, costs) == [], "run: python -m elo_engine.kernels.compiled --write"
    (name, target), cost = next(iter(costs.items()))
    other = {**costs, (name, target): replace(cost, registers=cost.registers + 1)}
    assert len(differences(written, other)) == 1 and differences(written.replace("rotary", "turn"), costs)
    if ALL:
        assert written == compiled.table()


def test_nothing_spills_at_the_width_of_the_table(costs: Costs) -> None:
    cells = re.findall(r"(\d+) / (\d+) / (\d+)", compiled.written_table())
    wanted = [(made, target) for made in specimens.specimens() for target in compiled.TARGETS if target >= made.least]
    assert len(cells) == len(wanted) == 28 * 5 + 10 * 3  # 8-bit floats begin with sm_89
    assert len(costs) == (len(wanted) if ALL else 28 + 10)
    assert {cost.spill_bytes for cost in costs.values()} == {0} == {int(spilled) for _, spilled, _ in cells}
    # 48 KiB is what a program may use on every card without asking.
    assert max(cost.shared_bytes for cost in costs.values()) <= 48 * 1024
    assert max(int(shared) for _, _, shared in cells) <= 48 * 1024


def test_fp32_compiles_without_spills() -> None:
    for specimen, target in in_turn(specimens.specimens("fp32"), (80, 120)):
        assert compiled.compile_for(specimen, target).spill_bytes == 0, (specimen.name, target)


def test_norms_of_other_widths_compile_without_spills() -> None:
    """A q/k norm, SmolLM2-135M, Llama-3.2-1B, Llama-3.1-70B; two widths for each kernel, unless all are asked for."""
    widths, turns = (64, 576, 2048, 8192), set()
    for number, width in enumerate(widths):
        norms = [specimen for specimen in specimens.specimens(width=width) if "rms_norm" in specimen.name]
        assert len(norms) >= 5
        for i, specimen in enumerate(norms):
            if ALL or (i - number) % len(widths) < 2:
                assert compiled.compile_for(specimen, 80).spill_bytes == 0, (specimen.name, width)
                turns.add((width, specimen.name))
    assert {width for width, _ in turns} == set(widths) and len({name for _, name in turns}) >= 5


def test_a_spill_would_be_seen() -> None:
    """The widest norm is known to spill a little: the numbers above can be other than 0."""
    backward = next(s for s in specimens.specimens(width=16384) if s.name == "rms_norm backward")
    assert 0 < compiled.compile_for(backward, 80).spill_bytes < 512


def test_all_kernels_compile_within_a_minute_on_a_fresh_machine(fresh: dict[int, float]) -> None:
    """With an empty cache, more of them than any first step wants. Nothing is tuned by trial, so this is all."""
    assert (max(fresh.values()) if ALL else sum(fresh.values())) < 60
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "kernels").glob("*.py")]
    assert not any("autotune" in source for source in sources)


def test_no_atomics_and_wide_loads(pairs: Pairs, fresh: dict[int, float]) -> None:
    """Sums in the order of arrival would differ from run to run; narrow loads would halve the bandwidth."""
    for specimen, target in pairs:
        ptx = compiled.ptx_for(specimen, target)
        assert not re.search(r"\b(atom|red)\.(global|shared)?", ptx), f"{specimen.name} has atomics"
        # The others are a single program, or one a tensor, which reads a few thousand sums.
        if not specimen.name.startswith("adamw norm"):
            assert re.search(r"ld\.global\.v4\.b32", ptx), f"{specimen.name} loads less than 16 bytes at once"


def test_what_ptxas_says_reaches_the_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    nonsense = ".version 8.0\n.target sm_80\nnonsense;"
    monkeypatch.setattr(compiled, "ptx_for", lambda specimen, capability: nonsense)
    with pytest.raises(RuntimeError, match=r"swiglu forward for sm_80: ptxas said: .*[Ss]yntax error"):
        compiled.compile_for(named("swiglu forward"), 80)
