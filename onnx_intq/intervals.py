"""Bounds every integer tensor of a model by interval arithmetic, and says what may overflow.

Law: whatever a model is fed, its integer tensors stay within their boxes, which hold an interval
for each channel where that is known; and no result of a node leaves its type unless the node is
among the risks, or is a Cast that wraps all its values by the same number, so that they stay in
order. What onnxruntime computes wrongly is a risk, too.

A risk is no proof of an overflow: but for a few relations, intervals do not see that operands
depend on each other, such as that a square root's square is at most its argument. What the body of
a Scan carries over from step to step may be anything its type holds, which therefore holds at every
step; so may the inputs of a Loop's body, and what comes out of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import onnx
import onnx_graphsurgeon as gs

from onnx_intq.graph import element_type
from onnx_intq.interval_arithmetic import Box, Interval, box, of_constant, union
from onnx_intq.interval_relations import related
from onnx_intq.interval_rules import RULES, Place

BITS = (2, 4, 8, 16, 32, 64)
LIMITS: dict[str, Interval] = {
    "BOOL": (0, 1),
    **{f"INT{bits}": (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) for bits in BITS},
    **{f"UINT{bits}": (0, (1 << bits) - 1) for bits in BITS},
}
"""ONNX's name of an integer type -> its lowest and highest value."""


@dataclass(frozen=True, kw_only=True)
class Risk:
    """A node whose result is not proven to stay within its type.

    Attributes:
        node: Its name.
        tensor: Its output.
        why: What was found.
        bounded: Whether the bounds are known, and too wide; else there are none.
    """

    node: str
    tensor: str
    why: str
    bounded: bool


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What `bounds` found.

    Attributes:
        boxes: Name of each integer tensor of the outermost graph -> the intervals of its elements.
        risks: In the order of the nodes, bodies included.
    """

    boxes: dict[str, Box]
    risks: tuple[Risk, ...]

    @property
    def intervals(self) -> dict[str, Interval]:
        """Name of each of these tensors -> its lowest and highest value."""
        return {name: each.ends for name, each in self.boxes.items()}


def bounds(model: gs.Graph) -> Bounds:
    """Bound the integer tensors of `model`, whose nodes are in order, as `graph.load` gives them.

    Tensors without a type, and float ones, are left out.
    """
    found = _Found()
    found.graph(model)
    boxes = {
        name: found.known[id(tensor)]
        for name, tensor in model.tensors().items()
        if id(tensor) in found.known
    }
    return Bounds(boxes=boxes, risks=tuple(found.risks))


def limits(tensor: gs.Tensor) -> Interval | None:
    """The lowest and highest value of a tensor's type, None if that is no integer type."""
    number = element_type(tensor)
    return LIMITS.get(onnx.TensorProto.DataType.Name(number)) if number else None


@dataclass
class _Found:
    """Boxes by the `id` of tensors, and risks, as the nodes are gone through."""

    known: dict[int, Box] = field(default_factory=dict)
    risks: list[Risk] = field(default_factory=list)

    def graph(self, graph: gs.Graph) -> None:
        self.whole_type(t for t in graph.inputs if id(t) not in self.known)
        for node in graph.nodes:
            for tensor in node.inputs:
                if isinstance(tensor, gs.Constant) and limits(tensor) and tensor.values.size:
                    self.known[id(tensor)] = of_constant(tensor.values)
            bodies = [value for value in node.attrs.values() if isinstance(value, gs.Graph)]
            if node.op == "Scan":
                self.scanned(node)
            for body in bodies:
                self.graph(body)
            if node.op == "If":
                self.joined(node, bodies)
            elif node.op == "Scan":
                self.collected(node)
            elif bodies:
                self.whole_type(node.outputs)
            else:
                self.node(node)

    def node(self, node: gs.Node) -> None:
        """Bound what a node makes."""
        same = len(node.outputs) if node.op == "Split" else 1
        for tensor in node.outputs[:same]:
            if of_type := limits(tensor):
                self.known[id(tensor)] = self.result(node, tensor, of_type)
        self.whole_type(node.outputs[same:])

    def result(self, node: gs.Node, tensor: gs.Tensor, of_type: Interval) -> Box:
        """The box of a tensor that a node makes; a risk if that is not within its type."""
        rule, place = RULES.get(node.op), Place(node, self.known, of_type)
        try:
            exact = rule(place) if rule else "has no rule"
        except KeyError:
            exact = "reads a tensor without bounds"
        if isinstance(exact, str):
            self.risk(node, tensor, exact, bounded=False)
            return box(*of_type)
        exact = related(place, exact)
        low, high = exact.ends
        if of_type[0] <= low and high <= of_type[1]:
            return exact
        type_ = onnx.TensorProto.DataType.Name(element_type(tensor)).lower()
        self.risk(node, tensor, f"{low}..{high} may leave {type_}", bounded=True)
        return box(*of_type)

    def risk(self, node: gs.Node, tensor: gs.Tensor, why: str, *, bounded: bool) -> None:
        why = f"{node.op} {why}" if not bounded else f"{node.op}: {why}"
        self.risks.append(Risk(node=node.name, tensor=tensor.name, why=why, bounded=bounded))

    def joined(self, node: gs.Node, branches: list[gs.Graph]) -> None:
        """What an If gives is what one of its branches gives."""
        self.whole_type(node.outputs)
        for index, tensor in enumerate(node.outputs):
            results = [self.known.get(id(branch.outputs[index])) for branch in branches]
            known = [each for each in results if each]
            if len(known) == len(branches) == 2:
                self.known[id(tensor)] = union(*(each.hull() for each in known))

    def scanned(self, node: gs.Node) -> None:
        """A slice of what is scanned lies within the bounds of the whole."""
        inputs = zip(node.attrs["body"].inputs, node.inputs, strict=True)
        for inner, outer in list(inputs)[-node.attrs["num_scan_inputs"] :]:
            if limits(inner) and id(outer) in self.known:
                self.known[id(inner)] = self.known[id(outer)].hull()

    def collected(self, node: gs.Node) -> None:
        """A Scan gives what its body gave, or, after no step, the states it began with."""
        self.whole_type(node.outputs)
        results = zip(node.outputs, node.attrs["body"].outputs, strict=True)
        states = len(node.inputs) - node.attrs["num_scan_inputs"]
        for index, (outer, inner) in enumerate(results):
            held = [inner, *node.inputs[index : index + 1]] if index < states else [inner]
            if limits(outer) and all(id(tensor) in self.known for tensor in held):
                boxes = [self.known[id(tensor)].hull() for tensor in held]
                self.known[id(outer)] = union(*boxes)

    def whole_type(self, tensors: Iterable[gs.Tensor]) -> None:
        for tensor in tensors:
            if of_type := limits(tensor):
                self.known[id(tensor)] = box(*of_type)
