"""onnxruntime on the CPU: sessions, what its optimiser made of a model, latency side by side."""

from __future__ import annotations

import functools
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from onnx_intq.feeds import Batch, TensorSpec, check
from onnx_intq.graph import PROTOBUF_LIMIT, first_line, require_model_file
from onnx_intq.hollow import Hollow
from onnx_intq.transform import IntqError

Model = str | Path | bytes | onnx.ModelProto | Hollow
"""A model's file, its serialized bytes, the model itself, or that with its weights apart."""
PROVIDERS = ("CPUExecutionProvider",)
QUIET = 4
"""onnxruntime's log level "fatal": what fails is raised, and told in one line, by us."""
ERROR_PREFIX = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ")
DTYPES: Mapping[str, npt.DTypeLike] = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(bool)": np.bool_,
    "tensor(string)": np.object_,
    **{f"tensor({sign}int{n})": f"{sign}int{n}" for sign in ("", "u") for n in (8, 16, 32, 64)},
    "tensor(float16)": np.float16,
}
"""NumPy's types for onnxruntime's type names."""
PROBE = """<ir_version: 8, opset_import: ["" : 13]>
    probe (uint8[4,64] x, int8[64,16] w) => (int32[4,16] y) { y = MatMulInteger(x, w) }"""


class Session:
    """A model loaded into onnxruntime on the CPU.

    Where the processor's u8 x s8 products saturate (x86 without VNNI), onnxruntime is told to use
    exact, slower ones; elsewhere that setting would only cost speed. It needs `optimize`.

    Attributes:
        inputs: What `run` takes.
        outputs: What `run` gives.
        metadata: The model's `metadata_props`.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    metadata: Mapping[str, str]

    def __init__(
        self,
        model: Model,
        *,
        threads: int | None = None,
        optimize: bool = True,
        spin: bool = True,
        arena: bool = True,
    ) -> None:
        """Load `model`.

        Args:
            model: Files may exceed 2 GB; so may a ModelProto, which then goes through a temporary
                file.
            threads: Threads per operator, None for all processors.
            optimize: Whether onnxruntime may fuse nodes; without, every node runs as written.
            spin: Whether idle threads wait actively: lower latency for more processor time.
            arena: Whether memory of one run is kept for the next; for many sessions it adds up.

        Raises:
            IntqError: onnxruntime is missing or refuses the model, the file is missing, or the
                model has integer products that this processor would compute wrongly.
        """
        self._name = str(model) if isinstance(model, str | Path) else "model"
        options = _options(threads, optimize=optimize)
        options.enable_cpu_mem_arena = arena
        if not spin:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if saturates():
            options.add_session_config_entry("session.x64quantprecision", "1")
        self._weights = model.weights if isinstance(model, Hollow) else {}  # read where they are
        self._session = _create(model, options)
        if saturates():
            _require_exact(model, self._name)
        self.inputs = tuple(_spec(value, self._name) for value in self._session.get_inputs())
        self.outputs = tuple(_spec(value, self._name) for value in self._session.get_outputs())
        self.metadata = dict(self._session.get_modelmeta().custom_metadata_map)

    def run(self, feeds: Batch, names: Sequence[str] | None = None) -> dict[str, npt.NDArray[Any]]:
        """Run the model once.

        Args:
            feeds: One array per input.
            names: The outputs wanted, None for all.

        Raises:
            IntqError: The feeds do not fit the inputs, an output does not exist, or running fails.
        """
        known = [output.name for output in self.outputs]
        wanted = known if names is None else list(names)
        if unknown := [name for name in wanted if name not in known]:
            raise IntqError(
                f"{self._name}: no output {unknown[0]!r}; expected one of: {', '.join(known)}"
            )
        check(feeds, self.inputs)
        if not wanted:  # onnxruntime would take no names for all names
            return {}
        try:
            results = self._session.run(wanted, dict(feeds))
        except Exception as error:
            raise IntqError(f"{self._name}: onnxruntime cannot run it: {_reason(error)}") from error
        return dict(zip(wanted, results, strict=True))


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Latency of one model among several timed in turn, seconds per run.

    Attributes:
        median: Over all rounds.
        low: 10th percentile.
        high: 90th percentile.
        ratio: Median over rounds of this model's time divided by the first model's in that round.
        rounds: Timed runs.
    """

    median: float
    low: float
    high: float
    ratio: float
    rounds: int


def latency(
    models: Sequence[Model],
    feeds: Sequence[Batch],
    *,
    rounds: int = 20,
    seconds: float = 0,
    threads: int = 1,
) -> list[Timing]:
    """Time models in turn, A B A B ..., in this process, so that all see the same machine.

    Args:
        models: At least one.
        feeds: One batch per model.
        rounds: At least this many runs of each, after one round of warm-up.
        seconds: Rounds go on until this much time has passed.
        threads: Threads per operator.

    Raises:
        IntqError: As for `Session` and `Session.run`, or fewer than one round was asked for.
    """
    if rounds < 1:
        raise IntqError(f"{rounds} rounds of timing; expected at least 1; raise the number")
    sessions = [Session(model, threads=threads) for model in models]
    turns = list(zip(sessions, feeds, strict=True))
    for session, batch in turns:
        session.run(batch)
    times: list[list[float]] = []
    start = time.perf_counter()
    while len(times) < rounds or time.perf_counter() - start < seconds:
        times.append([_time(session, batch) for session, batch in turns])
    return list(timings(np.array(times)))


def optimized_ops(model: Model) -> Counter[str]:
    """Count the operator types of the graph onnxruntime actually runs, bodies of nodes included.

    A quantized model is fused well where no QuantizeLinear is left but at the graph's boundary.

    Raises:
        IntqError: As for `Session`.
    """
    options = _options(threads=1, optimize=True)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "optimized.onnx"
        options.optimized_model_filepath = str(target)
        # The written graph may exceed protobuf's 2 GB, so its weights go beside it.
        key = "session.optimized_model_external_initializers_file_name"
        options.add_session_config_entry(key, "weights")
        _create(model, options)
        written = onnx.load(str(target), load_external_data=False)
    return Counter(_operators(written.graph))


@functools.cache
def saturates() -> bool:
    """Whether this processor's u8 x s8 matrix products saturate at 16 bits; a fixed fact.

    Source: "U8S8 saturation", onnxruntime.ai/docs/performance/model-optimizations/quantization.
    """
    session = _create(onnx.parser.parse_model(PROBE), _options(threads=1, optimize=True))
    x, w = np.full((4, 64), 255, np.uint8), np.full((64, 16), 127, np.int8)
    (y,) = session.run(None, {"x": x, "w": w})
    return bool((y != 64 * 255 * 127).any())


def _require_exact(model: Model, name: str) -> None:
    """Refuse products of uint8 weights and int8 activations: they saturate, and nothing helps.

    onnxruntime's setting for exact products replaces int8 constants alone.
    """
    graph = _structure(model).graph
    constants = _constants(graph)
    for node in graph.node:
        if node.op_type in {"ConvInteger", "MatMulInteger"} and _is_mixed(node, graph, constants):
            raise IntqError(
                f"{name}: {node.op_type} {node.name!r} multiplies uint8 by int8 activations, which "
                "this processor (x86 without VNNI) gets wrong; expected a model for any processor; "
                "quantize it with --cpu any"
            )


def _constants(graph: onnx.GraphProto) -> set[str]:
    """Initializers, and what is made of them alone, such as weights that are packed."""
    found = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if node.input and all(name in found or not name for name in node.input):
            found.update(node.output)
    return found


def _is_mixed(node: onnx.NodeProto, graph: onnx.GraphProto, constants: set[str]) -> bool:
    """Whether a product's zero points, which our models always give, have the two types."""
    found = {t.name: t.data_type for t in graph.initializer}
    kinds = {found.get(name) for name in node.input[2:4]}
    activation = node.input[0 if node.op_type == "ConvInteger" else 1]
    int8, uint8 = onnx.TensorProto.INT8, onnx.TensorProto.UINT8
    return kinds == {int8, uint8} and activation not in constants


def _structure(model: Model) -> onnx.ModelProto:
    """The model without its external weights."""
    if isinstance(model, Hollow):
        return model.model
    if isinstance(model, onnx.ModelProto):
        return model
    if isinstance(model, bytes):
        return onnx.load_model_from_string(model)
    return onnx.load(str(model), load_external_data=False)


def _options(threads: int | None, *, optimize: bool) -> Any:
    if threads is not None and threads < 1:
        raise IntqError(f"{threads} threads; expected at least 1; change the number")
    ort = _onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = QUIET
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    # Idle threads of one session must not take time from another that is being timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def _create(model: Model, options: Any) -> Any:
    if isinstance(model, str | Path):
        require_model_file(model)
        return _load(str(model), options, str(model))
    if isinstance(model, bytes):
        return _load(model, options, "model")
    if isinstance(model, Hollow):
        values = map(_onnxruntime().OrtValue.ortvalue_from_numpy, model.weights.values())
        options.add_external_initializers(list(model.weights), list(values))
        return _load(model.referring().SerializeToString(), options, "model")
    if sum(len(tensor.raw_data) for tensor in model.graph.initializer) < PROTOBUF_LIMIT:
        return _load(model.SerializeToString(), options, "model")
    with tempfile.TemporaryDirectory() as folder:
        copy, target = onnx.ModelProto(), str(Path(folder) / "model.onnx")
        copy.CopyFrom(model)  # save_model empties the tensors it writes
        onnx.save_model(copy, target, save_as_external_data=True, location="weights")
        del copy
        return _load(target, options, "model")


def _load(source: str | bytes, options: Any, name: str) -> Any:
    ort = _onnxruntime()
    try:
        return ort.InferenceSession(source, options, providers=list(PROVIDERS))
    except Exception as error:
        raise IntqError(f"{name}: onnxruntime cannot load it: {_reason(error)}") from error


def _onnxruntime() -> ModuleType:
    try:
        import onnxruntime
    except ImportError as error:
        raise IntqError(
            f"cannot import onnxruntime ({first_line(error)}); running a model needs it; "
            "run: pip install 'onnx_intq[cpu]'"
        ) from error
    found: ModuleType = onnxruntime
    return found


def _spec(value: Any, model: str) -> TensorSpec:
    if value.type not in DTYPES:
        expected = "expected tensors of numbers; export it without"
        raise IntqError(f"{model}: {value.name!r} has type {value.type}; {expected}")
    return TensorSpec(
        name=value.name, dtype=np.dtype(DTYPES[value.type]), shape=tuple(value.shape or ())
    )


def _reason(error: Exception) -> str:
    return ERROR_PREFIX.sub("", first_line(error))


def _time(session: Session, feeds: Batch) -> float:
    start = time.perf_counter()
    session.run(feeds)
    return time.perf_counter() - start


def timings(times: npt.NDArray[np.float64]) -> Iterator[Timing]:
    """What each column of [rounds, models] says, in seconds; ratios are to the first."""
    ratios = np.median(times / times[:, :1], axis=0)
    percentiles = np.percentile(times, (10, 50, 90), axis=0)
    for (low, median, high), ratio in zip(percentiles.T, ratios, strict=True):
        yield Timing(
            median=float(median),
            low=float(low),
            high=float(high),
            ratio=float(ratio),
            rounds=len(times),
        )


def _operators(graph: onnx.GraphProto) -> Iterator[str]:
    for node in graph.node:
        yield node.op_type
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                yield from _operators(body)
