"""ONNX files in and out of `onnx_graphsurgeon.Graph`: atomic, metadata, external data, opset."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs

from onnx_intq.transform import IntqError

PROTOBUF_LIMIT = 2_000_000_000
"""Bytes of weights above which they go to a file beside the model; protobuf stops at 2 GiB."""
MAX_IR = 13
"""Newest IR version that onnxruntime 1.31 reads."""


def load(path: str | Path) -> gs.Graph:
    """Read an ONNX file; weights held in `Constant` nodes become initializers.

    Returns:
        The graph, shapes inferred, the file's metadata in `metadata(graph)`.

    Raises:
        IntqError: The file or its external weights are missing, or it is not valid ONNX.
    """
    return graph_from_model(read_model(path))


def read_model(path: str | Path) -> onnx.ModelProto:
    """Read and check an ONNX file, external data included.

    Raises:
        IntqError: As for `load`.
    """
    path = Path(path)
    if not path.is_file():
        raise IntqError(f"{path}: no such file; expected an ONNX model; check the path")
    try:
        model = onnx.load(str(path))
    except (FileNotFoundError, onnx.checker.ValidationError) as error:
        raise IntqError(
            f"{path}: its external weights cannot be read ({first_line(error)}); "
            "expected them beside the model; copy both files"
        ) from error
    except Exception as error:
        raise IntqError(f"{path}: not an ONNX model; expected a protobuf ModelProto") from error
    if not model.graph.node or not model.opset_import:
        raise IntqError(f"{path}: not an ONNX model (no nodes or no opset); export it again")
    try:
        onnx.checker.check_model(str(path))
    except (onnx.checker.ValidationError, ValueError) as error:
        raise IntqError(f"{path}: invalid ONNX: {first_line(error)}; export it again") from error
    return model


def graph_from_model(model: onnx.ModelProto) -> gs.Graph:
    """Import a ModelProto: `Constant` nodes become initializers, nodes named, shapes inferred."""
    if sum(len(t.raw_data) for t in model.graph.initializer) < PROTOBUF_LIMIT:
        model = onnx.shape_inference.infer_shapes(model)
    graph = gs.import_onnx(model)
    graph.intq_metadata = {p.key: p.value for p in model.metadata_props}
    for number, sub in enumerate(subgraphs(graph)):
        _lift_constants(sub)
        _name_nodes(sub, f"body{number}_" if number else "")
    return graph


def model_from_graph(graph: gs.Graph) -> onnx.ModelProto:
    """Export to a ModelProto with an explicit IR version and the graph's metadata."""
    graph.toposort()
    model: onnx.ModelProto = gs.export_onnx(graph)
    needed = onnx.helper.find_min_ir_version_for(list(model.opset_import), ignore_unknown=True)
    model.ir_version = min(MAX_IR, max(needed, graph.ir_version or 0, 8))
    onnx.helper.set_model_props(model, dict(sorted(metadata(graph).items())))
    _drop_inferred_shapes(model.graph)
    return model


def save(graph: gs.Graph, path: str | Path, limit: int = PROTOBUF_LIMIT) -> None:
    """Write `graph` to `path`, whole or not at all; weights go beside it above `limit` bytes.

    Raises:
        IntqError: The file cannot be written (folder missing, disk full, no permission).
    """
    path = Path(path)
    model = model_from_graph(graph)
    if weight_bytes(graph) < limit:
        content = model.SerializeToString(deterministic=True)
        write_atomically(path, lambda target: target.write_bytes(content))
        return
    data = path.with_name(path.name + ".data")

    def write(target: Path) -> None:
        folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=".intq-"))
        try:
            onnx.save_model(
                model, str(folder / path.name), save_as_external_data=True, location=data.name
            )
            (folder / path.name).replace(target)
            (folder / data.name).replace(data)
        finally:
            shutil.rmtree(folder)

    write_atomically(path, write)


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a file beside `path`, then rename it: it appears whole or not at all.

    Raises:
        IntqError: The operating system refused (folder missing, disk full, no permission).
    """
    path = Path(path)
    target = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    try:
        write(target)
        target.replace(path)
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise IntqError(f"{path}: cannot be written: {reason}; nothing was left behind") from error
    finally:
        target.unlink(missing_ok=True)


def read_text(path: str | Path) -> str:
    """A small UTF-8 text file.

    Raises:
        IntqError: It cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise IntqError(f"{path}: cannot be read: {first_line(error)}; check the path") from error


def check_output(output: str | Path, *inputs: str | Path | None) -> None:
    """Refuse an output that is one of the inputs, or whose folder does not exist.

    Raises:
        IntqError: With what to do instead.
    """
    output = Path(output)
    if any(i is not None and Path(i).resolve() == output.resolve() for i in inputs):
        raise IntqError(f"{output}: output is the input file; expected another name; change -o")
    if not output.absolute().parent.is_dir():
        raise IntqError(f"{output}: its folder does not exist; create it first")


def metadata(graph: gs.Graph) -> dict[str, str]:
    """The model's `metadata_props` as a dict, to be edited in place."""
    if "intq_metadata" not in vars(graph):
        graph.intq_metadata = {}
    found: dict[str, str] = graph.intq_metadata
    return found


def subgraphs(graph: gs.Graph) -> Iterator[gs.Graph]:
    """The graph itself, then the bodies of its If, Loop and Scan nodes, outermost first."""
    yield graph
    for node in graph.nodes:
        for value in node.attrs.values():
            if isinstance(value, gs.Graph):
                yield from subgraphs(value)


def weight_bytes(graph: gs.Graph) -> int:
    """Bytes of all initializers, sub-graphs included."""
    return sum(
        t.values.nbytes
        for sub in subgraphs(graph)
        for t in sub.tensors().values()
        if isinstance(t, gs.Constant)
    )


def constant(node: gs.Node, index: int) -> npt.NDArray[Any] | None:
    """The values of a node's input `index`, None if it is absent or computed at run time."""
    if index >= len(node.inputs) or not isinstance(node.inputs[index], gs.Constant):
        return None
    values: npt.NDArray[Any] = node.inputs[index].values
    return values


def producer(tensor: gs.Tensor) -> gs.Node | None:
    """The node that computes `tensor`; None for graph inputs and constants."""
    return tensor.inputs[0] if tensor.inputs else None


def sole_consumer(graph: gs.Graph, tensor: gs.Tensor) -> gs.Node | None:
    """The only node that reads `tensor`; None if there are several, none, or it is an output."""
    if len(tensor.outputs) != 1 or any(tensor is t for t in graph.outputs):
        return None
    return tensor.outputs[0]


def remove(graph: gs.Graph, nodes: Iterable[gs.Node]) -> None:
    """Detach `nodes` and take them out of `graph`, in one sweep."""
    gone = {id(node) for node in nodes}
    for node in graph.nodes:
        if id(node) in gone:
            node.inputs.clear()
            node.outputs.clear()
    graph.nodes[:] = [node for node in graph.nodes if id(node) not in gone]


def replace_uses(graph: gs.Graph, old: gs.Tensor, new: gs.Tensor) -> None:
    """Let everything that reads `old` (nodes, bodies, graph outputs) read `new` instead.

    An output of the graph keeps its name: `new` takes it.
    """
    for node in list(old.outputs):
        for index, tensor in enumerate(node.inputs):
            if tensor is old:
                node.inputs[index] = new
    for sub in subgraphs(graph):
        for index, tensor in enumerate(sub.outputs):
            if tensor is old:
                sub.outputs[index] = new
                if sub is graph:
                    new.name, old.name = old.name, new.name


def require_float32(graph: gs.Graph) -> None:
    """Refuse float16, bfloat16 and float64 models.

    Raises:
        IntqError: Naming the first such tensor.
    """
    half = {np.dtype(np.float16), np.dtype(np.float64)}
    for sub in subgraphs(graph):
        for name, tensor in sub.tensors().items():
            if isinstance(tensor.dtype, np.dtype | type) and np.dtype(tensor.dtype) in half:
                raise IntqError(
                    f"tensor {name!r} is {np.dtype(tensor.dtype)}; expected a float32 model; "
                    "export it in float32 (the INT8 file is smaller than a float16 one)"
                )


def convert_opset(graph: gs.Graph, version: int) -> None:
    """Raise the opset of the default domain to at least `version`, in place.

    Raises:
        IntqError: onnx's version converter cannot convert an operator of the model.
    """
    if graph.opset >= version:
        return
    kept = dict(metadata(graph))
    try:
        model = onnx.version_converter.convert_version(model_from_graph(graph), version)
        onnx.checker.check_model(model)
    except Exception as error:
        raise IntqError(
            f"opset {graph.opset} cannot be raised to {version} ({first_line(error)}); "
            f"export the model with opset {version} or newer"
        ) from error
    vars(graph).update(vars(graph_from_model(model)))
    graph.intq_metadata = kept


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file, external data included."""
    digest = hashlib.sha256()
    for part in _parts(Path(path)):
        with part.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def file_bytes(path: str | Path) -> int:
    """Size of a file, external data included."""
    return sum(part.stat().st_size for part in _parts(Path(path)))


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for one-line messages."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _drop_inferred_shapes(graph: onnx.GraphProto) -> None:
    """Keep only the shapes that cannot be inferred again: those of other domains' operators."""
    foreign = {name for node in graph.node if node.domain for name in node.output}
    kept = [value for value in graph.value_info if value.name in foreign]
    del graph.value_info[:]
    graph.value_info.extend(kept)


def _parts(path: Path) -> list[Path]:
    return [p for p in (path, path.with_name(path.name + ".data")) if p.is_file()]


def _lift_constants(graph: gs.Graph) -> None:
    kept = []
    for node in graph.nodes:
        values = _constant_values(node) if node.op == "Constant" else None
        if values is None:
            kept.append(node)
            continue
        (output,) = node.outputs
        node.outputs.clear()
        output.to_constant(values)
    graph.nodes[:] = kept


def _constant_values(node: gs.Node) -> npt.NDArray[np.generic] | None:
    (key, value), *_ = node.attrs.items()
    if key == "value":
        return np.asarray(value.values)
    if key in {"value_float", "value_floats"}:
        return np.asarray(value, np.float32)
    return np.asarray(value, np.int64) if key in {"value_int", "value_ints"} else None


def _name_nodes(graph: gs.Graph, prefix: str) -> None:
    taken: set[str] = set()
    for number, node in enumerate(graph.nodes):
        if not node.name or node.name in taken:
            node.name = f"{prefix}{node.op}_{number}"
        taken.add(node.name)
