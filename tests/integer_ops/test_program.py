"""Steps in order, what each frees, bodies of If."""

import weakref
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx.parser
import pytest

from onnx_intq.graph import graph_from_model
from onnx_intq.integer_ops import OPS
from onnx_intq.integer_ops.program import Program, compiled
from onnx_intq.transform import IntqError

HEADER = '<ir_version: 8, opset_import: ["" : 17]> g '


def program(text: str) -> Program:
    graph = graph_from_model(onnx.parser.parse_model(HEADER + text))
    return compiled(graph, graph.opset)


def test_tensors_are_freed_after_their_last_use(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def spy(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
        alive.append(sum(ref() is not None for ref in seen))
        y = x + 1
        seen.append(weakref.ref(y))
        return y

    monkeypatch.setitem(OPS, "Abs", spy)
    chain = " ".join(f"t{i + 1} = Abs(t{i})" for i in range(6))
    steps = program(f"(int8[4] t0) => (int8[4] t2, int8[4] t6) {{ {chain} }}")
    found = steps.run({"t0": np.zeros(4, np.int8)})
    assert found["t6"].tolist() == [6] * 4
    # Of all before it each sees its own input, and the output t2.
    assert alive == [0, 1, 1, 2, 2, 2]


def test_outputs_may_be_inputs_or_constants() -> None:
    steps = program("(int8[2] x) => (int8[2] x, int8 c, int8[2] y) <int8 c = {7}> {y = Add(x, c)}")
    found = steps.run({"x": np.array([1, 2], np.int8)})
    assert {name: values.tolist() for name, values in found.items()} == {
        "x": [1, 2],
        "c": 7,
        "y": [8, 9],
    }


NESTED = """(int8[n] x, bool a, bool b) => (int8[m] y) <int8 k = {1}> {
    z = Add(x, k)
    y = If (a) <
      then_branch = yes () => (int8[m] p) {
        c = Constant<value=int8 {10}>()
        p = If (b) <
          then_branch = inner () => (int8[m] r) { r = Mul(z, c) },
          else_branch = other () => (int8[m] s) { s = Identity(x) }
        >
      },
      else_branch = no () => (int8[m] q) { c = Constant<value=int8 {-1}>() q = Mul(z, c) }
    >
}"""


@pytest.mark.parametrize(
    ("a", "b", "want"), [(1, 1, [20, 30]), (1, 0, [1, 2]), (0, 1, [-2, -3]), (0, 0, [-2, -3])]
)
def test_if_runs_one_branch_on_outer_tensors(a: int, b: int, want: list[int]) -> None:
    given = {"x": np.array([1, 2], np.int8), "a": np.bool_(a), "b": np.bool_(b)}
    found = program(NESTED).run({name: np.asarray(values) for name, values in given.items()})
    assert found["y"].tolist() == want


def test_a_loop_is_refused() -> None:
    text = """(int64 n, bool t, int8[2] x) => (int8[2] y) { y = Loop (n, t, x) <
        body = turn (int64 i, bool go, int8[2] s) => (bool on, int8[2] next) {
            next = Add(s, s) on = Identity(go) }
    > }"""
    with pytest.raises(
        IntqError, match=r"\(Loop\): operator Loop cannot be run by the interpreter"
    ):
        program(text)


def test_a_failing_node_is_named_with_its_shapes() -> None:
    steps = program("(int8[n] x, int8[m] z) => (int8[] y) { [sum] y = Add(x, z) }")
    given = {"x": np.zeros(2, np.int8), "z": np.zeros(3, np.int8)}
    with pytest.raises(IntqError, match=r"node 'sum' \(Add\) failed .* \[2\], \[3\]: ") as caught:
        steps.run(given)
    assert "\n" not in str(caught.value)
