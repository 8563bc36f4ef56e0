"""A configuration for `elo plan` with shapes by name: neither its model nor its shards are there."""

from __future__ import annotations

from pathlib import Path


def unmade_run(folder: Path, stages: str = "") -> Path:
    """plan.yaml in `folder`, the defaults but for these lines of YAML."""
    path = folder / "plan.yaml"
    path.write_text(f"model: none/such\noutput: {folder / 'out'}\ndata: {{shards: {{ja: nowhere}}}}\n{stages}")
    return path
