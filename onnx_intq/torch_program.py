"""An ONNX graph as a list of torch calls, each followed by what may be freed after it."""

from __future__ import annotations

import functools
import graphlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import onnx_graphsurgeon as gs
from torch import Tensor

from onnx_intq.graph import first_line
from onnx_intq.torch_ops import control
from onnx_intq.torch_ops.binding import Read, Result, bind, scalar
from onnx_intq.transform import IntqError


@dataclass(frozen=True, kw_only=True)
class Step:
    """One node.

    Attributes:
        node: Its name and operator, for messages.
        function: The call, attributes bound.
        inputs: Names of the inputs, "" for an omitted one.
        reads: How an input becomes a Python value, None for a tensor; as many as inputs.
        outputs: Names of the outputs, "" for an omitted one.
        frees: Names that no later step reads.
    """

    node: str
    function: Callable[..., Result]
    inputs: tuple[str, ...]
    reads: tuple[Read | None, ...]
    outputs: tuple[str, ...]
    frees: tuple[str, ...] = ()

    def run(self, values: dict[str, Tensor]) -> None:
        """Take the inputs from `values`, put the outputs there, remove what nobody needs any more.

        Raises:
            IntqError: torch refused; the message names the node and the shapes.
        """
        tensors = [values[name] if name else None for name in self.inputs]
        try:
            result = self.function(*self._arguments(tensors))
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            shapes = ", ".join("-" if t is None else str(list(t.shape)) for t in tensors)
            raise IntqError(
                f"{self.node} failed on inputs of shapes {shapes or '-'}: {first_line(error)}; "
                "check the feeds and the model"
            ) from error
        results = (result,) if isinstance(result, Tensor) else result
        values.update((n, r) for n, r in zip(self.outputs, results, strict=False) if n)
        for name in self.frees:
            values.pop(name, None)

    def _arguments(self, tensors: Sequence[Tensor | None]) -> list[Any]:
        """Python values where asked for; the tensors all on the first accelerator among them."""
        pairs = list(zip(tensors, self.reads, strict=True))
        device = next(
            (t.device for t, r in pairs if t is not None and r is None and t.device.type != "cpu"),
            None,
        )
        return [
            t if t is None else read(t) if read else t if device is None else t.to(device)
            for t, read in pairs
        ]


@dataclass(frozen=True, kw_only=True)
class Program:
    """The steps of a graph or of a body, in order.

    Attributes:
        inputs: Names of its inputs.
        outputs: Names of its outputs.
        captured: Names it reads but does not compute: initializers and, in a body, outer tensors.
        steps: One per node, each after those it reads from.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    captured: tuple[str, ...]
    steps: tuple[Step, ...]

    def run(self, values: dict[str, Tensor]) -> list[Tensor]:
        """Run on `values`, which holds inputs and captured tensors; the outputs stay in it."""
        for step in self.steps:
            step.run(values)
        return [values[name] for name in self.outputs]


@dataclass(frozen=True, kw_only=True)
class Compiler:
    """Makes programs of graphs and collects their initializers.

    Attributes:
        opset: Version of the default domain.
        keep: Names that are never freed and count as read: taps.
        constants: The initializers found, by name.
    """

    opset: int
    keep: frozenset[str] = frozenset()
    constants: dict[str, gs.Constant] = field(default_factory=dict[str, gs.Constant])

    def compile(self, graph: gs.Graph) -> Program:
        """The program of a graph or body.

        Raises:
            IntqError: An operator, attribute, number of inputs or output is not supported.
        """
        outputs = tuple(self._name(t) for t in graph.outputs)
        steps = ordered([self._step(node, {*outputs, *self.keep}) for node in graph.nodes])
        inputs = tuple(t.name for t in graph.inputs)
        made = {*inputs, *(name for step in steps for name in step.outputs)}
        read = dict.fromkeys(name for step in steps for name in step.inputs if name)
        return Program(
            inputs=inputs,
            outputs=outputs,
            captured=tuple(n for n in read | dict.fromkeys(outputs) if n not in made),
            steps=tuple(with_frees(steps, {*outputs, *self.keep})),
        )

    def _name(self, tensor: gs.Tensor) -> str:
        """The tensor's name; initializers of different bodies may share one, so make it unique."""
        name = str(tensor.name)
        if isinstance(tensor, gs.Constant):
            while self.constants.setdefault(name, tensor) is not tensor:
                name += "'"
        return name

    def _step(self, node: gs.Node, wanted: set[str]) -> Step:
        step = Step(
            node=f"node {node.name!r} ({node.op})",
            function=control.branch,
            inputs=tuple(self._name(t) for t in node.inputs),
            reads=(),
            outputs=tuple(t.name for t in node.outputs),
        )
        if node.op == "If":
            return self._branch(step, node)
        if node.op == "Loop":
            return self._loop(step, node)
        used = (i for i, t in enumerate(node.outputs, 1) if t.outputs or t.name in wanted)
        call = bind(node, self.opset, max(used, default=1))
        return replace(step, function=call.function, reads=call.reads)

    def _branch(self, step: Step, node: gs.Node) -> Step:
        then, other = (self.compile(node.attrs[k]) for k in ("then_branch", "else_branch"))
        names = tuple(dict.fromkeys(then.captured + other.captured))
        return replace(
            step,
            function=functools.partial(control.branch, names=names, then=then.run, other=other.run),
            inputs=step.inputs + names,
            reads=(scalar,) + (None,) * len(names),
        )

    def _loop(self, step: Step, node: gs.Node) -> Step:
        body = self.compile(node.attrs["body"])
        inputs = step.inputs + body.captured
        return replace(
            step,
            function=functools.partial(
                control.loop, names=body.captured, inputs=body.inputs, body=body.run
            ),
            inputs=inputs,
            reads=(scalar, scalar) + (None,) * (len(inputs) - 2),
        )


def ordered(steps: Sequence[Step]) -> list[Step]:
    """The steps, each after those whose outputs it reads; unchanged if they are so already."""
    maker = {name: i for i, step in enumerate(steps) for name in step.outputs if name}
    needs = {i: [maker[n] for n in s.inputs if n in maker] for i, s in enumerate(steps)}
    if all(j < i for i, before in needs.items() for j in before):
        return list(steps)
    return [steps[i] for i in graphlib.TopologicalSorter(needs).static_order()]


def with_frees(steps: Sequence[Step], keep: Iterable[str]) -> list[Step]:
    """The steps, each told which names it is the last to mention, those of `keep` left out."""
    last = {name: i for i, s in enumerate(steps) for name in (*s.inputs, *s.outputs)}
    frees: list[list[str]] = [[] for _ in steps]
    for name in last.keys() - {"", *keep}:
        frees[last[name]].append(name)
    return [replace(s, frees=tuple(sorted(f))) for s, f in zip(steps, frees, strict=True)]
