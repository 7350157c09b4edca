"""Finds tensors whose channels can be scaled, each by its own factor, without changing a model.

A group of tensors shares the factors of one set of channels: each of its tensors is made by a
linear operator, a LayerNormalization or a product with a constant that takes the factors in, or by
an operator that passes them on (it moves values, or is positively homogeneous); each is read by
operators that do the same. Queries and keys are of one group with inverse factors: their product
stays. Channels are followed through reshapes by labels: an integer array that broadcasts to the
tensor, the number of the channel each value belongs to, FIXED for values that must stay.
Law: `Group.scale` with any positive factors keeps the model's function.
(Nagel et al. 2019, 1906.04721, section 4.1; SmoothQuant, 2211.10438, section 4.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnx_intq.graph import Names, constant, producer
from onnx_intq.labels import (
    FIXED,
    CannotScaleError,
    Labels,
    align,
    labels_after,
    labels_before,
    operand_labels,
    shape_of,
    vector,
)

Array = npt.NDArray[Any]
LINEAR = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
CHANNELS_FIRST = {"Conv", "ConvTranspose"}
LARGEST_GROUP = 48
"""Tensors; what spreads further is a residual stream, which some operator will not let pass."""


@dataclass(frozen=True, eq=False)
class Edit:
    """A constant that takes factors in.

    Attributes:
        node: Reads the constant.
        index: At this input; an absent one needs no edit.
        labels: Integers that broadcast to the constant, or to which it broadcasts.
        power: The constant is multiplied by factors ** power.
    """

    node: gs.Node
    index: int
    labels: Labels
    power: int


@dataclass(frozen=True, eq=False)
class Reading:
    """A product that reads a tensor of the group.

    Attributes:
        node: The product.
        index: Which input.
        labels: Of that input.
        power: That input is multiplied by factors ** power.
    """

    node: gs.Node
    index: int
    labels: Labels
    power: int


@dataclass(eq=False)
class Group:
    """Tensors whose channels are scaled together.

    Attributes:
        size: How many factors there are.
        tensors: Name -> labels and the power of the factors that multiply it.
        edits: What scaling changes.
        readings: The products that read the tensors.
    """

    size: int
    tensors: dict[str, tuple[Labels, int]] = field(default_factory=dict)
    edits: list[Edit] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)

    def scale(self, factors: Array, names: Names) -> None:
        """Multiply channel c of the tensors by factors[c]; the model's function stays.

        Args:
            factors: float64 [size], positive.
            names: In use; takes those of the new constants.
        """
        extended = np.append(np.asarray(factors, np.float64), 1.0)  # FIXED is the last
        for edit in self.edits:
            old = edit.node.inputs[edit.index]
            extra = edit.labels.ndim - max(old.values.ndim, 1)
            labels = edit.labels  # a vector stays a vector: biases fuse
            while extra > 0 and labels.shape[0] == 1:
                labels, extra = labels[0], extra - 1
            values = old.values * np.power(extended[labels], edit.power)
            name = old.name if len(old.outputs) == 1 else names.new(old.name)
            edit.node.inputs[edit.index] = gs.Constant(name, values.astype(old.values.dtype))


def groups(graph: gs.Graph) -> Iterator[tuple[gs.Node, Group | str]]:
    """For every product that reads a tensor of no earlier group: its group, or what is in the way.

    Args:
        graph: Float, shapes inferred; not changed. Bodies of If, Loop and Scan are left out.
    """
    done: set[str] = set()
    for node in graph.nodes:
        for index in _activations(node):
            tensor = node.inputs[index]
            if tensor.name in done:
                continue
            found = _group(graph, node, index)
            if isinstance(found, Group):
                if not done.isdisjoint(found.tensors):
                    found = "a part of its group is in another"
                else:
                    done |= found.tensors.keys()
            yield node, found


def weight_axes(node: gs.Node) -> tuple[int, int]:
    """The axes of a linear operator's second input that hold its input and output channels."""
    if node.op == "Conv":
        return 1, 0
    return (1, 0) if node.op == "Gemm" and node.attrs.get("transB", 0) else (0, 1)


def has_weight(node: gs.Node) -> bool:
    """Whether a node is a linear operator with a constant second input."""
    return node.op in LINEAR and isinstance(node.inputs[1], gs.Constant)


def _activations(node: gs.Node) -> range:
    if node.op not in LINEAR or isinstance(node.inputs[0], gs.Constant):
        return range(0)
    if has_weight(node):
        return range(1)
    return range(2) if node.op == "MatMul" else range(0)


def _group(graph: gs.Graph, node: gs.Node, index: int) -> Group | str:
    why = ""
    # Where a factor like 1 / sqrt(d) or the 1 / 2 of a GELU cannot be passed, it becomes a vector.
    for absorb in (False, True):
        for first in (0, 1):
            try:
                search = _Search(graph, absorb=absorb, first=first)
                return search.start(node, index)
            except CannotScaleError as obstacle:
                why = why or str(obstacle)
    return why


class _Search:
    """Grows one group."""

    def __init__(self, graph: gs.Graph, *, absorb: bool, first: int) -> None:
        self._graph, self._absorb, self._first = graph, absorb, first
        self._own = {id(n) for n in graph.nodes}
        self._ends = {id(t) for t in (*graph.inputs, *graph.outputs)}
        self._edited: set[tuple[int, int]] = set()
        self._queue: list[tuple[gs.Tensor, Labels, int]] = []
        self._group = Group(0)

    def start(self, node: gs.Node, index: int) -> Group:
        tensor = node.inputs[index]
        self._visit(tensor, self._first_labels(node, index), 1)
        while self._queue:
            current, found, power = self._queue.pop()
            self._made(current, found, power)
            for reader in list(current.outputs):
                for place, read in enumerate(reader.inputs):
                    if read is current:
                        self._read(reader, place, found, power)
        self._check_products()
        return self._group

    def _first_labels(self, node: gs.Node, index: int) -> Labels:
        """A number for every channel of what `node` reads; each head has channels of its own."""
        shape = shape_of(node.inputs[index])
        linear = has_weight(node)
        axis = 1 if linear and node.op in CHANNELS_FIRST else len(shape) - (2 if index else 1)
        axes = [axis] if linear or len(shape) < 4 else [len(shape) - 3, axis]
        axes = [i for i in axes if i == axis or isinstance(shape[i], int)]
        if axis < 0 or not isinstance(shape[axis], int):
            raise CannotScaleError("the number of channels is not known")
        sizes = [n if i in axes else 1 for i, n in enumerate(shape)]
        self._group.size = int(np.prod(sizes))
        return np.arange(self._group.size).reshape(sizes)

    def _check_products(self) -> None:
        """Refuse groups where a product takes the factors in twice."""
        for node in self._graph.nodes:
            if node.op == "Mul" and node.outputs[0].name in self._group.tensors:
                sources = [t.name in self._group.tensors for t in node.inputs]
                sources += [(id(node), i) in self._edited for i in range(2)]
                if sum(sources) != 1:
                    raise CannotScaleError(f"{node.name} multiplies the channels by each other")

    def _visit(self, tensor: gs.Tensor, labels: Labels, power: int) -> None:
        if (labels == FIXED).all():
            return
        if tensor.name in self._group.tensors:
            known, before = self._group.tensors[tensor.name]
            if before != power or known.shape != labels.shape or (known != labels).any():
                raise CannotScaleError(f"the channels of {tensor.name} are joined in two ways")
            return
        if id(tensor) in self._ends or isinstance(tensor, gs.Constant) or not tensor.inputs:
            raise CannotScaleError(f"{tensor.name} is an input, an output or constant")
        if len(self._group.tensors) >= LARGEST_GROUP:
            raise CannotScaleError("too many tensors share the channels, as in a residual stream")
        self._group.tensors[tensor.name] = labels, power
        self._queue.append((tensor, labels, power))

    def _visit_operand(self, node: gs.Node, index: int, labels: Labels, power: int) -> None:
        """An operand of a sum: its constants are edited."""
        tensor = node.inputs[index]
        if isinstance(tensor, gs.Constant):
            self._edit(node, index, labels, power)
            return
        self._visit(tensor, operand_labels(labels, shape_of(tensor)), power)

    def _edit(self, node: gs.Node, index: int, labels: Labels, power: int) -> None:
        if (id(node), index) not in self._edited:
            self._edited.add((id(node), index))
            self._group.edits.append(Edit(node, index, labels, power))

    # How a tensor is made.

    def _made(self, tensor: gs.Tensor, labels: Labels, power: int) -> None:
        node = producer(tensor)
        if node is None or id(node) not in self._own:
            raise CannotScaleError(f"{tensor.name} is made elsewhere")
        if has_weight(node):
            self._made_by_linear(node, labels, power)
        elif node.op == "LayerNormalization" and tensor is node.outputs[0]:
            self._made_by_norm(node, labels, power)
        elif node.op == "MatMul":
            self._made_by_product(node, labels, power)
        elif node.op in {"Add", "Sub"}:
            for index in range(2):
                self._visit_operand(node, index, labels, power)
        elif node.op == "Mul":
            self._made_by_mul(node, labels, power)
        elif node.op == "Div" and isinstance(node.inputs[1], gs.Constant):
            self._visit(node.inputs[0], operand_labels(labels, shape_of(node.inputs[0])), power)
        elif node.op == "Where":
            self._passed_by_where(node, labels, power)
        else:
            self._visit(node.inputs[0], labels_before(node, tensor, labels), power)

    def _made_by_linear(self, node: gs.Node, labels: Labels, power: int) -> None:
        along = vector(labels, 1 if node.op in CHANNELS_FIRST else -1, node)
        axis = weight_axes(node)[1]
        w = node.inputs[1].values
        if node.op == "ConvTranspose" and node.attrs.get("group", 1) != 1:
            raise CannotScaleError(f"{node.name} is a grouped ConvTranspose")
        if w.ndim < 2 or (node.op == "MatMul" and w.ndim != 2):
            raise CannotScaleError(f"{node.name} has a weight of rank {w.ndim}")
        self._edit(node, 1, along.reshape([-1 if i == axis else 1 for i in range(w.ndim)]), power)
        if len(node.inputs) > 2 and not node.inputs[2].is_empty():
            if constant(node, 2) is None:
                raise CannotScaleError(f"the bias of {node.name} is computed at run time")
            self._edit(node, 2, along, power)

    def _made_by_norm(self, node: gs.Node, labels: Labels, power: int) -> None:
        along = vector(labels, -1, node)
        if node.attrs.get("axis", -1) not in {-1, labels.ndim - 1} or constant(node, 1) is None:
            raise CannotScaleError(f"{node.name} normalizes over several axes, or has no constants")
        self._edit(node, 1, along, power)
        if len(node.inputs) > 2 and not node.inputs[2].is_empty():
            if constant(node, 2) is None:
                raise CannotScaleError(f"the bias of {node.name} is computed at run time")
            self._edit(node, 2, along, power)

    def _made_by_product(self, node: gs.Node, labels: Labels, power: int) -> None:
        if labels.ndim < 2:
            raise CannotScaleError(f"{node.name} is a product of vectors")
        rows, columns = labels.shape[-2] > 1, labels.shape[-1] > 1
        if rows and columns:
            raise CannotScaleError(f"{node.name} mixes the channels")
        index = 0 if rows else 1
        self._visit(node.inputs[index], operand_labels(labels, shape_of(node.inputs[index])), power)

    def _made_by_mul(self, node: gs.Node, labels: Labels, power: int) -> None:
        values = [constant(node, i) for i in range(2)]
        if any(t.name in self._group.tensors for t in node.inputs):
            return  # reached from there
        for index, value in enumerate(values):
            if value is not None and (value.size > 1 or self._absorb):
                self._edit(node, index, labels, power)
                return
        index = next((i for i in (0, 1) if values[1 - i] is not None), self._first)
        self._visit(node.inputs[index], operand_labels(labels, shape_of(node.inputs[index])), power)

    def _passed_by_where(self, node: gs.Node, labels: Labels, power: int) -> None:
        for index in (1, 2):
            value = constant(node, index)
            if value is None:
                source = node.inputs[index]
                self._visit(source, operand_labels(labels, shape_of(source)), power)
            elif value.any():
                raise CannotScaleError(f"{node.name} fills in constants")

    # How it is read.

    def _read(self, node: gs.Node, index: int, labels: Labels, power: int) -> None:
        if node.op == "Shape":
            return
        if id(node) not in self._own:
            raise CannotScaleError(f"{node.name} stands in a body")
        if has_weight(node) and index == 0:
            self._read_by_linear(node, labels, power)
        elif node.op == "MatMul":
            self._read_by_product(node, index, labels, power)
        elif node.op in {"Add", "Sub", "Mul"} or (node.op, index) in {
            ("Div", 0),
            ("Where", 1),
            ("Where", 2),
        }:
            self._visit(node.outputs[0], align(labels, len(shape_of(node.outputs[0]))), power)
        else:
            if index:
                raise CannotScaleError(f"{node.name} ({node.op}) reads them")
            for result in node.outputs:
                self._visit(result, labels_after(node, result, labels), power)

    def _read_by_linear(self, node: gs.Node, labels: Labels, power: int) -> None:
        along = vector(labels, 1 if node.op in CHANNELS_FIRST else -1, node)
        w = node.inputs[1].values
        if w.ndim < 2 or (node.op == "MatMul" and w.ndim != 2) or node.attrs.get("transA", 0):
            raise CannotScaleError(f"{node.name} has a weight of rank {w.ndim}, or transposes")
        axis, group = weight_axes(node)[0], node.attrs.get("group", 1)
        shaped = along.reshape([-1 if i == axis else 1 for i in range(w.ndim)])
        if node.op == "Conv" and group > 1:
            per_group = along.reshape(group, 1, -1)
            shaped = np.broadcast_to(per_group, (group, len(w) // group, per_group.shape[2]))
            shaped = shaped.reshape(len(w), -1, *[1] * (w.ndim - 2))
        self._edit(node, 1, shaped, -power)
        self._group.readings.append(Reading(node, index=0, labels=labels, power=power))

    def _read_by_product(self, node: gs.Node, index: int, labels: Labels, power: int) -> None:
        if isinstance(node.inputs[1 - index], gs.Constant):
            raise CannotScaleError(f"{node.name} multiplies by a constant from the left")
        if labels.ndim < 2:
            raise CannotScaleError(f"{node.name} is a product of vectors")
        self._group.readings.append(Reading(node, index, labels, power))
        inner, outer = (-1, -2) if index == 0 else (-2, -1)
        if labels.shape[inner] == 1:
            self._visit(node.outputs[0], align(labels, len(shape_of(node.outputs[0]))), power)
            return
        if labels.shape[outer] > 1:
            raise CannotScaleError(f"{node.name} mixes the channels")
        other = node.inputs[1 - index]
        turned = align(np.swapaxes(labels, -1, -2), len(shape_of(other)))
        self._visit(other, operand_labels(turned, shape_of(other)), -power)
