"""The table of docs/reliability.md: each fault once, each test it names there to be run."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
TEXT = (TESTS.parent / "docs" / "reliability.md").read_text(encoding="utf-8")
FAULTS = range(1, 36)


def rows(text: str) -> list[tuple[int, str, list[str]]]:
    """(number, promises, tests) of each line of the table."""
    found = []
    for line in text.splitlines():
        match = re.fullmatch(r"\| (\d+) \| .+ \| ((?:P\d ?)+) \| (.+) \|", line)
        if match:
            found.append((int(match.group(1)), match.group(2).strip(), re.findall(r"`([^`]+)`", match.group(3))))
    return found


def problems(text: str) -> list[str]:
    """What is wrong with a table."""
    table, found = rows(text), []
    numbers = [number for number, _, _ in table]
    if numbers != list(FAULTS):
        found.append(f"faults {numbers} are not 1 to {FAULTS[-1]}, once each and in order")
    for number, promises, tests in table:
        if not tests:
            found.append(f"{number}: no test")
        if not set(promises.split()) <= {f"P{i}" for i in range(5)}:
            found.append(f"{number}: {promises}")
        for test in tests:
            file, _, name = test.partition("::")
            path = TESTS / file
            if not path.is_file():
                found.append(f"{number}: no file {file}")
            elif name not in functions(path):
                found.append(f"{number}: no test {name} in {file}")
    return found


def functions(path: Path) -> set[str]:
    """Tests at the top of a file that nothing skips for good."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return {
        node.name
        for node in body
        if isinstance(node, ast.FunctionDef)
        and node.name.startswith("test_")
        and not any(re.search(r"mark\.(skip|xfail)\b", ast.unparse(mark)) for mark in node.decorator_list)
    }


def test_every_fault_has_its_tests() -> None:
    assert problems(TEXT) == []


def test_every_test_of_the_folder_is_of_use() -> None:
    """A file of tests/faults that the table does not name would be run for nothing known."""
    named = {test.partition("::")[0] for _, _, tests in rows(TEXT) for test in tests}
    assert {f"faults/{path.name}" for path in (TESTS / "faults").glob("test_*.py")} <= named


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("| 7 | ", "| 8 | ", "once each"),
        ("test_preflight`", "test_preflights`", "12: no test test_preflights"),
        ("`test_header.py", "`test_headers.py", "22: no file"),
        ("| P3 | `test_publish.py::test_preflight", "| P9 | `test_publish.py::test_preflight", "12: P9"),
    ],
)
def test_a_wrong_table_is_seen(before: str, after: str, said: str) -> None:
    assert before in TEXT
    assert any(said in problem for problem in problems(TEXT.replace(before, after)))
