"""The shapes of all tensors of a graph for given sizes of its inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx
import onnx_graphsurgeon as gs

from onnx_intq.frontend import Frontend
from onnx_intq.graph import bare_model, first_line, hollow_from_graph, metadata
from onnx_intq.segments import reads
from onnx_intq.shape_arithmetic import infer_shapes, static_shapes
from onnx_intq.speech import FRONTEND_KEY
from onnx_intq.transform import IntqError

Shape = tuple[int, ...]
HOP = 0.01
"""Seconds between frames where the model does not say."""


def input_shapes(
    graph: gs.Graph, *, seconds: float, shapes: Mapping[str, Sequence[int]] | None = None
) -> dict[str, Shape]:
    """A shape for every input: as given, else one sample with `seconds` of audio in frames.

    The time axis is the last dynamic axis, other than the first, of the first input; axes with the
    same name are equally long. All other dynamic axes have length 1.

    Raises:
        IntqError: `shapes` does not fit the inputs, or `seconds` is not positive.
    """
    if not seconds > 0:
        raise IntqError(f"{seconds} seconds of audio; expected more than 0; change --seconds")
    given = {name: _checked(graph, name, shape) for name, shape in (shapes or {}).items()}
    frames = max(1, round(seconds / _window_stride(graph)))
    dynamic = [d for t in graph.inputs[:1] for d in (t.shape or [])[1:] if not isinstance(d, int)]
    sizes: dict[str | None, int] = {dynamic[-1]: frames} if dynamic else {}
    for tensor in graph.inputs:
        for axis, size in zip(tensor.shape or [], given.get(tensor.name, ()), strict=False):
            sizes |= {} if isinstance(axis, int) else {axis: size}
    known = {
        t.name: tuple(d if isinstance(d, int) else sizes.get(d, 1) for d in t.shape or [])
        for t in graph.inputs
    }
    return known | given


def infer(graph: gs.Graph, inputs: Mapping[str, Shape]) -> dict[str, Shape]:
    """The shapes of all tensors that follow from those of the inputs; others are left out.

    Raises:
        IntqError: The inputs' shapes contradict the graph.
    """
    model = bare_model(hollow_from_graph(graph.copy()).model)
    del model.graph.value_info[:]
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    for value in model.graph.input:
        if value.name in inputs:
            _set_shape(value, inputs[value.name])
    try:
        model = infer_shapes(model)
    except onnx.shape_inference.InferenceError as error:
        found = ", ".join(f"{name} {list(shape)}" for name, shape in inputs.items())
        raise IntqError(
            f"shapes {found} do not fit the model ({first_line(error)}); "
            "expected shapes it can run; change --seconds or --shapes"
        ) from error
    return static_shapes(model)


def infer_body(body: gs.Graph, node: gs.Node, known: Mapping[str, Shape]) -> dict[str, Shape]:
    """The shapes within the body of a node, as far as they follow from `known`.

    Args:
        body: Of `node`.
        node: Whose outer tensors count as inputs of the body.
        known: Shapes of the body's inputs and of outer tensors.
    """
    alone = body.copy()
    outer = [t for t in reads(node) if t.name in alone.tensors()]
    given = {t.name for t in alone.inputs}
    alone.inputs += [alone.tensors()[t.name] for t in outer if t.name not in given]
    return infer(alone, known)


def _checked(graph: gs.Graph, name: str, shape: Sequence[int]) -> Shape:
    found = [t for t in graph.inputs if t.name == name]
    if not found:
        names = ", ".join(t.name for t in graph.inputs)
        raise IntqError(f"shape given for {name!r}, which is no input; expected one of: {names}")
    declared = found[0].shape
    fits = declared is None or (
        len(declared) == len(shape)
        and all(not isinstance(d, int) or d == s for d, s in zip(declared, shape, strict=True))
    )
    if not fits or any(size < 1 for size in shape):
        raise IntqError(
            f"shape {list(shape)} for input {name!r}; expected {declared}; change the shape"
        )
    return tuple(shape)


def _window_stride(graph: gs.Graph) -> float:
    recorded = metadata(graph).get(FRONTEND_KEY)
    return Frontend.from_json(recorded).window_stride if recorded else HOP


def _set_shape(value: onnx.ValueInfoProto, shape: Shape) -> None:
    dims = value.type.tensor_type.shape.dim
    del dims[:]
    for size in shape:
        dims.add().dim_value = size
