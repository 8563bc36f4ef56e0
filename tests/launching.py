"""Calls the launchers of kernels/ the way a test machine can: under Triton's interpreter, and on a GPU where
there is one.

Triton chooses between its interpreter and its compiler once, when it is imported, for its own library too. So
that both can be tested in one pytest session, the interpreter runs in a process of its own: this file,
started as a script. Tensors cross as the bytes of their storages with shapes and strides, so views, shared
storage and writes in place all work.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import importlib.util
import json
import os
import select
import struct
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import IO, Any, ClassVar

import torch
from safetensors.torch import load, save

sys.path.insert(0, str(Path(__file__).parent))
import quick_interpreter

ROOT = Path(__file__).resolve().parents[1]
ANSWER_SECONDS = 120.0

Storages = dict[str, torch.Tensor]

BACKENDS = ["interpreter"] + (["cuda"] if torch.cuda.is_available() else [])


class Launcher:
    """`launcher("swiglu", "swiglu_forward", gate_NF, up_NF)` calls kernels/swiglu.py and returns a list of
    results.

    Arguments that the kernel writes are written in the caller's tensors. `planted=[(old, new)]` runs a copy
    of the file in which each `old`, which must occur, is replaced by its `new`: the tests' proof that they
    would see such an error.

    Raises:
        ValueError: as the launcher raised it.
        AssertionError: anything else went wrong; the message has the other process's traceback.
    """

    # One for all launchers: nothing of a call is left in it, and its imports take seconds.
    _process: ClassVar[subprocess.Popen[bytes] | None] = None

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def __call__(
        self,
        stem: str,
        function: str,
        *args: Any,
        planted: list[tuple[str, str]] | None = None,
        **kwargs: Any,
    ) -> list[torch.Tensor | None]:
        storages: Storages = {}
        request = {
            "stem": stem,
            "function": function,
            "planted": planted,
            "args": [_encode(value, storages) for value in args],
            "kwargs": {name: _encode(value, storages) for name, value in kwargs.items()},
        }
        if self.backend == "cuda":
            answer, returned = _serve(request, {key: flat.cuda() for key, flat in storages.items()})
        else:
            answer, returned = self._ask(request, storages)
        if answer["error"] is not None:
            kind, message = answer["error"]
            raise ValueError(message) if kind == "ValueError" else AssertionError(message)
        for key, flat in storages.items():
            flat.copy_(returned[key])
        return [None if key is None else returned[key].cpu() for key in answer["results"]]

    def _ask(self, request: dict[str, Any], storages: Storages) -> tuple[dict[str, Any], Storages]:
        process = Launcher._process
        if process is None or process.poll() is not None:
            # OMP: the interpreter is numpy in one thread; torch's pool would only spin beside it.
            environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
            process = Launcher._process = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd=ROOT,
                env=environment,
            )
            atexit.register(process.kill)
        assert process.stdin is not None and process.stdout is not None
        _send(process.stdin, request, storages)
        if not select.select([process.stdout], [], [], ANSWER_SECONDS)[0]:
            process.kill()
            process.wait()
            raise AssertionError(f"the interpreter gave no answer to {request} in {ANSWER_SECONDS} s")
        return _receive(process.stdout)


def _encode(value: Any, storages: Storages) -> Any:
    """JSON for one argument; a tensor becomes a view of a storage that travels beside it."""
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        key = f"storage-{storage.data_ptr()}"
        storages[key] = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,))
        dtype = str(value.dtype).removeprefix("torch.")
        view = [key, dtype, list(value.shape), list(value.stride()), value.storage_offset()]
        return {"view": view}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, tuple):
        return {"tuple": [_encode(item, storages) for item in value]}
    return {"value": value}


def _decode(value: dict[str, Any], storages: Storages) -> Any:
    if "view" in value:
        key, dtype, shape, stride, offset = value["view"]
        return storages[key].view(getattr(torch, dtype)).as_strided(shape, stride, offset)
    if "dtype" in value:
        return getattr(torch, value["dtype"])
    if "tuple" in value:
        return tuple(_decode(item, storages) for item in value["tuple"])
    return value["value"]


def _send(stream: IO[bytes], message: dict[str, Any], storages: Storages) -> None:
    head, payload = json.dumps(message).encode(), save(storages)
    stream.write(struct.pack("<QQ", len(head), len(payload)) + head + payload)
    stream.flush()


def _receive(stream: IO[bytes]) -> tuple[dict[str, Any], Storages]:
    lengths = stream.read(16)
    assert len(lengths) == 16, "the other process ended; its message is above"
    head, payload = struct.unpack("<QQ", lengths)
    message = json.loads(stream.read(head))
    # Cloned, because safetensors hands out views of read-only bytes of any alignment.
    return message, {key: flat.clone() for key, flat in load(stream.read(payload)).items()}


def _serve(request: dict[str, Any], storages: Storages) -> tuple[dict[str, Any], Storages]:
    """Call one launcher; the storages come back as the call left them, with the results beside them."""
    try:
        with contextlib.ExitStack() as stack:
            module = _module(request["stem"], request["planted"], stack)
            args = [_decode(value, storages) for value in request["args"]]
            kwargs = {name: _decode(value, storages) for name, value in request["kwargs"].items()}
            outcome = getattr(module, request["function"])(*args, **kwargs)
    except ValueError as error:
        return {"error": ["ValueError", str(error)]}, {}
    except Exception:
        return {"error": ["other", traceback.format_exc()]}, {}
    outcome = outcome if isinstance(outcome, tuple) else (outcome,)
    names = [None if tensor is None else f"result-{i}" for i, tensor in enumerate(outcome)]
    results = {name: tensor.contiguous().clone() for name, tensor in zip(names, outcome, strict=True) if name}
    return {"error": None, "results": names}, {**storages, **results}


def _module(stem: str, planted: list[tuple[str, str]] | None, stack: contextlib.ExitStack) -> Any:
    if planted is None:
        return importlib.import_module(f"elo_engine.kernels.{stem}")
    source = (ROOT / "kernels" / f"{stem}.py").read_text(encoding="utf-8")
    for old, new in planted:
        assert old in source, f"kernels/{stem}.py no longer contains {old!r}; plant the error elsewhere"
        source = source.replace(old, new)
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    path = Path(folder, f"{stem}_planted.py")
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"elo_engine.kernels.{stem}_planted", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    stack.callback(sys.modules.pop, spec.name)
    spec.loader.exec_module(module)
    return module


def _round_as_hardware_does() -> None:
    """Make the interpreter's fp32 -> bf16 round to nearest even, as the compiled kernels do (cvt.rn.bf16).

    It cuts the low bits off, twice the error (triton#8322, triton#9808), which would hide that much of the
    kernels' own. Of 8-bit floats it rounds the mantissa without a carry into the exponent; compiled it is
    cvt.rn.satfinite, which keeps a number that is too large at the largest one and NaN NaN.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter._convert_float
    eight = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}

    def convert(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if source == tl.float32 and target == tl.bfloat16:
            bits = torch.tensor(data.view("float32")).to(torch.bfloat16).view(torch.int16)
            return bits.numpy().view("uint16")
        if source == tl.float32 and target in eight:
            wide, largest = torch.tensor(data.view("float32")), torch.finfo(eight[target]).max
            return wide.clamp(-largest, largest).to(eight[target]).view(torch.uint8).numpy()
        return original(data, source, target, mode)

    interpreter._convert_float = convert


def main() -> None:
    # Standard output carries the answers; whatever a library prints goes to standard error.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    sys.path.insert(0, str(ROOT))
    _round_as_hardware_does()
    quick_interpreter.install()
    # Overflow to inf is arithmetic here, not an accident of the program that a person should be warned about.
    import numpy

    numpy.seterr(all="ignore")
    requests = os.fdopen(0, "rb")
    while requests.peek(1):
        _send(answers, *_serve(*_receive(requests)))


if __name__ == "__main__":
    main()
