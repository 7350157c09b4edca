"""Every family of operators: the values of onnxruntime, and the gradient of finite differences."""

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import pytest
import torch
from torch import Tensor

from onnx_intq.graph import graph_from_model
from onnx_intq.torch_graph import TorchGraph
from onnx_intq.transform import IntqError

CASES: dict[str, tuple[str, str]] = {
    "conv1d": (
        "float[2,4,12] x, float[6,4,3] w, float[6] b",
        "y = Conv<pads=[1,2], strides=[2]>(x, w, b)",
    ),
    "conv1d pointwise": ("float[2,4,7] x, float[3,4,1] w, float[3] b", "y = Conv(x, w, b)"),
    "conv1d pointwise, strided": (
        "float[2,4,7] x, float[3,4,1] w",
        "y = Conv<strides=[2]>(x, w)",
    ),
    "conv1d depthwise": (
        "float[2,4,12] x, float[4,1,5] w, float[4] b",
        "y = Conv<pads=[2,2], group=4>(x, w, b)",
    ),
    "conv1d depthwise, dilated": (
        "float[2,4,13] x, float[4,1,3] w, float[4] b",
        "y = Conv<pads=[3,2], group=4, dilations=[3]>(x, w, b)",
    ),
    "conv1d depthwise, doubling": (
        "float[2,3,9] x, float[6,1,3] w",
        'y = Conv<group=3, auto_pad="SAME_UPPER">(x, w)',
    ),
    "conv2d": (
        "float[1,4,6,5] x, float[4,2,3,2] w",
        'y = Conv<group=2, auto_pad="SAME_LOWER", strides=[2,1]>(x, w)',
    ),
    "conv3d": ("float[1,2,3,4,3] x, float[2,2,2,2,2] w", "y = Conv<pads=[0,1,0,1,0,1]>(x, w)"),
    "conv transpose": (
        "float[2,3,5] x, float[3,4,3] w, float[4] b",
        "y = ConvTranspose<strides=[2], pads=[1,0], output_padding=[1]>(x, w, b)",
    ),
    "conv transpose, output shape": (
        "float[1,2,3,3] x, float[2,2,3,3] w",
        "y = ConvTranspose<strides=[2,2], output_shape=[6,6]>(x, w)",
    ),
    "gemm": (
        "float[3,4] x, float[2,3] w, float[2] b",
        "y = Gemm<alpha=0.5, beta=2.0, transA=1, transB=1>(x, w, b)",
    ),
    "einsum": ("float[2,3,4] x, float[2,4,5] w", 'y = Einsum<equation="bij, bjk -> bik">(x, w)'),
    "batch norm": (
        "float[2,3,5] x, float[3] s, float[3] b, float[3] m",
        "v = Constant<value_floats=[0.5,1.0,2.0]>() y = BatchNormalization(x, s, b, m, v)",
    ),
    "layer norm": (
        "float[2,3,4] x, float[3,4] s, float[3,4] b",
        "y = LayerNormalization<axis=1, epsilon=0.001>(x, s, b)",
    ),
    "layer norm, broadcast scale": (
        "float[2,3,4] x, float[4] s, float[1,4] b",
        "y = LayerNormalization<axis=1>(x, s, b)",
    ),
    "instance norm": (
        "float[2,3,4,2] x, float[3] s, float[3] b",
        "y = InstanceNormalization(x, s, b)",
    ),
    "lp norm": ("float[2,3,4] x", "y = LpNormalization<axis=1, p=2>(x)"),
    "lrn": ("float[1,6,3,2] x", "y = LRN<size=3, alpha=0.1>(x)"),
    "max pool": (
        "float[1,2,8,7] x",
        "y = MaxPool<kernel_shape=[3,2], strides=[2,2], pads=[1,0,1,1], ceil_mode=1>(x)",
    ),
    "average pool": (
        "float[1,2,8,7] x",
        "y = AveragePool<kernel_shape=[3,2], strides=[2,2], pads=[1,0,1,1], ceil_mode=1>(x)",
    ),
    "average pool, padding counts": (
        "float[1,2,8] x",
        "y = AveragePool<kernel_shape=[3], pads=[1,1], count_include_pad=1>(x)",
    ),
    "global pools": (
        "float[2,3,4,2] x",
        "a = GlobalAveragePool(x) b = GlobalMaxPool(x) c = GlobalLpPool(x) y = Sum(a, b, c)",
    ),
    "softmax": ("float[2,3,4] x", "a = Softmax<axis=1>(x) b = LogSoftmax(x) y = Add(a, b)"),
    "reductions": (
        "float[2,3,4] x",
        """p = Exp(x)
        a = ReduceL1<axes=[1]>(x) b = ReduceL2<axes=[1]>(x) c = ReduceMax<axes=[1]>(x)
        d = ReduceMin<axes=[1]>(x) e = ReduceMean<axes=[1]>(x) f = ReduceProd<axes=[1]>(x)
        g = ReduceLogSumExp<axes=[1]>(x) h = ReduceSumSquare<axes=[1]>(x)
        i = ReduceLogSum<axes=[1]>(p)
        y = Concat<axis=0>(a, b, c, d, e, f, g, h, i)""",
    ),
    "activations": (
        "float[3,4] x",
        """a = Elu<alpha=0.5>(x) b = Selu(x) c = LeakyRelu<alpha=0.2>(x) d = HardSigmoid(x)
        e = HardSwish(x) f = Softplus(x) g = Softsign(x) h = Erf(x) i = Celu<alpha=2.0>(x)
        j = ThresholdedRelu<alpha=0.3>(x) k = Relu(x) l = Sigmoid(x) m = Tanh(x)
        y = Concat<axis=0>(a, b, c, d, e, f, g, h, i, j, k, l, m)""",
    ),
    "prelu": ("float[2,3,4] x, float[3,1] s", "y = PRelu(x, s)"),
    "clip": (
        "float[3,4] x",
        "l = Constant<value_float=-0.5>() h = Constant<value_float=0.7>() y = Clip(x, l, h)",
    ),
    "arithmetic": (
        "float[3,4] x, float[4] z",
        """a = Mul(x, z) b = Sub(a, z) e = Exp(z) c = Div(b, e) t = Constant<value_float=2.0>()
        d = Pow(c, t) f = Max(d, x) g = Min(f, a) y = Mean(g, x)""",
    ),
    "where": (
        "float[3,4] x, float[3,4] z",
        "c = Greater(x, z) n = Not(c) a = Where(c, x, z) b = Cast<to=1>(n) y = Mul(a, b)",
    ),
    "pad": (
        "float[2,5] x",
        """p = Constant<value_ints=[0,3,1,2]>() q = Constant<value_ints=[0,2,0,1]>()
        v = Constant<value_float=0.5>()
        a = Pad(x, p, v) b = Pad<mode="reflect">(x, q) c = Pad<mode="edge">(x, q)
        d = Concat<axis=1>(b, c) e = ReduceSum<keepdims=0>(a) y = Add(d, e)""",
    ),
    "slices": (
        "float[4,6] x",
        """s = Constant<value_ints=[-1,1]>() e = Constant<value_ints=[-99,5]>()
        t = Constant<value_ints=[-2,2]>() a = Constant<value_ints=[0,1]>()
        y = Slice(x, s, e, a, t)""",
    ),
    "split": ("float[2,7] x", "l = Constant<value_ints=[3,4]>() a, y = Split<axis=1>(x, l)"),
    "gathers": (
        "float[4,3] x",
        """i = Constant<value_ints=[-1,0]>() a = Gather<axis=0>(x, i)
        u = Constant<value=int64[2,3] {0,-1,2,1,1,0}>() b = GatherElements(x, u)
        n = Constant<value=int64[2,1] {3,-4}>() c = GatherND(x, n)
        y = Sum(a, b, c)""",
    ),
    "scatters": (
        "float[4,3] x, float[2,3] u",
        """n = Constant<value=int64[2,1] {3,-4}>() a = ScatterND(x, n, u)
        i = Constant<value=int64[2,3] {0,-1,2,1,1,0}>() b = ScatterElements(x, i, u)
        y = Add(a, b)""",
    ),
    "shapes": (
        "float[2,3,4] x",
        """s = Shape(x) o = Constant<value_ints=[1]>() n = Gather(s, o)
        m = Constant<value_ints=[-1]>() r = Concat<axis=0>(m, n)
        a = Reshape(x, r) b = Flatten<axis=2>(x) c = Reshape(b, r)
        z = ConstantOfShape<value=float[1] {2.0}>(s) d = Reshape(z, r)
        t = Transpose<perm=[1,0]>(a) w = Transpose(t) p = Sum(a, c, d, w)
        e = Constant<value_ints=[2,1,3]>() q = Expand(p, e)
        k = Constant<value_ints=[1,2,1]>() y = Tile(q, k)""",
    ),
    "squeezes": (
        "float[2,1,3] x",
        "i = Constant<value_ints=[1]>() a = Squeeze(x, i) y = Unsqueeze(a, i)",
    ),
    "depth and space": (
        "float[1,8,2,3] x",
        'a = DepthToSpace<blocksize=2, mode="CRD">(x) y = SpaceToDepth<blocksize=2>(a)',
    ),
    "cumulative": (
        "float[3,4] x",
        "i = Constant<value_int=1>() y = CumSum<exclusive=1, reverse=1>(x, i)",
    ),
    "top k": ("float[3,6] x", "k = Constant<value_ints=[2]>() y, i = TopK<largest=0>(x, k)"),
    "triangle": ("float[4,4] x", "k = Constant<value_int=1>() y = Trilu<upper=0>(x, k)"),
    "resize": (
        "float[1,2,4,3] x",
        """s = Constant<value_floats=[1.0,1.0,2.0,1.5]>()
        a = Resize<mode="linear">(x, , s) b = Resize<mode="cubic">(x, , s)
        c = Resize<mode="nearest">(x, , s) y = Sum(a, b, c)""",
    ),
    "lstm": (
        "float[3,2,4] x, float[2,12,4] w, float[2,12,3] r, float[2,24] b",
        'y, h, c = LSTM<hidden_size=3, direction="bidirectional">(x, w, r, b)',
    ),
    "gru": (
        "float[3,2,4] x, float[1,9,4] w, float[1,9,3] r, float[1,18] b",
        "a, h = GRU<hidden_size=3, linear_before_reset=1>(x, w, r, b) y = Squeeze(a)",
    ),
    "rnn": (
        "float[3,2,4] x, float[1,3,4] w, float[1,3,3] r",
        'y, h = RNN<hidden_size=3, direction="reverse", activations=["Relu"]>(x, w, r)',
    ),
}


def model(inputs: str, body: str) -> onnx.ModelProto:
    header = '<ir_version: 8, opset_import: ["" : 17]>'
    return onnx.parser.parse_model(f"{header} g ({inputs}) => (float[] y) {{ {body} }}")


def feeds_for(parsed: onnx.ModelProto) -> dict[str, npt.NDArray[np.float64]]:
    random = np.random.default_rng(0)
    return {
        value.name: random.normal(size=[d.dim_value for d in value.type.tensor_type.shape.dim])
        for value in parsed.graph.input
    }


@pytest.mark.parametrize("name", CASES)
def test_the_values_are_those_of_onnxruntime(name: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    parsed = model(*CASES[name])
    feeds = {k: v.astype(np.float32) for k, v in feeds_for(parsed).items()}
    (want,) = onnxruntime.InferenceSession(
        parsed.SerializeToString(), providers=["CPUExecutionProvider"]
    ).run(None, feeds)
    net = TorchGraph(graph_from_model(parsed))
    (have,) = net({k: torch.from_numpy(v) for k, v in feeds.items()}).values()
    assert have.shape == want.shape
    # Fewer than 128 float32 terms per element: 128 roundings of half a unit in the last place.
    np.testing.assert_allclose(have, want, rtol=0, atol=2**-17 * np.abs(want).max())


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_that_of_finite_differences(name: str) -> None:
    parsed = model(*CASES[name])
    net = TorchGraph(graph_from_model(parsed)).double()
    feeds = feeds_for(parsed)
    tensors = [torch.from_numpy(v).requires_grad_() for v in feeds.values()]

    def function(*given: Tensor) -> Tensor:
        found: dict[str, Tensor] = net(dict(zip(feeds, given, strict=True)))
        assert found["y"].requires_grad
        return found["y"]

    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize(
    ("opset", "body"),
    [
        (7, 'y = Upsample<mode="nearest", scales=[1.0, 2.0]>(x)'),
        (9, "s = Constant<value=float[2] {1.0, 2.0}>() y = Upsample(x, s)"),
        (10, "s = Constant<value=float[2] {1.0, 2.0}>() y = Resize(x, s)"),
    ],
)
def test_upsampling_of_old_opsets(opset: int, body: str) -> None:
    header = f'<ir_version: 8, opset_import: ["" : {opset}]>'
    parsed = onnx.parser.parse_model(f"{header} g (float[1,2] x) => (float[] y) {{ {body} }}")
    found = TorchGraph(graph_from_model(parsed))({"x": torch.tensor([[1.0, 2.0]])})
    assert found["y"].tolist() == [[1, 1, 2, 2]]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("y = Resize(x)", "Resize without scales and sizes"),
        ('a, y = RNN<activations=["Affine"], hidden_size=2>(x, x, x)', "activation Affine"),
        ('y = Pad<mode="wrap">(x, i)', "index_select"),
    ],
)
def test_what_only_shows_when_running_names_the_node(body: str, message: str) -> None:
    parsed = model("float[2,2,2] x, float[6] i", body)
    net = TorchGraph(graph_from_model(parsed))
    with pytest.raises(IntqError, match=rf"^node '.*' .* failed on inputs .*{message}"):
        net({"x": torch.ones(2, 2, 2), "i": torch.ones(6)})


def test_the_mean_of_integers_is_an_integer() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]> g (int32[3] x) => (int32[] y) {
        y = ReduceMean<keepdims=0>(x) }"""
    net = TorchGraph(graph_from_model(onnx.parser.parse_model(text)))
    y = net({"x": torch.tensor([1, 2, 5], dtype=torch.int32)})["y"]
    assert (y.dtype, y.item()) == (torch.int32, 2)
