"""`make fuzz`, for a moment: clean under the sanitizers, and an error planted in the ring is found."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SECONDS = "1"  # `make fuzz` takes 30 each
pytestmark = pytest.mark.skipif(not (shutil.which("g++") and shutil.which("make")), reason="needs make and g++")


def run_target(tree: Path, target: str) -> subprocess.CompletedProcess[str]:
    made = subprocess.run(
        ["make", f"build/fuzz/{target}", "CXX=g++"], cwd=tree, capture_output=True, text=True, timeout=240
    )
    if "cannot find -l" in made.stderr or "unrecognized" in made.stderr:
        pytest.skip("this compiler has no sanitizers")
    assert made.returncode == 0, made.stderr
    return subprocess.run([tree / "build/fuzz" / target, SECONDS], capture_output=True, text=True, timeout=120)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The sources alone, so that nothing is built where they lie."""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copy(ROOT / "Makefile", tmp_path)
    return tmp_path


def plant(tree: Path, line: str, instead: str) -> None:
    path = tree / "csrc" / "mover.cpp"
    text = path.read_text()
    assert text.count(line) == 1
    path.write_text(text.replace(line, instead))


def test_the_mover_under_address_sanitizer(tree: Path) -> None:
    done = run_target(tree, "fuzz_mover")
    assert done.returncode == 0 and "inputs in" in done.stdout, done.stderr


def test_the_ring_under_thread_sanitizer(tree: Path) -> None:
    done = run_target(tree, "stress_ring")
    assert done.returncode == 0 and "stale releases refused" in done.stdout, done.stderr


def test_a_generation_that_nobody_compares_is_found(tree: Path) -> None:
    plant(
        tree,
        "if (found.state == State::kFree || found.generation != slot.generation)",
        "if (found.state == State::kFree)",
    )
    done = run_target(tree, "stress_ring")
    assert done.returncode != 0
