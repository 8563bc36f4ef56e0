"""`make scale`: what grows with the size of what is read, and what must not. Prints one JSON object.

* A corpus of 2 GB of text through `elo data`, against one of 200 MB: the peak of resident memory is the same.
* A checkpoint of 100,000 tiny tensors against one of 10,000: open, plan, read the detached layers, write back; each
  takes about ten times as long, and not a hundred times.
* An index of 200 shards: opened and read whole with 76 descriptors allowed.

Not collected: minutes. tests/test_scale.py runs the same functions on little.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "faults")]

from peak import own_peak_mib  # noqa: E402

# Verses of nobody's book: lengths and letters of real text, and never the same line twice in a row.
SUBJECTS = ("the king", "his servant", "a shepherd", "the people of a valley", "every man", "her son", "a priest")
VERBS = ("went up to", "spoke against", "remembered", "gave bread to", "did not see", "built a house by", "sent for")
OBJECTS = ("the river", "the city of stone", "his father's field", "the seed of the tree", "the word", "a great host")
ENDS = ("in those days", "and it was evening", "for seven years", "as is written", "before the sun", "and said nothing")
DESCRIPTORS = 2 * 32 + 4  # see `shards`
GROWTH_MIB = 32  # of the peak, from the small corpus to the large: see `corpus`


# The elo command, which writes down its peak as it ends; sys.argv[1] is where.
WITH_PEAK = """
import atexit, runpy, sys
sys.path.insert(0, "tests/faults")
from peak import own_peak_mib
told = sys.argv.pop(1)
atexit.register(lambda: open(told, "w").write(str(own_peak_mib())))
runpy.run_module("elo_engine", run_name="__main__")
"""


def write_corpus(path: Path, size: int) -> int:
    """JSON lines of some 2 kB of text each, `size` bytes in all; returns the number of documents."""
    chance, documents, written = random.Random(7), 0, 0
    lines = []
    for _ in range(4000):
        verses = " ".join(
            f"{chance.choice(SUBJECTS).capitalize()} {chance.choice(VERBS)} {chance.choice(OBJECTS)}, "
            f"{chance.choice(ENDS)}."
            for _ in range(chance.randint(5, 60))
        )
        lines.append((json.dumps({"text": verses + chance.choice(("", " 日本語の文章も少し。"))}) + "\n").encode())
    with path.open("wb") as file:
        while written < size:
            line = lines[chance.randrange(len(lines))]
            file.write(line)
            documents, written = documents + 1, written + len(line)
    return documents


def corpus(folder: Path, sizes_mb: tuple[int, int]) -> dict[str, Any]:
    """`elo data` on a small and a large corpus: seconds, and the peak of resident memory of the process.

    What may grow with the corpus: one record a shard in the manifest (some 300 bytes), one line of progress. Text,
    tokens and tables are of one shard of 2**24 tokens, which the small corpus fills as well. So growth beyond the
    allocator's own spread (GROWTH_MIB) is something that is kept.
    """
    from tokenizer_fixture import make_tokenizer

    tokenizer = make_tokenizer(folder / "tokenizer")
    found: dict[str, Any] = {}
    for name, size_mb in zip(("small", "large"), sizes_mb, strict=True):
        path = folder / f"{name}.jsonl"
        documents = write_corpus(path, size_mb * 10**6)
        began = time.perf_counter()
        told = folder / f"{name}.peak"
        subprocess.run(
            [sys.executable, "-c", WITH_PEAK, told, "data", path, "--tokenizer", tokenizer, "--out", folder / name],
            cwd=ROOT, env=os.environ | {"TOKENIZERS_PARALLELISM": "true"}, stdout=subprocess.DEVNULL, check=True,
        )  # fmt: skip
        manifest = json.loads((folder / name / "manifest.json").read_text())
        assert manifest["totals"]["documents"] == documents, "documents were lost"
        found[name] = {
            "megabytes": size_mb, "documents": documents, "tokens": manifest["totals"]["tokens"],
            "shards": len(manifest["shards"]), "seconds": round(time.perf_counter() - began, 1),
            "peak_mib": float(told.read_text()),
        }  # fmt: skip
        path.unlink()
        shutil.rmtree(folder / name)
    found["growth_mib"] = round(found["large"]["peak_mib"] - found["small"]["peak_mib"], 1)
    assert found["growth_mib"] <= GROWTH_MIB, found
    return found


def make_checkpoint(folder: Path, tensors: int, shards: int) -> None:
    """Ten layers of tiny fp32 tensors; names as long as real ones."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    names = [f"model.layers.{i * 10 // tensors}.block.{i}.weight" for i in range(tensors)]
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        own = names[shard * tensors // shards : (shard + 1) * tensors // shards]
        file = "model.safetensors" if shards == 1 else f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: torch.full((4, 2), float(len(name))) for name in own}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(own, file)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def detached(names: list[str]) -> list[str]:
    """The tensors of the first and the last layer."""
    return [name for name in names if name.split(".")[2] in ("0", "9")]


def use_checkpoint(folder: Path, out: Path) -> dict[str, float]:
    """CPU seconds of each part of the way of a checkpoint: open, plan, read the detached layers, write back."""
    import torch

    from elo_engine.checkpoint import CheckpointReader, open_checkpoint, publish, rewrite_checkpoint
    from elo_engine.checkpoint.plan import coalesce, cut, in_file_order

    seconds: dict[str, float] = {}

    def part(name: str, began: float) -> float:
        now = time.process_time()
        seconds[name] = now - began
        return now

    at = time.process_time()
    index = open_checkpoint(folder)
    at = part("open", at)
    pieces = [piece for run in coalesce(in_file_order(set(index.entries.values()))) for piece in cut(run, 1 << 16)]
    assert sum(chunk.end - chunk.begin for chunk in pieces) == index.total_bytes
    at = part("plan", at)
    names = detached(list(index.entries))
    with CheckpointReader(index) as reader:
        weights = reader.read(names)
    assert all(bool((weights[name] == len(name)).all()) for name in names[:: len(names) // 9])
    at = part("read", at)
    with publish(out) as target:
        rewrite_checkpoint(index, {name: 2 * weight for name, weight in weights.items()}, target)
    part("write", at)
    with CheckpointReader(open_checkpoint(out)) as reader:
        again = reader.read(names)
    assert all(torch.equal(again[name], 2 * weights[name]) for name in names)
    shutil.rmtree(out)
    return seconds


def tensors(folder: Path, counts: tuple[int, int]) -> dict[str, Any]:
    """`use_checkpoint` for a small and a large number of tensors, each in a process of its own for its peak."""
    found: dict[str, Any] = {}
    for count in counts:
        make_checkpoint(folder / str(count), count, 1)
        shown = subprocess.run(
            [sys.executable, __file__, "--checkpoint", folder / str(count)],
            cwd=ROOT, capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        found[str(count)] = json.loads(shown)
    small, large = (found[str(count)]["seconds"] for count in counts)
    found["ratios"] = {name: round(large[name] / max(small[name], 0.001), 1) for name in small}
    return found


def shards(folder: Path, count: int) -> dict[str, Any]:
    """Open and read an index of many shards, with fewer descriptors than shards; how many were open at most.

    The reader keeps 32 shards open, each once for reads past the page cache as well; four more are the folder's and
    those of a shard on its way.
    """
    from elo_engine.checkpoint import CheckpointReader, open_checkpoint

    make_checkpoint(folder / "sharded", 5 * count, count)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (held + DESCRIPTORS + 8, before[1]))  # 8: for the watching itself
    most = 0

    def watch(done: int, total: int) -> None:
        nonlocal most
        most = max(most, len(os.listdir("/proc/self/fd")) - held)

    try:
        index = open_checkpoint(folder / "sharded")
        with CheckpointReader(index) as reader:
            assert len(reader.read(index.entries, progress=watch)) == 5 * count
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    left = len(os.listdir("/proc/self/fd")) - held
    assert most <= DESCRIPTORS and left == 0, f"{most} descriptors at most, {left} left"
    return {"shards": count, "most_descriptors": most, "left_open": left}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus-mb", type=int, default=2000, help="0 leaves the corpora out")
    parser.add_argument("--tensors", type=int, default=100_000)
    parser.add_argument("--shards", type=int, default=200)
    parser.add_argument("--folder", type=Path, help="where the files are while it runs; else the system's own")
    parser.add_argument("--checkpoint", type=Path, help="use this one alone, and print seconds and the peak")
    options = parser.parse_args()
    if options.checkpoint is not None:
        seconds = use_checkpoint(options.checkpoint, options.checkpoint.with_name("written"))
        print(json.dumps({"seconds": {k: round(v, 3) for k, v in seconds.items()}, "peak_mib": own_peak_mib()}))
        return
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found["tensors"] = tensors(Path(folder), (options.tensors // 10, options.tensors))
        found["shards"] = shards(Path(folder), options.shards)
        if options.corpus_mb:
            found["corpus"] = corpus(Path(folder), (min(200, options.corpus_mb // 2), options.corpus_mb))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
