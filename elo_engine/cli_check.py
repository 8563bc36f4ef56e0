"""The verb that tries a promise on the user's own machine, `elo verify-resume`; `cli.py` puts it in its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from elo_engine import console
from elo_engine.cli_judge import AsJson, Config, Overrides
from elo_engine.command import verb


@verb
def verify_resume(
    config: Config,
    overrides: Overrides = None,
    stage: Annotated[
        str | None, typer.Option(help="pretrain or align (default: both; interleaved they are one, align)")
    ] = None,
    steps: Annotated[int, typer.Option(min=2, help="optimizer steps of a stage; it is killed half-way")] = 4,
    work: Annotated[Path | None, typer.Option(help="new folder, removed at the end (default: OUTPUT-verify)")] = None,
    as_json: AsJson = False,
) -> None:
    """Train a few steps straight, and killed and resumed; compare weights, moments, losses and place in the data."""
    from elo_engine.verify_resume import describe, require_exact, verify

    found = verify(config, overrides or [], stage, steps, work)
    for line in [json.dumps(found, indent=2)] if as_json else describe(found):
        console.out.print(line, markup=False)
    require_exact(found)
