"""Turns integer NumPy code into ONNX nodes: call it with a `Value` in place of an array.

A kernel of `onnx_intq.kernels` is plain NumPy on int64 arrays. A `Value` implements the same
operators and functions, emits a node for each, and carries an interval that is proven to hold all
its elements. The interval decides the type: int32 where it fits, else int64; beyond int64 the
trace is refused. So the graph computes what NumPy computes, bit for bit, and cannot overflow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnx_intq.value import Builder as Builder
from onnx_intq.value import Operand, Shape, highest, lowest, require
from onnx_intq.value import Value as Value

Array = npt.NDArray[Any]
T = TypeVar("T")

LONGEST = 1 << 16
"""The longest dynamic axis a sum is proven for: 65,536 frames, over ten minutes of speech."""

INT32, INT64 = np.iinfo(np.int32), np.iinfo(np.int64)


def bounded(x: T, low: int, high: int) -> T:
    """`x`, known to lie in [low, high] by a proof that intervals cannot give.

    Checked where `x` is an array; where it is a `Value`, its interval is narrowed.

    Raises:
        AssertionError: An element lies outside: the proof is wrong.
    """
    if isinstance(x, Value):
        return cast(T, x.narrowed(low, high))
    values = np.asarray(x)
    if values.size and not (values.min() >= low and values.max() <= high):
        raise AssertionError(f"{values.min()}..{values.max()} is not within {low}..{high}")
    return x


Handler = TypeVar("Handler", bound=Callable[..., Value])


def _handles(function: Callable[..., Any]) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        Value.HANDLERS[function] = handler
        return handler

    return register


@_handles(np.add)
def _add(a: Operand, b: Operand) -> Value:
    return _arithmetic("Add", a, b, lowest(a) + lowest(b), highest(a) + highest(b))


@_handles(np.subtract)
def _subtract(a: Operand, b: Operand) -> Value:
    return _arithmetic("Sub", a, b, lowest(a) - highest(b), highest(a) - lowest(b))


@_handles(np.multiply)
def _multiply(a: Operand, b: Operand) -> Value:
    if a is b and isinstance(a, Value):  # a square is not negative
        ends = a.low**2, a.high**2
        return _arithmetic("Mul", a, a, 0 if a.low <= 0 <= a.high else min(ends), max(ends))
    corners = [x * y for x in (lowest(a), highest(a)) for y in (lowest(b), highest(b))]
    return _arithmetic("Mul", a, b, min(corners), max(corners))


@_handles(np.left_shift)
def _left_shift(a: Operand, b: Operand) -> Value:
    return _multiply(a, _power_of_two(b))


@_handles(np.right_shift)
def _right_shift(a: Operand, b: Operand) -> Value:
    return _floor_divide(a, _power_of_two(b))


def _power_of_two(exponent: Operand) -> Array:
    if isinstance(exponent, Value):
        raise TypeError("a shift by a traced value; expected a constant: take a power of two")
    return np.int64(1) << np.asarray(exponent, np.int64)


@_handles(np.floor_divide)
def _floor_divide(a: Operand, b: Operand) -> Value:
    """ONNX's Div truncates: a dividend that may be negative is raised by a multiple of b first."""
    least = lowest(b)
    require(least >= 1, "division by a value that may be below 1", b)
    if lowest(a) < 0 and isinstance(b, Value):
        down = _subtract(a, _subtract(b, 1))  # rounds towards minus infinity
        return _divide(_where(_less(a, 0), down, a), b)
    if lowest(a) >= 0:
        return _divide(a, b)
    steps = -(lowest(a) // np.asarray(b, np.int64))
    divided = _divide(_add(a, steps * np.asarray(b, np.int64)), b)
    exact = _subtract(divided, steps)
    return exact.narrowed(lowest(a) // least, max(highest(a) // least, highest(a) // highest(b)))


def _divide(a: Operand, b: Operand) -> Value:
    corners = [_truncated(x, y) for x in (lowest(a), highest(a)) for y in (lowest(b), highest(b))]
    return _arithmetic("Div", a, b, min(corners), max(corners))


def _truncated(a: int, b: int) -> int:
    return a // b if a >= 0 else -(-a // b)


@_handles(np.maximum)
def _maximum(a: Operand, b: Operand) -> Value:
    return _arithmetic("Max", a, b, max(lowest(a), lowest(b)), max(highest(a), highest(b)))


@_handles(np.minimum)
def _minimum(a: Operand, b: Operand) -> Value:
    return _arithmetic("Min", a, b, min(lowest(a), lowest(b)), min(highest(a), highest(b)))


@_handles(np.clip)
def _clip(a: Value, low: int, high: int) -> Value:
    if low <= a.low and a.high <= high:
        return a
    dtype = _type(a.low, a.high, low, high)
    limits = [a.builder.constant(np.asarray(limit), dtype) for limit in (low, high)]
    tensor = a.builder.node("Clip", [a.astype(dtype), *limits], dtype, a.tensor.shape)
    return Value(a.builder, tensor, min(max(a.low, low), high), max(min(a.high, high), low))


@_handles(np.negative)
def _negative(a: Value) -> Value:
    return _subtract(0, a)


@_handles(np.absolute)
def _absolute(a: Value) -> Value:
    if a.low >= 0:
        return a
    return _unary("Abs", a, max(a.low, 0), max(-a.low, a.high))


@_handles(np.sign)
def _sign(a: Value) -> Value:
    return _unary("Sign", a, max(min(a.low, 1), -1), max(min(a.high, 1), -1))


@_handles(np.less)
def _less(a: Operand, b: Operand) -> Value:
    return _comparison("Less", a, b)


@_handles(np.less_equal)
def _less_equal(a: Operand, b: Operand) -> Value:
    return _comparison("LessOrEqual", a, b)


@_handles(np.greater)
def _greater(a: Operand, b: Operand) -> Value:
    return _comparison("Greater", a, b)


@_handles(np.greater_equal)
def _greater_equal(a: Operand, b: Operand) -> Value:
    return _comparison("GreaterOrEqual", a, b)


@_handles(np.equal)
def _equal(a: Operand, b: Operand) -> Value:
    return _comparison("Equal", a, b)


@_handles(np.where)
def _where(condition: Value, a: Operand, b: Operand) -> Value:
    low, high = min(lowest(a), lowest(b)), max(highest(a), highest(b))
    dtype = _type(low, high)
    inputs = [condition.tensor, *(_tensor(condition.builder, x, dtype) for x in (a, b))]
    tensor = condition.builder.node("Where", inputs, dtype, _shape(condition, a, b))
    return Value(condition.builder, tensor, low, high)


@_handles(np.sum)
def _sum(a: Value, axis: int | None = None, keepdims: bool = False) -> Value:
    count = _length(a, axis)
    low, high = min(count * a.low, a.low), max(count * a.high, a.high)
    return _reduction("ReduceSum", a, axis, keepdims, low, high)


@_handles(np.max)
def _max(a: Value, axis: int | None = None, keepdims: bool = False) -> Value:
    return _reduction("ReduceMax", a, axis, keepdims, a.low, a.high)


@_handles(np.take)
def _take(table: Array, index: Value) -> Value:
    values = np.asarray(table)
    inside = values.ndim == 1 and index.low >= 0 and index.high < len(values)
    require(inside, f"a table of {len(values)} entries", index)
    low, high = int(values.min()), int(values.max())
    inputs = [index.builder.constant(values, _smallest(low, high)), index.astype(np.int32)]
    tensor = index.builder.node("Gather", inputs, _smallest(low, high), index.tensor.shape, axis=0)
    return Value(index.builder, tensor, low, high)


@_handles(np.matmul)
def _matmul(a: Value, b: Value) -> Value:
    """Unsigned 8 bits on the left is onnxruntime's fast form; wider factors multiply as int64."""
    length = _length(a, -1)
    corners = [x * y for x in (a.low, a.high) for y in (b.low, b.high)]
    low, high = length * min(0, *corners), length * max(0, *corners)
    narrow = b.low >= -128 and b.high <= 127 and a.low >= -128 and a.high <= 255
    if not (narrow and (a.low >= 0 or a.high <= 127) and _type(low, high) == np.int32):
        require(INT64.min <= low and high <= INT64.max, "MatMul", a, b)
        tensors = [a.astype(np.int64), b.astype(np.int64)]
        return Value(a.builder, a.builder.node("MatMul", tensors, np.int64), low, high)
    tensors = [a.astype(np.uint8 if a.low >= 0 else np.int8), b.astype(np.int8)]
    return Value(a.builder, a.builder.node("MatMulInteger", tensors, np.int32), low, high)


def _arithmetic(op: str, a: Operand, b: Operand, low: int, high: int) -> Value:
    """An elementwise node whose operands and result have the narrower type that holds them all."""
    builder = _builder(a, b)
    require(INT64.min <= low and high <= INT64.max, op, a, b)
    dtype = _type(low, high, lowest(a), highest(a), lowest(b), highest(b))
    tensors = [_tensor(builder, x, dtype) for x in (a, b)]
    return Value(builder, builder.node(op, tensors, dtype, _shape(a, b)), low, high)


def _comparison(op: str, a: Operand, b: Operand) -> Value:
    builder, dtype = _builder(a, b), _type(lowest(a), highest(a), lowest(b), highest(b))
    tensors = [_tensor(builder, x, dtype) for x in (a, b)]
    return Value(builder, builder.node(op, tensors, np.bool_, _shape(a, b)), 0, 1)


def _unary(op: str, a: Value, low: int, high: int) -> Value:
    dtype = _type(low, high, a.low, a.high)
    tensor = a.builder.node(op, [a.astype(dtype)], dtype, a.tensor.shape)
    return Value(a.builder, tensor, low, high)


def _reduction(op: str, a: Value, axis: int | None, keepdims: bool, low: int, high: int) -> Value:
    if axis is None or not keepdims:
        raise TypeError(f"{op} without axis or keepdims; expected both")
    require(INT64.min <= low and high <= INT64.max, op, a)
    dtype = _type(low, high, a.low, a.high)
    axes = a.builder.constant([axis], np.int64)
    shape = a.tensor.shape
    if shape is not None:
        shape = [1 if i == axis % len(shape) else size for i, size in enumerate(shape)]
    tensor = a.builder.node(op, [a.astype(dtype), axes], dtype, shape, keepdims=1)
    return Value(a.builder, tensor, low, high)


def _length(a: Value, axis: int | None) -> int:
    """The size of an axis, `LONGEST` if it is dynamic or unknown."""
    shape = a.tensor.shape
    size = shape[axis] if shape is not None and axis is not None else None
    return size if isinstance(size, int) else LONGEST


def _shape(*operands: Operand) -> Shape:
    """The shape operands broadcast to; None if the rank of one is unknown."""
    shapes = [x.tensor.shape if isinstance(x, Value) else np.shape(x) for x in operands]
    if any(shape is None for shape in shapes):
        return None
    rank = max(map(len, shapes))
    columns = zip(*((1,) * (rank - len(s)) + tuple(s) for s in shapes), strict=True)
    return [_dimension(sizes) for sizes in columns]


def _dimension(sizes: Sequence[int | str]) -> int | str:
    """One dimension of a broadcast: a number above 1 is certain, then a name, then 1."""
    certain: list[int | str] = [size for size in sizes if isinstance(size, int) and size != 1]
    names: list[int | str] = [size for size in sizes if isinstance(size, str)]
    return [*certain, *names, 1][0]


def _builder(*operands: Operand) -> Builder:
    return next(x.builder for x in operands if isinstance(x, Value))


def _tensor(builder: Builder, operand: Operand, dtype: np.dtype[Any]) -> gs.Tensor:
    if isinstance(operand, Value):
        return operand.astype(dtype)
    return builder.constant(operand, dtype)


def _type(*bounds: int) -> np.dtype[Any]:
    fits = INT32.min <= min(bounds) and max(bounds) <= INT32.max
    return np.dtype(np.int32 if fits else np.int64)


def _smallest(low: int, high: int) -> np.dtype[Any]:
    """The smallest type for a table: read, cast, then computed with."""
    candidates = map(np.dtype, ("int8", "uint8", "int32", "int64"))
    return next(d for d in candidates if np.iinfo(d).min <= low and high <= np.iinfo(d).max)
