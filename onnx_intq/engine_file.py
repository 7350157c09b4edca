"""Engine files and their sidecars: `E.engine` beside `E.engine.json`, which says what it is.

An engine runs on one release of one library and one GPU kind, and tells neither; the sidecar does,
and whether the engine still fits what is asked for. Law: what a sidecar says was checked against
the engine's own hash, so a sidecar beside another engine says nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import onnx_graphsurgeon as gs

from onnx_intq import __version__, engine
from onnx_intq.engine_layers import Product
from onnx_intq.engine_profile import Profile, profiles
from onnx_intq.engine_session import EngineSession
from onnx_intq.files import check_output, first_line, read_text, sha256, write_atomically
from onnx_intq.graph import load, metadata
from onnx_intq.integer_only import is_integer_only
from onnx_intq.transform import IntqError

RECIPE = "onnx_intq.recipe"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What an engine is to be built from, for and with.

    Attributes:
        model: An ONNX file.
        target: The library and the GPU kind.
        shapes: Profiles of some inputs; the others get theirs from the model.
        workspace: MiB of GPU memory that a layer may use; None for all there is.
        timing_cache: File of kernel times: taken over if it exists, else written. None for none.
        timing_cache_sha256: What the file must hash to; None for anything.
    """

    model: Path
    target: engine.Target
    shapes: Mapping[str, Profile]
    workspace: int | None = None
    timing_cache: Path | None = None
    timing_cache_sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """What an engine is.

    Attributes:
        onnx_intq: Our version.
        model: File name of the ONNX model.
        model_sha256: Of its file, external data included.
        recipe: The passes that made the model, "" if it records none.
        library: A key of `engine.BACKENDS`.
        library_version: Its version.
        compute_capability: The GPU kind, such as "7.5".
        gpu: Name of the GPU it was built on; None where it was built for a kind.
        shapes: Input -> smallest, most common and largest shape.
        axes: Input -> its shape in the model, names for dynamic axes.
        strongly_typed: Always: all precision is in the model.
        workspace: MiB, None for no limit.
        timing_cache_sha256: Of the file of kernel times used or written; None without one.
        seconds: What the builder took.
        engine_sha256: Of the engine's file.
        engine_bytes: Its size.
        products: Convolutions and matrix products, and the type each computes in.
        alone: Q/DQ nodes that were not fused with any operator.
        metadata: The model's `metadata_props`: front end, labels and so on.
    """

    onnx_intq: str
    model: str
    model_sha256: str
    recipe: str
    library: str
    library_version: str
    compute_capability: str
    gpu: str | None
    shapes: Mapping[str, Profile]
    axes: Mapping[str, Sequence[int | str | None]]
    strongly_typed: bool = True
    workspace: int | None
    timing_cache_sha256: str | None
    seconds: float
    engine_sha256: str
    engine_bytes: int
    products: tuple[Product, ...]
    alone: tuple[str, ...]
    metadata: Mapping[str, str]

    def to_json(self) -> str:
        """As an object, indented."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Sidecar:
        """Read back what `to_json` wrote; law: `from_json(s.to_json()) == s`.

        Raises:
            IntqError: The text is no such object.
        """
        try:
            found = json.loads(text)
            values = {field.name: found[field.name] for field in fields(cls)}
            values["products"] = tuple(Product(**entry) for entry in found["products"])
            values["shapes"] = {n: _profile(p) for n, p in found["shapes"].items()}
            values["axes"] = {n: tuple(axes) for n, axes in found["axes"].items()}
            return cls(**values | {"alone": tuple(found["alone"])})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise IntqError(
                f"sidecar is none of this version ({first_line(error)}); build the engine again"
            ) from error

    def precisions(self, kind: str) -> dict[str, int]:
        """Type -> how many products of `kind` compute in it; "unknown" where that is not told."""
        found = Counter(p.precision or "unknown" for p in self.products if p.kind == kind)
        return dict(sorted(found.items()))


def sidecar_path(file: Path) -> Path:
    """Where the sidecar of an engine lies."""
    return file.with_name(file.name + ".json")


def read_sidecar(file: Path) -> Sidecar | None:
    """The sidecar of an engine; None if there is none, or it is that of another engine.

    Raises:
        IntqError: It cannot be read, or is none of this version.
    """
    found = _recorded(file)
    fits = found is not None and file.is_file() and found.engine_sha256 == sha256(file)
    return found if fits else None


def build_file(request: Request, output: Path, *, force: bool = False) -> tuple[Sidecar, bool]:
    """Build an engine into a file, or keep the one that is there if its sidecar still fits.

    Args:
        request: What to build.
        output: The engine; its sidecar goes beside it, and the timing cache to its own file.
        force: Build in any case.

    Returns:
        The sidecar, and whether the engine was there already.

    Raises:
        IntqError: As for `engine.build`, or the timing cache has another hash than expected.
    """
    _check_paths(request, output)
    graph = load(request.model)
    if is_integer_only(graph):
        raise IntqError(
            f"{request.model}: the model is integer-only, and TensorRT has no integer products; "
            "expected Q/DQ nodes; quantize the float model with --target tensorrt"
        )
    request = replace(request, shapes=profiles(graph, request.shapes))
    recorded = None if force else _of_this_version(output)
    times = _timing_cache(request, recorded)
    if recorded is not None and _fits(output, recorded, request, times):
        return recorded, True
    built = engine.build(
        request.model,
        backend=request.target.backend,
        compute_capability=request.target.compute_capability,
        shapes=request.shapes,
        workspace=request.workspace,
        timing_cache=times,
    )
    sidecar = _sidecar(request, graph, built, times)
    if times is not None and not times.known and request.timing_cache is not None:
        write_atomically(request.timing_cache, lambda file: file.write_bytes(built.timing_cache))
    write_atomically(output, lambda file: file.write_bytes(built.engine))
    text = sidecar.to_json()
    write_atomically(sidecar_path(output), lambda file: file.write_text(text, encoding="utf-8"))
    return sidecar, False


def load_session(file: Path) -> tuple[EngineSession, Sidecar | None]:
    """Load an engine file onto the GPU, with its sidecar.

    Without a sidecar it is taken for one of TensorRT, and its front end and labels are not known.

    Raises:
        IntqError: The file is missing, there is no GPU, the library is missing or refuses it.
    """
    if not file.is_file():
        raise IntqError(f"{file}: no such file; expected an engine; check the path")
    sidecar = read_sidecar(file)
    backend = sidecar.library if sidecar else "tensorrt"
    session = engine.open_session(
        file.read_bytes(),
        backend,
        name=str(file),
        metadata=sidecar.metadata if sidecar else {},
    )
    return session, sidecar


def _check_paths(request: Request, output: Path) -> None:
    if output.suffix != engine.SUFFIX:
        raise IntqError(
            f"{output}: engines are known by their names; expected one that ends in "
            f"{engine.SUFFIX}; change -o"
        )
    check_output(output, request.model, request.timing_cache)
    check_output(sidecar_path(output), request.model, request.timing_cache)
    if request.timing_cache is not None and not request.timing_cache.exists():
        check_output(request.timing_cache, request.model)


def _recorded(file: Path) -> Sidecar | None:
    """The sidecar beside a file, whether it is of this file or not."""
    path = sidecar_path(file)
    if not path.is_file():
        return None
    try:
        return Sidecar.from_json(read_text(path))
    except IntqError as error:
        raise IntqError(f"{path}: {error}") from error


def _of_this_version(output: Path) -> Sidecar | None:
    """The sidecar that is there; one of another version is as good as none."""
    try:
        return _recorded(output)
    except IntqError:
        return None


def _timing_cache(request: Request, recorded: Sidecar | None) -> engine.TimingCache | None:
    """The known times, which must hash to what is asked for, or else to what was recorded.

    A build of the same model must then find all times it needs: it is to give the same engine.
    """
    file, expected = request.timing_cache, request.timing_cache_sha256
    pinned = expected is not None
    if recorded is not None and expected is None:
        expected = recorded.timing_cache_sha256
        pinned = expected is not None and recorded.model_sha256 == sha256(request.model)
    if file is None:
        if request.timing_cache_sha256:
            raise IntqError(
                "--timing-cache-sha256 without --timing-cache; expected both; add the file"
            )
        return None
    if request.target.backend != "tensorrt":
        raise IntqError(
            f"--timing-cache {file} has no effect: {request.target.backend} times no kernels; "
            "expected backend tensorrt; leave it out"
        )
    if not file.is_file():
        if expected:
            raise IntqError(
                f"{file}: no such file; expected the timing cache with sha256 {expected}; restore "
                "it, or build anew with --force and without --timing-cache-sha256"
            )
        return engine.TimingCache()
    known = file.read_bytes()
    found = hashlib.sha256(known).hexdigest()
    if expected not in {None, found}:
        raise IntqError(
            f"{file}: timing cache has sha256 {found}; expected {expected}; restore it, or build "
            "anew with --force and without --timing-cache-sha256"
        )
    return engine.TimingCache(known=known, pinned=pinned)


def _fits(output: Path, known: Sidecar, request: Request, times: engine.TimingCache | None) -> bool:
    """Whether the engine that is there, known by its sidecar, is what a build would make."""
    wanted = (request.target, request.shapes, request.workspace)
    target = engine.Target(
        backend=known.library,
        compute_capability=known.compute_capability,
        gpu=known.gpu,
        note=request.target.note,
    )
    cache = None if times is None else hashlib.sha256(times.known).hexdigest()
    return (
        (target, known.shapes, known.workspace) == wanted
        and known.timing_cache_sha256 == cache
        and known.model_sha256 == sha256(request.model)
        and read_sidecar(output) is not None
        and known.library_version == engine.version(known.library)
    )


def _sidecar(
    request: Request, graph: gs.Graph, built: engine.Build, times: engine.TimingCache | None
) -> Sidecar:
    used = (times.known or built.timing_cache) if times is not None else None
    return Sidecar(
        onnx_intq=__version__,
        model=request.model.name,
        model_sha256=sha256(request.model),
        recipe=metadata(graph).get(RECIPE, ""),
        library=built.library,
        library_version=built.version,
        compute_capability=built.compute_capability,
        gpu=request.target.gpu,
        shapes=built.shapes,
        axes={t.name: tuple(t.shape or ()) for t in graph.inputs},
        workspace=request.workspace,
        timing_cache_sha256=None if used is None else hashlib.sha256(used).hexdigest(),
        seconds=round(built.seconds, 3),
        engine_sha256=hashlib.sha256(built.engine).hexdigest(),
        engine_bytes=len(built.engine),
        products=built.products,
        alone=built.alone,
        metadata=metadata(graph),
    )


def _profile(shapes: Sequence[Sequence[int]]) -> Profile:
    small, common, large = (tuple(shape) for shape in shapes)
    return small, common, large
