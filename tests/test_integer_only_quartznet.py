"""The real QuartzNet15x5 in integers: proven, equal to its Q/DQ file and to the interpreter."""

from pathlib import Path

import pytest

from onnx_intq import console, feeds, recipes
from onnx_intq.calibrate import calibrate
from onnx_intq.compare import compare
from onnx_intq.evaluate import evaluate
from onnx_intq.feeds import Batch
from onnx_intq.graph import load
from onnx_intq.integer_only import prove
from onnx_intq.interpreter import SideBySide
from onnx_intq.models.export import export_named
from onnx_intq.quantize import prepared, quantize
from onnx_intq.samples import specs
from onnx_intq.source import Source, recorded_frontend

CALIBRATED, COMPARED = 4, 2
"""Utterances."""

pytestmark = pytest.mark.slow


def utterances(model: Path, manifest: Path, count: int) -> list[Batch]:
    net = load(model)
    frontend = recorded_frontend(net)
    return list(feeds.read(manifest, frontend=frontend, inputs=specs(net), limit=count))


@pytest.fixture(scope="module")
def models(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The Q/DQ and the integer-only file, from the same ranges."""
    folder = tmp_path_factory.mktemp("quartznet")
    net, ranges = folder / "float.onnx", folder / "ranges.json"
    export_named(str(assets / "quartznet15x5.nemo"), net)
    batches = utterances(net, assets / "speech_train" / "manifest.json", CALIBRATED)
    calibrate(prepared(net), batches).write(ranges)
    found = folder / "qdq.onnx", folder / "integer.onnx"
    for target, output in zip(("ort", "integer"), found, strict=True):
        quantize(net, output, recipes.pipeline(target), Source(ranges=ranges), bar=console.bar)
    return found


def test_it_is_proven_and_as_small(models: tuple[Path, Path]) -> None:
    qdq, integer = models
    assert prove(load(integer)) == []
    assert integer.stat().st_size <= 1.05 * qdq.stat().st_size


def test_every_requantisation_runs_in_int32(models: tuple[Path, Path]) -> None:
    ops = [node.op for node in load(models[1]).nodes]
    assert ops.count("ConvInteger") == 171
    assert ops.count("Div") >= 171 + 15
    divisions = [n for n in load(models[1]).nodes if n.op == "Div" and "LogSoftmax" not in n.name]
    # A layer with a channel that has no division is rare: three in 20,000 have none.
    assert sum(n.outputs[0].dtype == "int64" for n in divisions) <= 2


def test_it_computes_what_the_qdq_file_computes(models: tuple[Path, Path], assets: Path) -> None:
    qdq, integer = models
    batches = utterances(qdq, assets / "speech_dev" / "manifest.json", COMPARED)
    found = compare(load(qdq), load(integer), batches)
    assert found.differing_per_million(lambda row: row.forced) == 0
    assert found.differing_per_million(lambda row: row.free) == 0
    assert len(found.rows) > 180


def test_its_words_are_the_qdq_file_s(models: tuple[Path, Path], assets: Path) -> None:
    qdq, integer = models
    total = evaluate(integer, assets / "speech_dev" / "manifest.json", against=qdq).total
    assert total.words == 1173
    assert total.differs == 0


def test_the_interpreter_computes_every_tensor(models: tuple[Path, Path], assets: Path) -> None:
    integer = models[1]
    sides = SideBySide(load(integer))
    for batch in utterances(integer, assets / "speech_dev" / "manifest.json", COMPARED):
        assert sides.run(batch) == []
