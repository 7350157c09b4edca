"""Parses a model and builds its engine: the work of the child process, on either library.

Networks are strongly typed: all precision is in the model's Q/DQ nodes, no flag asks for any.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from onnx_intq import engine_api as api
from onnx_intq.engine_library import Library, RtxLibrary
from onnx_intq.engine_log import Log, logger, one_line
from onnx_intq.transform import IntqError

ENGINE, TIMING_CACHE = "engine", "timing_cache"
"""The files a child finds or leaves beside its answer."""
MIB = 1 << 20
WEIGHTED = {"CONVOLUTION": "conv", "DECONVOLUTION": "conv_transpose", "MATRIX_MULTIPLY": "matmul"}
"""The library's names of the layers that compute products, and ours."""
QDQ = {"QUANTIZE", "DEQUANTIZE"}


@dataclass(frozen=True, kw_only=True)
class _Parsed:
    """A model as the library holds it; the parser owns the weights."""

    log: Log
    logger: api.ILogger
    builder: api.Builder
    config: api.IBuilderConfig
    network: api.INetworkDefinition
    parser: api.OnnxParser
    refusals: Sequence[Mapping[str, Any]]


def answer(trt: Library, request: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Do what `request["action"]` says; to build, leave the file `ENGINE` in `folder`.

    Args:
        trt: The library.
        request: "action" is "describe", "parse" or "build"; see `engine.py`.
        folder: Holds the timing cache, if one is to be used, and takes the one that is made.

    Raises:
        IntqError: The library refuses the GPU kind, the shapes or the network. What the parser
            refuses is no error here, but in the answer.
    """
    found: dict[str, Any] = {"version": trt.__version__}
    if request["action"] == "describe":
        return found
    parsed = _parse(trt, request)
    found |= {"layers": parsed.network.num_layers, "refusals": parsed.refusals}
    if request["action"] == "parse" or parsed.refusals:
        return found
    return found | _build(trt, parsed, request, folder)


def _parse(trt: Library, request: Mapping[str, Any]) -> _Parsed:
    log = Log()
    receiver = logger(trt, log)
    builder = _builder(trt, receiver, log, request["backend"])
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # or it tells no layers
    typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(typed)
    parser = trt.OnnxParser(network, receiver)
    if hasattr(trt, "ComputeCapability"):
        _set_target(cast(RtxLibrary, trt), config, request)
        cast(api.RtxOnnxParser, parser).set_builder_config(config)
    parsed = parser.parse_from_file(request["model"])
    errors = [_refusal(parser.get_error(i)) for i in range(parser.num_errors)]
    return _Parsed(
        log=log,
        logger=receiver,
        builder=builder,
        config=config,
        network=network,
        parser=parser,
        refusals=[] if parsed else errors or [_unexplained(log)],
    )


def _build(
    trt: Library, parsed: _Parsed, request: Mapping[str, Any], folder: Path
) -> dict[str, Any]:
    """Build an engine of a parsed model; what it says of itself."""
    config, name = parsed.config, f"{request['backend']} {trt.__version__}"
    _set_shapes(parsed, request["shapes"])
    if request["workspace"] is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request["workspace"] * MIB)
    times = None
    if request["timing_cache"]:  # "must not be destroyed until after the engine is built"
        times = _timing_cache(trt, config, folder / TIMING_CACHE, request["pinned"], name)
    start = time.perf_counter()
    engine = parsed.builder.build_serialized_network(parsed.network, config)
    seconds = time.perf_counter() - start
    if engine is None:
        return {"failure": parsed.log.first_error}
    (folder / ENGINE).write_bytes(engine)
    if times is not None:
        (folder / TIMING_CACHE).write_bytes(times.serialize())
    return {
        "seconds": seconds,
        "text": parsed.log.layers or _inspect(trt, parsed.logger, bytes(engine)),
        "products": _weighted(parsed.network),
        "quantizers": _inner_quantizers(parsed.network),
    }


def information(trt: Library, engine: api.ICudaEngine) -> str:
    """The inspector's JSON about the layers of a loaded engine."""
    inspector = engine.create_engine_inspector()
    return inspector.get_engine_information(trt.LayerInformationFormat.JSON)


def _builder(trt: Library, receiver: api.ILogger, log: Log, backend: str) -> api.Builder:
    try:
        return trt.Builder(receiver)
    except (TypeError, RuntimeError) as error:  # pybind11's words for a builder that is null
        raise IntqError(
            f"{backend} {trt.__version__} cannot start ({log.first_error}); expected a GPU and a "
            "driver it supports; check nvidia-smi"
        ) from error


def _set_target(trt: RtxLibrary, config: api.IBuilderConfig, request: Mapping[str, Any]) -> None:
    """TensorRT-RTX builds for a GPU kind by name; TensorRT has no such setting."""
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
    target = cast(api.RtxIBuilderConfig, config)
    target.num_compute_capabilities = 1
    target.set_compute_capability(known[wanted], 0)


def _set_shapes(parsed: _Parsed, shapes: Mapping[str, Sequence[Sequence[int]]]) -> None:
    sizes = parsed.builder.create_optimization_profile()
    inputs = [parsed.network.get_input(i) for i in range(parsed.network.num_inputs)]
    for tensor in inputs:
        small, common, large = map(tuple, shapes[tensor.name])
        sizes.set_shape(tensor.name, small, common, large)
    parsed.config.add_optimization_profile(sizes)


def _timing_cache(
    trt: Library, config: api.IBuilderConfig, file: Path, pinned: bool, name: str
) -> api.ITimingCache:
    """Let the builder take known times from `file`, if there is one; if pinned, no others.

    The flags are those of "Algorithm Selection and Reproducible Builds" in NVIDIA's guide.
    """
    known = file.read_bytes() if file.is_file() else b""
    config.set_flag(trt.BuilderFlag.EDITABLE_TIMING_CACHE)
    if pinned:
        config.set_flag(trt.BuilderFlag.ERROR_ON_TIMING_CACHE_MISS)
    cache = config.create_timing_cache(known)
    if not config.set_timing_cache(cache, False):
        raise IntqError(
            f"{name} does not take the timing cache; expected one of this release and this GPU; "
            "delete it, or name another with --timing-cache"
        )
    return cache


def _inspect(trt: Library, receiver: api.ILogger, engine: bytes) -> str:
    """The `information` about an engine just built; "" where it cannot be loaded."""
    loaded = trt.Runtime(receiver).deserialize_cuda_engine(engine)
    return "" if loaded is None else information(trt, loaded)


def _weighted(network: api.INetworkDefinition) -> list[tuple[str, str]]:
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    return [(t.name, WEIGHTED[t.type.name]) for t in layers if t.type.name in WEIGHTED]


def _inner_quantizers(network: api.INetworkDefinition) -> list[str]:
    """The Q/DQ nodes that do not stand at the boundary, where they have nothing to fuse with."""
    layers = (network.get_layer(i) for i in range(network.num_layers))
    return [
        layer.name
        for layer in layers
        if layer.type.name in QDQ
        and not layer.get_input(0).is_network_input
        and not layer.get_output(0).is_network_output
    ]


def _refusal(error: api.ParserError) -> dict[str, Any]:
    return {
        "index": error.node(),
        "name": error.node_name(),
        "operator": error.node_operator(),
        "reason": one_line(error.desc()),
        "function": one_line(" ".join(error.local_function_stack())),
    }


def _unexplained(log: Log) -> dict[str, Any]:
    return {"index": -1, "name": "", "operator": "", "reason": log.first_error, "function": ""}
