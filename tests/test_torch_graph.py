"""The torch module made of an ONNX graph."""

import importlib.util
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx.parser
import onnx_graphsurgeon as gs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from onnx_intq.graph import graph_from_model, load
from onnx_intq.torch_graph import TorchGraph, parameter_name, tensor_name
from onnx_intq.torch_ops import OPS
from onnx_intq.transform import IntqError

ROOT = Path(__file__).parent.parent


def graph(signature: str, body: str, opset: int = 17) -> gs.Graph:
    header = f'<ir_version: 10, opset_import: ["" : {opset}]>'
    return graph_from_model(onnx.parser.parse_model(f"{header} g {signature} {{ {body} }}"))


TWO_LAYERS = graph(
    "(float[2,n] x) => (float[2,n] y) <float[2,1] w = {2.0, -1.0}, float c = {0.5}>",
    "a = Mul(x, w) b = Relu(a) y = Add(b, c)",
)


def test_outputs_come_first_then_taps() -> None:
    found = TorchGraph(TWO_LAYERS, taps=["a", "x", "w"])({"x": torch.ones(2, 3)})
    assert list(found) == ["y", "a", "x", "w"]
    assert found["a"].tolist() == [[2] * 3, [-1] * 3]
    assert found["y"].tolist() == [[2.5] * 3, [0.5] * 3]


def test_a_tap_that_does_not_exist_is_refused() -> None:
    with pytest.raises(IntqError, match="tap 'z': the graph has no such tensor"):
        TorchGraph(TWO_LAYERS, taps=["a", "z"])


@pytest.mark.parametrize(
    ("feeds", "message"), [([], "feed 'x' is missing"), (["x", "z"], "feed 'z' is unknown")]
)
def test_feeds_must_be_the_inputs(feeds: list[str], message: str) -> None:
    with pytest.raises(IntqError, match=f"{message}; expected exactly: x"):
        TorchGraph(TWO_LAYERS)({name: torch.ones(2, 3) for name in feeds})


def test_weights_are_parameters_that_train_when_told_to() -> None:
    net = TorchGraph(TWO_LAYERS)
    x = torch.ones(2, 3, requires_grad=True)
    net({"x": x})["y"].sum().backward()
    assert net.weights.keys() == {"w", "c"}
    assert all(p.grad is None for p in net.parameters())
    assert x.grad is not None
    assert x.grad.tolist() == [[2] * 3, [0] * 3]
    net.weights["w"].requires_grad_()
    net({"x": x})["y"].sum().backward()
    assert net.weights["w"].grad is not None
    assert net.weights["w"].grad.tolist() == [[3], [0]]


def test_another_tensor_takes_a_weights_place() -> None:
    net = TorchGraph(TWO_LAYERS)
    other = torch.tensor([[3.0], [4.0]], requires_grad=True)
    weights = {parameter_name("w"): other}
    found = torch.func.functional_call(net, weights, ({"x": torch.ones(2, 1)},))
    assert found["y"].tolist() == [[3.5], [4.5]]
    found["y"].sum().backward()
    assert other.grad is not None
    assert other.grad.tolist() == [[1], [1]]
    assert net.weights["w"].tolist() == [[2], [-1]]


@settings(derandomize=True, deadline=None)
@given(st.text(min_size=1))
def test_parameter_names_read_back(name: str) -> None:
    assert tensor_name(parameter_name(name)) == name
    torch.nn.Module().register_parameter(parameter_name(name), None)


def test_tensors_are_freed_after_their_last_use(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def spy(x: Tensor) -> Tensor:
        alive.append(sum(ref() is not None for ref in seen))
        y = x + 1
        seen.append(weakref.ref(y))
        return y

    monkeypatch.setitem(OPS, "Abs", spy)
    chain = " ".join(f"t{i + 1} = Abs(t{i})" for i in range(6))
    net = TorchGraph(graph("(float[4] t0) => (float[4] t6)", chain), taps=["t2"])
    with torch.no_grad():
        net({"t0": torch.ones(4)})
    # Of all before it each sees its own input, and the tap.
    assert alive == [0, 1, 1, 2, 2, 2]


SHAPES = graph(
    "(float[a,b] x) => (float[] y) <float w = {2.0}>",
    """s = Shape(x) i = Constant<value_ints=[1]>() n = Gather(s, i)
    m = Constant<value_ints=[-1]>() r = Concat<axis=0>(n, m) a = Reshape(x, r)
    t = Constant<value_ints=[0]>() g = Gather<axis=1>(a, t) y = Mul(g, w)""",
)


def test_shape_arithmetic_stays_on_the_cpu() -> None:
    # A meta tensor has no values: reading a shape from one would fail as it would stall a GPU.
    y = TorchGraph(SHAPES).to("meta")({"x": torch.ones(4, 6, device="meta")})["y"]
    assert y.device.type == "meta"
    assert y.shape == (6, 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_what_the_cpu_gives() -> None:
    x = torch.arange(24.0).reshape(4, 6)
    y = TorchGraph(SHAPES).to("cuda")({"x": x.cuda()})["y"]
    assert y.device.type == "cuda"
    assert torch.equal(y.cpu(), TorchGraph(SHAPES)({"x": x})["y"])


def test_nodes_may_come_in_any_order() -> None:
    shuffled = TWO_LAYERS.copy()
    shuffled.nodes.reverse()
    x = {"x": torch.ones(2, 3)}
    assert torch.equal(TorchGraph(shuffled)(x)["y"], TorchGraph(TWO_LAYERS)(x)["y"])


IF = """s = ReduceSum<keepdims=0>(x) c = Greater(s, w)
y = If (c) <
  then_branch = yes () => (float[] p) { k = Constant<value_float=10.0>() p = Mul(x, k) },
  else_branch = no () => (float[] q) { k = Constant<value_float=-1.0>() q = Mul(x, k) }
>"""


@pytest.mark.parametrize(("value", "factor"), [(1.0, 10.0), (-1.0, -1.0)])
def test_if_runs_one_branch_on_outer_tensors(value: float, factor: float) -> None:
    net = TorchGraph(graph("(float[3] x) => (float[] y) <float w = {0.0}>", IF))
    x = torch.full((3,), value, requires_grad=True)
    net({"x": x})["y"].sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [factor] * 3


LOOP = """n = Constant<value_int=3>() t = Constant<value=bool {1}>()
y, rows = Loop (n, t, x) <
  body = turn (int64 i, bool go, float[2] s) => (bool on, float[2] next, float[2] row) {
    next = Mul(s, w) row = Identity(next) on = Identity(go)
  }
>"""


def test_loop_carries_states_and_stacks_rows() -> None:
    net = TorchGraph(graph("(float[2] x) => (float[2] y) <float w = {2.0}>", LOOP), taps=["rows"])
    x = torch.ones(2, requires_grad=True)
    found = net({"x": x})
    assert found["y"].tolist() == [8, 8]
    assert found["rows"].tolist() == [[2, 2], [4, 4], [8, 8]]
    found["y"].sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [8, 8]


QDQ = """s = Constant<value_float=0.5>() z = Constant<value=uint8 {128}>()
q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z)"""


def test_quantizing_passes_gradients_inside_its_grid() -> None:
    net = TorchGraph(graph("(float[n] x) => (float[n] y)", QDQ))
    x = torch.tensor([-64.5, -64.0, 0.24, 0.75, 63.5, 64.0])
    want = [-64.0, -64.0, 0.0, 1.0, 63.5, 63.5]
    assert net({"x": x})["y"].tolist() == want
    x.requires_grad_()
    y = net({"x": x})["y"]
    assert y.tolist() == want
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 0]


def test_four_bit_weights_are_read_by_dequantize_linear_only() -> None:
    # The text holds the bytes: two numbers in the first, 120 = 0x78, and below bfloat16's bits.
    signature = "(float[2] x) => (float[] y) <int4[2] w = {120}, float s = {0.5}>"
    net = TorchGraph(graph(signature, "v = DequantizeLinear(w, s) y = Mul(x, v)", 21))
    assert net({"x": torch.ones(2)})["y"].tolist() == [-4, 3.5]
    with pytest.raises(IntqError, match=r"node '.*' \(Cast\) reads 'w' of type int4"):
        TorchGraph(graph(signature, "v = Cast<to=1>(w) t = Mul(v, s) y = Mul(x, t)", 21))


def test_bfloat16_weights() -> None:
    signature = "(bfloat16[2] x) => (bfloat16[2] y) <bfloat16[2] w = {16320, 49152}>"
    net = TorchGraph(graph(signature, "y = Mul(x, w)"))
    y = net({"x": torch.ones(2, dtype=torch.bfloat16)})["y"]
    assert y.dtype == torch.bfloat16
    assert y.tolist() == [1.5, -2]


def test_strings_have_no_torch_form() -> None:
    values = graph("(float[2] x) => (float[2] y)", "y = Mul(x, x)")
    values.nodes[0].inputs[1] = gs.Constant("names", np.array(["a", "b"], dtype=object))
    with pytest.raises(IntqError, match="element type object has no torch form"):
        TorchGraph(values)


def test_matchboxnet_is_that_of_onnxruntime(assets: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    path = assets / "matchboxnet_3x2x64_all35_bn.onnx"
    net = TorchGraph(load(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (given_,) = session.get_inputs()
    shape = [n if isinstance(n, int) else 100 for n in given_.shape]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
    (want,) = session.run(None, {given_.name: x.detach().numpy()})
    (have,) = net({given_.name: x}).values()
    # 19 convolutions of at most 64 * 29 terms each, rounding errors adding up at random
    assert np.abs(have.detach().numpy() - want).max() <= 1e-4 * np.abs(want).max()
    have.square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert x.grad.abs().max() > 0


@pytest.fixture(scope="module")
def table() -> Iterator[ModuleType]:
    path = ROOT / "tools" / "torch_graph_table.py"
    spec = importlib.util.spec_from_file_location("torch_graph_table", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclass looks up annotations
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "count"), [("light", 9), ("pytorch-converted", 82), ("pytorch-operator", 35)]
)
def test_every_model_of_the_onnx_package_matches(table: ModuleType, kind: str, count: int) -> None:
    found = {case.name: table.outcome(case) for case in table.cases(kind)}
    assert {name: why for name, why in found.items() if why != "match"} == {}
    assert len(found) >= count
