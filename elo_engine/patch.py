"""The verb `elo patch`: what changed between two checkpoints as a small file, with progress and one line of result.

The work is in `checkpoint/patch*.py`; here are the hub ids, the bars and the words.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from elo_engine import console
from elo_engine.checkpoint import (
    PatchStats,
    Progress,
    apply_patch,
    average_patches,
    diff_checkpoints,
    resolve_model,
    revert_patch,
    verify_patch,
)
from elo_engine.errors import UsageError
from elo_engine.measure.meter import human_bytes
from elo_engine.reattach import describe_rewrite


@contextmanager
def _bars() -> Iterator[Progress]:
    """A progress bar for each kind of work, one after the other."""
    with ExitStack() as stack:
        current = ""
        bar = None

        def progress(what: str, done: int, total: int) -> None:
            nonlocal current, bar
            if what != current or bar is None:
                stack.close()
                current, bar = what, stack.enter_context(console.bytes_bar(what))
            bar(done, total)

        yield progress


def diff(base: str, changed: str, out: Path) -> str:
    """Make a patch; see `diff_checkpoints`. Returns the line to show."""
    with _bars() as progress:
        stats = diff_checkpoints(resolve_model(base), resolve_model(changed), out, progress)
    return _describe(out, stats)


def average(base: str, patches: list[Path], out: Path, weights: str | None) -> str:
    """Average patches of one base; weights: numbers with commas between. See `average_patches`."""
    with _bars() as progress:
        stats = average_patches(resolve_model(base), patches, out, parse_weights(weights), progress)
    return _describe(out, stats)


def apply(folder: str, patch: Path, out: Path, *, hard_links: bool, back: bool) -> str:
    """Apply a patch, or take it `back`; see `apply_patch` and `revert_patch`."""
    body = revert_patch if back else apply_patch
    with _bars() as progress:
        stats = body(resolve_model(folder), patch, out, progress, hard_links=hard_links)
    declined = f"\nhard links were declined: {stats.not_linked}" if stats.not_linked else ""
    return f"{out}: {'the base again' if back else 'patched'}, {describe_rewrite(stats)}{declined}"


def verify(folder: str, patch: Path) -> str:
    """Which side of the patch a checkpoint is; see `verify_patch`."""
    with _bars() as progress:
        return f"{folder}: {verify_patch(resolve_model(folder), patch, progress)}"


def parse_weights(text: str | None) -> list[float] | None:
    """`0.5,0.5` -> numbers. Raises UsageError."""
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--weights {text}: give numbers with commas between, for example 0.5,0.5") from None


def _describe(out: Path, stats: PatchStats) -> str:
    if stats.tensors == 0:
        line = f"{out}: no tensor differs, so this is an empty patch"
    else:
        line = f"{out}: {stats.tensors} tensors differ, {human_bytes(stats.file_bytes)}"
    if stats.other_files:
        line += f"\nnot in the patch, which holds weights alone: {', '.join(stats.other_files)}"
    return line
