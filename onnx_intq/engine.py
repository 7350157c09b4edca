"""TensorRT and TensorRT-RTX: parse a model, build its engine, run it. The only importer of both.

Parsing and building happen in a child process, `python -m onnx_intq.engine FOLDER`: a crash of the
library ends the child alone. TensorRT-RTX parses and builds without GPU and driver; TensorRT, which
times kernels, and running an engine need both.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from onnx_intq import engine_build, engine_device, engine_refusals
from onnx_intq.child import ChildError, ask, serve
from onnx_intq.engine_build import ENGINE, TIMING_CACHE
from onnx_intq.engine_layers import Layer, Product, alone, products, read_layers
from onnx_intq.engine_library import Library
from onnx_intq.engine_profile import Profile, profiles
from onnx_intq.engine_refusals import Refusal
from onnx_intq.engine_session import EngineSession
from onnx_intq.graph import first_line, graph_from_model, read_model
from onnx_intq.transform import IntqError

BACKENDS: Mapping[str, tuple[str, str]] = {
    "tensorrt": ("tensorrt", "tensorrt"),
    "tensorrt-rtx": ("tensorrt_rtx", "rtx"),
}
"""Library name -> (Python module, extra that installs it)."""
SUFFIX = ".engine"
"""Of engine files."""
ANY_GPU = "8.6"
"""The compute capability TensorRT-RTX builds for where there is no GPU: it has int8 kernels."""
TIMEOUT = 3600.0
"""Seconds after which a child is given up; QuartzNet15x5 takes TensorRT-RTX about 11."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """What to build with, and for.

    Attributes:
        backend: A key of `BACKENDS`.
        compute_capability: The GPU kind, such as "7.5".
        gpu: The GPU's name; None where the engine is built for GPUs of this kind, not on one.
        note: What the user should know of the choice; "" for nothing.
    """

    backend: str
    compute_capability: str
    gpu: str | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Build:
    """An engine and what the library says of it.

    Attributes:
        engine: The serialized engine ("plan"); it runs on the same library version and GPU kind.
        seconds: What the library's builder took.
        library: A key of `BACKENDS`: an engine of TensorRT-RTX is none of TensorRT.
        version: Of the library.
        compute_capability: The GPU kind it was built for, such as "8.6".
        shapes: The profile of every input.
        layers: The engine's layers in order of execution; empty where a version of the library
            describes them in a way that is not known here.
        products: The model's convolutions and matrix products, and the type each computes in.
        alone: Q/DQ nodes, but those at the boundary, that were not fused with any operator.
        timing_cache: The times of the kernels tried, b"" where none were asked for.
    """

    engine: bytes = field(repr=False)
    seconds: float
    library: str
    version: str
    compute_capability: str
    shapes: dict[str, Profile]
    layers: tuple[Layer, ...] = field(repr=False)
    products: tuple[Product, ...] = field(repr=False)
    alone: tuple[str, ...] = ()
    timing_cache: bytes = field(default=b"", repr=False)

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
        refusals: What the parser cannot take.
    """

    library: str
    version: str
    layers: int
    refusals: tuple[Refusal, ...]


@dataclass(frozen=True, kw_only=True)
class TimingCache:
    """Times of kernels to take over, or an empty collection to fill.

    Attributes:
        known: From an earlier build of this release for this GPU; b"" for none.
        pinned: Whether a kernel without a known time is an error: then a build repeats another.
    """

    known: bytes = field(default=b"", repr=False)
    pinned: bool = False


def library(backend: str) -> Library:
    """Import a library.

    Raises:
        IntqError: It is unknown, missing or broken; the message names the command that installs it.
    """
    module, extra = _backend(backend)
    try:
        return cast(Library, importlib.import_module(module))
    except ImportError as error:
        raise IntqError(
            f"cannot import {module} ({first_line(error)}); {backend} needs it; run: "
            f"pip install 'onnx_intq[{extra}]'"
        ) from error


def choose(backend: str | None = None, compute_capability: str | None = None) -> Target:
    """What to build with, and for: by default TensorRT on the GPU at hand, else TensorRT-RTX.

    Raises:
        IntqError: TensorRT was asked for and is not installed, has no GPU, or was asked for a GPU
            kind that is not at hand: it times kernels on the very GPU it builds for.
    """
    gpu = engine_device.gpu()
    note = ""
    if backend is None:
        installed = importlib.util.find_spec("tensorrt") is not None
        backend = "tensorrt" if installed and gpu else "tensorrt-rtx"
        lacking = [] if gpu else ["GPU"]
        lacking += [] if installed else ["tensorrt"]
        if lacking:
            note = f"no {' and no '.join(lacking)} here: built with tensorrt-rtx, another product"
    if _backend(backend)[0] == "tensorrt_rtx":
        target = compute_capability or (gpu.compute_capability if gpu else ANY_GPU)
        return Target(backend=backend, compute_capability=target, note=note)
    if importlib.util.find_spec("tensorrt") is None:
        library(backend)
    found = engine_device.require_gpu(f"building with {backend}, which times kernels,")
    if compute_capability not in {None, found.compute_capability}:
        raise IntqError(
            f"compute capability {compute_capability}; {backend} builds for the GPU at hand, "
            f"{found.name} ({found.compute_capability}); build there, or with --backend "
            "tensorrt-rtx"
        )
    return Target(backend=backend, compute_capability=found.compute_capability, gpu=found.name)


def version(backend: str) -> str:
    """The version of a library, found in a child process.

    Raises:
        IntqError: It is missing.
    """
    try:
        with tempfile.TemporaryDirectory() as name:
            request = {"action": "describe", "backend": backend}
            found = ask("onnx_intq.engine", request, Path(name), TIMEOUT)
    except ChildError as error:
        raise IntqError(f"{backend} {error}; expected its version; install it again") from error
    return str(found["version"])


def build(
    model: str | Path,
    *,
    backend: str = "tensorrt-rtx",
    compute_capability: str = ANY_GPU,
    shapes: Mapping[str, Profile] | None = None,
    workspace: int | None = None,
    timing_cache: TimingCache | None = None,
    timeout: float = TIMEOUT,
) -> Build:
    """Build an engine for one GPU kind.

    Args:
        model: An ONNX file.
        backend: A key of `BACKENDS`.
        compute_capability: The GPU kind, such as "7.5" (Turing) or "8.6" (Ampere).
        shapes: Smallest, most common and largest shape of inputs; see `engine_profile.profiles`.
        workspace: MiB of GPU memory that a layer may use; None for all there is.
        timing_cache: Times to take over; None for none.
        timeout: Seconds after which to give up.

    Raises:
        IntqError: The file is no ONNX model, the library is missing, refuses the model or the
            shapes, crashes, or takes too long.
    """
    _backend(backend)
    loaded = read_model(model)  # the library takes any bytes for an empty model
    sizes = profiles(graph_from_model(loaded), shapes or {})
    request = {
        "action": "build",
        "model": str(model),
        "backend": backend,
        "compute_capability": compute_capability,
        "shapes": sizes,
        "workspace": workspace,
        "timing_cache": timing_cache is not None,
        "pinned": timing_cache is not None and timing_cache.pinned,
    }
    known = {TIMING_CACHE: timing_cache.known} if timing_cache and timing_cache.known else {}
    found, files = _ask(request, known, timeout)
    name = f"{model}: {backend} {found['version']}"
    for refusal in engine_refusals.refusals(loaded, found["refusals"]):
        raise IntqError(f"{name} cannot parse {refusal}")
    if "failure" in found:
        reason = engine_refusals.failure(loaded, found["failure"])
        raise IntqError(f"{name} cannot build it: {reason}")
    layers = read_layers(found["text"])
    return Build(
        engine=files[ENGINE],
        seconds=found["seconds"],
        library=backend,
        version=found["version"],
        compute_capability=compute_capability,
        shapes=sizes,
        layers=layers,
        products=products(found["products"], layers),
        alone=alone(layers, found["quantizers"]),
        timing_cache=files.get(TIMING_CACHE, b""),
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
    _backend(backend)
    loaded = read_model(model)
    request = {
        "action": "parse",
        "model": str(model),
        "backend": backend,
        "compute_capability": compute_capability,
    }
    found, _ = _ask(request, {}, timeout)
    return Parse(
        library=backend,
        version=found["version"],
        layers=found["layers"],
        refusals=engine_refusals.refusals(loaded, found["refusals"]),
    )


def open_session(
    engine: bytes, backend: str, *, name: str, metadata: Mapping[str, str]
) -> EngineSession:
    """Load an engine onto the GPU; `engine_file.load_session` does so with a file.

    Raises:
        IntqError: There is no GPU, the library is missing or refuses the engine.
    """
    engine_device.require_gpu(f"{name}: running an engine")
    trt = library(backend)
    device = engine_device.Device()
    return EngineSession(trt, engine, device, name=name, metadata=metadata)


def _backend(name: str) -> tuple[str, str]:
    if name not in BACKENDS:
        raise IntqError(f"unknown backend {name!r}; expected one of: {', '.join(BACKENDS)}")
    return BACKENDS[name]


def _ask(
    request: Mapping[str, Any], files: Mapping[str, bytes], timeout: float
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Have a child do what `request` says; return its answer and the files it left."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, content in files.items():
            (folder / file).write_bytes(content)
        try:
            found = ask("onnx_intq.engine", request, folder, timeout)
        except ChildError as error:
            raise IntqError(
                f"{request['model']}: {request['backend']} {error}; expected an answer to "
                f"{request['action']}; look for the cause with: onnx-intq check --target tensorrt"
            ) from error
        except IntqError as error:
            raise IntqError(f"{request['model']}: {error}") from error
        left = [folder / file for file in (ENGINE, TIMING_CACHE)]
        return found, {file.name: file.read_bytes() for file in left if file.is_file()}


def answer(request: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The child's work: see `engine_build.answer`.

    Raises:
        IntqError: The library is missing, or refuses the GPU kind, the shapes or the timing cache.
    """
    return engine_build.answer(library(request["backend"]), request, folder)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), answer)
