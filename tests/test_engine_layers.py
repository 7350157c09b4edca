from onnx_intq.engine_layers import Layer, Product, layers_from_text, products

TENSOR = "{ Name: t, Dimensions: [-1,4], Strides: [4,1], Datatype: %s, Format: (NHWC) Channel }"
LINE = "Name: %s, LayerType: %s, Inputs: [%s], Constants: [%s], Outputs: [%s], TacticName: , %s"
WAIT = "Name: e, LayerType: wait, Inputs: [], Constants: [], Outputs: [], TacticName: , "
WAIT += "StreamId: 1, EventId: 29, Metadata: "
REST = "StreamId: 0, Metadata: "


def line(name: str, kind: str, inputs: list[str], nodes: list[str]) -> str:
    source = ", ".join(TENSOR % dtype for dtype in inputs)
    found = "\x1f".join(f"[ONNX Layer: {node}]" for node in nodes)
    return LINE % (name, kind, source, TENSOR % "Half", TENSOR % "Float", f"{REST}{found}")


TEXT = "\n".join(
    [
        "Layers:",
        line("a", "kgen", ["Float"], ["q", "conv, 1]"]),
        line("b, with comma", "correlation", ["Int8"], ["conv, 1]", "d"]),
        line("c", "gemm", ["Float", "Int8"], ["one", "two"]),
        line("d", "runtime_fusion", ["Int8"], ["three"]),
        WAIT,
        line("f", "runtime_fusion", ["Float"], ["four"]),
        "",
        "I/O Tensors:",
        " Name: x, IOMode: Input, DataType: Float",
    ]
)


def test_layers_are_read_from_text() -> None:
    found = layers_from_text(TEXT)
    assert [layer.name for layer in found] == ["a", "b, with comma", "c", "d", "e", "f"]
    assert found[1] == Layer(
        name="b, with comma",
        kind="correlation",
        inputs=("int8",),
        outputs=("float",),
        nodes=("conv, 1]", "d"),
    )
    assert found[4] == Layer(name="e", kind="wait", inputs=(), outputs=(), nodes=())


def test_products_compute_in_the_type_of_their_kernels_first_input() -> None:
    weighted = [("conv, 1]", "conv"), ("two", "matmul"), ("three", "matmul")]
    weighted += [("four", "conv"), ("lost", "conv")]
    assert products(weighted, layers_from_text(TEXT)) == (
        Product(name="conv, 1]", kind="conv", precision="int8"),
        Product(name="two", kind="matmul", precision="float"),
        Product(name="three", kind="matmul", precision=""),
        Product(name="four", kind="conv", precision="float"),
        Product(name="lost", kind="conv", precision=""),
    )


def test_text_in_another_format_gives_no_layers() -> None:
    assert layers_from_text('{"Layers": [{"Name": "a"}]}') == ()
