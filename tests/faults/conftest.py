"""Processes to be killed, and runs that nothing disturbed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_fixture import Processes, final_state


@pytest.fixture(scope="session")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """`processes("run", config, patch=...)` -> exit status and what was printed."""
    made = Processes(tmp_path_factory.mktemp("processes"))
    yield made
    made.close()


@pytest.fixture
def straight(
    run_tree: dict[str, Any], write_config: Callable[..., Path], processes: Processes, tmp_path: Path
) -> Callable[..., dict[str, bytes]]:
    """`straight(*options)`: weights, moments and model of the same run without a fault."""

    def run(*options: str) -> dict[str, bytes]:
        tree = run_tree | {"output": str(tmp_path / "straight")}
        status, shown = processes("run", write_config(tree, "straight.yaml"), *options)
        assert status == 0, shown
        return final_state(tmp_path / "straight")

    return run
