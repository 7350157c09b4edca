from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from onnx_intq.graph import Names
from onnx_intq.transform import IntqError
from onnx_intq.value import Builder, Value, highest, lowest, require

INT64 = np.iinfo(np.int64)


def builder(name: str = "node") -> Builder:
    graph = gs.Graph(opset=21)
    return Builder(graph, Names(graph), {}, name)


def value(low: int, high: int, dtype: Any = np.int32) -> Value:
    return builder().value(gs.Variable("x", dtype, [2, "n"]), low, high)


def ops(of: Value) -> list[str]:
    return [node.op for node in of.builder.graph.nodes]


def test_equal_constants_share_one_initializer() -> None:
    to = builder()
    first = to.constant([1, 2], np.int32)
    assert first is to.constant(np.array([1, 2], np.int64), np.int32)
    others = [
        to.constant([1, 2], np.int64),
        to.constant([[1, 2]], np.int32),
        to.constant([2, 1], np.int32),
        to.constant(1, np.int32),
        to.constant([1], np.int32),
    ]
    assert len({id(c) for c in (first, *others)}) == 6
    assert [c.name for c in (first, *others)] == ["c0", "c1", "c2", "c3", "c4", "c5"]
    assert [c.values.shape for c in (first, *others)] == [(2,), (2,), (1, 2), (2,), (), (1,)]
    assert first.values.dtype == np.int32


def test_constants_own_their_values() -> None:
    values = np.array([1, 2], np.int32)
    kept = builder().constant(values[::-1], np.int32)
    values[:] = 0
    assert kept.values.tolist() == [2, 1]


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (np.array([256]), np.uint8),
        (np.array([-1]), np.uint8),
        (np.array(1 << 31), np.int32),
        (0.5, np.int64),
        (np.array([1, np.float64(2.25)]), np.int32),
    ],
)
def test_constants_that_their_type_does_not_hold_are_a_bug(values: Any, dtype: Any) -> None:
    with pytest.raises(AssertionError, match=r"a constant that u?int.* does not hold"):
        builder().constant(values, dtype)


def test_nodes_are_numbered_and_bear_the_name_of_their_place() -> None:
    to = builder("conv1")
    x = gs.Variable("t0", np.int32, [3])
    to.graph.inputs = [x]
    to.names = Names(to.graph)
    y = to.node("Clip", [x], np.int32, [3])
    z = to.node("Cast", [y], np.int8, to=3)
    assert [t.name for t in (y, z)] == ["t1", "t2"]
    assert [n.name for n in to.graph.nodes] == ["conv1_t1", "conv1_t2"]
    assert (y.shape, z.shape) == ([3], None)
    assert (y.dtype, z.dtype) == (np.int32, np.int8)
    assert to.graph.nodes[1].attrs == {"to": 3}
    assert to.graph.nodes[1].inputs == [y]


def test_a_cast_is_emitted_once_whatever_the_interval() -> None:
    x = value(0, 255)
    assert x.astype(np.int32) is x.tensor
    assert x.astype("int32") is x.tensor
    narrow = x.narrowed(0, 127)
    wide = narrow.astype(np.int64)
    assert x.astype(np.int64) is wide
    assert narrow.astype(np.int8) is narrow.astype(np.int8)
    assert ops(x) == ["Cast", "Cast"]
    assert (wide.dtype, wide.shape) == (np.int64, [2, "n"])
    assert x.builder.graph.nodes[0].attrs == {"to": 7}


def test_a_cast_that_may_lose_something_is_refused() -> None:
    x = value(0, 256)
    with pytest.raises(IntqError, match=r"Cast to uint8: operands in 0\.\.256 leave"):
        x.astype(np.uint8)
    wrapped = x.astype(np.uint8, wrap=True)
    assert wrapped.dtype == np.uint8
    with pytest.raises(IntqError, match="Cast to uint8"):  # although there is such a tensor now
        x.astype(np.uint8)
    assert x.astype(np.uint8, wrap=True) is wrapped
    with pytest.raises(IntqError, match="Cast to int8"):
        value(-129, 0).astype(np.int8)


def test_intervals_only_get_narrower() -> None:
    x = value(-10, 10)
    for low, high, expected in (
        (-5, 5, (-5, 5)),
        (-20, 3, (-10, 3)),
        (10, 90, (10, 10)),
        (-99, 99, (-10, 10)),
    ):
        found = x.narrowed(low, high)
        assert (found.low, found.high) == expected
        assert found.tensor is x.tensor
    with pytest.raises(AssertionError, match=r"nothing lies both in -10\.\.10"):
        x.narrowed(11, 20)


def test_bounds_of_operands() -> None:
    x = value(-3, 7)
    assert (lowest(x), highest(x)) == (-3, 7)
    assert (lowest(5), highest(5)) == (5, 5)
    constant = np.array([[4, -2], [1 << 40, 0]])
    assert (lowest(constant), highest(constant)) == (-2, 1 << 40)
    assert (lowest(1 << 70), highest(-(1 << 70))) == (1 << 70, -(1 << 70))
    for real in (0.5, np.array([1.0]), np.float32(2)):
        for bound in (lowest, highest):
            with pytest.raises(TypeError, match="a float beside a traced value"):
                bound(real)  # type: ignore[arg-type]


def test_refusals_tell_the_intervals() -> None:
    require(True, "Add", 1)
    message = (
        r"Mul: operands in -3\.\.7, 5\.\.6 leave the integers' range; expected narrower inputs; "
        "use fewer bits, or keep the node float"
    )
    with pytest.raises(IntqError, match=message):
        require(False, "Mul", value(-3, 7), np.array([5, 6]))


def test_a_value_decides_no_branch_and_is_no_sequence() -> None:
    x = value(0, 1)
    with pytest.raises(TypeError, match=r"a branch on a traced value; expected np\.where"):
        bool(x)
    with pytest.raises(TypeError):
        len(x)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        x[0]  # type: ignore[index]
    with pytest.raises(TypeError):
        int(x)  # type: ignore[call-overload]
