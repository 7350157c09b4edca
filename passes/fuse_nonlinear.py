"""Fuses elementwise functions that an exporter wrote as chains of operators.

Before: `y = Mul(Mul(x, Add(Erf(Div(x, 1.4142)), 1)), 0.5)`.   After: `y = Gelu(x)`, opset 20.
So for GELU by erf and by tanh, HardSwish, Mish, Sigmoid and Softplus, in whatever order and with
whatever constants they are written: a chain is what it computes.
Condition: between x and y there are elementwise operators and scalar constants alone, and at 487
points the chain differs from the operator by 1e-6 of max(1, |y|) at most.
Law: outputs do not change but for float32 rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from onnx_intq.graph import convert_opset, producer
from onnx_intq.scalar_functions import Float64, above, between, composed, evaluate
from onnx_intq.transform import Context, Pass

OPSET = 20
"""Brought Gelu."""
TOLERANCE = 1e-6
"""For constants written with seven digits; GELU's two forms differ by 4.8e-4."""
POINTS = np.concatenate([np.linspace(-12, 12, 481), [-100.0, -50.0, -20.0, 20.0, 50.0, 100.0]])


@dataclass(frozen=True, kw_only=True)
class _Known:
    """An operator, and what there is one of in every chain that computes it."""

    op: str
    parts: frozenset[str]
    attrs: dict[str, str] = field(default_factory=dict)

    def agrees(self, values: Float64) -> bool:
        """Whether `values` at `POINTS` are the operator's."""
        wanted = evaluate(gs.Node(self.op, attrs=dict(self.attrs)), [POINTS])
        reach = TOLERANCE * np.maximum(np.abs(wanted), 1)
        return values.shape == wanted.shape and bool((np.abs(values - wanted) <= reach).all())


KNOWN = (
    _Known(op="Gelu", parts=frozenset({"Erf"})),
    _Known(op="Gelu", parts=frozenset({"Tanh", "Sigmoid"}), attrs={"approximate": "tanh"}),
    _Known(op="HardSwish", parts=frozenset({"Clip", "HardSigmoid"})),
    _Known(op="Mish", parts=frozenset({"Tanh"})),
    _Known(op="Sigmoid", parts=frozenset({"Exp"})),
    _Known(op="Softplus", parts=frozenset({"Exp"})),
)
PARTS = frozenset().union(*(known.parts for known in KNOWN))
LAST = {"Mul", "Div", "Log", "Reciprocal"}
"""Operators that such a chain may end with."""


@dataclass(frozen=True, kw_only=True)
class FuseNonlinear(Pass):
    """Fuse chains into one operator."""

    def run(self, model: gs.Graph, ctx: Context) -> int:
        """Fuse; return how many chains were."""
        if any(_match(node) for node in model.nodes):
            convert_opset(model, OPSET)
        count = 0
        for index, last in enumerate(model.nodes):
            matched = _match(last)
            if matched is not None:
                known, start = matched
                (result,) = last.outputs
                last.outputs.clear()
                model.nodes[index] = gs.Node(
                    known.op, last.name, dict(known.attrs), [start], [result]
                )
                count += 1
        if count:
            model.cleanup(remove_unused_graph_inputs=False)
        for node in [n for n in model.nodes if n.op == "Erf"]:
            ctx.skip(node, "what is made of it is no operator that is known here")
        return count


def _match(last: gs.Node) -> tuple[_Known, gs.Tensor] | None:
    """The operator that the chain up to `last` computes, and of which tensor."""
    starts = above(last.outputs[0]) if last.op in LAST else []
    if not any((maker := producer(t)) is not None and maker.op in PARTS for t in starts):
        return None
    for start in starts:
        nodes = between(last.outputs[0], start)
        parts = {node.op for node in nodes or []}
        candidates = [known for known in KNOWN if known.parts & parts and known.op not in parts]
        if not candidates or not _same_rank(start, last.outputs[0]):
            continue
        values = composed(last.outputs[0], start, POINTS)
        for known in candidates:
            if known.agrees(values):
                return known, start
    return None


def _same_rank(a: gs.Tensor, b: gs.Tensor) -> bool:
    """Whether both are known to have one rank: a constant of shape [1, 1] could add axes."""
    return a.shape is not None and b.shape is not None and len(a.shape) == len(b.shape)
