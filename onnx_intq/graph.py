"""ONNX files in and out of `onnx_graphsurgeon.Graph`: atomic, metadata, external data, opset."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.inliner
import onnx_graphsurgeon as gs

from onnx_intq.files import check_output as check_output
from onnx_intq.files import data_path, read_structure
from onnx_intq.files import file_bytes as file_bytes
from onnx_intq.files import first_line as first_line
from onnx_intq.files import read_text as read_text
from onnx_intq.files import require_model_file as require_model_file
from onnx_intq.files import sha256 as sha256
from onnx_intq.files import write_atomically as write_atomically
from onnx_intq.hollow import Hollow, hollow, hollowed, is_empty
from onnx_intq.hollow import bare_model as bare_model
from onnx_intq.transform import IntqError

PROTOBUF_LIMIT = 2_000_000_000
"""Bytes of weights above which they go to a file beside the model; protobuf stops at 2 GiB."""
MAX_IR = 13
"""Newest IR version that onnxruntime 1.31 reads."""
OTHER_FLOATS = {
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.BFLOAT16,
    onnx.TensorProto.DOUBLE,
}


def load(path: str | Path) -> gs.Graph:
    """Read an ONNX file; weights held in `Constant` nodes become initializers.

    Returns:
        The graph, shapes inferred, the file's metadata in `metadata(graph)`.

    Raises:
        IntqError: The file or its external weights are missing, or it is not valid ONNX.
    """
    model = read_model(path)
    try:
        return graph_from_model(model)
    except IntqError as error:
        raise IntqError(f"{path}: {error}") from error


def read_model(path: str | Path) -> onnx.ModelProto:
    """Read and check an ONNX file, external data included.

    Raises:
        IntqError: As for `load`.
    """
    path = Path(path)
    require_model_file(path)
    model = read_structure(path)
    try:
        onnx.load_external_data_for_model(model, str(path.parent))
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise IntqError(
            f"{path}: its external weights cannot be read ({first_line(error)}); "
            "expected them beside the model; copy both files"
        ) from error
    if not model.graph.node or not model.opset_import:
        raise IntqError(f"{path}: not an ONNX model (no nodes or no opset); export it again")
    try:
        onnx.checker.check_model(str(path))
    except (onnx.checker.ValidationError, ValueError) as error:
        raise IntqError(f"{path}: invalid ONNX: {first_line(error)}; export it again") from error
    return model


def graph_from_model(model: onnx.ModelProto) -> gs.Graph:
    """Import a ModelProto: `Constant` nodes become initializers, nodes named, shapes inferred.

    Functions of the model's own are written out where they are called.

    Raises:
        IntqError: Shapes cannot be inferred: a function uses operators of a domain that the model
            does not import.
    """
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    return _graph_from_hollow(hollowed(model))


def _graph_from_hollow(hollow: Hollow) -> gs.Graph:
    model = hollow.model
    try:
        inferred = onnx.shape_inference.infer_shapes(bare_model(model))
    except onnx.shape_inference.InferenceError as error:
        raise IntqError(
            f"shapes cannot be inferred ({first_line(error)}); expected a model that imports the "
            "domains of all its operators; export it again"
        ) from error
    model = _refill(inferred, model)
    graph = gs.import_onnx(model)
    # A reference to any part of a ModelProto keeps all of it in memory.
    graph.import_domains = copy.deepcopy(list(graph.import_domains))
    for sub in subgraphs(graph):  # bodies may read weights that no other node reads
        for name, tensor in sub.tensors().items():
            if name in hollow.weights and is_empty(tensor):
                tensor.values = hollow.weights[name]
    graph.intq_metadata = {p.key: p.value for p in model.metadata_props}
    for number, sub in enumerate(subgraphs(graph)):
        _lift_constants(sub)
        _name_nodes(sub, f"body{number}_" if number else "")
    return graph


def model_from_graph(graph: gs.Graph) -> onnx.ModelProto:
    """Export to a ModelProto with an explicit IR version and the graph's metadata."""
    return hollow_from_graph(graph).filled()


def hollow_from_graph(graph: gs.Graph) -> Hollow:
    """As `model_from_graph`, with the large weights apart, where they are not copied."""
    sort(graph)
    exported = hollow(graph)
    model = exported.model
    needed = onnx.helper.find_min_ir_version_for(list(model.opset_import), ignore_unknown=True)
    model.ir_version = min(MAX_IR, max(needed, graph.ir_version or 0, 8))
    onnx.helper.set_model_props(model, dict(sorted(metadata(graph).items())))
    _drop_inferred_shapes(model.graph)
    return exported


def save(graph: gs.Graph, path: str | Path, limit: int = PROTOBUF_LIMIT) -> None:
    """Write `graph` to `path`, whole or not at all; weights go beside it above `limit` bytes.

    Raises:
        IntqError: The file cannot be written (folder missing, disk full, no permission).
    """
    path = Path(path)
    if path.is_dir():
        raise IntqError(f"{path}: is a folder; expected a file's name; change -o")
    exported = hollow_from_graph(graph)
    if weight_bytes(graph) < limit:
        write_atomically(path, exported.write)
        return
    model, data = exported.filled(), data_path(path)

    def write(target: Path) -> None:
        folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=".intq-"))
        try:
            onnx.save_model(
                model, str(folder / path.name), save_as_external_data=True, location=data.name
            )
            (folder / path.name).replace(target)
            if (folder / data.name).exists():  # small tensors stay in the model
                (folder / data.name).replace(data)
        finally:
            shutil.rmtree(folder)

    write_atomically(path, write)


def metadata(graph: gs.Graph) -> dict[str, str]:
    """The model's `metadata_props` as a dict, to be edited in place."""
    if "intq_metadata" not in vars(graph):
        graph.intq_metadata = {}
    found: dict[str, str] = graph.intq_metadata
    return found


def with_metadata(copy: gs.Graph, graph: gs.Graph) -> gs.Graph:
    """`copy` with the metadata of `graph`, which graphsurgeon's copies lose."""
    metadata(copy).update(metadata(graph))
    return copy


def subgraphs(graph: gs.Graph) -> Iterator[gs.Graph]:
    """The graph itself, then the bodies of its If, Loop and Scan nodes, outermost first."""
    yield graph
    for node in graph.nodes:
        for value in node.attrs.values():
            if isinstance(value, gs.Graph):
                yield from subgraphs(value)


def weight_bytes(graph: gs.Graph) -> int:
    """Bytes of all initializers, sub-graphs included."""
    tensors = [t for sub in subgraphs(graph) for t in sub.tensors().values()]
    constants = {id(t): t for t in tensors if isinstance(t, gs.Constant)}
    return sum(t.values.nbytes for t in constants.values())


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

    An output of the graph keeps its name: `new` takes it. Bodies cannot have `old` as an output.
    """
    for node in list(old.outputs):
        for index, tensor in enumerate(node.inputs):
            if tensor is old:
                node.inputs[index] = new
    for index, tensor in enumerate(graph.outputs):
        if tensor is old:
            graph.outputs[index] = new
            new.name, old.name = old.name, new.name


class Names:
    """Gives new tensors names that no tensor of a graph has yet, bodies included."""

    def __init__(self, graph: gs.Graph) -> None:
        """Collect the names in use."""
        self._taken = {name for sub in subgraphs(graph) for name in sub.tensors()}
        self._counts: dict[str, int] = {}

    def new(self, wish: str) -> str:
        """`wish`, with underscores behind it if that name is in use."""
        while wish in self._taken:
            wish += "_"
        self._taken.add(wish)
        return wish

    def number(self, prefix: str) -> str:
        """`prefix` with the first number behind it that makes a new name."""
        count = self._counts.get(prefix, 0)
        while f"{prefix}{count}" in self._taken:
            count += 1
        self._counts[prefix] = count + 1
        return self.new(f"{prefix}{count}")


def require_float32(graph: gs.Graph) -> None:
    """Refuse float16, bfloat16 and float64 models.

    Raises:
        IntqError: Naming the first such tensor.
    """
    for sub in subgraphs(graph):
        for name, tensor in sub.tensors().items():
            if (found := element_type(tensor)) in OTHER_FLOATS:
                raise IntqError(
                    f"tensor {name!r} is {onnx.TensorProto.DataType.Name(found).lower()}; "
                    "expected a float32 model; "
                    "export it in float32 (the INT8 file is smaller than a float16 one)"
                )


def element_type(tensor: gs.Tensor) -> int | None:
    """ONNX's number of a tensor's element type, such as `TensorProto.FLOAT`; None if unknown."""
    dtype = tensor.dtype
    if dtype is None or isinstance(dtype, int):  # a number where NumPy has no such type
        return dtype
    return int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def convert_opset(graph: gs.Graph, version: int) -> None:
    """Raise the opset of the default domain to at least `version`, in place.

    Raises:
        IntqError: onnx's version converter cannot convert an operator of the model.
    """
    if graph.opset >= version:
        return
    exported = hollow_from_graph(graph)
    try:
        bare = bare_model(exported.model)
        converted = onnx.version_converter.convert_version(bare, version)
        onnx.checker.check_model(converted)
    except Exception as error:
        raise IntqError(
            f"opset {graph.opset} cannot be raised to {version} ({first_line(error)}); "
            f"export the model with opset {version} or newer"
        ) from error
    kept = metadata(graph)
    refilled = Hollow(_refill(converted, exported.model), exported.weights)
    vars(graph).update(vars(_graph_from_hollow(refilled)))
    graph.intq_metadata = kept


def _drop_inferred_shapes(graph: onnx.GraphProto) -> None:
    """Keep only the shapes that cannot be inferred again: those of other domains' operators."""
    foreign = {name for node in graph.node if node.domain for name in node.output}
    kept = [value for value in graph.value_info if value.name in foreign]
    del graph.value_info[:]
    graph.value_info.extend(kept)


def _refill(bare: onnx.ModelProto, model: onnx.ModelProto) -> onnx.ModelProto:
    """Give `bare`, made of `bare_model(model)`, the weights and inputs of `model` again."""
    small = {tensor.name for tensor in bare.graph.initializer}
    bare.graph.initializer.extend(t for t in model.graph.initializer if t.name not in small)
    del bare.graph.input[:]
    bare.graph.input.extend(model.graph.input)
    return bare


def sort(graph: gs.Graph) -> None:
    """Put every node behind those it reads from, bodies included, and else keep the order."""
    for sub in subgraphs(graph):
        own, seen, ordered = {id(node) for node in sub.nodes}, set[int](), list[gs.Node]()
        stack = [(node, False) for node in reversed(sub.nodes)]
        while stack:
            node, ready = stack.pop()
            if ready:
                ordered.append(node)
            elif id(node) not in seen:
                seen.add(id(node))
                stack.append((node, True))
                stack += [(maker, False) for maker in _makers(node) if id(maker) in own]
        sub.nodes[:] = ordered


def _makers(node: gs.Node) -> Iterator[gs.Node]:
    """The nodes that make what `node` and its bodies read."""
    bodies = [b for v in node.attrs.values() if isinstance(v, gs.Graph) for b in subgraphs(v)]
    for reader in (node, *(n for body in bodies for n in body.nodes)):
        for tensor in reader.inputs:
            yield from tensor.inputs


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
    """Name nodes without a name, or with that of an earlier node; given names are kept."""
    taken, seen = {node.name for node in graph.nodes}, {""}
    for number, node in enumerate(graph.nodes):
        if node.name in seen:
            node.name = f"{prefix}{node.op}_{number}"
            while node.name in taken:
                node.name += "_"
            taken.add(node.name)
        seen.add(node.name)
