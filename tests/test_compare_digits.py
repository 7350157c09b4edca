"""The embedded model, its quantized forms of two tools, and what becomes of it when spoilt."""

from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from onnx_intq.compare import compare
from onnx_intq.feeds import Batch, read
from onnx_intq.graph import load
from onnx_intq.models.export import export_named
from onnx_intq.progress import bar
from onnx_intq.quantize import quantize
from onnx_intq.recipes import pipeline
from onnx_intq.samples import specs
from onnx_intq.source import Source, recorded_frontend

pytestmark = pytest.mark.slow

SPEECH = Path(__file__).parent.parent / "models" / "pretrained" / "digits" / "manifest.json"


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, gs.Graph]:
    """The embedded model: float, QDQ of ours, and QDQ of onnxruntime's quantize_static."""
    folder = tmp_path_factory.mktemp("digits")
    paths = {name: folder / f"{name}.onnx" for name in ("float", "qdq", "prepared", "ort")}
    export_named("digits", paths["float"])
    quantize(paths["float"], paths["qdq"], pipeline("ort"), Source(data=SPEECH), bar=bar)

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # untyped
        def __init__(self) -> None:
            self._batches = iter(spoken(load(paths["float"]), 9))

        def get_next(self) -> Batch | None:
            return next(self._batches, None)

    quant_pre_process(paths["float"], paths["prepared"])
    quantize_static(paths["prepared"], paths["ort"], Reader(), quant_format=QuantFormat.QDQ)
    return {name: load(path) for name, path in paths.items()}


def spoken(net: gs.Graph, count: int) -> list[Batch]:
    frontend = recorded_frontend(net)
    return list(read(SPEECH, frontend=frontend, inputs=specs(net), limit=count))


@pytest.mark.parametrize("name", ["qdq", "ort"])
def test_the_embedded_model_and_its_quantized_forms(name: str, digits: dict[str, gs.Graph]) -> None:
    found = compare(digits["float"], digits[name], spoken(digits["float"], 2), threads=1)
    # Input, 26 convolutions, 4 sums, the transposition and the result.
    assert [row.operators[0] for row in found.rows].count("Conv") == 26
    assert len(found.rows) == 33
    assert found.left_out == ()
    assert min(row.forced.sqnr for row in found.rows) > 15
    assert found.outputs[0].free.sqnr > 20
    assert found.rows[0].forced.most_steps == 0


def test_two_tools_quantized_forms_compare(digits: dict[str, gs.Graph]) -> None:
    found = compare(digits["qdq"], digits["ort"], spoken(digits["float"], 1), threads=1)
    assert len(found.rows) == 33
    # The same function, prepared: only float32 rounding lies between.
    found = compare(digits["float"], digits["prepared"], spoken(digits["float"], 1), threads=1)
    assert min(row.free.sqnr for row in found.rows) > 90


@pytest.mark.parametrize("reference", ["float", "qdq"])
def test_a_spoilt_convolution_of_the_embedded_model_is_found(
    reference: str, digits: dict[str, gs.Graph]
) -> None:
    batches = spoken(digits["float"], 1)
    convolutions = [node.name for node in digits["qdq"].nodes if node.op == "Conv"]
    for name in convolutions:
        spoilt = digits["qdq"].copy()
        (node,) = (n for n in spoilt.nodes if n.name == name)
        stored = node.inputs[1].inputs[0].inputs[0]
        stored.values = np.ascontiguousarray(stored.values[::-1])  # its channels in reverse
        found = compare(digits[reference], spoilt, batches, threads=1)
        forced, free = found.forced_entry, found.free_entry
        assert forced is not None
        assert name in forced.nodes
        assert free is forced
        if reference == "qdq":
            assert found.first_difference is forced
            assert [row for row in found.rows if row.forced.noise] == [forced]
