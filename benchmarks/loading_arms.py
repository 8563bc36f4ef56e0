"""The arms of the loading comparison. Started as `python loading_arms.py ARM JOB.json`, once for each measurement.

The process imports what its arm needs, says so in one JSON line, waits for a line on stdin (the page cache is
prepared meanwhile), loads, and prints one JSON line. The clock runs from "path known" to "every wanted tensor is
materialised on the device": headers and index are read inside it, and a byte of every page of every tensor is touched,
in all arms alike, so that a lazy mapping pays for its pages. A checksum of the wanted tensors is taken after it.

On a GPU the CUDA context is made before the clock starts, in all arms alike.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import mmap
import os
import queue
import sys
import threading
import time
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PAGE = 4096
Load = Callable[[], dict[str, Tensor]]


@dataclass(frozen=True)
class Job:
    """What to load. `ranges`: (shard path, begin, end) of the wanted bytes, neighbours joined; for the ceilings."""

    folder: Path
    names: tuple[str, ...]
    device: str
    ranges: tuple[tuple[str, int, int], ...]
    threads: int

    @property
    def wanted_bytes(self) -> int:
        return sum(end - begin for _, begin, end in self.ranges)

    def shards(self) -> dict[Path, list[str]]:
        """The shards that hold wanted tensors, from the index file: what a user of a peer has to find out first."""
        index = self.folder / "model.safetensors.index.json"
        if not index.exists():
            return {self.folder / "model.safetensors": list(self.names)}
        weight_map = json.loads(index.read_text())["weight_map"]
        found: dict[Path, list[str]] = {}
        for name in self.names:
            found.setdefault(self.folder / weight_map[name], []).append(name)
        return dict(sorted(found.items()))


def engine(method: str | None = None, path: str | None = None) -> Callable[[Job], Load]:
    """This engine. method: of CheckpointReader, None for its default; path: of mover.using, None for its default."""

    def build(job: Job) -> Load:
        from elo_engine.checkpoint import CheckpointReader, open_checkpoint

        chosen = importlib.import_module("elo_engine.checkpoint.mover").using if path else nullcontext

        def load() -> dict[str, Tensor]:
            with chosen(path), CheckpointReader(open_checkpoint(job.folder), *[method] if method else []) as reader:
                return reader.read(job.names, device=job.device)

        return load

    return build


def safetensors(backend: str) -> Callable[[Job], Load]:
    """safe_open for each shard. On a CPU the mapping backend gives views of the file, hence the clone."""

    def build(job: Job) -> Load:
        from safetensors import safe_open

        def load() -> dict[str, Tensor]:
            out = {}
            for path, names in job.shards().items():
                with safe_open(path, "pt", device=job.device, backend=backend) as file:
                    for name in names:
                        tensor = file.get_tensor(name)
                        out[name] = tensor.clone() if backend == "mmap" and job.device == "cpu" else tensor
            return out

        return load

    return build


def safetensors_prefetch(job: Job) -> Load:
    """safetensors 0.9: background load to a GPU by a plan of names."""
    from safetensors import safe_open

    if job.device == "cpu":
        raise RuntimeError("prefetch loads to CUDA devices only")

    def load() -> dict[str, Tensor]:
        loaders = []
        for path, names in job.shards().items():
            file: Any = safe_open(path, "pt", device=job.device)
            loaders.append((file, file.prefetch(dict.fromkeys(names))))
        return {name: tensor for _, loader in loaders for name, tensor in loader}

    return load


def fastsafetensors(direct: bool) -> Callable[[Job], Load]:
    """set_tensor_filter, which narrows the reads of this copier alone. Its default is O_DIRECT."""

    def build(job: Job) -> Load:
        os.environ["FASTSAFETENSORS_ODIRECT"] = str(int(direct))
        from fastsafetensors import SafeTensorsFileLoader

        wanted = frozenset(job.names)

        def load() -> dict[str, Tensor]:
            loader = SafeTensorsFileLoader(None, job.device, nogds=True)
            loader.set_tensor_filter(wanted.__contains__)
            loader.add_filenames({0: [str(path) for path in job.shards()]})
            buffers = loader.copy_files_to_device()
            out = {name: buffers.get_tensor(name) for name in job.names}
            buffers.close()  # the tensors own their memory from here on
            loader.close()
            return out

        return load

    return build


def runai_streamer(job: Job) -> Load:
    """runai-model-streamer by names: it reads the headers and makes the ranges itself."""
    from runai_model_streamer import SafetensorsStreamer

    def load() -> dict[str, Tensor]:
        with SafetensorsStreamer() as streamer:
            paths = [str(path) for path in job.shards()]
            streamer.stream_files(paths, device=job.device, tensor_names=job.names)
            return dict(streamer.get_tensors())

    return load


def runai_chunks(job: Job) -> Load:
    """runai-model-streamer by ranges: FileChunks with one range a tensor, from headers read here."""
    from runai_model_streamer import FileChunks, FileStreamer

    from elo_engine.checkpoint.header import TORCH_DTYPES

    def load() -> dict[str, Tensor]:
        requests, fields = [], []
        for number, (path, names) in enumerate(job.shards().items()):
            with open(path, "rb") as file:
                n = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(n))
            names.sort(key=lambda name: header[name]["data_offsets"][0])
            spans = [header[name]["data_offsets"] for name in names]
            offsets, sizes = [8 + n + begin for begin, _ in spans], [end - begin for begin, end in spans]
            requests.append(FileChunks(number, str(path), offsets, sizes))
            fields.append([(name, TORCH_DTYPES[header[name]["dtype"]], header[name]["shape"]) for name in names])
        out = {}
        with FileStreamer() as streamer:
            streamer.stream_files(requests, device=job.device)
            for number, chunk, piece in streamer.get_chunks():
                name, dtype, shape = fields[number][chunk]
                out[name] = piece.view(-1).view(dtype).view(shape)
        return out

    return load


def transformers(own: bool) -> Callable[[Job], Load]:
    """The whole model, as a user loads it; all its parameters are touched.

    On a CPU its parameters may stay mappings of the shards, which the first step of a training then copies page by
    page. own: copy those inside the clock, so that every tensor has memory of its own as in the other arms.
    """

    def build(job: Job) -> Load:
        from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401  (the class is imported lazily)

        has_accelerate = importlib.util.find_spec("accelerate") is not None

        def load() -> dict[str, Tensor]:
            # device_map needs accelerate and loads to the GPU tensor by tensor; without it the model goes there whole.
            there = {"device_map": job.device} if job.device != "cpu" and has_accelerate else {}
            model = AutoModelForCausalLM.from_pretrained(job.folder, dtype=torch.bfloat16, **there)
            if not there:
                model.to(job.device)
            if own:
                spans = _shard_mappings()
                for parameter in model.parameters():
                    if _is_mapped(parameter, spans):
                        parameter.data = parameter.data.clone()
            return dict(model.state_dict())

        return load

    return build


def page_cache_ceiling(threads: int) -> Callable[[Job], Load]:
    """pread of the wanted ranges into one hot buffer of 1 MiB a thread: what copying out of the page cache costs."""
    return lambda job: lambda: _read_ranges(job, threads or job.threads, 1 << 20, 0)


def disk_ceiling(job: Job) -> Load:
    """O_DIRECT reads of the wanted ranges into hot buffers, 16 at a time of 2 MiB each."""
    return lambda: _read_ranges(job, 16, 2 << 20, os.O_DIRECT)


def _read_ranges(job: Job, threads: int, block: int, flags: int) -> dict[str, Tensor]:
    blocks: queue.SimpleQueue[tuple[int, int, int]] = queue.SimpleQueue()
    files = {path: os.open(path, os.O_RDONLY | flags) for path, _, _ in job.ranges}
    for path, begin, end in job.ranges:
        if flags:
            begin, end = begin // PAGE * PAGE, -(-end // PAGE) * PAGE
        for at in range(begin, end, block):
            blocks.put((files[path], at, min(block, end - at)))
    errors = []

    def work() -> None:
        memory = mmap.mmap(-1, block, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory has no huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
        buffer = memoryview(memory)
        try:
            while True:
                fd, at, count = blocks.get_nowait()
                os.preadv(fd, [buffer[:count]], at)
        except queue.Empty:
            pass
        except OSError as error:
            errors.append(error)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for fd in files.values():
        os.close(fd)
    if errors:
        raise errors[0]
    return {}


def link_ceiling(job: Job) -> Load:
    """Copies from pinned memory to the GPU, as many bytes as are wanted; pinning is outside the clock."""
    if job.device == "cpu":
        raise RuntimeError("there is no link to measure on a CPU")
    host = torch.ones(256 << 20, dtype=torch.uint8).pin_memory()
    target = torch.empty_like(host, device=job.device)
    target.copy_(host)

    def load() -> dict[str, Tensor]:
        for at in range(0, job.wanted_bytes, len(host)):
            count = min(len(host), job.wanted_bytes - at)
            target[:count].copy_(host[:count], non_blocking=True)
        return {}

    return load


BUILD: dict[str, Callable[[Job], Load]] = {
    "engine": engine(),
    "engine_pread": engine("pread"),
    "engine_direct": engine("direct"),
    "engine_mmap": engine("mmap"),
    "engine_python": engine(path="python"),
    "safetensors_mmap": safetensors("mmap"),
    "safetensors_pread": safetensors("pread"),
    "safetensors_next_mmap": safetensors("mmap"),
    "safetensors_next_pread": safetensors("pread"),
    "safetensors_next_prefetch": safetensors_prefetch,
    "fastsafetensors": fastsafetensors(direct=True),
    "fastsafetensors_buffered": fastsafetensors(direct=False),
    "runai_streamer": runai_streamer,
    "runai_chunks": runai_chunks,
    "transformers": transformers(own=False),
    "transformers_own": transformers(own=True),
    "ceiling_page_cache_1": page_cache_ceiling(1),
    "ceiling_page_cache_n": page_cache_ceiling(0),
    "ceiling_disk": disk_ceiling,
    "ceiling_link": link_ceiling,
}


def touch(tensors: dict[str, Tensor]) -> int:
    """Read one byte of every page of every tensor."""
    total = 0
    for tensor in tensors.values():
        if tensor.device.type == "cpu" and tensor.numel():
            flat = tensor.reshape(-1).view(torch.uint8)
            total += int(flat[::PAGE].sum()) + int(flat[-1])
    return total


def checksum(tensors: dict[str, Tensor], names: tuple[str, ...]) -> str:
    """Over names, dtypes, shapes and bytes; empty for a ceiling, which keeps nothing."""
    if not tensors:
        return ""
    digest = hashlib.sha256()
    for name in sorted(names):
        tensor = tensors[name].cpu()
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {crc:08x}\n".encode())
    return digest.hexdigest()


def mapped_bytes(tensors: dict[str, Tensor]) -> int:
    """Bytes of tensors whose memory is still a mapping of a shard and not their own."""
    spans = _shard_mappings()
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors.values() if _is_mapped(tensor, spans))


def _shard_mappings() -> list[tuple[int, int]]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    spans = [line.split()[0].split("-") for line in lines if line.endswith(".safetensors")]
    return [(int(begin, 16), int(end, 16)) for begin, end in spans]


def _is_mapped(tensor: Tensor, spans: list[tuple[int, int]]) -> bool:
    return tensor.device.type == "cpu" and any(begin <= tensor.data_ptr() < end for begin, end in spans)


def _read_status(path: str, *keys: str) -> list[int]:
    lines = dict(line.split(":", 1) for line in Path(path).read_text().splitlines())
    return [int(lines[key].split()[0]) for key in keys]


def measure(load: Load, job: Job) -> dict[str, Any]:
    """Load once; seconds, bytes read (calls, disk), memory, checksum."""
    cuda = job.device != "cpu"
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    (rss_kib,) = _read_status("/proc/self/status", "VmRSS")
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = _read_status("/proc/self/io", "rchar", "read_bytes")
    began = time.perf_counter()
    tensors = load()
    touch(tensors)
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    after = _read_status("/proc/self/io", "rchar", "read_bytes")
    (peak_kib,) = _read_status("/proc/self/status", "VmHWM")
    return {
        "seconds": seconds, "call_bytes": after[0] - before[0], "disk_bytes": after[1] - before[1],
        "peak_rss_bytes": max(0, peak_kib - rss_kib) * 1024,
        "peak_gpu_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "mapped_bytes": mapped_bytes(tensors), "checksum": checksum(tensors, job.names),
    }  # fmt: skip


def main() -> None:
    """Measure one arm once."""
    arm, text = sys.argv[1], Path(sys.argv[2]).read_text()
    # What a library prints goes to stderr; stdout is for the two lines.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        fields = json.loads(text)
        ranges = tuple((path, begin, end) for path, begin, end in fields["ranges"])
        job = Job(Path(fields["folder"]), tuple(fields["names"]), fields["device"], ranges, fields["threads"])
        load = BUILD[arm](job)
        if job.device != "cpu":
            torch.ones(1, device=job.device)
            torch.cuda.synchronize()
        print(json.dumps({"ready": True}), file=out, flush=True)
        if not sys.stdin.readline():
            return
        result = measure(load, job)
    except Exception as error:  # the reason becomes the arm's row
        missing = "not available: " if isinstance(error, ImportError) else ""
        result = {"failed": f"{missing}{type(error).__name__}: {error}".splitlines()[0][:300]}
    print(json.dumps(result), file=out, flush=True)


if __name__ == "__main__":
    main()
