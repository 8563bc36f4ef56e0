"""Triton's interpreter without what it does again for every call of a device function.

It finds the builtins of the language by going through all members of its modules, for every kernel that is launched
and again for every function that a kernel calls: a third of the time of the kernels' tests. What it finds is the same
each time, so it is found once; and what is patched already is left as it is. What a kernel computes is untouched.
"""

from __future__ import annotations

import gc
import inspect
from typing import Any


def install() -> None:
    """In this process, whose Triton interprets; a second time changes nothing."""
    import triton.language as tl
    from triton.runtime import interpreter

    if getattr(interpreter._patch_lang, "quick", False):
        return
    gc.set_threshold(50_000, 20, 100)  # of the many objects of a launch hardly any is part of a cycle
    patch_all, patch_attribute = interpreter._patch_lang, interpreter._patch_attr
    owners = (tl, tl.core, tl.tensor, tl.math, tl.core.tensor_descriptor_base)
    builtins = {
        owner: [(name, member) for name, member in inspect.getmembers(owner) if tl.core.is_builtin(member)]
        for owner in owners
    }
    patched: set[Any] = set()

    def patch_builtin(owner: Any, builder: Any, scope: Any) -> None:
        for name, member in builtins[owner]:
            if getattr(owner, name) is member:
                patch_attribute(owner, name, member, builder, scope)

    class Quick(interpreter._LangPatchScope):  # type: ignore[misc]
        """What restores everything forgets that it was patched."""

        def __init__(self, inner: Any, made: set[Any]) -> None:
            self._inner, self._made = inner, made

        def restore(self) -> None:
            if self._inner is not None:
                self._inner.restore()
            patched.difference_update(self._made)

    def patch_lang(function: Any) -> Any:
        # a device function sees the language by the names of its own file
        seen = {value for value in function.__globals__.values() if value is tl or value is tl.core}
        if seen and seen <= patched:
            return Quick(None, set())
        made = seen - patched
        inner = patch_all(function)
        patched.update(made)
        return Quick(inner, made)

    patch_lang.quick = True  # type: ignore[attr-defined]
    interpreter._patch_builtin, interpreter._patch_lang = patch_builtin, patch_lang
