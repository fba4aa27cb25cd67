"""Makes Triton's interpreter some five times as fast, and changes no number: what it makes anew is kept.

Most of its time goes into descriptions of the values it computes with, and into what it asks and leaves unanswered, not
into these values. What is replaced here is private to Triton and known in one version, that of `constraints.txt`:
another is left as it is.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton._utils import validate_block_shape
from triton.language import semantic
from triton.runtime import interpreter

CORE = tl.core
KNOWN = "3.6."


def hasten() -> None:
    """Call it once, before the first kernel runs."""
    if not triton.__version__.startswith(KNOWN):
        return
    _patch_the_language_once_per_launch()
    _keep_shapes()
    _keep_dtypes()
    _cut_bfloat16_off_at_once()
    _let_integers_overflow_unasked()


def _patch_the_language_once_per_launch() -> None:
    """Each function that a kernel calls patched it again, some hundred attributes, and undid nothing."""
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[tuple[bool, bool]] = set()
    names = cache(lambda fn: tuple(module in fn.__globals__.values() for module in (tl, CORE)))

    def patch_lang(fn: Any) -> Any:
        modules = names(fn)
        if modules in patched:
            return None
        patched.add(modules)
        return patch(fn)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        try:
            return launch(self, *args, **kwargs)
        finally:
            patched.clear()  # it undid what it had patched

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_lang, call


def _keep_shapes() -> None:
    """One description for all tensors of a shape, and no names before somebody asks."""

    @cache
    def block(sizes: tuple[int, ...]) -> tuple[Any, int]:
        shape = CORE.tuple(sizes)
        shape.sizes = sizes
        return shape, validate_block_shape(sizes)

    @cache
    def tensor(shape: tuple[int, ...]) -> tuple[Any, Any]:
        return CORE.tuple([CORE.constexpr(size) for size in shape]), CORE.constexpr(math.prod(shape))

    def init_block_type(self: Any, element_ty: Any, shape: Any) -> None:
        known = shape.__dict__.get("sizes") if type(shape) is CORE.tuple else None
        self.element_ty, self.sizes = element_ty, known or tuple(CORE._unwrap_if_constexpr(size) for size in shape)
        if not self.sizes:
            raise TypeError("0d block_type is forbidden")
        self.shape, self.numel = block(self.sizes)

    def same_block_type(self: Any, other: Any) -> bool:
        return isinstance(other, CORE.block_type) and self.sizes == other.sizes and self.element_ty == other.element_ty

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = tensor(type.sizes if type.is_block() else ())

    CORE.block_type.__init__, CORE.block_type.__eq__ = init_block_type, same_block_type
    CORE.block_type.name = property(lambda self: f"<{self.shape}, {self.element_ty}>")
    CORE.tensor.__init__ = init_tensor
    compare, answers = CORE.tuple.__eq__, (CORE.constexpr(False), CORE.constexpr(True))

    def same_tuple(self: Any, other: Any) -> Any:
        if type(other) is not CORE.tuple:
            return compare(self, other)
        return answers[self is other or self.values == other.values]

    broadcast = semantic.TritonSemantic.broadcast_impl_value
    CORE.tuple.__eq__ = same_tuple
    semantic.TritonSemantic.broadcast_impl_value = lambda self, left, right: (
        (left, right) if left.shape is right.shape else broadcast(self, left, right)
    )


def _keep_dtypes() -> None:
    """A table of all dtypes was made to look one up."""
    find = interpreter._get_np_dtype
    found: dict[str, Any] = {}

    def get_np_dtype(dtype: Any) -> Any:
        scalar = dtype.element_ty if isinstance(dtype, CORE.block_type) else dtype
        if isinstance(scalar, CORE.pointer_type):
            return find(scalar)
        if scalar.name not in found:
            found[scalar.name] = find(scalar)
        return found[scalar.name]

    interpreter._get_np_dtype = get_np_dtype


def _cut_bfloat16_off_at_once() -> None:
    """Sign, exponent and mantissa went their own ways, and zeros the longest; the smallest numbers still do."""
    convert = interpreter._convert_float

    def convert_float(values: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        names = source.name, target.name
        if names not in (("bf16", "fp32"), ("fp32", "bf16")) or rounding_mode is not None:
            return convert(values, source, target, rounding_mode)
        narrow, dense = names[0] == "bf16", np.ascontiguousarray(values)
        bits = dense.view(np.uint16).astype(np.uint32) << 16 if narrow else dense.view(np.uint32)
        magnitude = bits & 0x7FFFFFFF
        made = bits if narrow else (bits >> 16).astype(np.uint16)
        if (small := (magnitude < 0x00800000) & (magnitude != 0)).any():
            made[small] = convert(dense[small], source, target, rounding_mode)
        return made.reshape(values.shape)

    interpreter._convert_float = convert_float


def _let_integers_overflow_unasked() -> None:
    """Each sum and product of integers was made in 64 bits too, for an assertion that the interpreter then left out."""
    semantic.TritonSemantic.binary_op_sanitize_overflow_impl = lambda *args: None
