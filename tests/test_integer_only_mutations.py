"""Integer graphs pass; whatever float is put on whichever of their edges is found and named."""

from collections.abc import Iterator, Sequence
from typing import Any

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from onnx_intq.graph import graph_from_model
from onnx_intq.integer_only import Finding, examine, prove
from onnx_intq.tensor_types import typed_graph

CONV = """
    g (float[1, 2, time] x) => (float[1, 3, time] y)
        <float sx = {0.1}, uint8 zx = {128}, float sy = {0.2}, int8 zy = {-3}, uint8 zw = {128},
         uint8[3, 2, 1] w = {1, 2, 3, 4, 5, 200}, int64 b = {1518500250},
         int64[3, 1] bias = {1, 2, 3}, int64 half = {32768}, int64 power = {65536},
         int64 z = {-3}, int64 low = {-128}, int64 high = {127}> {
            q = QuantizeLinear(x, sx, zx)
            acc = ConvInteger(q, w, zx, zw)
            wide = Cast<to = 7>(acc)
            biased = Add(wide, bias)
            product = Mul(biased, b)
            rounded = Add(product, half)
            shifted = Div(rounded, power)
            placed = Add(shifted, z)
            clipped = Clip(placed, low, high)
            narrow = Cast<to = 3>(clipped)
            y = DequantizeLinear(narrow, sy, zy)
        }"""
BODIES = """
    g (float[1, 4] x, int64[1] length, bool loud) => (float[1, 4] y, bool[4] mask, int64[1] rest)
        <float s = {0.1}, uint8 z = {128}, int32 zero = {0}, int64 three = {3}, bool yes = {1},
         int64[1] one = {1}, int64 first = {0}, int64 step = {1}, int64[1] axis = {0}> {
            q = QuantizeLinear(x, s, z)
            wide = Cast<to = 6>(q)
            chosen = If(loud) <
                then_branch = a () => (int32[1, 4] p) <int32 two = {2}> {
                    m = Mul(wide, two)
                    p = Max(m, zero)
                },
                else_branch = b () => (int32[1, 4] r) { r = Identity(wide) }>
            looped = Loop(three, yes, chosen) <
                body = c (int64 i, bool go, int32[1, 4] state) => (bool on, int32[1, 4] next) {
                    on = Identity(go)
                    count = Cast<to = 6>(i)
                    next = Add(state, count)
                }>
            start = Squeeze(chosen, axis)
            scanned, sums = Scan<num_scan_inputs = 1, body =
                d (int32[4] last, int32[4] row) => (int32[4] total, int32[4] now) {
                    total = Add(last, row)
                    now = Sub(total, last)
                }>(start, looped)
            y = DequantizeLinear(sums, s, zero)
            shape = Shape(q)
            frames = Gather(shape, step)
            steps = Range(first, frames, step)
            mask = Less(steps, length)
            rest = Sub(length, one)
        }"""
INT8 = """
    g (int8[2, 4] x, int64[1] length) => (int8[2, 3] y)
        <int8[4, 3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}, int8 zx = {5}, int32 half = {8},
         int32 four = {16}, int32 low = {-128}, int32 high = {127}> {
            acc = MatMulInteger(x, w, zx)
            rounded = Add(acc, half)
            shifted = Div(rounded, four)
            short = Cast<to = 6>(length)
            kept = Less(short, high)
            masked = Where(kept, shifted, low)
            above = Max(masked, low)
            within = Min(above, high)
            y = Cast<to = 3>(within)
        }"""
MODELS = {"conv": CONV, "bodies": BODIES, "int8": INT8}
OTHER_TYPES = ("FLOAT", "FLOAT16", "DOUBLE", "BFLOAT16", "STRING")
Edge = tuple[GraphProto, NodeProto, int, int]


def model(text: str, opset: int = 17) -> ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]>{text}')


def graphs(graph: GraphProto) -> Iterator[GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from graphs(attribute.g)


def edges(proto: ModelProto) -> list[Edge]:
    """Every edge that carries integers, in bodies too: who reads it, as which input, which type."""
    types = {tensor.name: tensor.type for tensor in typed_graph(proto).tensors}
    return [
        (graph, node, index, TensorProto.DataType.Value(str(types[name])[7:-1].upper()))
        for graph in graphs(proto.graph)
        for node in graph.node
        for index, name in enumerate(node.input)
        if types[name] != "tensor(float)"
    ]


class Insertion:
    """Puts nodes between a tensor and one of its readers; those that must be found are `bad`."""

    def __init__(self, proto: ModelProto, edge: Edge, tag: str) -> None:
        self.graph, self.reader, self.index, self.type = edge
        self.proto, self.tag = proto, tag
        self.tensor = self.reader.input[self.index]
        self.nodes: list[NodeProto] = []
        self.bad: list[str] = []

    def node(self, op: str, inputs: Sequence[str], *, bad: bool = True, **attributes: Any) -> str:
        """A new node; its output's name."""
        name = f"{self.tag}{op}{len(self.nodes)}"
        output = f"{name}_out"
        self.nodes.append(onnx.helper.make_node(op, inputs, [output], name=name, **attributes))
        if bad:
            self.bad.append(name)
        return output

    def constant(self, name: str, type_: int, value: float) -> str:
        name = f"{self.tag}{name}"
        self.proto.graph.initializer.append(onnx.helper.make_tensor(name, type_, [], [value]))
        return name

    def done(self, output: str) -> None:
        """Let the reader read `output` in place of the tensor."""
        at = next(i for i, node in enumerate(self.graph.node) if node is self.reader)
        self.reader.input[self.index] = output
        for node in reversed(self.nodes):
            self.graph.node.insert(at, node)

    def apply(self, kind: str) -> list[str]:
        """Do what `kind` says; the names of the nodes that must be found."""
        if kind in OTHER_TYPES:
            self.through(TensorProto.DataType.Value(kind))
        else:
            getattr(self, kind)()
        return self.bad

    def through(self, other: int) -> None:
        self.done(self.node("Cast", [self.node("Cast", [self.tensor], to=other)], to=self.type))

    def combine(self, real: str) -> None:
        """Let the reader read the tensor with a float one added to it, as an integer."""
        number = self.node("Cast", [real], to=self.type)
        op = "And" if self.type == TensorProto.BOOL else "Add"
        self.done(self.node(op, [self.tensor, number], bad=False))

    def relu(self) -> None:
        relu = self.node("Relu", [self.node("Cast", [self.tensor], to=TensorProto.FLOAT)])
        self.done(self.node("Cast", [relu], to=self.type))

    def pair(self) -> None:
        scale = self.constant("s", TensorProto.FLOAT, 0.5)
        zero = self.constant("z", TensorProto.INT8, 0)
        short = self.node("Cast", [self.tensor], bad=False, to=TensorProto.INT8)
        real = self.node("DequantizeLinear", [short, scale, zero])
        again = self.node("QuantizeLinear", [real, scale, zero])
        self.done(self.node("Cast", [again], bad=False, to=self.type))

    def qlinear(self) -> None:
        scale = self.constant("s", TensorProto.FLOAT, 0.5)
        zero = self.constant("z", TensorProto.INT8, 0)
        short = self.node("Cast", [self.tensor], bad=False, to=TensorProto.INT8)
        four = [short, scale, zero]
        product = self.node("QLinearMatMul", [*four, *four, scale, zero])
        self.done(self.node("Cast", [product], bad=False, to=self.type))

    def domain(self) -> None:
        self.proto.opset_import.append(onnx.helper.make_opsetid("com.acme", 1))
        self.done(self.node("Twice", [self.tensor], domain="com.acme"))

    def unknown(self) -> None:
        self.done(self.node("Twice", [self.tensor]))

    def value_float(self) -> None:
        self.combine(self.node("Constant", [], value_float=1.0))

    def value_floats(self) -> None:
        self.node("Constant", [], value_floats=[1.0])
        self.done(self.node("Identity", [self.tensor], bad=False))

    def initializer(self) -> None:
        self.combine(self.constant("one", TensorProto.FLOAT, 1))

    def random(self) -> None:
        real = self.node("RandomUniformLike", [self.tensor], dtype=TensorProto.FLOAT)
        self.done(self.node("Cast", [real], to=self.type))

    def sequence(self) -> None:
        some = self.node("SequenceConstruct", [self.tensor])
        at = self.constant("at", TensorProto.INT64, 0)
        self.done(self.node("SequenceAt", [some, at]))

    def optional(self) -> None:
        self.done(self.node("OptionalGetElement", [self.node("Optional", [self.tensor])]))

    def body(self) -> None:
        outer, self.nodes = self.nodes, []
        relu = self.node("Relu", [self.node("Cast", [self.tensor], to=TensorProto.FLOAT)])
        result = self.node("Cast", [relu], to=self.type)
        yes = self._body("yes", self.nodes, result)
        self.nodes = []
        same = self.node("Identity", [self.tensor], bad=False)
        no = self._body("no", self.nodes, same)
        self.nodes = outer
        condition = self.constant("condition", TensorProto.BOOL, 1)
        self.done(self.node("If", [condition], bad=False, then_branch=yes, else_branch=no))

    def _body(self, name: str, nodes: list[NodeProto], output: str) -> GraphProto:
        result = onnx.helper.make_tensor_value_info(output, self.type, None)
        return onnx.helper.make_graph(nodes, f"{self.tag}{name}", [], [result])


KINDS = (
    *OTHER_TYPES,
    "relu",
    "pair",
    "qlinear",
    "value_float",
    "value_floats",
    "initializer",
    "random",
    "sequence",
    "optional",
    "body",
)
UNKNOWN = ("domain", "unknown")
"""Operators whose results have no known type: what follows from them is not named."""


def named(findings: Sequence[Finding]) -> set[str]:
    """The nodes found; "model" stands for inference, which refuses some of the shapes."""
    return {finding.node for finding in findings} - {"model"}


@pytest.mark.parametrize("text", MODELS.values(), ids=MODELS)
def test_integer_graphs_pass(text: str) -> None:
    proto = model(text)
    onnx.checker.check_model(proto, full_check=True)
    assert prove(proto) == []
    assert prove(graph_from_model(proto)) == []


def test_what_was_proven_is_counted() -> None:
    proof = examine(model(BODIES))
    assert proof.findings == ()
    assert (proof.nodes, proof.tensors) == (20, 39)
    assert (proof.quantizers, proof.dequantizers, proof.unread) == (1, 1, ())
    proof = examine(model(INT8))
    assert (proof.nodes, proof.tensors) == (9, 17)
    assert (proof.quantizers, proof.dequantizers) == (0, 0)


@pytest.mark.parametrize("kind", [*KINDS, *UNKNOWN])
@pytest.mark.parametrize("text", MODELS.values(), ids=MODELS)
def test_whatever_is_put_on_any_edge_is_found_and_nothing_else(text: str, kind: str) -> None:
    for number in range(len(edges(model(text)))):
        proto = model(text)
        bad = Insertion(proto, edges(proto)[number], "new_").apply(kind)
        findings = prove(proto)
        holders = {"If_2", "Loop_3", "Scan_5"} if kind in UNKNOWN else set[str]()  # they pass it on
        assert named(findings) - holders == set(bad), f"edge {number}"
        assert all(f.why and (f.tensor or f.node == "model") for f in findings)


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_several_insertions_are_all_found(data: st.DataObject) -> None:
    proto = model(data.draw(st.sampled_from(list(MODELS.values()))))
    places = edges(proto)
    chosen = data.draw(st.sets(st.integers(0, len(places) - 1), min_size=2, max_size=5))
    bad = [
        name
        for number in sorted(chosen)
        for name in Insertion(proto, places[number], f"new{number}_").apply(
            data.draw(st.sampled_from(KINDS))
        )
    ]
    assert named(prove(proto)) == set(bad)
