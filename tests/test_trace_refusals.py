from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from onnx_intq.graph import Names
from onnx_intq.trace import Builder, bounded
from onnx_intq.transform import IntqError

Function = Callable[..., Any]


def value(bounds: tuple[int, int], shape: tuple[int, ...] | None = (4,)) -> Any:
    graph = gs.Graph(opset=21)
    x = gs.Variable("x", np.int64, shape)
    return Builder(graph, Names(graph), {}).value(x, *bounds)


@pytest.mark.parametrize("shift", [-1, 63, 64, np.array([3, -2])])
def test_impossible_shifts_are_refused(shift: Any) -> None:
    functions: list[Function] = [lambda x: x << shift, lambda x: x >> shift]
    for function in functions:
        with pytest.raises(IntqError, match="a shift"):
            function(value((0, 1)))
    with pytest.raises(TypeError, match="a shift by a traced value"):
        1 << value((0, 1))
    with pytest.raises(TypeError, match="a float"):
        value((0, 1)) << 1.5


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x % 3,
        lambda x: divmod(x, 3),
        lambda x: x / 3,
        lambda x: x**2,
        lambda x: x & 1,
        lambda x: ~x,
        lambda x: x != 1,
        lambda x: +x,
        lambda x: np.sqrt(x),
        lambda x: np.exp(x),
        lambda x: np.min(x, axis=0, keepdims=True),
        lambda x: np.mean(x),
        lambda x: np.concatenate([x, x]),
        lambda x: np.reshape(x, (2, 2)),
        lambda x: np.cumsum(x),
        lambda x: np.add.reduce(x),
        lambda x: np.add(x, 1, out=np.zeros(4, int)),
        lambda x: np.add(x, 1, where=[True]),
        lambda x: x.__iadd__(1),
        lambda x: np.sum(x, axis=0),
        lambda x: np.sum(x, keepdims=True),
        lambda x: np.sum(x, axis=(0,), keepdims=True),
        lambda x: np.max(x, axis=(0,), keepdims=True),
        lambda x: np.max(x, axis=0),
        lambda x: np.sum(x, axis=0, keepdims=True, dtype=np.int32),
        lambda x: np.clip(x, None, 3),
        lambda x: x + 0.5,
        lambda x: 2.0 * x,
        lambda x: x // 2.5,
        lambda x: np.where(x, 1, 2),
        lambda x: np.where(x < 2),
        lambda x: (x < 2) + (x < 3),
        lambda x: np.array([True]) + (x < 3),
        lambda x: max(x, 1),
        lambda x: 1 if x == 1 else 2,
    ],
)
def test_what_is_not_supported_is_an_error(function: Function) -> None:
    for shape in ((4,), None):
        with pytest.raises(TypeError):
            function(value((1, 9), shape))


def test_in_place_writes_are_errors() -> None:
    x = value((1, 9))
    with pytest.raises(TypeError):
        x += 1
    with pytest.raises(TypeError):
        x[0] = 1
    array = np.zeros(4, int)
    with pytest.raises(TypeError):
        array += value((1, 9))


def test_constants_beyond_64_bits_are_refused() -> None:
    functions: list[Function] = [
        lambda x, c: x + c,
        lambda x, c: c * x,
        lambda x, c: x - c,
        lambda x, c: x // abs(c),
        lambda x, c: (x - 5) // abs(c),
        lambda x, c: x < c,
        lambda x, c: np.where(x < 1, x, c),
        lambda x, c: np.maximum(x, c),
        lambda x, c: np.minimum(x, c),
        lambda x, c: np.clip(x, 1, c) if c > 0 else np.clip(x, c, 0),
    ]
    for constant in (1 << 64, -(1 << 64)):
        for function in functions:
            with pytest.raises(IntqError, match="leave the integers' range"):
                function(value((0, 9)), constant)


def test_division_by_what_may_be_0_is_refused() -> None:
    functions: list[Function] = [
        lambda x: 10 // x,
        lambda x: x // x,
        lambda x: x // 0,
        lambda x: x // -1,
        lambda x: x // np.array([3, 0]),
    ]
    for function in functions:
        for bounds in ((0, 9), (-9, 9)):
            with pytest.raises(IntqError, match="division by a value that may be below 1"):
                function(value(bounds))


def test_bounded_narrows_values_and_checks_arrays() -> None:
    x = value((0, 1 << 40))
    y = bounded(x, -7, 100)
    assert (y.low, y.high) == (0, 100)
    assert y.tensor is x.tensor
    assert (y + 1).dtype == np.int32
    array = np.array([-7, 100])
    assert bounded(array, -7, 100) is array
    assert bounded(5, 5, 5) == 5
    empty = np.zeros((0, 3), int)
    assert bounded(empty, 1, 0) is empty
    for low, high in ((-6, 100), (-7, 99)):
        with pytest.raises(AssertionError, match=rf"-7\.\.100 is not within {low}\.\.{high}"):
            bounded(array, low, high)
    with pytest.raises(AssertionError, match="nothing lies both in"):
        bounded(x, -7, -1)
