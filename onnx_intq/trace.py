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
MIDDLE = 128
"""Zero point of int8 values that are held as uint8."""
EXACT = 1 << 53
"""onnxruntime adds up in float64, whatever the type: beyond, sums are rounded."""


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


def take(table: Array, index: Any) -> Any:
    """`np.take` of a constant table, whose index NumPy would not see to be a `Value`.

    Args:
        table: Integers, 1-D.
        index: Within the table; any shape.
    """
    return _take(table, index) if isinstance(index, Value) else np.take(table, index)


Handler = TypeVar("Handler", bound=Callable[..., Any])


def _handles(function: Callable[..., Any]) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        Value.HANDLERS[function] = handler
        return handler

    return register


@_handles(np.add)
def _add(a: Operand, b: Operand) -> Value:
    if _is_boolean(a) and _is_boolean(b):  # NumPy's sum of booleans is their disjunction
        raise TypeError("a sum of two comparisons; expected np.where for one of them")
    for value, other in ((a, b), (b, a)):
        if isinstance(value, Value) and _is_zero(other) and not _is_boolean(value):
            return value
    return _arithmetic("Add", a, b, lowest(a) + lowest(b), highest(a) + highest(b))


@_handles(np.subtract)
def _subtract(a: Operand, b: Operand) -> Value:
    if isinstance(a, Value) and _is_zero(b):
        return a
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
    require(lowest(exponent) >= 0 and highest(exponent) <= 62, "a shift", exponent)
    return np.int64(1) << np.asarray(exponent, np.int64)


@_handles(np.floor_divide)
def _floor_divide(a: Operand, b: Operand) -> Value:
    """ONNX's Div truncates: a dividend that may be negative is raised by a multiple of b first."""
    least = lowest(b)
    require(least >= 1, "division by a value that may be below 1", b)
    require(min(lowest(a), 0) - highest(b) > INT64.min, "division", a, b)
    if lowest(a) >= 0:
        return _divide(a, b)
    if isinstance(b, Value):
        down = _subtract(a, _subtract(b, 1))  # rounds towards minus infinity
        negative = _less(a, 0) if isinstance(a, Value) else np.asarray(a) < 0
        exact = _divide(_where(negative, down, a), b)
    else:
        steps = -(lowest(a) // np.asarray(b, np.int64))
        exact = _subtract(_divide(_add(a, steps * np.asarray(b, np.int64)), b), steps)
    return exact.narrowed(lowest(a) // least, max(highest(a) // least, highest(a) // highest(b)))


def _divide(a: Operand, b: Operand) -> Value:
    corners = [_truncated(x, y) for x in (lowest(a), highest(a)) for y in (lowest(b), highest(b))]
    return _arithmetic("Div", a, b, min(corners), max(corners))


def _truncated(a: int, b: int) -> int:
    return a // b if a >= 0 else -(-a // b)


@_handles(np.maximum)
def _maximum(a: Operand, b: Operand) -> Value:
    return _extreme("Max", a, b, max(lowest(a), lowest(b)), max(highest(a), highest(b)))


@_handles(np.minimum)
def _minimum(a: Operand, b: Operand) -> Value:
    return _extreme("Min", a, b, min(lowest(a), lowest(b)), min(highest(a), highest(b)))


def _extreme(op: str, a: Operand, b: Operand, low: int, high: int) -> Value:
    """Max or Min; of int64 by a comparison.

    onnxruntime's Max, Min, Clip and Sign are wrong for int64 operands that share their upper 32
    bits and differ in bit 31 (x86-64, seen in 1.31.1; github.com/microsoft/onnxruntime/pull/25280).
    """
    if _type(lowest(a), highest(a), lowest(b), highest(b)) == np.int32:
        return _arithmetic(op, a, b, low, high)
    first, second = (a, b) if op == "Max" else (b, a)
    return _where(_less(a, b), second, first).narrowed(low, high)


@_handles(np.clip)
def _clip(a: Value, low: int, high: int) -> Value:
    if low <= a.low and a.high <= high:
        return a
    if _type(a.low, a.high, low, high) == np.int64:
        raised = _maximum(a, low) if a.low < low else a
        return _minimum(raised, high) if raised.high > high else raised
    limits = [a.builder.constant(np.asarray(limit), np.int32) for limit in (low, high)]
    inputs = [a.astype(np.int32), *limits]
    tensor = a.builder.node("Clip", inputs, np.int32, a.tensor.shape)
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
    low, high = max(min(a.low, 1), -1), max(min(a.high, 1), -1)
    if _type(a.low, a.high) == np.int32:
        return _unary("Sign", a, low, high)
    return _subtract(_greater(a, 0), _less(a, 0)).narrowed(low, high)


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
def _where(condition: Operand, a: Operand, b: Operand) -> Value:
    if not _is_boolean(condition):
        raise TypeError("np.where of integers; expected a comparison")
    low, high = min(lowest(a), lowest(b)), max(highest(a), highest(b))
    builder, dtype = _builder(condition, a, b), _type(low, high)
    types = zip((condition, a, b), (np.dtype(np.bool_), dtype, dtype), strict=True)
    inputs = [_tensor(builder, operand, wanted) for operand, wanted in types]
    tensor = builder.node("Where", inputs, dtype, _shape(condition, a, b))
    return Value(builder, tensor, low, high)


@_handles(np.sum)
def _sum(a: Value, axis: int | None = None, keepdims: bool = False) -> Value:
    count, fewest = _length(a, axis)
    low, high = min(fewest * a.low, count * a.low), max(fewest * a.high, count * a.high)
    require(low >= -EXACT and high <= EXACT, "ReduceSum, in onnxruntime's float64", a)
    return _reduction("ReduceSum", a, axis, keepdims, low, high)


@_handles(np.max)
def _max(a: Value, axis: int | None = None, keepdims: bool = False) -> Value:
    require(_type(a.low, a.high) == np.int32, "ReduceMax of int64, which onnxruntime gets wrong", a)
    return _reduction("ReduceMax", a, axis, keepdims, a.low, a.high)


def _take(table: Array, index: Value) -> Value:
    values = np.asarray(table)
    inside = values.ndim == 1 and index.low >= 0 and index.high < len(values)
    require(inside, f"a table of {len(values)} entries", index)
    low, high = int(values.min()), int(values.max())
    dtype = (_type if index.builder.target == "tensorrt" else _smallest)(low, high)
    inputs = [index.builder.constant(values, dtype), index.astype(np.int32)]
    tensor = index.builder.node("Gather", inputs, dtype, index.tensor.shape, axis=0)
    return Value(index.builder, tensor, low, high)


@_handles(np.split)
def _split(a: Value, sections: int | Sequence[int], axis: int = 0) -> list[Value]:
    """Along an axis of known length, into equal parts or at the given places."""
    parts, dtype = np.split(np.arange(_length(a, axis)[0]), sections), a.dtype
    sizes = [len(part) for part in parts]
    shape = list(a.tensor.shape)
    shapes = [[s if i == axis % len(shape) else n for i, n in enumerate(shape)] for s in sizes]
    inputs = [a.tensor, a.builder.constant(sizes, np.int64)]
    first = a.builder.node("Split", inputs, dtype, shapes[0], axis=axis)
    rest = [gs.Variable(a.builder.names.number("t"), dtype, each) for each in shapes[1:]]
    first.inputs[0].outputs += rest
    return [Value(a.builder, tensor, a.low, a.high) for tensor in (first, *rest)]


@_handles(np.matmul)
def _matmul(a: Value, b: Value) -> Value:
    """Of 8 bits: uint8 on the left, and on the right, unless that has to be portable, int8.

    16 bits on the right are multiplied byte by byte: 256 * (a @ high) + a @ low.
    """
    length, _ = _length(a, -1)
    corners = [x * y for x in (a.low, a.high) for y in (b.low, b.high)]
    low, high = length * min(0, *corners), length * max(0, *corners)
    bytes_ = a.low >= -128 and a.high <= 255
    if bytes_ and max(a.high, -a.low) * MIDDLE * length <= INT32.max and _has_two_bytes(b):
        digits = _bytes(b)
        return _add(_multiply(_matmul(a, digits[0]), 1 << 8), _matmul(a, digits[1]))
    narrow = b.low >= -128 and b.high <= 127 and bytes_
    if not (narrow and (a.low >= 0 or a.high <= 127) and _type(low, high) == np.int32):
        require(INT64.min <= low and high <= INT64.max, "MatMul", a, b)
        tensors = [a.astype(np.int64), b.astype(np.int64)]
        return Value(a.builder, a.builder.node("MatMul", tensors, np.int64), low, high)
    if a.builder.portable and a.low >= 0:
        zeros = [a.builder.constant(np.asarray(zero), np.uint8) for zero in (0, MIDDLE)]
        tensors = [a.astype(np.uint8), _add(b, MIDDLE).astype(np.uint8), *zeros]
    else:
        tensors = [a.astype(np.uint8 if a.low >= 0 else np.int8), b.astype(np.int8)]
    return Value(a.builder, a.builder.node("MatMulInteger", tensors, np.int32), low, high)


def _has_two_bytes(x: Value) -> bool:
    """Whether a value is 256 * high + low of two int8, and not of one."""
    single = x.low >= -MIDDLE and x.high < MIDDLE
    return not single and x.low >= -257 * MIDDLE and x.high < 255 * MIDDLE


def _bytes(x: Value) -> tuple[Value, Value]:
    """The two int8 of which a value is 256 * high + low."""
    raised = _add(x, 257 * MIDDLE)
    high = _right_shift(raised, 8)
    low = _subtract(raised, _left_shift(high, 8)).narrowed(0, 255)
    return _subtract(high, MIDDLE), _subtract(low, MIDDLE)


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
    if not isinstance(axis, int) or not keepdims:
        raise TypeError(f"{op} without one axis or keepdims; expected both")
    dtype = _type(low, high, a.low, a.high)
    axes = a.builder.constant([axis], np.int64)
    shape = a.tensor.shape
    if shape is not None:
        shape = [1 if i == axis % len(shape) else size for i, size in enumerate(shape)]
    tensor = a.builder.node(op, [a.astype(dtype), axes], dtype, shape, keepdims=1)
    return Value(a.builder, tensor, low, high)


def _length(a: Value, axis: int | None) -> tuple[int, int]:
    """The size of an axis, at most and at least: `LONGEST` and 0 if it is dynamic or unknown."""
    shape = a.tensor.shape
    size = shape[axis] if shape is not None and axis is not None else None
    return (size, size) if isinstance(size, int) else (LONGEST, 0)


def _shape(*operands: Operand) -> Shape:
    """The shape operands broadcast to; None if the rank of one is unknown."""
    shapes = [x.tensor.shape if isinstance(x, Value) else np.shape(x) for x in operands]
    if any(shape is None for shape in shapes):
        return None
    rank = max(map(len, shapes))
    columns = zip(*((1,) * (rank - len(s)) + tuple(s) for s in shapes), strict=True)
    return [_dimension(sizes) for sizes in columns]


def _dimension(sizes: Sequence[int | str]) -> int | str:
    """One dimension of a broadcast: a number but 1 is certain, then what is dynamic, then 1."""
    certain = [size for size in sizes if isinstance(size, int) and size != 1]
    dynamic = [size for size in sizes if not isinstance(size, int)]
    return (certain or dynamic or [1])[0]


def _is_boolean(operand: Operand) -> bool:
    return bool((operand if isinstance(operand, Value) else np.asarray(operand)).dtype == np.bool_)


def _is_zero(operand: Operand) -> bool:
    return isinstance(operand, int | np.integer) and operand == 0


def _builder(*operands: Operand) -> Builder:
    return next(x.builder for x in operands if isinstance(x, Value))


def _tensor(builder: Builder, operand: Operand, dtype: np.dtype[Any]) -> gs.Tensor:
    if isinstance(operand, Value):
        return operand.astype(dtype)
    return builder.constant(operand, dtype)


def _type(*bounds: int) -> np.dtype[Any]:
    low, high = min(bounds), max(bounds)
    require(INT64.min <= low and high <= INT64.max, "int64", low, high)
    return np.dtype(np.int32 if INT32.min <= low and high <= INT32.max else np.int64)


def _smallest(low: int, high: int) -> np.dtype[Any]:
    """The smallest type for a table: read, cast, then computed with."""
    candidates = map(np.dtype, ("int8", "uint8", "int32", "int64"))
    return next(d for d in candidates if np.iinfo(d).min <= low and high <= np.iinfo(d).max)
