"""Which ways of computing this machine has, and a recorder of what torch allocates and multiplies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from elo_engine.errors import UsageError
from elo_engine.model import cpu_native


def _runs(choice: str) -> bool:
    try:
        with cpu_native.using(choice):
            return True
    except UsageError:
        return False


NATIVE = [name for name in ("base", "avx2", "avx512") if _runs(name)]
PATHS = ["torch", *NATIVE]


class Recorder(TorchDispatchMode):
    """The largest tensor made inside, and the FLOPs of its matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.flops = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        if name == "mm":
            self.flops += 2 * args[0].shape[0] * args[0].shape[1] * args[1].shape[1]
        elif name in ("addmm", "addmm_"):
            self.flops += 2 * args[1].shape[0] * args[1].shape[1] * args[2].shape[1]
        ours = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        for made in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in ours:
                self.largest = max(self.largest, made.numel())
        return result
