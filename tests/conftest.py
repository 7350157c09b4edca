"""Fixtures shared by all tests."""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import settings

from onnx_intq.cli import main
from onnx_intq.frontend import Frontend
from onnx_intq.graph import graph_from_model, load, model_from_graph
from onnx_intq.grid import dyadic, requantize
from onnx_intq.integer_only import prove
from onnx_intq.lowering import GRIDS
from onnx_intq.runtime import Session
from onnx_intq.speech import FRONTEND_KEY, LABELS_KEY, labels_to_json
from onnx_intq.transform import Context, Pass, run
from onnx_intq.verify import well_formed

settings.register_profile("reproducible", derandomize=True, deadline=None)
settings.load_profile("reproducible")  # a law that fails once fails every time

ROOT = Path(__file__).parent.parent
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def uneven() -> Callable[..., npt.NDArray[np.float32]]:
    """Makes weights of channels, axis 0, of very different sizes: (seed, shape) -> float32."""

    def make(seed: int = 0, shape: tuple[int, ...] = (6, 40)) -> npt.NDArray[np.float32]:
        rng = np.random.default_rng(seed)
        sizes = 10.0 ** rng.uniform(-3, 1, (shape[0],) + (1,) * (len(shape) - 1))
        return (rng.standard_normal(shape) * sizes).astype(np.float32)

    return make


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real models and speech; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("INTQ_ASSETS", ROOT.parent / "shared" / "assets"))
    if not folder.is_dir():
        pytest.skip(f"no assets at {folder}; set INTQ_ASSETS")
    return folder


TINY = """<ir_version: 8, opset_import: ["" : 17]>
    tiny (float[batch, 4, time] audio_signal) => (float[batch, time, 3] log_probs) {
        c = Conv<pads = [1, 1]>(audio_signal, w1)
        n = BatchNormalization(c, gamma, beta, mean, variance)
        r = Relu(n)
        l = Conv(r, w2, b2)
        t = Transpose<perm = [0, 2, 1]>(l)
        log_probs = LogSoftmax(t)
    }"""
"""A recognizer of the letter a and the space: Conv, BatchNormalization, Relu, Conv."""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """The file `m.onnx`: a recognizer with random weights, one BatchNormalization, 4 mel bands."""
    random = np.random.default_rng(0)
    weights = {
        "w1": random.standard_normal((8, 4, 3)),
        "gamma": random.uniform(0.5, 2, 8),
        "beta": random.standard_normal(8),
        "mean": random.standard_normal(8),
        "variance": random.uniform(5, 20, 8),
        "w2": random.standard_normal((3, 8, 1)),
        "b2": random.standard_normal(3),
    }
    model = onnx.parser.parse_model(TINY)
    for name, values in weights.items():
        tensor = onnx.numpy_helper.from_array(values.astype(np.float32), name)
        model.graph.initializer.append(tensor)
    frontend = Frontend(sample_rate=8000, features=4)
    recorded = {FRONTEND_KEY: frontend.to_json(), LABELS_KEY: labels_to_json("a ")}
    onnx.helper.set_model_props(model, recorded)
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    return path


@pytest.fixture
def rnnt(tmp_path: Path) -> Path:
    """The folder `rnnt`: an RNN-T with random weights for the front end and labels of `tiny`.

    Its weights are so large that it writes something other for other features.
    """
    torch = pytest.importorskip("torch")
    from onnx_intq.models.rnnt import Rnnt, RnntConfig
    from onnx_intq.models.rnnt_export import export_rnnt

    config = RnntConfig(
        labels=("a", " "), features=4, factor=3, width=8, predictor=6, joint=5, predictor_layers=2
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        network = Rnnt(config).eval()
        for parameter in network.parameters():
            parameter.mul_(3)
    frontend = Frontend(sample_rate=8000, features=4)
    export_rnnt(network, tmp_path / "rnnt", frontend=frontend)
    return tmp_path / "rnnt"


@pytest.fixture
def speech(tmp_path: Path) -> Path:
    """A manifest of two utterances of noise, half a second each, that are said to be words."""
    soundfile = pytest.importorskip("soundfile")
    folder = tmp_path / "speech"
    folder.mkdir()
    lines: list[str] = []
    for number in range(2):
        noise = np.random.default_rng(number).uniform(-0.5, 0.5, 4000 + 400 * number)
        soundfile.write(folder / f"{number}.wav", noise, 8000)
        lines.append(json.dumps({"audio_filepath": f"{number}.wav", "text": "a a"}))
    manifest = folder / "manifest.json"
    manifest.write_text("\n".join(lines))
    return manifest


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `onnx-intq` with the arguments given; returns exit code, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["onnx-intq", *map(str, arguments)])
        code: object = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        assert isinstance(code, int)
        return code, captured.out, captured.err

    return call


Feeds = Mapping[str, np.ndarray]


@pytest.fixture
def foreign(tmp_path: Path) -> Callable[..., gs.Graph]:
    """Quantizes a float model with onnxruntime's `quantize_static`, uint8, in QDQ format."""
    quantization = pytest.importorskip("onnxruntime.quantization")

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc,name-defined]
        def __init__(self, feeds: Sequence[Feeds]) -> None:
            self._feeds: Iterator[Feeds] = iter(feeds)

        def get_next(self) -> Feeds | None:
            return next(self._feeds, None)

    def quantized(model: onnx.ModelProto, feeds: Sequence[Feeds], **options: Any) -> gs.Graph:
        unsigned = quantization.QuantType.QUInt8
        path = tmp_path / "foreign.onnx"
        options = {"activation_type": unsigned, "weight_type": unsigned} | options
        quantization.quantize_static(
            model, path, Reader(feeds), quant_format=quantization.QuantFormat.QDQ, **options
        )
        return load(path)

    return quantized


Parameters = tuple[str, float, int]
"""Type, scale and zero point."""


def _place_graph(
    body: str, result: Parameters, *operands: Parameters, shapes: Any = ("n, 6",), **constants: Any
) -> gs.Graph:
    """The nodes `body` of a, b ..., the dequantized inputs x0, x1 ...; c is quantized to q."""
    pairs = zip(operands, shapes, strict=True)
    inputs = [f"{p[0]}[{shape}] x{i}" for i, (p, shape) in enumerate(pairs)]
    names = "abcdef"
    read = [f"{names[i]} = DequantizeLinear(x{i}, scale{i}, zero{i})" for i in range(len(operands))]
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 21]>
        g ({", ".join(inputs)}) => ({result[0]} q) {{
            {" ".join(read)} {body}
            q = QuantizeLinear(c, scale, zero)
        }}"""
    )
    model.graph.output[0].type.tensor_type.ClearField("shape")
    for index, (dtype, scale, zero_point) in enumerate((result, *operands)):
        suffix = str(index - 1) if index else ""
        constants[f"scale{suffix}"] = np.float32(scale)
        constants[f"zero{suffix}"] = np.array(zero_point, dtype)
    for name, values in constants.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(values), name))
    return graph_from_model(model)


def _place_lower(spec: Pass, model: gs.Graph) -> list[str]:
    """Lower; doing so again must change nothing. Returns why something remains.

    Where nothing remains, the model is proven to be integer-only.
    """
    ctx = Context(facts={"complete"})
    first, second = run(model, [spec, spec], ctx, [well_formed])
    assert second.changes == 0
    assert second.skipped == first.skipped
    assert bool(first.changes) != bool(first.skipped)
    if first.changes:
        assert prove(model) == []
    return [why for _, why in first.skipped]


def _place_outputs(model: gs.Graph, *inputs: Any) -> Any:
    """What onnxruntime computes, int64."""
    feeds = {f"x{i}": values for i, values in enumerate(inputs)}
    (result,) = Session(model_from_graph(model), threads=1).run(feeds).values()
    return result.astype(np.int64)


def _requantized(values: Any, scale: float, result: Parameters, reach: int = 0) -> Any:
    """Integers, at most `reach`, with a scale on the result's grid, by the reference."""
    dtype, steps, zero_point = result
    grid, bits = GRIDS[dtype], min(31, 62 - reach.bit_length())
    multiplier = dyadic(scale / float(np.float32(steps)), 62 - grid.bits, bits)
    return requantize(values, multiplier, zero_point=zero_point, low=grid.low, high=grid.high)


def _reals(q: Any, parameters: Parameters) -> Any:
    """The real values of integers, float64."""
    _, scale, zero_point = parameters
    return (np.asarray(q, np.int64) - zero_point) * float(np.float32(scale))


def _saturated(values: Any, parameters: Parameters) -> Any:
    """Real values, cut to those that the grid can hold."""
    grid = GRIDS[parameters[0]]
    return np.clip(values, _reals(grid.low, parameters), _reals(grid.high, parameters))


def _integers(dtype: str, shape: tuple[int, ...], seed: int = 0) -> Any:
    """All integers of the type, again and again; of 16 bits a random choice and both ends."""
    info, size = np.iinfo(dtype), int(np.prod(shape))
    if info.bits == 8:
        return np.resize(np.arange(info.min, info.max + 1), size).astype(dtype).reshape(shape)
    chosen = np.random.default_rng(seed).integers(info.min, info.max + 1, size)
    chosen[:2] = info.min, info.max
    return chosen.astype(dtype).reshape(shape)


@pytest.fixture(scope="session")
def place() -> SimpleNamespace:
    """Builds, lowers and runs one place: `DequantizeLinear.. -> operators -> QuantizeLinear`."""
    return SimpleNamespace(
        graph=_place_graph,
        lower=_place_lower,
        outputs=_place_outputs,
        requantized=_requantized,
        reals=_reals,
        saturated=_saturated,
        integers=_integers,
    )
