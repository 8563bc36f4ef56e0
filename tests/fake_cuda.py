"""CUDA's stand-in on a machine without a card: tensors that say they are on `cuda:0`, kernels that are noted and not
launched, streams and events that remember what was ordered after what.

torch's fake tensors have a device and no values, so an operation that mixes the host's memory with the device's raises
as it would on a card, and so does a kernel that is handed a tensor of the host. Tensors of the host stay real. Watched
are, beside that:

* waits: where the host reads a number of the device, and copies that would wait for it, since the host's memory is not
  pinned; reading gives 1000, 0 or true, a copy gives ones.
* races: of two streams that touch the same bytes, one of them to write, one must have waited for the other; before
  memory is given back, the stream it was made on must have waited for all others that used it, since it gets it again.

Both are `fake_streams.py`'s. What this cannot see: what a kernel does, the order within one stream, and torch's own
choice of a library.

`fake_cuda.cpp`, which see, must be loaded before torch.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import textwrap
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from types import SimpleNamespace
from typing import Any

import torch
from fake_streams import HOST, Event, Stream, World, merge, world
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
HERE = torch.device("cuda")  # without a number, as a run has it


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
        if func is torch.ops.prim.device.default and on_device(args[0]):
            return args[0].fake_device
        kwargs = dict(kwargs or {})
        tensors, device = _tensors((args, *kwargs.values())), kwargs.get("device")
        if func is aten._pin_memory.default:
            assert not on_device(args[0]), "a tensor of the device is pinned"
            return world.pin(args[0].clone())
        if not any(map(on_device, tensors)) and (device is None or torch.device(device).type != "cuda"):
            pin = kwargs.pop("pin_memory", None)
            out = func(*args, **kwargs)
            return world.pin(out) if pin else out
        return self._device(func, args, kwargs)

    def _device(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if func is aten._local_scalar_dense.default:
            world.waits.append(f"a number is read: {place()}")
            merge(world.streams[HOST].seen, world.current.seen)
            return True if args[0].dtype == torch.bool else 1000.0 if args[0].is_floating_point() else 0
        world.current.tick()
        if func is aten.copy_.default and not on_device(args[0]):
            return self._to_host(args[0], args[1])
        if func is aten._to_copy.default and torch.device(kwargs.get("device") or HERE).type == "cpu":
            made = torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
            if kwargs.get("non_blocking"):
                world.pin(made)  # what torch takes for it
            return self._to_host(made, args[0])
        if func in (aten.copy_.default, aten._to_copy.default):
            source = args[1] if func is aten.copy_.default else args[0]
            if not on_device(source) and source.dim() and not world.is_pinned(source):
                world.waits.append(f"a copy of pageable memory: {place()}")
        with self.fake:
            if func is aten._to_copy.default and not on_device(args[0]):  # of small ones the mode would keep the values
                out = torch.empty(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device=kwargs["device"])
            else:
                out = func(*args, **kwargs)
        if func.namespace != "prim" and not _is_view(func):  # a question about the tensor, or other bounds of it
            self._note(func, args, kwargs, out)
        return out

    def _to_host(self, host: Tensor, device: Tensor) -> Tensor:
        assert host.shape == torch.broadcast_shapes(host.shape, device.shape)
        world.memory(device).use(device, world.current, False, "copy")
        if world.is_pinned(host):
            world.memory(host).use(host, world.current, True, "copy")
        else:
            world.waits.append(f"a copy to pageable memory: {place()}")
            merge(world.streams[HOST].seen, world.current.seen)
        with torch.no_grad():
            return host.fill_(1)

    def _note(self, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        by, schema = func.__name__, func._schema
        named = [(schema.arguments[i], value) for i, value in enumerate(args)]
        named += [(one, kwargs[one.name]) for one in schema.arguments if one.name in kwargs]
        for one, value in named:
            writes = one.alias_info is not None and one.alias_info.is_write
            for tensor in _tensors((value,)):
                if on_device(tensor) or world.is_pinned(tensor):
                    world.memory(tensor).use(tensor, world.current, writes, by)
        for tensor in _tensors((out,)):
            world.memory(tensor).use(tensor, world.current, True, by)


def _tensors(values: Any) -> list[Tensor]:
    """Those among the values, and in lists of them."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


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
    world.launched.append(name)
    world.current.tick()
    for argument, value in dict(zip(self.arg_names, args, strict=False), **kwargs).items():
        if isinstance(value, Tensor):
            assert on_device(value), f"{name}: {argument} is on {value.device}, and a kernel cannot reach it"
            world.memory(value).use(value, world.current, argument in stores, name)


def _by_address(module: Any, name: str, reads: int) -> None:
    """Launchers that hand their kernels a table of addresses: the lists of tensors, of which the first `reads` are only
    read.
    """
    launcher = getattr(module, name)

    def noted(*args: Any, **kwargs: Any) -> Any:
        out = launcher(*args, **kwargs)
        for number, value in enumerate(args):
            for tensor in _tensors((value,)):
                world.memory(tensor).use(tensor, world.current, number >= reads, name)
        return out

    setattr(module, name, noted)


class _Runtime:
    """As torch.cuda.cudart()."""

    def cudaHostRegister(self, pointer: int, size: int, flags: int) -> int:
        world.pinned.append((pointer, pointer + size))
        return 0

    def cudaHostUnregister(self, pointer: int) -> int:
        world.pinned = [pair for pair in world.pinned if pair[0] != pointer]
        return 0


@contextlib.contextmanager
def _stream(stream: Stream) -> Iterator[None]:
    before, world.current = world.current, stream
    try:
        yield
    finally:
        world.current = before


def _synchronize(device: Any = None) -> None:
    world.waits.append(f"torch.cuda.synchronize: {place()}")
    for stream in world.streams.values():
        merge(world.streams[HOST].seen, stream.seen)


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
            return world.pin(found.clone())
        return found if device is None else found.to(device)

    torch.tensor = made
    product = torch._scaled_mm

    def scaled_mm(*operands: Any, out: Tensor | None = None, **named: Any) -> Tensor:
        """torch's has no form without values and with an `out`."""
        found: Tensor = product(*operands, **named)
        return found if out is None else out.copy_(found)

    torch._scaled_mm = scaled_mm
    FakeTensor.data_ptr = lambda self: 4096  # type: ignore[method-assign]
    warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # to tell storages apart
    FakeTensor.record_stream = lambda self, stream: world.memory(self).recorded.add(stream.name)  # type: ignore
    card = SimpleNamespace(name="NVIDIA H200", total_memory=140 << 30, major=9, minor=0, uuid="00")
    replaced: dict[str, Any] = {
        "Stream": Stream, "Event": Event, "stream": _stream, "synchronize": _synchronize,
        "current_stream": lambda device=None: world.current, "current_device": lambda: 0,
        "device_of": lambda tensor: contextlib.nullcontext(), "cudart": _Runtime, "device_count": lambda: 1,
        "get_device_capability": lambda device=None: (card.major, card.minor), "is_available": lambda: True,
        "get_device_name": lambda device=None: card.name, "get_device_properties": lambda device=None: card,
        "is_bf16_supported": lambda including_emulation=True: True,
        "mem_get_info": lambda device=None: (1 << 36, 1 << 37),
        "_lazy_init": lambda: None, "empty_cache": lambda: None, "reset_peak_memory_stats": lambda device=None: None,
        **{name: lambda device=None: 1 << 20 for name in ("max_memory_allocated", "max_memory_reserved")},
        **{name: lambda device=None: 0 for name in ("memory_allocated", "memory_reserved")},
    }  # fmt: skip
    for name, value in replaced.items():
        setattr(torch.cuda, name, value)
    torch._C._cuda_record_memory_history = lambda *of: None  # type: ignore[attr-defined]
    torch.cuda.memory._dump_snapshot = lambda path: None


class AtOnce(Executor):
    """In place of a thread that reads ahead, which would be outside of the stand-in."""

    def __init__(self, *of: Any) -> None: ...

    def submit(self, work: Callable[..., Any], /, *args: Any, **options: Any) -> Future[Any]:
        made: Future[Any] = Future()
        made.set_result(work(*args, **options))
        return made


@contextlib.contextmanager
def fake_cuda() -> Iterator[World]:
    """A fresh device inside the block."""
    world.begin()
    with FakeCuda():
        yield world

