"""Folders that cannot be written, and other programs that write where we do: faults 29 and 30."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_fixture import changed_layers, make_source
from fault_fixture import Processes

from elo_engine.checkpoint import open_checkpoint, publish, rewrite_checkpoint, verify_commit
from elo_engine.errors import FailedError, RefusedError

Tree = dict[str, Any]
UNWRITABLE = Path("/proc")  # for root as well


def test_a_folder_that_cannot_be_written_is_named(
    run_tree: Tree, write_config: Callable[..., Path], processes: Processes
) -> None:
    status, shown = processes("run", write_config(run_tree | {"output": str(UNWRITABLE / "run")}))
    assert status == 1 and "error:" in shown and str(UNWRITABLE) in shown and "Traceback" not in shown, shown
    with pytest.raises(FailedError, match="/proc"), publish(UNWRITABLE / "out"):
        pytest.fail("the body must not run")


def test_an_output_that_is_its_source_is_refused(tmp_path: Path) -> None:
    """By its name, and through a link."""
    make_source(tmp_path / "source")
    (tmp_path / "link").symlink_to("source")
    before = {path.name: path.read_bytes() for path in (tmp_path / "source").iterdir()}
    for target in (tmp_path / "source", tmp_path / "link", tmp_path / "source" / "..", tmp_path / "link" / "."):
        with pytest.raises(RefusedError), publish(target):
            pytest.fail("the body must not run")
    assert {path.name: path.read_bytes() for path in (tmp_path / "source").iterdir()} == before


@pytest.mark.parametrize("side", ["source", "out"])
def test_a_foreign_truncation_of_one_side_leaves_the_other(side: str, tmp_path: Path) -> None:
    """Clones share extents, not files: only hard links, which must be asked for, would be destroyed."""
    make_source(tmp_path / "source")
    with publish(tmp_path / "out") as folder:
        rewrite_checkpoint(open_checkpoint(tmp_path / "source"), changed_layers(), folder)
    before = {path.name: path.read_bytes() for path in (tmp_path / "source").iterdir()}
    for path in (tmp_path / side).glob("*.safetensors"):
        os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))
    if side == "source":
        verify_commit(tmp_path / "out")
    else:
        assert {path.name: path.read_bytes() for path in (tmp_path / "source").iterdir()} == before
        with pytest.raises(FailedError, match="has 0 bytes"):
            verify_commit(tmp_path / "out")
