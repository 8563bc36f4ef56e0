"""`make scale` in short: ten times the tensors take about ten times as long; many shards take few descriptors."""

from __future__ import annotations

from pathlib import Path

from faults import scale

from elo_engine.checkpoint.header import TensorEntry
from elo_engine.checkpoint.plan import cut

COUNTS = (1_000, 10_000)
# Ten times the tensors: linear work is ten times as long, quadratic a hundred times. Between the two, geometrically.
MOST = 32


def ratio(folder: Path, name: str) -> float:
    """Of CPU seconds; the least of two, since others' work on the machine only adds."""
    least = []
    for count in COUNTS:
        runs = [scale.use_checkpoint(folder / str(count), folder / "written") for _ in range(2)]
        least.append(min(seconds[name] if name else sum(seconds.values()) for seconds in runs))
    return least[1] / least[0]


def test_ten_times_the_tensors_take_ten_times_as_long(tmp_path: Path) -> None:
    for count in COUNTS:
        scale.make_checkpoint(tmp_path / str(count), count, 1)
    assert ratio(tmp_path, "") < MOST


def test_many_shards_take_few_descriptors(tmp_path: Path) -> None:
    assert scale.shards(tmp_path, 100)["most_descriptors"] >= 32, "the bound is not reached, so nothing was tested"


def test_chunks_do_not_copy_the_rest_of_the_run() -> None:
    """A run of many tensors is looked at once, and not again for each of its chunks."""

    class Counted(list):  # type: ignore[type-arg]
        looked = 0

        def __getitem__(self, at):  # type: ignore[no-untyped-def]
            found = list.__getitem__(self, at)
            Counted.looked += len(found) if isinstance(at, slice) else 1
            return found

    size = 8 << 10
    run = Counted(TensorEntry(str(i), "U8", (size,), "s", i * size, (i + 1) * size) for i in range(2_000))
    assert sum(len(chunk.pieces) for chunk in cut(run, 1 << 16)) >= 2_000
    assert Counted.looked < 10 * len(run)
