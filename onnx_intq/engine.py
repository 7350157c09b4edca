"""TensorRT-RTX: parses and builds engines, always in a child process, and says what runs in int8.

The child is `python -m onnx_intq.engine FOLDER`. Networks are strongly typed: all precision is in
the model's Q/DQ nodes. Parsing and building need neither GPU nor driver; running an engine does.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from onnx_intq.child import ChildError, ask, serve
from onnx_intq.engine_layers import Layer, Product, layers_from_text, products
from onnx_intq.engine_profile import Profile, profile
from onnx_intq.graph import first_line, read_model
from onnx_intq.transform import IntqError

BACKENDS: Mapping[str, tuple[str, str]] = {"tensorrt-rtx": ("tensorrt_rtx", "rtx")}
"""Library name -> (Python module, extra that installs it)."""
WEIGHTED = {"CONVOLUTION": "conv", "DECONVOLUTION": "conv_transpose", "MATRIX_MULTIPLY": "matmul"}
"""The library's names of the layers that `Build.products` lists, and ours."""
ENGINE = "engine"
"""The file a child leaves beside its answer."""
TIMEOUT = 1800.0
"""Seconds after which a child is given up; QuartzNet15x5 takes about 11."""


@dataclass(frozen=True, kw_only=True)
class Build:
    """An engine and what the library says of it.

    Attributes:
        engine: The serialized engine ("plan"); it runs on the same library version and GPU kind.
        seconds: What the library's builder took.
        library: A key of `BACKENDS`: an engine of TensorRT-RTX is none of TensorRT.
        version: Of the library.
        compute_capability: The GPU kind it was built for, such as "8.6".
        layers: The engine's layers in order of execution, from text of an undocumented format:
            empty where a version of the library writes it differently.
        products: The model's convolutions and matrix products, and the type each computes in.
    """

    engine: bytes = field(repr=False)
    seconds: float
    library: str
    version: str
    compute_capability: str
    layers: tuple[Layer, ...] = field(repr=False)
    products: tuple[Product, ...] = field(repr=False)

    def count(self, kind: str, precision: str | None = None) -> int:
        """How many products there are of `kind` that compute in `precision` (None: in any)."""
        found = [p for p in self.products if p.kind == kind]
        return len([p for p in found if precision in {None, p.precision}])


@dataclass(frozen=True, kw_only=True)
class Parse:
    """What the library's ONNX parser makes of a model.

    Attributes:
        library: A key of `BACKENDS`.
        version: Of the library.
        layers: Layers of the network.
        refusals: (node name, reason) of what the parser cannot take; it stops at the first.
    """

    library: str
    version: str
    layers: int
    refusals: tuple[tuple[str, str], ...]


def build(
    model: str | Path,
    *,
    backend: str = "tensorrt-rtx",
    compute_capability: str = "8.6",
    shapes: Mapping[str, Profile] | None = None,
    timeout: float = TIMEOUT,
) -> Build:
    """Build an engine for one GPU kind.

    Args:
        model: An ONNX file.
        backend: A key of `BACKENDS`.
        compute_capability: The GPU kind, such as "7.5" (Turing) or "8.6" (Ampere).
        shapes: Smallest, most common and largest shape of inputs with dynamic axes; by default
            1, 1 and 8 for axis 0, and 64, 512 and 2048 for every other one.
        timeout: Seconds after which to give up.

    Raises:
        IntqError: The file is no ONNX model, the library is missing, refuses the model or the
            shapes, crashes, or takes too long.
    """
    found, engine = _ask("build", model, backend, compute_capability, shapes or {}, timeout)
    layers = layers_from_text(found["layers"])
    return Build(
        engine=engine,
        seconds=found["seconds"],
        library=backend,
        version=found["version"],
        compute_capability=compute_capability,
        layers=layers,
        products=products(found["products"], layers),
    )


def parse(
    model: str | Path,
    *,
    backend: str = "tensorrt-rtx",
    compute_capability: str = "7.5",
    timeout: float = TIMEOUT,
) -> Parse:
    """Let the library's ONNX parser read a model, without building an engine.

    Args:
        model: As for `build`.
        backend: As for `build`.
        compute_capability: As for `build`.
        timeout: As for `build`.

    Raises:
        IntqError: The file is no ONNX model, the library is missing, crashes or takes too long.
            What the parser refuses is no error here, but in `Parse.refusals`.
    """
    found, _ = _ask("parse", model, backend, compute_capability, {}, timeout)
    return Parse(
        library=backend,
        version=found["version"],
        layers=found["layers"],
        refusals=tuple((node, why) for node, why in found["refusals"]),
    )


def _ask(
    action: str,
    model: str | Path,
    backend: str,
    compute_capability: str,
    shapes: Mapping[str, Profile],
    timeout: float,
) -> tuple[dict[str, Any], bytes]:
    """Have a child do `action`; return its answer and the engine, if any."""
    if backend not in BACKENDS:
        raise IntqError(f"unknown backend {backend!r}; expected one of: {', '.join(BACKENDS)}")
    read_model(model)  # the library takes any bytes for an empty model
    request = {
        "action": action,
        "model": str(model),
        "backend": backend,
        "compute_capability": compute_capability,
        "shapes": {name: [list(s) for s in profile] for name, profile in shapes.items()},
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            found = ask("onnx_intq.engine", request, folder, timeout)
        except ChildError as error:
            raise IntqError(
                f"{model}: {backend} {error}; expected an answer to {action}; look for the cause "
                "with: onnx-intq check --target tensorrt"
            ) from error
        except IntqError as error:
            raise IntqError(f"{model}: {error}") from error
        engine = folder / ENGINE
        return found, engine.read_bytes() if engine.is_file() else b""


def answer(request: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The child's work: parse; to build, leave the file `ENGINE` in `folder`.

    Raises:
        IntqError: The library is missing, or refuses the model, the shapes or the GPU kind.
    """
    trt = _library(request["backend"])
    log = _logger(trt)
    builder = trt.Builder(log)
    config = _config(trt, builder, request)
    typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(typed)
    parser = trt.OnnxParser(network, log)  # owns the weights: to be kept until the engine is built
    parser.set_builder_config(config)
    parsed = parser.parse_from_file(request["model"])
    errors = [_refusal(parser.get_error(i)) for i in range(parser.num_errors)]
    refusals = [] if parsed else errors or [("", log.first_error)]
    if request["action"] == "parse":
        return {"version": trt.__version__, "layers": network.num_layers, "refusals": refusals}
    name = f"{request['backend']} {trt.__version__}"
    for node, why in refusals:
        raise IntqError(f"{name} cannot parse node {node!r}: {why}; change or remove it")
    _add_profile(builder, config, network, request["shapes"])
    start = time.perf_counter()
    engine = builder.build_serialized_network(network, config)
    seconds = time.perf_counter() - start
    if engine is None:
        raise IntqError(f"{name} cannot build it: {log.first_error}")
    (folder / ENGINE).write_bytes(engine)
    return {
        "version": trt.__version__,
        "seconds": seconds,
        "layers": log.layers,
        "products": _weighted(network),
    }


def _library(backend: str) -> ModuleType:
    module, extra = BACKENDS[backend]
    try:
        return __import__(module)
    except ImportError as error:
        raise IntqError(
            f"cannot import {module} ({first_line(error)}); parsing and building with {backend} "
            f"needs it; run: pip install 'onnx_intq[{extra}]'"
        ) from error


def _logger(trt: Any) -> Any:
    """A logger that keeps the first error and the text about the engine's layers."""

    class Log(trt.ILogger):  # type: ignore[misc]  # known at run time alone
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.first_error = "it gives no reason"
            self.layers = ""
            self._failed = False

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR and not self._failed:
                self.first_error, self._failed = _one_line(message), True
            elif message.startswith("Layers:"):
                self.layers = message

    return Log()


def _config(trt: Any, builder: Any, request: Mapping[str, Any]) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # or it tells no layers
    wanted = request["compute_capability"]
    known = {
        f"{name[2:-1]}.{name[-1]}": value
        for name, value in trt.ComputeCapability.__members__.items()
        if name[2:].isdigit()
    }
    if wanted not in known:
        raise IntqError(
            f"compute capability {wanted!r}; {request['backend']} {trt.__version__} builds for "
            f"{', '.join(sorted(known, key=float))}; change --compute-capability"
        )
    config.num_compute_capabilities = 1
    config.set_compute_capability(known[wanted], 0)
    return config


def _add_profile(builder: Any, config: Any, network: Any, shapes: Mapping[str, Any]) -> None:
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    if unknown := set(shapes) - {t.name for t in inputs}:
        names = ", ".join(t.name for t in inputs)
        raise IntqError(f"shapes given for {min(unknown)!r}; expected for one of: {names}")
    sizes = builder.create_optimization_profile()
    for tensor in inputs:
        found = profile(tensor.name, tuple(tensor.shape), shapes.get(tensor.name))
        sizes.set_shape(tensor.name, *map(tuple, found))
    config.add_optimization_profile(sizes)


def _weighted(network: Any) -> list[tuple[str, str]]:
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    return [(t.name, WEIGHTED[t.type.name]) for t in layers if t.type.name in WEIGHTED]


def _refusal(error: Any) -> tuple[str, str]:
    unnamed = f"{error.node_operator()} number {error.node()}"
    return error.node_name() or unnamed, _one_line(error.desc())


def _one_line(text: str) -> str:
    return " ".join(text.split()).rstrip(".")


if __name__ == "__main__":
    serve(Path(sys.argv[1]), answer)
