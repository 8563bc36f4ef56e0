"""Every kernel compiled for every card it is meant for, without having one: does ptxas take it, and what does
it cost.

`python -m elo_engine.kernels.compiled` prints the table of registers, spills and shared memory, and with
`--write` puts it into README.md beside this file, where a test compares it. Compiling at the shapes of
Llama-3.1-8B (D 4096, F 14336, V 128256) in bf16 is what the launchers would do there: sizes and strides
divisible by 16, pointers aligned.
"""

from __future__ import annotations

import argparse
import inspect
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

# A100, RTX 30 and A10, RTX 40 and L4, H100 and H200, RTX 50.
TARGETS = (80, 86, 89, 90, 120)

BEGIN, END = "<!-- compiled: begin -->", "<!-- compiled: end -->"
README = Path(__file__).with_name("README.md")


@dataclass(frozen=True)
class Specimen:
    """One kernel at one set of compile-time numbers, as a launcher would ask for it.

    `floats` is the type behind every pointer that `pointers` does not name; plain arguments are 32-bit integers unless
    `scalars` says otherwise, and divisible by 16 unless `ragged` names them.
    """

    name: str
    kernel: Any
    constants: Mapping[str, Any]
    num_warps: int
    floats: str = "bf16"
    pointers: Mapping[str, str] = field(default_factory=dict)
    scalars: Mapping[str, str] = field(default_factory=lambda: {"eps": "fp32"})
    ragged: tuple[str, ...] = ("N",)  # a ragged number of rows is the ordinary case
    least: int = 80  # compiled for cards of this compute capability and later

    def source(self) -> ASTSource:
        """What triton.compile takes: signature, constants, and what is known to be divisible by 16."""
        names = self.kernel.arg_names
        signature = {name: self._type(name) for name in names}
        divisible = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if self._divisible(name)}
        return ASTSource(self.kernel, signature, constexprs=dict(self.constants), attrs=divisible)

    def _type(self, name: str) -> str:
        if name in self.constants:
            return "constexpr"
        if name.endswith("_ptr"):
            return "*" + self.pointers.get(name, self.floats)
        return self.scalars.get(name, "i32")

    def _divisible(self, name: str) -> bool:
        return name not in self.constants and name not in self.scalars and name not in self.ragged


@dataclass(frozen=True)
class Cost:
    """What ptxas reports for one kernel on one target: per thread, but shared memory per program."""

    registers: int
    spill_bytes: int
    shared_bytes: int


def _compile(specimen: Specimen, capability: int) -> Any:
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(specimen.source(), target=target, options={"num_warps": specimen.num_warps})


def ptx_for(specimen: Specimen, capability: int) -> str:
    """The PTX that Triton makes of a kernel for one target."""
    ptx: str = _compile(specimen, capability).asm["ptx"]
    return ptx


def compile_for(specimen: Specimen, capability: int) -> Cost:
    """Compile to machine code with the ptxas that Triton ships; what Triton makes is cached by Triton.

    Raises:
        RuntimeError: ptxas refuses the code that Triton made, with its message.
    """
    # Triton's metadata has no spills, and a cached kernel was not assembled now, so ptxas is asked once more.
    ptx = ptx_for(specimen, capability)
    target = re.search(r"^\.target\s+(\w+)", ptx, re.MULTILINE)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        source, result = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        command = [_ptxas(capability), "-v", "--regAllocOptLevel=2", f"--gpu-name={target[1]}"]
        done = subprocess.run([*command, str(source), "-o", str(result)], capture_output=True, text=True)
    registers = re.search(r"Used (\d+) registers", done.stderr)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    if done.returncode or registers is None or spills is None:
        raise RuntimeError(f"{specimen.name} for sm_{capability}: ptxas said: {done.stdout}{done.stderr}")
    shared: int = _compile(specimen, capability).metadata.shared
    return Cost(int(registers[1]), int(spills[1]) + int(spills[2]), shared)


def _ptxas(capability: int) -> str:
    """Where it is: Triton has had a second one for Blackwell since 3.5, and before takes no word of the target."""
    told = (capability,) if inspect.signature(get_ptxas).parameters else ()
    path: str = get_ptxas(*told).path
    return path


def table(progress: Callable[[str], None] | None = None) -> str:
    """The table of README.md: one line a kernel, one column a target."""
    heads = " | ".join(f"sm_{target}" for target in TARGETS)
    lines = [
        f"triton {triton.__version__}: registers / bytes spilled (both a thread) / bytes of shared memory.",
        "",
        f"| bf16, D 4096 | warps | {heads} |",
        "|---|---|" + "---|" * len(TARGETS),
    ]
    from .specimens import specimens

    for specimen in specimens():
        costs = [compile_for(specimen, target) if target >= specimen.least else None for target in TARGETS]
        cells = " | ".join(
            "none" if cost is None else f"{cost.registers} / {cost.spill_bytes} / {cost.shared_bytes}" for cost in costs
        )
        lines.append(f"| {specimen.name} | {specimen.num_warps} | {cells} |")
        if progress is not None:
            progress(specimen.name)
    return "\n".join(lines)


def written_table() -> str:
    """The table that README.md holds now.

    Raises:
        ValueError: README.md has lost the two markers.
    """
    text = README.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{README}: put the markers {BEGIN} and {END} around the table, once each")
    return text.split(BEGIN)[1].split(END)[0].strip()


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Compile every kernel for every target and tabulate the cost."
    )
    parser.add_argument("--write", action="store_true", help=f"put the table into {README}")
    write = parser.parse_args().write
    found = table(progress=lambda name: print(f"compiled {name}", file=sys.stderr))
    print(found)
    if write:
        written_table()
        before, rest = README.read_text(encoding="utf-8").split(BEGIN)
        README.write_text(f"{before}{BEGIN}\n\n{found}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
