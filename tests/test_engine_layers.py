import json

import pytest

from onnx_intq.engine_layers import Layer, Product, alone, products, read_layers

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
    found = read_layers(TEXT)
    assert [layer.name for layer in found] == ["a", "b, with comma", "c", "d", "e", "f"]
    assert found[1] == Layer(
        name="b, with comma",
        kind="correlation",
        inputs=("int8",),
        outputs=("float",),
        nodes=("conv, 1]", "d"),
    )
    assert found[4] == Layer(name="e", kind="wait", inputs=(), outputs=(), nodes=())
    assert [layer.multiplies for layer in found] == [False, True, True, False, False, False]


def test_products_compute_in_the_type_of_their_kernels_first_input() -> None:
    weighted = [("conv, 1]", "conv"), ("two", "matmul"), ("three", "matmul")]
    weighted += [("four", "conv"), ("lost", "conv")]
    assert products(weighted, read_layers(TEXT)) == (
        Product(name="conv, 1]", kind="conv", precision="int8"),
        Product(name="two", kind="matmul", precision="float"),
        Product(name="three", kind="matmul", precision=""),
        Product(name="four", kind="conv", precision="float"),
        Product(name="lost", kind="conv", precision=""),
    )


@pytest.mark.parametrize(
    ("key", "told", "expected"),
    [
        ("Format/Datatype", "Thirty-two wide channel vectorized row major Int8 format.", "int8"),
        ("Format/Datatype", "Row major linear FP32", "float"),
        ("Format/Datatype", "Channel major FP16 format where channel % 4 == 0", "half"),
        ("Datatype", "Int8", "int8"),
        ("DataType", "BF16", "bf16"),
        ("Datatype", "Something", ""),
        ("Format", "Row major linear FP32 format (kLINEAR)", ""),
    ],
)
def test_layers_are_read_from_json_of_every_release(key: str, told: str, expected: str) -> None:
    entry = {
        "Name": "conv + relu",
        "LayerType": "CaskConvolution",
        "Inputs": [{"Name": "x", "Dimensions": [1, 2], key: told}],
        "Outputs": [{"Name": "y", "Datatype": "Int32"}],
        "Metadata": "[ONNX Layer: conv]\x1f[ONNX Layer: relu]",
    }
    (found,) = read_layers(json.dumps({"Layers": ["a name alone", entry], "Bindings": ["x"]}))
    assert found == Layer(
        name="conv + relu",
        kind="CaskConvolution",
        inputs=(expected,),
        outputs=("int32",),
        nodes=("conv", "relu"),
    )
    assert found.multiplies
    expected_product = (Product(name="conv", kind="conv", precision=expected),)
    assert products([("conv", "conv")], [found]) == expected_product


@pytest.mark.parametrize(
    "text", ["", "Layers", '{"Layers": ["a"]}', "{no JSON", '{"Bindings": []}']
)
def test_text_in_another_format_gives_no_layers(text: str) -> None:
    assert read_layers(text) == ()


def test_quantizers_that_share_a_layer_with_nothing_else_stand_alone() -> None:
    layers = read_layers(
        "\n".join(
            [
                line("a", "kgen", ["Float"], ["q1"]),
                line("b", "kgen", ["Float"], ["q2", "conv"]),
                line("c", "kgen", ["Float"], ["q3", "dq3"]),
                line("d", "kgen", ["Float"], ["q1"]),
                WAIT,
            ]
        )
    )
    assert alone(layers, ["q1", "q2", "q3", "dq3"]) == ("q1", "q3", "dq3")
    assert alone(layers, ["q2", "q3"]) == ()
