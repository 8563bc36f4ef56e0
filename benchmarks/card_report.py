"""What a part of `elo bench card` that is no benchmark by itself leaves: a file of figures, and an exit status."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from elo_engine.errors import EloError


def leave(out: Path, figures: dict[str, float], notes: dict[str, str] | None = None) -> None:
    """Write the figures known by now, whole or not at all, so that whoever ends this process finds them.

    notes: of a figure that is not there, why.
    """
    writing = out.with_name(f".{out.name}.tmp")
    writing.write_text(json.dumps({"figures": figures, "notes": notes or {}}, allow_nan=False), encoding="utf-8")
    writing.replace(out)


@contextmanager
def refusing() -> Iterator[None]:
    """Typed errors end the process as they end `elo`: one line, and the exit status that is the error's."""
    try:
        yield
    except EloError as error:
        print(f"error: {error}", flush=True)
        sys.exit(error.exit_status)
