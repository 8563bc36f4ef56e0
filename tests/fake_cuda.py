"""CUDA's stand-in on a machine without a card: tensors that say they are on `cuda:0`, kernels that are noted and not
launched, streams and events that remember what was ordered after what.

torch's fake tensors have a device and no values, so an operation that mixes the host's memory with the device's raises
as it would on a card, and so does a kernel that is handed a tensor of the host. Tensors of the host stay real. Watched
are, beside that:

* waits: where the host reads a number of the device, and copies that would wait for it, since the host's memory is not
  pinned; reading gives 1.
* races: of two streams that touch the same bytes, one of them to write, one must have waited for the other; before
  memory is given back, the stream it was made on must have waited for all others that used it, since it gets it again.

Time passes by counting: each stream numbers what is queued on it, and knows how far each other one had come when it
last waited for it (vector clocks, Mattern 1989). What this cannot see: what a kernel does, the order within one stream,
and torch's own choice of a library.

`fake_cuda.cpp`, which see, must be loaded before torch.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import math
import textwrap
import traceback
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
HOST = "host"
HERE = torch.device("cuda", 0)


class Race(AssertionError):
    """Two streams touch the same memory in no order."""


class Stream:
    """As torch.cuda.Stream."""

    def __init__(self, device: Any = None, name: str = "") -> None:
        self.name = name or f"stream {len(_world.streams)}"
        self.seen: dict[str, int] = {}  # how far each stream had come when this one last waited for it
        _world.streams[self.name] = self

    def wait_event(self, event: Event) -> None:
        assert event.seen is not None, "waits for an event that was never recorded: on a card that is no wait at all"
        _merge(self.seen, event.seen)

    def wait_stream(self, other: Stream) -> None:
        _merge(self.seen, other.seen)

    def synchronize(self) -> None:
        _world.waits.append("stream.synchronize")
        _merge(_world.streams[HOST].seen, self.seen)

    def tick(self) -> int:
        """The number of what is queued now, after all that the host has seen."""
        _merge(self.seen, _world.streams[HOST].seen)
        self.seen[self.name] = self.seen.get(self.name, 0) + 1
        return self.seen[self.name]


class Event:
    """As torch.cuda.Event."""

    def __init__(self, **options: Any) -> None:
        self.seen: dict[str, int] | None = None

    def record(self, stream: Stream | None = None) -> None:
        self.seen = dict((stream or _world.current).seen)

    def synchronize(self) -> None:
        assert self.seen is not None, "waits for an event that was never recorded"
        _merge(_world.streams[HOST].seen, self.seen)

    def query(self) -> bool:
        return False


def _merge(into: dict[str, int], other: dict[str, int]) -> None:
    for name, count in other.items():
        into[name] = max(into.get(name, 0), count)


class _Memory:
    """One storage of the device, or one of the host that copies of the device touch."""

    def __init__(self, tensor: Tensor, stream: Stream | None) -> None:
        self.ref = StorageWeakRef(tensor.untyped_storage())
        self.made_on = stream  # None: of the host
        self.shape, self.dtype = tuple(tensor.shape), tensor.dtype
        self.uses: list[tuple[int, int, str, int, bool, str]] = []  # bytes [begin, end), stream, its number, writes, by
        self.recorded: set[str] = set()  # record_stream

    def use(self, tensor: Tensor, stream: Stream, writes: bool, by: str) -> None:
        begin = tensor.storage_offset() * tensor.element_size()
        span = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        end = begin + (span * tensor.element_size() if tensor.numel() else 0)
        number = stream.seen.get(stream.name, 0)
        kept = []
        for use in self.uses:
            first, last, name, when, wrote, who = use
            ordered = stream.seen.get(name, 0) >= when
            overlap = first < end and begin < last
            if overlap and (writes or wrote) and not ordered:
                raise Race(
                    f"{by} on {stream.name} {'writes' if writes else 'reads'} what {who} on {name} "
                    f"{'writes' if wrote else 'reads'}, {self.shape} of {self.dtype}, and neither waits for the other"
                )
            if not (writes and ordered and begin <= first and last <= end):
                kept.append(use)
        self.uses = [*kept, (begin, end, stream.name, number, writes, by)]

    def give_back(self) -> None:
        """What other streams do with it must be known to the stream that gets it again."""
        if self.made_on is None:
            return
        for _, _, name, when, _, who in self.uses:
            if name not in self.recorded and self.made_on.seen.get(name, 0) < when:
                raise Race(
                    f"memory of {self.shape}, {self.dtype}, is given back to {self.made_on.name}, which does not wait "
                    f"for {who} on {name}"
                )


class _World:
    def __init__(self) -> None:
        self.streams: dict[str, Stream] = {}
        self.memories: dict[int, _Memory] = {}
        self.pinned: list[tuple[int, int]] = []
        self.kept: list[Tensor] = []  # pinned memory stays, so that its addresses stay pinned
        self.waits: list[str] = []
        self.launched: list[str] = []
        self.current: Stream

    def begin(self) -> None:
        self.__init__()  # type: ignore[misc]
        Stream(name=HOST)
        self.current = Stream(name="compute")

    def pin(self, tensor: Tensor) -> Tensor:
        self.kept.append(tensor)
        begin = tensor.untyped_storage().data_ptr()
        self.pinned.append((begin, begin + tensor.untyped_storage().nbytes()))
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        pointer = tensor.data_ptr()
        return tensor.numel() == 0 or any(begin <= pointer < end for begin, end in self.pinned)

    def sweep(self, stream: Stream) -> None:
        """A tensor is made on this stream, of what was made on it and given back before."""
        gone = [key for key, one in self.memories.items() if one.made_on in (stream, None) and one.ref.expired()]
        for key in gone:
            self.memories.pop(key).give_back()

    def memory(self, tensor: Tensor) -> _Memory:
        key = tensor.untyped_storage()._cdata
        known = self.memories.get(key)
        if known is None or known.ref.expired():
            self.sweep(self.current)
            known = self.memories[key] = _Memory(tensor, self.current if isinstance(tensor, FakeTensor) else None)
        return known


_world = _World()


def on_device(value: Any) -> bool:
    return isinstance(value, FakeTensor)


def place() -> str:
    """The innermost line of the engine, for a message."""
    frames = [frame for frame in traceback.extract_stack() if "/elo_engine/" in frame.filename]
    return f"{frames[-1].filename.split('/elo_engine/')[-1]}:{frames[-1].lineno}" if frames else "?"


class FakeCuda(TorchDispatchMode):
    """Inside, operations with a tensor of the device are fake, all others real."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        device = kwargs.get("device")
        if func is aten._pin_memory.default:
            assert not on_device(args[0]), "a tensor of the device is pinned"
            return _world.pin(args[0].clone())
        if not any(map(on_device, tensors)) and (device is None or torch.device(device).type != "cuda"):
            pin = kwargs.pop("pin_memory", None)
            out = func(*args, **kwargs)
            return _world.pin(out) if pin else out
        return self._device(func, args, kwargs)

    def _device(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if func is aten._local_scalar_dense.default:
            _world.waits.append(f"a number is read: {place()}")
            _merge(_world.streams[HOST].seen, _world.current.seen)
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].is_floating_point() else 1)
        _world.current.tick()
        if func is aten.copy_.default and not on_device(args[0]):
            return self._to_host(args[0], args[1])
        if func is aten._to_copy.default and torch.device(kwargs.get("device") or HERE).type == "cpu":
            made = torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
            if kwargs.get("non_blocking"):
                _world.pin(made)  # what torch takes for it
            return self._to_host(made, args[0])
        if func in (aten.copy_.default, aten._to_copy.default):
            source = args[1] if func is aten.copy_.default else args[0]
            if not on_device(source) and source.dim() and not _world.is_pinned(source):
                _world.waits.append(f"a copy of pageable memory: {place()}")
        with self.fake:
            out = func(*args, **kwargs)
        if func.namespace != "prim" and not _is_view(func):  # a question about the tensor, or other bounds of it
            self._note(func, args, kwargs, out)
        return out

    def _to_host(self, host: Tensor, device: Tensor) -> Tensor:
        assert host.shape == torch.broadcast_shapes(host.shape, device.shape)
        _world.memory(device).use(device, _world.current, False, "copy")
        if _world.is_pinned(host):
            _world.memory(host).use(host, _world.current, True, "copy")
        else:
            _world.waits.append(f"a copy to pageable memory: {place()}")
            _merge(_world.streams[HOST].seen, _world.current.seen)
        with torch.no_grad():
            return host.fill_(1)

    def _note(self, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        by, schema = func.__name__, func._schema
        named = [(schema.arguments[i], value) for i, value in enumerate(args)]
        named += [(one, kwargs[one.name]) for one in schema.arguments if one.name in kwargs]
        for one, value in named:
            writes = one.alias_info is not None and one.alias_info.is_write
            for tensor in tree_leaves(value):
                if isinstance(tensor, Tensor) and (on_device(tensor) or _world.is_pinned(tensor)):
                    _world.memory(tensor).use(tensor, _world.current, writes, by)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                _world.memory(tensor).use(tensor, _world.current, True, by)


def _is_view(func: Any) -> bool:
    return any(one.alias_info is not None and not one.alias_info.is_write for one in func._schema.returns)


# -- Triton


def written(function: Any, cache: dict[Any, set[str]] = {}) -> set[str]:  # noqa: B006
    """The pointers that a kernel stores to: those that the first argument of a `tl.store` was made of."""
    if function in cache:
        return cache[function]
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    made: dict[str, set[str]] = {}

    def pointers(node: ast.AST) -> set[str]:
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.load":
            return set()
        if isinstance(node, ast.Name):
            return made.get(node.id, {node.id} if node.id.endswith("_ptr") else set())
        return set().union(*(pointers(child) for child in ast.iter_child_nodes(node)), set())

    stored: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                for name in (one.id for one in ast.walk(target) if isinstance(one, ast.Name)):
                    made[name] = made.get(name, set()) | pointers(node.value)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.store":
            stored |= pointers(node.args[0])
    cache[function] = stored
    return stored


def _run(self: Any, *args: Any, grid: Any, warmup: Any = None, **kwargs: Any) -> None:
    """In place of JITFunction.run: what the launch touches."""
    name = self.fn.__name__
    grid = grid(dict(zip(self.arg_names, args, strict=False)) | kwargs) if callable(grid) else grid
    assert all(isinstance(one, int) and one > 0 for one in grid), f"{name}: grid {grid}"
    assert all(one < 65536 for one in grid[1:]), f"{name}: grid {grid}, and y and z end at 65535"
    stores = written(self.fn)
    _world.launched.append(name)
    _world.current.tick()
    for argument, value in dict(zip(self.arg_names, args, strict=False), **kwargs).items():
        if isinstance(value, Tensor):
            assert on_device(value), f"{name}: {argument} is on {value.device}, and a kernel cannot reach it"
            _world.memory(value).use(value, _world.current, argument in stores, name)


def _by_address(module: Any, name: str, reads: int) -> None:
    """Launchers that hand their kernels a table of addresses: the lists of tensors, of which the first `reads` are only
    read.
    """
    launcher = getattr(module, name)

    def noted(*args: Any, **kwargs: Any) -> Any:
        out = launcher(*args, **kwargs)
        for number, value in enumerate(args):
            for tensor in tree_leaves(value):
                if isinstance(tensor, Tensor):
                    _world.memory(tensor).use(tensor, _world.current, number >= reads, name)
        return out

    setattr(module, name, noted)


class _Runtime:
    """As torch.cuda.cudart()."""

    def cudaHostRegister(self, pointer: int, size: int, flags: int) -> int:
        _world.pinned.append((pointer, pointer + size))
        return 0

    def cudaHostUnregister(self, pointer: int) -> int:
        _world.pinned = [pair for pair in _world.pinned if pair[0] != pointer]
        return 0


@contextlib.contextmanager
def _stream(stream: Stream) -> Iterator[None]:
    before, _world.current = _world.current, stream
    try:
        yield
    finally:
        _world.current = before


def _synchronize(device: Any = None) -> None:
    _world.waits.append(f"torch.cuda.synchronize: {place()}")
    for stream in _world.streams.values():
        _merge(_world.streams[HOST].seen, stream.seen)


def install() -> None:
    """For this process, for good."""
    from triton.runtime.jit import JITFunction

    from elo_engine.kernels import adamw, adamw_8bit, adamw_norms

    JITFunction.run = _run
    for module, name, reads in (
        (adamw, "adamw_fp32", 1), (adamw, "update_fp32", 1), (adamw_8bit, "adamw_8bit", 1),
        (adamw_8bit, "update_8bit", 1), (adamw_norms, "leaf_norms", 1),
    ):  # fmt: skip
        _by_address(module, name, reads)
    tensor = torch.tensor

    def made(data: Any, *, device: Any = None, pin_memory: bool = False, **options: Any) -> Tensor:
        """torch's copies below what a mode sees."""
        found = tensor(data, **options)
        if pin_memory:
            return _world.pin(found.clone())
        return found if device is None else found.to(device)

    torch.tensor = made
    FakeTensor.data_ptr = lambda self: 4096  # type: ignore[method-assign]
    FakeTensor.record_stream = lambda self, stream: _world.memory(self).recorded.add(stream.name)  # type: ignore
    replaced: dict[str, Any] = {
        "Stream": Stream, "Event": Event, "stream": _stream, "synchronize": _synchronize,
        "current_stream": lambda device=None: _world.current, "current_device": lambda: 0,
        "device_of": lambda tensor: contextlib.nullcontext(), "cudart": _Runtime, "device_count": lambda: 1,
        "get_device_capability": lambda device=None: (9, 0), "get_device_name": lambda device=None: "fake",
        "memory_allocated": lambda device=None: 0, "memory_reserved": lambda device=None: 0,
        "mem_get_info": lambda device=None: (1 << 34, 1 << 35), "empty_cache": lambda: None, "_lazy_init": lambda: None,
    }  # fmt: skip
    for name, value in replaced.items():
        setattr(torch.cuda, name, value)


@contextlib.contextmanager
def fake_cuda() -> Iterator[_World]:
    """A fresh device inside the block."""
    _world.begin()
    with FakeCuda():
        yield _world


__all__ = ["HERE", "Race", "fake_cuda", "install", "math", "_disable_current_modes"]
