"""Memory of the host for what is not on the device: anonymous pages, or a file's where memory is short.

On a GPU's host anonymous memory is registered with the driver, so copies run beside the computation. The file loses its
name as soon as it has one (nothing is left behind, however the process ends), and its blocks are reserved before it is
mapped: a disk that is full must be an error and not a SIGBUS.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
import weakref
from pathlib import Path

import torch
from torch import Tensor

from elo_engine.errors import FailedError, RefusedError
from elo_engine.measure.meter import human_bytes

PAGE = mmap.PAGESIZE


class Slab:
    """`nbytes` of zeros as a flat uint8 tensor, `memory`.

    Args:
        folder: None for anonymous memory; else a folder on the disk that holds it.
        pin: register anonymous memory with the GPU's driver.

    Raises:
        RefusedError: no such memory, or no such room on the disk.
        FailedError: the driver does not register it.
    """

    def __init__(self, nbytes: int, *, folder: Path | None = None, pin: bool = False) -> None:
        size = max(PAGE, -(-nbytes // PAGE) * PAGE)
        self._map = _anonymous(size) if folder is None else _unnamed_file(size, folder)
        self.on_disk = folder is not None
        self.memory: Tensor = torch.frombuffer(self._map, dtype=torch.uint8)[:nbytes]
        if pin and folder is None:
            _register(self)

    def soon(self, begin: int, end: int) -> None:
        """These bytes will be read: the kernel may begin to fetch them from the disk."""
        if self.on_disk and end > begin:
            first = begin // PAGE * PAGE
            self._map.madvise(mmap.MADV_WILLNEED, first, end - first)


def _anonymous(size: int) -> mmap.mmap:
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise RefusedError(
            f"{human_bytes(size)} of host memory cannot be had for the streamed model ({error}); set "
            "align.stream.store=disk, or free memory"
        ) from error
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _unnamed_file(size: int, folder: Path) -> mmap.mmap:
    fd = -1
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fd, path = tempfile.mkstemp(prefix=".streamed-model-", dir=folder)
        os.unlink(path)
        os.posix_fallocate(fd, 0, size)
        return mmap.mmap(fd, size, flags=mmap.MAP_SHARED)
    except OSError as error:
        raise RefusedError(
            f"{human_bytes(size)} cannot be reserved in {folder} for the streamed model ({error}); free that much "
            "there, move the output to another disk, or set align.stream.store=memory"
        ) from error
    finally:
        if fd >= 0:
            os.close(fd)


def _register(slab: Slab) -> None:
    """In one call: a copy may not cross from one registered piece to another. Undone when the slab goes, so whoever has
    a view of its memory keeps the slab.
    """
    runtime, pointer = torch.cuda.cudart(), slab.memory.data_ptr()
    error = int(runtime.cudaHostRegister(pointer, slab.memory.numel(), 1))  # portable: for every device
    if error:
        raise FailedError(
            f"{human_bytes(slab.memory.numel())} of host memory could not be registered with the GPU (CUDA error "
            f"{error}); raise the limit on locked memory (ulimit -l), or free host memory"
        )
    weakref.finalize(slab, runtime.cudaHostUnregister, pointer).atexit = False
