"""The whole flow as library functions: order of work, sources of ranges, what is recorded."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs
import pytest

from onnx_intq import feeds, recipes
from onnx_intq import quantize as module
from onnx_intq.calibrate import calibrate
from onnx_intq.frontend import Frontend
from onnx_intq.graph import graph_from_model, load, metadata, sha256
from onnx_intq.progress import Tick
from onnx_intq.quantize import (
    known_facts,
    prepared,
    quantize,
    require_float,
    run_recipe,
)
from onnx_intq.registry import parse
from onnx_intq.runtime import Session
from onnx_intq.source import Source, recorded_frontend
from onnx_intq.transform import CheckFailed, Context, IntqError, Pass, PassError

FLOAT = "drop_identity, fold_bn"


@contextmanager
def silent(title: str) -> Iterator[Tick]:
    yield lambda done, total: None


class Bars:
    """Progress bars that note their titles and how far they got."""

    def __init__(self) -> None:
        self.seen: dict[str, list[tuple[int, int]]] = {}

    @contextmanager
    def __call__(self, title: str) -> Iterator[Tick]:
        ticks = self.seen.setdefault(title, [])
        yield lambda done, total: ticks.append((done, total))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Feeds for the tiny model: three batches."""
    random = np.random.default_rng(0)
    batches = [
        {"audio_signal": random.standard_normal((2, 4, 30)).astype(np.float32)} for _ in range(3)
    ]
    feeds.write(tmp_path / "data.npz", batches)
    return tmp_path / "data.npz"


def parameters(path: Path) -> dict[str, npt.NDArray[Any]]:
    return {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def test_work_is_done_in_order_and_shown(tiny: Path, data: Path) -> None:
    bars, output = Bars(), tiny.with_name("q.onnx")
    done = quantize(tiny, output, recipes.pipeline("ort"), Source(data=data), bar=bars)
    assert list(done.seconds) == ["load", "prepare", "calibrate", "passes", "save"]
    assert bars.seen == {"calibrate": [(1, 3), (2, 3), (3, 3)]}
    assert [r.spec.name for r in done.reports] == [p.name for p in recipes.pipeline("ort")]
    assert (done.quantized, done.left, done.remaining) == ({"Conv": 2}, (), ())
    assert done.bytes_before == tiny.stat().st_size
    assert done.bytes_after == output.stat().st_size
    assert parse(done.recipe) == recipes.pipeline("ort")


@pytest.mark.slow
def test_synthesis_sees_the_batchnorms_that_calibration_does_not(tiny: Path) -> None:
    bars = Bars()
    output = tiny.with_name("q.onnx")
    done = quantize(tiny, output, recipes.pipeline("ort"), Source(seed=5), bar=bars)
    assert list(bars.seen) == ["synthesize", "calibrate"]
    assert "synthesize" in done.seconds
    found = metadata(load(output))
    assert "method='kl'" in found["onnx_intq.synthesis"]
    assert "seed=5" in found["onnx_intq.synthesis"]
    assert found["onnx_intq.seed"] == "5"


def test_no_data_is_made_where_no_pass_needs_it(tiny: Path) -> None:
    bars, output = Bars(), tiny.with_name("q.onnx")
    done = quantize(tiny, output, parse(FLOAT), Source(), bar=bars)
    assert not bars.seen
    assert done.quantized == {}
    # An exact recipe: what float32 rounding leaves is 100 dB and more below the signal.
    assert done.drift.sqnr > 100
    assert metadata(load(output))["onnx_intq.recipe"] == FLOAT
    assert load(output).opset == 17


def test_ranges_stand_in_place_of_data(tiny: Path, data: Path) -> None:
    ranges = tiny.with_name("r.json")
    graph = prepared(tiny)
    assert "BatchNormalization" not in {node.op for node in graph.nodes}
    calibrate(graph, feeds.read(data), observer="minmax").write(ranges)
    for observer in ("minmax", "entropy"):
        for name, source in (("a", Source(data=data)), ("b", Source(ranges=ranges))):
            output = tiny.with_name(f"{name}.onnx")
            quantize(tiny, output, recipes.pipeline("ort"), source, observer=observer, bar=silent)
        a, b = (parameters(tiny.with_name(f"{name}.onnx")) for name in "ab")
        assert all(np.array_equal(a[name], b[name]) for name in a | b)
        found = metadata(load(tiny.with_name("b.onnx")))
        assert found["onnx_intq.ranges_sha256"] == sha256(ranges)
        assert found["onnx_intq.observer"] == observer
        assert "onnx_intq.data_sha256" not in found
    with pytest.raises(IntqError, match=r"both --ranges .* and --data .*; leave one out"):
        Source(ranges=ranges, data=data)


def test_observers_choose_ranges(tiny: Path, data: Path) -> None:
    output, scales = tiny.with_name("q.onnx"), set()
    for observer in ("minmax", "percentile", "mse", "entropy"):
        source = Source(data=data)
        quantize(tiny, output, recipes.pipeline("ort"), source, observer=observer, bar=silent)
        scales.add(float(parameters(output)["audio_signal_scale"]))
    assert len(scales) > 1


@pytest.mark.parametrize("target", ["ort", "tensorrt"])
def test_targets_choose_grids(tiny: Path, data: Path, target: str) -> None:
    output = tiny.with_name("q.onnx")
    quantize(tiny, output, recipes.pipeline(target), Source(data=data), bar=silent)
    points = [v for name, v in parameters(output).items() if name.endswith("_zp")]
    assert {v.dtype for v in points} == {np.dtype(np.uint8 if target == "ort" else np.int8)}
    assert any(v.any() for v in points) == (target == "ort")


def test_widths_reach_the_weights(tiny: Path, data: Path) -> None:
    output = tiny.with_name("q.onnx")
    passes = recipes.pipeline("ort", weight_bits=6, overrides=[("Conv_3", 3)], activation_bits=16)
    done = quantize(tiny, output, passes, Source(data=data), bar=silent)
    found = parameters(output)
    reach = {name: int(np.abs(found[f"{name}_q"].astype(int)).max()) for name in ("w1", "w2")}
    assert reach == {"w1": 31, "w2": 3}
    assert found["audio_signal_zp"].dtype == np.uint16
    assert load(output).opset == 21  # 16-bit QuantizeLinear
    # Three bits on the last layer: some 15 dB; nothing may be lost beyond that.
    assert done.drift.sqnr > 5


def test_old_opsets_are_raised_before_data_is_made(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proto = onnx.load(tiny)
    proto.opset_import[0].version = 11
    onnx.save(proto, tiny)
    order: list[str] = []

    def convert(graph: gs.Graph, version: int) -> None:
        order.append(f"opset {version}")
        raise IntqError("cannot be raised")

    def refuse(*args: object) -> None:
        order.append("data")

    monkeypatch.setattr(module, "convert_opset", convert)
    monkeypatch.setattr(Source, "ranges_of", refuse)
    with pytest.raises(IntqError, match="cannot be raised"):
        quantize(tiny, tiny.with_name("q.onnx"), recipes.pipeline("ort"), Source(), bar=silent)
    assert order == ["opset 13"]


def test_old_opsets_are_raised_and_keep_what_the_model_records(tiny: Path, data: Path) -> None:
    proto = onnx.load(tiny)
    proto.opset_import[0].version = 11
    onnx.save(proto, tiny)
    output = tiny.with_name("q.onnx")
    quantize(tiny, output, recipes.pipeline("ort"), Source(data=data), bar=silent)
    graph = load(output)
    assert graph.opset == 13
    assert recorded_frontend(graph) == Frontend(sample_rate=8000, features=4)
    Session(output)


def test_batchnorms_that_stay_are_named_and_counted(tiny: Path, data: Path) -> None:
    proto = onnx.load(tiny)
    (norm,) = (node for node in proto.graph.node if node.op_type == "BatchNormalization")
    norm.input[0] = "q"  # another operator stands before each
    norm.output[0] = "n2"
    again = onnx.NodeProto()
    again.CopyFrom(norm)
    again.input[0], again.output[0] = "q2", "n"
    at = list(proto.graph.node).index(norm)
    proto.graph.node.insert(at, onnx.helper.make_node("Sigmoid", ["c"], ["q"]))
    proto.graph.node.insert(at + 2, onnx.helper.make_node("Sigmoid", ["n2"], ["q2"]))
    proto.graph.node.insert(at + 3, again)
    onnx.save(proto, tiny)
    output = tiny.with_name("q.onnx")
    with pytest.raises(
        CheckFailed, match=r"BatchNormalization '\w+' cannot be folded \(and 1 more"
    ):
        quantize(tiny, output, recipes.pipeline("ort"), Source(data=data), bar=silent)
    with pytest.raises(CheckFailed, match="cannot be folded"):
        run_recipe(tiny, output, parse(FLOAT), Source(), bar=silent)
    assert not output.exists()
    passes = recipes.pipeline("ort")
    done = quantize(tiny, output, passes, Source(data=data), allow_bn=True, bar=silent)
    assert len(done.remaining) == 2
    assert [node.op for node in load(output).nodes].count("BatchNormalization") == 2


def test_nothing_is_called_quantized_that_is_not(tiny: Path, data: Path) -> None:
    output = tiny.with_name("q.onnx")
    kept = recipes.pipeline("ort", keep=["*"])
    with pytest.raises(IntqError, match=r"nothing was quantized \(Conv_0: kept float by request"):
        quantize(tiny, output, kept, Source(data=data), bar=silent)
    with pytest.raises(IntqError, match=r"no node matches 'Relu_2'; expected .*'Conv_0'"):
        run_recipe(tiny, output, parse("insert_qdq(keep=('Relu_2',))"), Source(), bar=silent)
    assert not output.exists()


@dataclass(frozen=True, kw_only=True)
class Break(Pass):
    """Claims to be exact, and is not."""

    def run(self, model: gs.Graph, ctx: Context) -> int:
        for node in model.nodes:
            if node.op == "Relu":
                node.op = "Abs"
        return 1


def test_verification_stops_a_pass_that_is_not_what_it_claims(tiny: Path) -> None:
    output = tiny.with_name("q.onnx")
    with pytest.raises(PassError, match="although it is exact"):
        quantize(tiny, output, [Break()], Source(), verify=True, bar=silent)
    with pytest.raises(PassError, match="although it is exact"):
        run_recipe(tiny, output, [Break()], Source(), verify=True, bar=silent)
    assert not output.exists()


def test_run_measures_the_drift_of_inexact_passes(tiny: Path, data: Path) -> None:
    ranges, output = tiny.with_name("r.json"), tiny.with_name("o.onnx")
    calibrate(prepared(tiny), feeds.read(data)).write(ranges)
    passes = parse("fold_bn, insert_qdq, quantize_weights")
    reports, drifts = run_recipe(
        tiny, output, passes, Source(ranges=ranges), observer="minmax", verify=True, bar=silent
    )
    assert [report.changes for report in reports] == [1, 2, 2]
    assert drifts.keys() == {"insert_qdq", "quantize_weights"}
    assert drifts["insert_qdq"].sqnr > 15
    found = metadata(load(output))
    assert found["onnx_intq.source_sha256"] == sha256(tiny)
    assert found["onnx_intq.ranges_sha256"] == sha256(ranges)
    assert run_recipe(tiny, None, passes, Source(ranges=ranges), bar=silent)[1] == {}


def test_facts_are_read_off_the_model(tiny: Path, data: Path) -> None:
    assert known_facts(load(tiny)) == set()
    assert known_facts(prepared(tiny)) == {"bn-folded"}
    output = tiny.with_name("q.onnx")
    quantize(tiny, output, recipes.pipeline("ort"), Source(data=data), bar=silent)
    assert known_facts(load(output)) == {"bn-folded", "quantized"}
    # A quantized model can be worked on further, though not be quantized again.
    reports, _ = run_recipe(output, None, parse("quantize_bias"), Source(), bar=silent)
    assert reports[0].changes == 2


def test_quantized_models_are_refused() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
        g (uint8[1, 4] x, float s, uint8 z, uint8[4, 4] w) => (uint8[1, 4] y) {
            y = QLinearMatMul(x, s, z, w, s, z, s, z)
        }"""
    graph = graph_from_model(onnx.parser.parse_model(text))
    with pytest.raises(IntqError, match=r"QLinearMatMul '.*': the model is quantized already"):
        require_float(graph)


def test_speech_needs_a_front_end(tiny: Path, speech: Path) -> None:
    proto = onnx.load(tiny)
    del proto.metadata_props[:]
    onnx.save(proto, tiny)
    output = tiny.with_name("q.onnx")
    with pytest.raises(IntqError, match="give --frontend"):
        quantize(tiny, output, recipes.pipeline("ort"), Source(data=speech), bar=silent)
    given = Source(data=speech, frontend=Frontend(sample_rate=8000, features=4))
    done = quantize(tiny, output, recipes.pipeline("ort"), given, bar=silent)
    assert done.quantized == {"Conv": 2}
