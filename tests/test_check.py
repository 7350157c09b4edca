from collections import Counter
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs
import pytest

from onnx_intq import registry
from onnx_intq.check import RULES, Problem, check, refused, warn
from onnx_intq.engine import Parse
from onnx_intq.engine_refusals import Refusal
from onnx_intq.graph import graph_from_model, load, save
from onnx_intq.models.export import export_named
from onnx_intq.runtime import optimized_ops
from onnx_intq.transform import Context, IntqError, run

RECIPES = {
    "ort": "fold_bn, insert_qdq(target='ort'), quantize_weights(scale='minmax'), quantize_bias",
    "tensorrt": "fold_bn, insert_qdq(target='tensorrt'), quantize_weights(scale='minmax')",
}


def quantized(path: Path, target: str) -> gs.Graph:
    """The model at `path` in Q/DQ form, with the range 0 to 4 behind Relu, else -4 to 4."""
    graph = load(path)
    low = {n.outputs[0].name: 0.0 for n in graph.nodes if n.op == "Relu"}
    ranges = {name: (low.get(name, -4.0), 4.0) for name in graph.tensors()}
    run(graph, registry.parse(RECIPES[target]), Context(facts={"calibrated"}, ranges=ranges))
    return graph


def test_a_problem_names_node_rule_and_what_to_do() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
        g (float[2] x) => (float[2] y) <float s = {1}, uint8 z = {7}> {
            q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) y = Relu(d)
        }"""
    graph = graph_from_model(onnx.parser.parse_model(text))
    assert check(graph, "ort") == []
    advice = "quantize the float model again with --target tensorrt"
    assert check(graph, "tensorrt") == [
        Problem(
            node="QuantizeLinear_0",
            rule="zero-point",
            message=f"zero point 7; expected 0 (symmetric quantization); {advice}",
        ),
        Problem(
            node="QuantizeLinear_0",
            rule="unsigned",
            message=f"quantized to uint8; expected int8; {advice}",
        ),
    ]


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(IntqError, match="unknown target 'tpu'; expected one of: ort, tensorrt"):
        check(gs.Graph(), "tpu")
    with pytest.raises(IntqError, match="unknown target 'tpu'; expected one of: ort, tensorrt"):
        warn(gs.Graph(), "tpu")


@pytest.mark.parametrize("target", RULES)
def test_every_rule_has_a_name_of_its_own(target: str) -> None:
    names = Counter(rule.name for rule in RULES[target])
    assert max(names.values()) == 1


def test_what_the_parser_refuses_is_a_problem_of_its_own() -> None:
    assert refused(None) == []
    refusals = [
        Refusal(node=node, operator="Swoosh", reason="Swoosh is unknown", advice="remove it")
        for node in ("swoosh", "")
    ]
    found = Parse(library="tensorrt-rtx", version="1.7", layers=3, refusals=tuple(refusals))
    message = "Swoosh is unknown; expected what the parser of tensorrt-rtx takes; remove it"
    assert refused(found) == [
        Problem(node="swoosh", rule="parser", message=message),
        Problem(node="model", rule="parser", message=message),
    ]


@pytest.mark.parametrize("lengths", [False, True])
def test_our_own_digits_break_no_rule_of_tensorrt(tmp_path: Path, lengths: bool) -> None:
    export_named("digits", tmp_path / "float.onnx", lengths=lengths)
    save(quantized(tmp_path / "float.onnx", "tensorrt"), tmp_path / "q.onnx")
    graph = load(tmp_path / "q.onnx")
    assert check(graph, "tensorrt") == warn(graph, "tensorrt") == []


@pytest.mark.slow
def test_our_own_masked_quartznet_breaks_no_rule_of_tensorrt(assets: Path, tmp_path: Path) -> None:
    export_named(str(assets / "quartznet15x5.nemo"), tmp_path / "float.onnx", lengths=True)
    save(quantized(tmp_path / "float.onnx", "tensorrt"), tmp_path / "q.onnx")
    graph = load(tmp_path / "q.onnx")
    assert check(graph, "tensorrt") == warn(graph, "tensorrt") == []


@pytest.mark.slow
def test_our_own_quartznet_breaks_no_rule_of_its_target(assets: Path, tmp_path: Path) -> None:
    exported = tmp_path / "float.onnx"
    export_named(str(assets / "quartznet15x5.nemo"), exported)
    assert [p.rule for p in check(load(exported), "ort")] == ["quantized"]
    assert check(load(exported), "tensorrt") == []
    for target, other in (("ort", "tensorrt"), ("tensorrt", "ort")):
        graph = quantized(exported, target)
        save(graph, tmp_path / "q.onnx")
        graph = load(tmp_path / "q.onnx")
        assert check(graph, target) == warn(graph, target) == []
        found = Counter(problem.rule for problem in check(graph, other))
        ops = optimized_ops(tmp_path / "q.onnx")
        if target == "ort":
            assert found == {
                "zero-point": 187 - 78,
                "unsigned": 187,
                "int32-bias": 94,
                "residual": 15,
                "missing-zero-point": 171,
            }
            assert ops["QLinearConv"] == 171
        else:
            assert found == {"unfused": ops["Conv"] + ops["FusedConv"]}
