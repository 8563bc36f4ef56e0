"""The compiled extension `elo_engine._csrc`, if it is there and of this version; everything in it has a twin in Python.

`model/cpu_native.py` (kernels) and `checkpoint/mover.py` (bytes) are its only callers.
"""

from __future__ import annotations

import importlib
from types import ModuleType

# torch before the extension: both name libgomp.so.1, and the first one loaded serves both. torch's wheel brings
# its own, and one runtime means one pool of threads and one torch.set_num_threads.
import torch  # noqa: F401

INTERFACE = 5  # of csrc/module.cpp; an extension left over from another version must not be called


def load() -> tuple[ModuleType | None, str]:
    """The extension, or None and why it is not used."""
    try:
        module = importlib.import_module("elo_engine._csrc")
    except ImportError as error:
        return None, f"elo_engine._csrc does not load: {error}"
    found = getattr(module, "INTERFACE", None)
    if found != INTERFACE:
        return None, f"elo_engine._csrc has interface {found}, this version needs {INTERFACE}: reinstall elo_engine"
    return module, ""


CSRC, CSRC_REASON = load()
