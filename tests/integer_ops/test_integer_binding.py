"""What is refused when a node is bound, and how its inputs are read."""

import numpy as np
import onnx.parser
import pytest

from onnx_intq.interpreter import Interpreter
from onnx_intq.transform import IntqError


def interpreter(body: str, opset: int = 21) -> Interpreter:
    header = f'<ir_version: 8, opset_import: ["" : {opset}, "com.microsoft" : 1]>'
    text = f"{header} g (int32[2,3] x) => (int32[] y) {{ {body} }}"
    return Interpreter(onnx.parser.parse_model(text))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "[odd] y = Erf(x)",
            "node 'odd' .*Erf cannot be run by the interpreter; expected one that works ",
        ),
        ("y = com.microsoft.Gelu(x)", "operator com.microsoft.Gelu cannot .* --target integer"),
        ("y = Neg<speed=3>(x)", "attribute 'speed' is not supported; remove it"),
        ("y = Clip(x, x, x, x)", "too many positional arguments; check its inputs"),
        ("a, m = Neg(x) y = Add(a, m)", "output 2 is not supported; expected it unused"),
        ('y = BitShift<direction="UP">(x, x)', "direction = 'UP' .* one of: 'LEFT', 'RIGHT'"),
    ],
)
def test_what_is_not_supported_is_named(body: str, message: str) -> None:
    with pytest.raises(IntqError, match=message) as caught:
        interpreter(body)
    assert "\n" not in str(caught.value)


def test_an_output_that_nobody_reads_does_no_harm() -> None:
    x = np.arange(6, dtype=np.int32).reshape(2, 3)
    assert interpreter("y, m = Neg(x)").run({"x": x})["y"].tolist() == (-x).tolist()


def test_old_opsets_give_as_attributes_what_new_ones_give_as_inputs() -> None:
    old = "y = Slice<starts=[1], ends=[3], axes=[1]>(x)"
    new = """s = Constant<value_ints=[1]>() e = Constant<value_ints=[3]>()
        a = Constant<value_ints=[1]>() y = Slice(x, s, e, a)"""
    x = np.arange(6, dtype=np.int32).reshape(2, 3)
    for body, opset in ((old, 9), (new, 17)):
        assert interpreter(body, opset).run({"x": x})["y"].tolist() == [[1, 2], [4, 5]]


def test_an_omitted_input_is_none() -> None:
    x = np.arange(6, dtype=np.int32).reshape(2, 3)
    found = interpreter('h = Constant<value=int32 {2}>() y = Clip(x, "", h)').run({"x": x})
    assert found["y"].tolist() == [[0, 1, 2], [2, 2, 2]]
