"""What the plan says of an interleaved run's disk, and what its report says of memory, against the run itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Elo = Callable[..., tuple[int, str]]


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def test_planned_disk_is_what_the_run_leaves(
    run_tree: dict[str, Any], write_config: Callable[..., Path], elo: Elo
) -> None:
    """Snapshots of both kinds of steps are one stage's, with the sums of the bridge, which its file has as well."""
    run_tree["align"] |= {"when": "interleaved", "recompute": "none"}
    run_tree["detach"] = {"bridge": "linear", "bridge_tokens": 512}
    run_tree["snapshot"] = {"every": 3, "keep": 2}
    status, shown = elo("run", write_config(run_tree))
    assert status == 0, shown
    folder = Path(run_tree["output"])
    disk = json.loads((folder / "plan.json").read_text())["disk"]
    assert disk["reattached"] == disk["pretrain_snapshots"] == 0 and not (folder / "reattached").exists()
    assert len(list((folder / "align").glob("step-*"))) == 2
    assert disk["align_snapshots"] == pytest.approx(size(folder / "align"), rel=0.03)
    assert disk["bridge"] == pytest.approx((folder / "pretrain" / "bridge.safetensors").stat().st_size, rel=0.05)
    report = (folder / "report.md").read_text()
    assert "0 B not recorded" not in report and "with the other steps" in report


def test_a_bridge_that_is_gone_is_not_fitted_again(
    run_tree: dict[str, Any], write_config: Callable[..., Path], elo: Elo
) -> None:
    run_tree["align"] |= {"when": "interleaved", "recompute": "none"}
    run_tree["detach"] = {"bridge": "linear", "bridge_tokens": 512}
    config = write_config(run_tree)
    assert elo("run", config)[0] == 0
    folder = Path(run_tree["output"])
    (folder / "pretrain" / "bridge.safetensors").unlink()
    for path in sorted((folder / "model").rglob("*"), reverse=True):
        path.unlink()
    (folder / "model").rmdir()
    status, shown = elo("run", config, "--resume", "auto")
    assert status == 1 and "is gone although this run has trained with it" in shown
