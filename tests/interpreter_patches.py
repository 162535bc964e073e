"""Makes Triton's interpreter faster, without which the tests in it take several times as long, and mends its bfloat16.

Most of its time goes into types. For every operation it works out anew what two operands become, and of which shape;
it makes a type for every value; and it replaces triton.language's functions whenever a kernel calls a function. All of
that depends on the operands' types alone, and there are few of them: the interpreter's own code is asked once, and what
it answered is remembered. Values of equal types share one ``__dict__``, by which they are known.
"""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import numpy as np


def apply() -> None:
    """Replace parts of the interpreter, for good: this process compiles no kernel."""
    import triton.language as tl
    from triton.language import semantic
    from triton.runtime import interpreter

    patch_once(tl, interpreter)
    remember_types(tl, interpreter)
    remember_operands(tl, semantic.TritonSemantic)
    compute_quickly(tl, semantic.TritonSemantic)
    index_quickly(tl)
    round_to_bfloat16(tl, interpreter)
    builder = interpreter.interpreter_builder
    # It does every addition of ints a second time in 64 bits, which no map that it can run needs.
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def patch_once(tl: Any, interpreter: Any) -> None:
    """The language's functions become the interpreter's once, and stay so."""
    patch = interpreter._patch_lang
    known: set[Any] = set()
    patched: set[int] = set()
    nothing_to_restore = SimpleNamespace(restore=lambda: None)

    def patch_lang(function: Any) -> Any:
        if function not in known:
            known.add(function)
            languages = {id(x) for x in function.__globals__.values() if x is tl or x is tl.core}
            if not languages <= patched:
                patched.update(languages)
                patch(function)
        return nothing_to_restore

    def patch_attr(obj: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        function = getattr(member, "__wrapped__", member)  # without its check that there is a semantic

        def call(*args: Any, **options: Any) -> Any:
            options["_semantic"] = semantic
            return function(*args, **options)

        scope.set_attr(obj, name, call)

    semantic = getattr(interpreter, "interpreter_semantic", None) or interpreter.TritonSemantic(
        interpreter.interpreter_builder
    )
    interpreter._patch_lang, interpreter._patch_attr = patch_lang, patch_attr


def remember_types(tl: Any, interpreter: Any) -> None:
    """All of a type, and of ``tensor(handle, type)`` but the handle, depends on nothing but what it is made of."""
    make_block, make_pointer = tl.block_type.__init__, tl.pointer_type.__init__
    make_tensor, make_np_dtype = tl.tensor.__init__, interpreter._get_np_dtype
    unwrap = tl.core._unwrap_if_constexpr
    types: dict[Any, dict[str, Any]] = {}  # what they hold keeps the element's type, and so its id

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = (id(element_ty.__dict__), *[x.value if isinstance(x, tl.constexpr) else x for x in shape])
        known = types.get(key)
        if known is None:
            make_block(self, element_ty, shape)
            types[key] = self.__dict__
        else:
            self.__dict__ = known

    def pointer_type(self: Any, element_ty: Any, *more: Any, **options: Any) -> None:
        make_pointer(self, element_ty, *more, **options)
        self.__dict__ = types.setdefault(
            (id(self.element_ty.__dict__), self.address_space, self.const, "pointer"), self.__dict__
        )

    def tensor(self: Any, handle: Any, type: Any) -> None:
        known = type.__dict__.get("of_tensors")
        if known is None:
            make_tensor(self, handle, type)
            type.of_tensors = {name: x for name, x in self.__dict__.items() if name != "handle"}
        else:
            self.__dict__.update(known)
            self.handle = handle

    def np_dtype(type: Any) -> Any:
        if "of_arrays" not in type.__dict__:
            type.of_arrays = make_np_dtype(type)
        return type.of_arrays

    plain = (tl.tensor, int, float, bool, type(None))

    def unwrap_if_constexpr(x: Any) -> Any:
        return x if type(x) in plain else unwrap(x)

    tl.block_type.__init__, tl.pointer_type.__init__ = block_type, pointer_type
    tl.tensor.__init__, interpreter._get_np_dtype = tensor, np_dtype
    tl.core._unwrap_if_constexpr = unwrap_if_constexpr


def remember_operands(tl: Any, semantic: Any) -> None:
    """Which types two operands get, and the constants that numbers become.

    Arrays aren't broadcast to the type that both get, since the operation does so itself.
    """
    check, broadcast = semantic.binary_op_type_checking_impl, semantic.broadcast_impl_value
    tensor = tl.tensor
    pairs: dict[Any, Any] = {}  # what they hold keeps the types, and so their ids
    shapes: dict[Any, Any] = {}

    def binary_op_type_checking_impl(self: Any, lhs: Any, rhs: Any, *options: Any, **named: Any) -> Any:
        left, right = type(lhs), type(rhs)
        if left is tensor and right is tensor:
            key = (id(lhs.type.__dict__), id(rhs.type.__dict__), options, *named.values())
            known = pairs.get(key)
            if known is None:
                x, y = check(self, lhs, rhs, *options, **named)
                pairs[key] = (x.type, y.type, lhs.type, rhs.type)
                return x, y
            return retyped(self, lhs, known[0]), retyped(self, rhs, known[1])
        number_first = right is tensor
        of, number, kind = (rhs, lhs, left) if number_first else (lhs, rhs, right)
        plain = type(of) is tensor and (kind is int or kind is float)
        if plain and not (number == 0 and math.copysign(1, number) < 0):  # -0.0 would be found as 0.0
            key = (id(of.type.__dict__), number, kind, number_first, options, *named.values())
            known = pairs.get(key)
            if known is None:
                x, y = check(self, lhs, rhs, *options, **named)
                pairs[key] = (x, y.type, of.type) if number_first else (x.type, y, of.type)
                return x, y
            if number_first:
                return known[0], retyped(self, rhs, known[1])
            return retyped(self, lhs, known[0]), known[1]
        return check(self, lhs, rhs, *options, **named)

    def retyped(self: Any, x: Any, wanted: Any) -> Any:
        if x.type.__dict__ is wanted.__dict__:
            return x
        x = self.cast(x, wanted.scalar)
        return x if x.type.__dict__ is wanted.__dict__ else tensor(x.handle, wanted)

    def broadcast_impl_value(self: Any, lhs: Any, rhs: Any) -> Any:
        a, b = lhs.type.__dict__, rhs.type.__dict__
        if a is b:
            return lhs, rhs
        key = (id(a), id(b))
        known = shapes.get(key)
        if known is None:
            x, y = broadcast(self, lhs, rhs)
            shapes[key] = x.type.__dict__ is a and y.type.__dict__ is b, lhs.type, rhs.type
            return x, y
        return (lhs, rhs) if known[0] else broadcast(self, lhs, rhs)

    semantic.binary_op_type_checking_impl = binary_op_type_checking_impl
    semantic.broadcast_impl_value = broadcast_impl_value


def compute_quickly(tl: Any, semantic: Any) -> None:
    """Sums, products and casts of numbers that NumPy has, too, are NumPy's."""
    from triton.runtime.interpreter import TensorHandle

    tensor = tl.tensor
    numbers = {id(x.__dict__) for x in (tl.int32, tl.int64, tl.float32, tl.float64)}
    cast = semantic.cast
    casts: dict[Any, Any] = {}  # what they hold keeps the types, and so their ids

    def quick(name: str, function: Any, *pointers: bool) -> None:
        slow = getattr(semantic, name)

        def operation(self: Any, x: Any, y: Any, *options: Any) -> Any:
            a, b = self.binary_op_type_checking_impl(x, y, *pointers)
            if id(a.dtype.__dict__) in numbers and a.type.__dict__ is b.type.__dict__:
                return tensor(TensorHandle(function(a.handle.data, b.handle.data), a.handle.dtype), a.type)
            return slow(self, x, y, *options)

        setattr(semantic, name, operation)

    def quick_cast(self: Any, x: Any, dst_ty: Any, *rounding: Any, **named: Any) -> Any:
        to = dst_ty.scalar.__dict__
        if x.dtype.__dict__ is to:
            return x
        key = (id(x.type.__dict__), id(to))
        known = casts.get(key)
        if known is None:
            found = cast(self, x, dst_ty, *rounding, **named)
            simple = {id(x.dtype.__dict__), id(to)} <= numbers
            casts[key] = simple, found.type, found.handle.data.dtype, found.handle.dtype, x.type, dst_ty
            return found
        if not known[0]:
            return cast(self, x, dst_ty, *rounding, **named)
        return tensor(TensorHandle(x.handle.data.astype(known[2]), known[3]), known[1])

    quick("add", np.add, True, True)
    quick("sub", np.subtract, True, False)
    quick("mul", np.multiply)
    semantic.cast = quick_cast


def index_quickly(tl: Any) -> None:
    """``x[:, None]`` is NumPy's own."""
    from triton.runtime.interpreter import TensorHandle

    get = tl.tensor.__getitem__
    get = getattr(get, "__wrapped__", get)
    tensor = tl.tensor
    types: dict[Any, Any] = {}

    def __getitem__(self: Any, slices: Any, _semantic: Any = None) -> Any:
        if type(slices) is not tuple or not self.type.is_block():
            return get(self, slices, _semantic=_semantic)
        key = (id(self.type.__dict__), *[x is None for x in slices])
        known = types.get(key)
        if known is None:
            found = get(self, slices, _semantic=_semantic)
            types[key] = found.type, self.type
            return found
        return tensor(TensorHandle(self.handle.data[slices], self.handle.dtype), known[0])

    tl.tensor.__getitem__ = tl.core.builtin(__getitem__)


def round_to_bfloat16(tl: Any, interpreter: Any) -> None:
    """float32 is rounded to the nearest bfloat16, ties to even, as by a GPU; the interpreter cuts it off."""
    convert = interpreter._convert_float

    def convert_float(x: Any, from_dtype: Any, to_dtype: Any, rounding: Any) -> Any:
        if from_dtype != tl.float32 or to_dtype != tl.bfloat16:
            return convert(x, from_dtype, to_dtype, rounding)
        bits = np.ascontiguousarray(x).view(np.uint32).reshape(x.shape)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)

    interpreter._convert_float = convert_float
