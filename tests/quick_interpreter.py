"""Triton's interpreter without what it does again for every call, and for every operation, of a kernel.

It finds the builtins of the language by going through all members of its modules, for every kernel that is launched
and again for every function that a kernel calls; and each of its small numpy operations makes and compares objects of
Triton's types for several times as long as numpy computes. What it finds and makes is the same each time, so it is
found and made once, and what is patched already is left as it is. What a kernel computes, and what is refused, is
untouched.
"""

from __future__ import annotations

import gc
import inspect
import math
from typing import Any


def install() -> None:
    """In this process, whose Triton interprets; a second time changes nothing."""
    from triton.runtime import interpreter

    if getattr(interpreter._patch_lang, "quick", False):
        return
    gc.set_threshold(50_000, 20, 100)  # of the many objects of a launch hardly any is part of a cycle
    _builtins_once(interpreter)
    _types_once(interpreter)
    _in_numpy(interpreter)


def _builtins_once(interpreter: Any) -> None:
    """The members of the language that a launch patches are looked for once."""
    import triton.language as tl

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


def _types_once(interpreter: Any) -> None:
    """What Triton's types say of themselves is kept: shapes, the type in numpy, and what two types come to."""
    import triton.language as tl
    from triton.language.semantic import TritonSemantic

    core = tl.core
    unwrap, np_dtype_of = core._unwrap_if_constexpr, interpreter._get_np_dtype
    plain = {int, float, bool, str, type(None), tl.dtype, tl.block_type, tl.pointer_type, tl.tensor}
    np_dtypes: dict[str, Any] = {}
    blocks: dict[tuple[int, ...], tuple[Any, int]] = {}
    tensors: dict[tuple[int, ...], tuple[Any, Any]] = {}
    computed: dict[Any, Any] = {}
    make_block, equal, compute = tl.block_type.__init__, tl.dtype.__eq__, TritonSemantic.computation_type_impl
    integers = frozenset(tl.dtype.SINT_TYPES + tl.dtype.UINT_TYPES)

    def unwrapped(value: Any) -> Any:
        return value if type(value) in plain else unwrap(value)

    def np_dtype(dtype: Any) -> Any:
        scalar = dtype.scalar
        if type(scalar) is not tl.dtype:  # a pointer
            return np_dtype_of(dtype)
        if scalar.name not in np_dtypes:
            np_dtypes[scalar.name] = np_dtype_of(scalar)
        return np_dtypes[scalar.name]

    def block(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple(map(unwrapped, shape)) if isinstance(shape, (list, core.tuple)) else ()
        known = blocks.get(sizes) if all(type(size) is int for size in sizes) else None
        if known is None:
            make_block(self, element_ty, shape)  # which refuses what is no shape
            blocks[tuple(self.shape)] = self.shape, self.numel
        else:
            self.element_ty = element_ty
            self.shape, self.numel = known

    def tensor(self: Any, handle: Any, type: Any) -> None:
        sizes = tuple(type.shape) if type.is_block() else ()
        if sizes not in tensors:
            tensors[sizes] = core.constexpr(math.prod(sizes)), core.tuple([core.constexpr(size) for size in sizes])
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = tensors[sizes]

    def computation_type(self: Any, a: Any, a_is_scalar: bool, b: Any, b_is_scalar: bool, div_or_mod: bool) -> Any:
        key = (a.name, a_is_scalar, b.name, b_is_scalar, div_or_mod)
        if key not in computed:
            computed[key] = compute(self, a, a_is_scalar, b, b_is_scalar, div_or_mod)
        return computed[key]

    core._unwrap_if_constexpr, interpreter._get_np_dtype = unwrapped, np_dtype
    tl.block_type.__init__, tl.tensor.__init__ = block, tensor
    # written when it is asked for, by a message
    tl.block_type.name = property(lambda self: f"<{self.shape}, {self.element_ty}>", lambda self, name: None)
    tl.dtype.is_int = lambda self: self.name in integers
    tl.dtype.__eq__ = lambda self, other: self is other or equal(self, other)
    TritonSemantic.computation_type_impl = computation_type


def _in_numpy(interpreter: Any) -> None:
    """What is numpy's in the end, without objects of Triton between."""
    import numpy as np
    from triton.language.semantic import TritonSemantic

    check, convert = TritonSemantic.binary_op_sanitize_overflow_impl, interpreter._convert_float
    broadcast_all = TritonSemantic.broadcast_impl_value
    tables: dict[Any, Any] = {}

    def checked(self: Any, left: Any, right: Any, operation: Any) -> None:
        """Whether integers overflow is said in debugging alone, and computed in all."""
        if self.builder.options.debug:
            check(self, left, right, operation)

    def converted(data: Any, source: Any, target: Any, mode: Any) -> Any:
        """Of 16 bits or fewer all are converted once, and looked up."""
        bits = source.primitive_bitwidth
        if bits > 16:
            return convert(data, source, target, mode)
        key = (source.name, target.name, mode)
        if key not in tables:
            tables[key] = convert(np.arange(1 << bits, dtype=f"uint{bits}"), source, target, mode)
        return tables[key][data.view(f"uint{bits}")]

    def broadcast(self: Any, left: Any, right: Any) -> Any:
        return (left, right) if left.shape is right.shape else broadcast_all(self, left, right)

    def splat(self: Any, block: Any, handle: Any) -> Any:
        made = np.empty(tuple(block.shape), interpreter._get_np_dtype(handle.dtype))
        made[...] = handle.data
        return interpreter.TensorHandle(made, handle.dtype.scalar)

    TritonSemantic.binary_op_sanitize_overflow_impl, interpreter._convert_float = checked, converted
    TritonSemantic.broadcast_impl_value, interpreter.InterpreterBuilder.create_splat = broadcast, splat
