"""A graph as a list of NumPy calls, each followed by what may be freed after it."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnx_intq.binding import Call, bind, scalar
from onnx_intq.graph import first_line
from onnx_intq.integer_ops import OPS
from onnx_intq.integer_ops.arrays import Array, Function
from onnx_intq.integer_ops.scan import Scan
from onnx_intq.segments import reads
from onnx_intq.transform import IntqError

UNKNOWN = (
    "cannot be run by the interpreter; expected one that works on integers; "
    "lower it with --target integer, or run the model in onnxruntime"
)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One node.

    Attributes:
        node: Its name and operator, for messages.
        call: What computes it.
        inputs: Names of the inputs, "" for an omitted one.
        outputs: Names of the outputs, "" for an omitted one.
        frees: Names that no later step reads.
    """

    node: str
    call: Call
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    frees: tuple[str, ...]

    def run(self, values: Mapping[str, Array]) -> list[tuple[str, Array]]:
        """The outputs that have a name, with it.

        Raises:
            IntqError: There is no result; the message names the node and the shapes.
        """
        arrays = [values[name] if name else None for name in self.inputs]
        try:
            with np.errstate(all="ignore"):  # wrapping is meant; operators refuse what is not
                result = self.call(arrays)
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            shapes = ", ".join("-" if a is None else str(list(a.shape)) for a in arrays)
            raise IntqError(
                f"{self.node} failed on inputs of shapes {shapes or '-'}: {first_line(error)}; "
                "check the feeds and the model"
            ) from error
        results = result if isinstance(result, tuple) else (result,)
        named = zip(self.outputs, results, strict=False)
        return [(name, np.asarray(array)) for name, array in named if name]


@dataclass(frozen=True, kw_only=True)
class Program:
    """The steps of a graph or of a body, in order.

    Attributes:
        constants: The initializers by name.
        outputs: Names of the outputs.
        steps: One per node, each after those it reads from.
    """

    constants: Mapping[str, Array]
    outputs: tuple[str, ...]
    steps: tuple[Step, ...]

    def stream(self, given: Mapping[str, Array]) -> Iterator[tuple[str, Array]]:
        """Yield the nodes' outputs; `given` holds inputs and, for a body, outer tensors."""
        values = {**self.constants, **given}
        for step in self.steps:
            found = step.run(values)
            values.update(found)
            yield from found
            del found  # it would keep what is freed now until the next step has run
            for name in step.frees:
                values.pop(name, None)

    def run(self, given: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs by name."""
        found = {name: array for name, array in self.stream(given) if name in self.outputs}
        known = {**self.constants, **given, **found}
        return {name: known[name] for name in self.outputs}


def compiled(graph: gs.Graph, opset: int) -> Program:
    """The program of a sorted graph or body.

    Raises:
        IntqError: An operator, attribute, number of inputs or output is not supported.
    """
    tensors = [*graph.outputs, *(t for node in graph.nodes for t in node.inputs)]
    outputs = tuple(t.name for t in graph.outputs)
    last = {t.name: i for i, n in enumerate(graph.nodes) for t in (*reads(n), *n.outputs)}
    frees: list[list[str]] = [[] for _ in graph.nodes]
    for name, index in last.items():
        frees[index].append(name)
    return Program(
        constants={t.name: t.values for t in tensors if isinstance(t, gs.Constant)},
        outputs=outputs,
        steps=tuple(
            _step(node, opset, free, outputs) for node, free in zip(graph.nodes, frees, strict=True)
        ),
    )


def _step(node: gs.Node, opset: int, frees: Sequence[str], wanted: Sequence[str]) -> Step:
    inputs = tuple(t.name for t in node.inputs)
    if node.op == "If":
        outer = tuple(dict.fromkeys(t.name for t in reads(node)))
        call, inputs = _branching(node, opset, outer), inputs + outer
    elif node.op == "Scan":
        outer = tuple(dict.fromkeys(t.name for t in reads(node) if t.name not in inputs))
        function = Scan.of(node, compiled(node.attrs["body"], opset).run, outer)
        call, inputs = Call(function=function, reads=(None,) * len(inputs + outer)), inputs + outer
    else:
        used = (i for i, t in enumerate(node.outputs, 1) if t.outputs or t.name in wanted)
        last = max(used, default=1)
        call = bind(node, OPS, opset=opset, used_outputs=last, unknown=UNKNOWN)
    return Step(
        node=f"node {node.name!r} ({node.op})",
        call=call,
        inputs=inputs,
        outputs=tuple(t.name for t in node.outputs),
        frees=tuple(frees),
    )


def _branching(node: gs.Node, opset: int, outer: Sequence[str]) -> Call:
    """`If`: one of two bodies, on a condition and the outer tensors that they read."""
    then, other = (compiled(node.attrs[key], opset) for key in ("then_branch", "else_branch"))
    function: Function = functools.partial(_branch, names=outer, then=then, other=other)
    return Call(function=function, reads=(scalar, *(None for _ in outer)))


def _branch(
    condition: bool, *outer: Array, names: Sequence[str], then: Program, other: Program
) -> tuple[Array, ...]:
    chosen = then if condition else other
    return tuple(chosen.run(dict(zip(names, outer, strict=True))).values())
