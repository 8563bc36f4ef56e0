"""The tests that need a card, and what became of each: `python -m elo_engine.benchmarks.card_tests OUT.json`.

They are told by what they say: a parameter `cuda`, the fixture `gpu`, a skip whose reason is a card that is not there,
or a module that computes on the GPU where there is one. Others would pass on any machine and are left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import torch

from elo_engine.benchmarks.card_report import leave, refusing
from elo_engine.benchmarks.recording import ROOT
from elo_engine.errors import FailedError, RefusedError

# Files that ask for a card somewhere; what nothing else shows comes first, what takes longest last.
FIRST = "test_graphed_cuda.py", "test_graphed_cuda_turns.py", "test_linear_cross_entropy_fp8.py", "test_linear_fp8.py"
LAST = ("test_same_training.py",)
ASKS = re.compile(r"\bBACKENDS\b|cuda\.is_available\(\)")
NEEDS = re.compile(r"\b(needs a (GPU|card)|measures a card)", re.IGNORECASE)
NAMED = 12  # failures that a figure's note names


def files(tests: Path) -> list[Path]:
    """The files that may have such a test, in order."""
    found = [path for path in sorted(tests.glob("test_*.py")) if ASKS.search(path.read_text(encoding="utf-8"))]
    places = {name: number for number, name in enumerate(FIRST)} | dict.fromkeys(LAST, 1000)
    return sorted(found, key=lambda path: places.get(path.name, 100))


def needs_card(item: Any) -> bool:
    """Whether a test says that it runs on a card alone, or that here it runs on one; not in Triton's interpreter."""
    if "interpreter" in item.name:
        return False
    call = getattr(item, "callspec", None)
    if call is not None and "cuda" in map(str, call.params.values()):
        return True
    if "gpu" in item.fixturenames:
        return True
    if any(NEEDS.search(mark.kwargs.get("reason", "")) for mark in item.iter_markers("skipif")):
        return True
    device = getattr(item.module, "DEVICE", None)
    on_card = isinstance(device, torch.device) and device.type == "cuda"
    return on_card or getattr(item.module, "CARD", False) is True


class Watch:
    """Leaves the tests that need no card out, and writes what is known after every test that ended."""

    def __init__(self, out: Path, order: list[Path]) -> None:
        self._out, self._order = out, order
        self.found = {"passed": list[str](), "failed": list[str](), "skipped": list[str]()}
        self.reasons: list[str] = []
        self.broken: list[str] = []

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        kept = [item for item in items if needs_card(item)]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = sorted(kept, key=lambda item: self._order.index(item.path))

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.broken.append(report.nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        name = report.nodeid.rpartition("/")[2]
        if report.failed and name not in self.found["failed"]:  # also in setting up or tearing down
            self.found["failed"].append(name)
        elif report.skipped:
            self.found["skipped"].append(name)
            self.reasons.append(str(report.longrepr[-1]) if isinstance(report.longrepr, tuple) else "")
        elif report.when == "call" and report.passed:
            self.found["passed"].append(name)
        if report.when == "teardown":
            self.leave()

    def leave(self) -> None:
        """The numbers so far, and the names of failures."""
        failed = [*self.found["failed"], *(f"{name} (could not be read)" for name in self.broken)]
        figures = {"passed": len(set(self.found["passed"]) - set(failed)), "failed": len(failed),
                   "skipped": len(self.found["skipped"])}  # fmt: skip
        more = f" and {len(failed) - NAMED} more" if len(failed) > NAMED else ""
        notes = {"failed": ", ".join(failed[:NAMED]) + more} if failed else {}
        if self.reasons:
            notes["skipped"] = "; ".join(dict.fromkeys(reason.removeprefix("Skipped: ") for reason in self.reasons))
        leave(self._out, {name: float(value) for name, value in figures.items()}, notes)


def run(out: Path, chosen: list[Path]) -> Watch:
    """Run those of these files' tests that need a card.

    Raises:
        FailedError: pytest itself failed.
    """
    import pytest

    watch = Watch(out, [path.resolve() for path in chosen])
    options = ["--import-mode=importlib", "-q", "-rf", "--tb=short", "-p", "no:cacheprovider", "-p", "no:benchmark"]
    options += ["--continue-on-collection-errors"]  # of a file that cannot be read the others know nothing
    options += ["-p", "no:xdist"] if importlib.util.find_spec("xdist") else []
    status = int(pytest.main([*options, *map(str, chosen)], plugins=[watch]))
    watch.leave()
    if status not in (0, 1, 5) and not watch.broken:  # 5: none was left, which the figures say
        raise FailedError(f"pytest ended with status {status}")
    return watch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    with refusing():
        if not (ROOT / "tests").is_dir():
            raise RefusedError("the tests are in a source tree alone, and this is an installed package")
        if importlib.util.find_spec("pytest") is None:
            raise RefusedError("pytest is not installed; pip install 'elo-engine[test]'")
        sys.path = [word for word in sys.path if word not in ("", str(ROOT))]  # kernels/README.md says why
        run(given.out, files(ROOT / "tests"))


if __name__ == "__main__":
    main()
