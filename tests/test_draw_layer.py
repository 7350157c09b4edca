"""tools/draw_layer.py: the README's picture of a layer before and after."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from onnx_intq import console, recipes
from onnx_intq.models.export import export_named
from onnx_intq.quantize import quantize
from onnx_intq.source import Source
from onnx_intq.transform import IntqError

ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "models" / "pretrained" / "digits" / "manifest.json"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw_layer", ROOT / "tools" / "draw_layer.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_layer_is_drawn_from_both_files(tool: ModuleType, tmp_path: Path) -> None:
    net, qdq, integer = (tmp_path / f"{name}.onnx" for name in ("float", "qdq", "integer"))
    export_named("digits", net)
    source = Source(data=DIGITS)
    quantize(net, qdq, recipes.pipeline("ort"), source, bar=console.bar)
    lowering = recipes.pipeline("integer", quantized=True)
    quantize(qdq, integer, lowering, Source(), bar=console.bar)
    first, second = tmp_path / "a.png", tmp_path / "b.png"
    for picture in (first, second):
        tool.draw(picture, qdq, integer, "encoder.encoder.1.mconv.3_q")
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(IntqError, match="no tensor 'x'; expected the quantized result"):
        tool.draw(first, qdq, integer, "x")
