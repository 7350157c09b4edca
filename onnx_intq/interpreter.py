"""Runs integer-only ONNX graphs in NumPy, the reference that onnxruntime must equal bit for bit.

Law: every tensor between the boundary nodes has the value onnxruntime computes, on any processor
and in any order of summation; `differences` counts where it does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs

from onnx_intq.feeds import Batch, TensorSpec, check
from onnx_intq.graph import element_type, graph_from_model, load, model_from_graph
from onnx_intq.integer_ops.arrays import Array, numpy_dtype
from onnx_intq.integer_ops.program import compiled
from onnx_intq.segments import Segments
from onnx_intq.transform import IntqError

Model: TypeAlias = onnx.ModelProto | gs.Graph | str | Path
"""A model, a graph, or a model's file."""


class Interpreter:
    """An ONNX graph, ready to be run in NumPy.

    Integers wrap in their own type, as they do in onnxruntime. What onnxruntime leaves undefined,
    or would end it, is an error here: division by zero, a sum of ConvInteger or MatMulInteger that
    leaves int32.

    Attributes:
        graph: The graph it runs, sorted, nodes named, `Constant` nodes made initializers.
        inputs: What `run` takes.
        tensors: Names of all that `run_all` gives: graph inputs, then outputs of nodes, in order.
    """

    graph: gs.Graph
    inputs: tuple[TensorSpec, ...]
    tensors: tuple[str, ...]

    def __init__(self, model: Model) -> None:
        """Prepare `model`, which is not changed.

        Raises:
            IntqError: The file is missing or invalid, or an operator, attribute or number of inputs
                is not supported.
        """
        self.graph = _graph(model)
        self.inputs = tuple(_spec(tensor) for tensor in self.graph.inputs)
        self._program = compiled(self.graph, self.graph.opset)
        made = [name for step in self._program.steps for name in step.outputs if name]
        self.tensors = (*(spec.name for spec in self.inputs), *made)

    def run(self, feeds: Batch) -> dict[str, npt.NDArray[Any]]:
        """The graph's outputs by name; other tensors are freed after their last use.

        Args:
            feeds: One array per input.

        Raises:
            IntqError: The feeds do not fit the inputs, or a node fails on its inputs.
        """
        check(feeds, self.inputs)
        return self._program.run(feeds)

    def run_all(self, feeds: Batch) -> dict[str, npt.NDArray[Any]]:
        """Every tensor by name, as `tensors` lists them; without those of bodies.

        Raises:
            IntqError: As for `run`.
        """
        return dict(self.stream(feeds))

    def stream(self, feeds: Batch) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        """Yield what `run_all` gives one by one, freeing each after its last use.

        Raises:
            IntqError: As for `run`.
        """
        check(feeds, self.inputs)
        yield from ((spec.name, np.asarray(feeds[spec.name])) for spec in self.inputs)
        yield from self._program.stream(feeds)


class Difference(NamedTuple):
    """A tensor that is not the same in two runs.

    Attributes:
        tensor: Its name.
        elements: How many elements differ; all where type or shape do.
        largest: The largest absolute difference; infinite where type or shape differ.
    """

    tensor: str
    elements: int
    largest: float


class SideBySide:
    """A model prepared to be compared in the interpreter and in onnxruntime, on every tensor.

    onnxruntime runs the graph in consecutive parts, whose tensors are all outputs: it cannot
    optimise them away.

    Attributes:
        interpreter: That of the model.
    """

    interpreter: Interpreter

    def __init__(self, model: Model, *, size: int = 32, threads: int | None = 1) -> None:
        """Prepare `model`, which is not changed.

        Args:
            model: Every type in it must be known to onnxruntime and NumPy.
            size: Tensors onnxruntime makes at a time; as many are held.
            threads: Threads of onnxruntime, None for all processors.

        Raises:
            IntqError: As for `Interpreter` and `runtime.Session`.
        """
        self.interpreter = Interpreter(model)
        graph, tensors = self.interpreter.graph, self.interpreter.tensors
        for tensor in (t for node in graph.nodes for t in node.outputs if t.name):
            if tensor.dtype is None:  # what onnxruntime gives could not be named
                raise IntqError(
                    f"the type of tensor {tensor.name!r} cannot be inferred; check its node"
                )
        self._theirs = Segments(graph, tensors, size=size, threads=threads)

    def run(self, feeds: Batch) -> list[Difference]:
        """The tensors that differ on `feeds`, in graph order; none where all bits are the same.

        Raises:
            IntqError: As for `Interpreter.run` and `runtime.Session.run`.
        """
        ours, held = self.interpreter.stream(feeds), dict[str, Array]()
        found: list[Difference] = []
        for name, want in self._theirs.run(feeds):
            while name not in held:  # the two may order independent nodes differently
                held.update([next(ours)])
            found += _compare(name, held.pop(name), want)
        return found


def differences(model: Model, feeds: Batch) -> list[Difference]:
    """Compare every tensor of the interpreter with onnxruntime's, on one batch.

    Returns:
        (tensor, how many elements differ, largest difference) of those that differ.

    Raises:
        IntqError: As for `SideBySide` and `SideBySide.run`.
    """
    return SideBySide(model).run(feeds)


def _compare(name: str, have: Array, want: Array) -> list[Difference]:
    if (have.dtype, have.shape) != (want.dtype, want.shape):
        return [Difference(name, want.size, float("inf"))]
    apart = have != want
    if want.dtype.kind == "f":
        apart &= ~(np.isnan(have) & np.isnan(want))
    if not apart.any():
        return []
    # As Python's numbers, which neither wrap nor round.
    error = np.abs(have[apart].astype(object) - want[apart].astype(object)).max()
    return [Difference(name, int(apart.sum()), float(error))]


def _graph(model: Model) -> gs.Graph:
    """The model as a sorted graph, nodes named, `Constant` nodes made initializers."""
    if isinstance(model, str | Path):
        return load(model)
    if not isinstance(model, onnx.ModelProto):
        model = model_from_graph(model.copy())
    return graph_from_model(model)


def _spec(tensor: gs.Tensor) -> TensorSpec:
    if tensor.type != "tensor_type":
        raise IntqError(
            f"input {tensor.name!r} is a {tensor.type.removesuffix('_type')}; expected a tensor; "
            "export the model without sequences and optional inputs"
        )
    dtype = numpy_dtype(element_type(tensor) or 0)
    return TensorSpec(name=tensor.name, dtype=dtype, shape=tuple(tensor.shape or ()))
