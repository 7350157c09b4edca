"""What is refused when a node is bound, and how inputs are read."""

import onnx.parser
import onnx_graphsurgeon as gs
import pytest
import torch

from onnx_intq.graph import graph_from_model
from onnx_intq.torch_graph import TorchGraph
from onnx_intq.transform import IntqError


def graph(body: str, inputs: str = "float[2,3] x", opset: int = 17) -> gs.Graph:
    header = f'<ir_version: 8, opset_import: ["" : {opset}, "com.microsoft" : 1]>'
    text = f"{header} g ({inputs}) => (float[] y) {{ {body} }}"
    return graph_from_model(onnx.parser.parse_model(text))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("[odd] y = NonMaxSuppression(x)", "node 'odd' .*NonMaxSuppression cannot be run in torch"),
        ("y = com.microsoft.Gelu(x)", "operator com.microsoft.Gelu cannot .* Conv, "),
        ("y = Relu<speed=3>(x)", "attribute 'speed' is not supported"),
        ("y = Clip(x, x, x, x)", "too many positional arguments"),
        ("y, m = LpNormalization(x)", None),
        ("a, m = Relu(x) y = Add(a, m)", "output 2 is not supported"),
        ('y = Gelu<approximate="erf">(x)', "approximate = 'erf' .* one of: 'none', 'tanh'"),
    ],
)
def test_what_is_not_supported_is_named(body: str, message: str | None) -> None:
    if message is None:  # an output that nobody reads does no harm
        TorchGraph(graph(body, opset=20))
        return
    with pytest.raises(IntqError, match=message):
        TorchGraph(graph(body, opset=20))


def test_a_failing_node_is_named_with_its_shapes() -> None:
    net = TorchGraph(graph("[sum] y = Add(x, z)", "float[2,n] x, float[2,m] z"))
    with pytest.raises(IntqError, match=r"node 'sum' \(Add\) .* \[2, 3\], \[2, 4\]") as caught:
        net({"x": torch.ones(2, 3), "z": torch.ones(2, 4)})
    assert "\n" not in str(caught.value)


def test_old_opsets_give_as_attributes_what_new_ones_give_as_inputs() -> None:
    old = "s = Squeeze<axes=[0]>(x) y = Slice<starts=[1], ends=[3], axes=[0]>(s)"
    new = """z = Constant<value_ints=[0]>() s = Squeeze(x, z) b = Constant<value_ints=[1]>()
        e = Constant<value_ints=[3]>() y = Slice(s, b, e, z)"""
    x = torch.arange(4.0)[None]
    for body, opset in ((old, 9), (new, 17)):
        found = TorchGraph(graph(body, "float[1,4] x", opset))({"x": x})["y"]
        assert found.tolist() == [1, 2]


def test_old_broadcasting_starts_at_an_axis() -> None:
    net = TorchGraph(
        graph("y = Add<axis=1, broadcast=1>(x, z)", "float[2,3,4] x, float[3] z", opset=6)
    )
    y = net({"x": torch.zeros(2, 3, 4), "z": torch.arange(3.0)})["y"]
    assert torch.equal(y, torch.arange(3.0)[None, :, None].expand(2, 3, 4))
