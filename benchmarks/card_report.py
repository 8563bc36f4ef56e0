"""What a part of `elo bench card` that is no benchmark by itself leaves: a file of figures, and an exit status."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from elo_engine.errors import EloError, FailedError


def leave(out: Path, figures: dict[str, float], notes: dict[str, str] | None = None) -> None:
    """Write the figures known by now, whole or not at all, so that whoever ends this process finds them.

    notes: of a figure that is not there, why.
    """
    writing = out.with_name(f".{out.name}.tmp")
    writing.write_text(json.dumps({"figures": figures, "notes": notes or {}}, allow_nan=False), encoding="utf-8")
    writing.replace(out)


class Cases:
    """The cases of a part: an error of one is its note, and the others go on.

    Attributes:
        figures, notes: of all cases so far, as `leave` takes them.
    """

    def __init__(self, out: Path) -> None:
        self._out, self._failed = out, list[str]()
        self.figures, self.notes = dict[str, float](), dict[str, str]()

    @contextmanager
    def case(self, name: str, figure: str) -> Iterator[None]:
        """Around one case; what is known after it is written. figure: that is not there where it fails."""
        try:
            yield
        except Exception as error:  # Triton's are of no class that others have; `require` raises for all of them
            traceback.print_exc()
            said = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:300]
            self.notes[figure] = said
            self._failed.append(f"{name}: {said}")
        leave(self._out, self.figures, self.notes)

    def require(self) -> None:
        """Raises FailedError naming the cases that failed."""
        if self._failed:
            raise FailedError("; ".join(self._failed))


@contextmanager
def refusing() -> Iterator[None]:
    """Typed errors end the process as they end `elo`: one line, and the exit status that is the error's."""
    try:
        yield
    except EloError as error:
        print(f"error: {error}", flush=True)
        sys.exit(error.exit_status)
