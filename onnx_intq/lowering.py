"""Finds the float nodes an integer-only pass rewrites, and puts integer nodes in their place.

A place to rewrite is `DequantizeLinear.. -> op [-> bias Add] [-> Relu | Clip] -> QuantizeLinear`:
all operands are integers with a scale, and so is the result. A pass gives one function that emits
the integer nodes of one place; `lower` does the rest.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnx_intq.composites import arguments
from onnx_intq.graph import Names, constant, producer, remove, replace_uses, sole_consumer
from onnx_intq.grid import Grid
from onnx_intq.placement import FUSED, is_bias
from onnx_intq.qdq import DEQUANTIZE, QUANTIZE, dequantizer, has_input
from onnx_intq.trace import Builder
from onnx_intq.transform import Context, IntqError
from onnx_intq.value import TARGETS, Value

Float64 = npt.NDArray[np.float64]

GRIDS: Mapping[str, Grid] = {
    "int8": Grid(8, signed=True),
    "uint8": Grid(8, signed=False),
    "int16": Grid(16, signed=True),
    "uint16": Grid(16, signed=False),
}
"""Type of a quantized tensor -> its integers."""
GRIDS_KEY = "onnx_intq.grids"
"""Metadata key of a JSON object: integer tensor to its float tensor's name, scale, zero point."""


def recorded_grids(metadata: Mapping[str, str]) -> dict[str, tuple[str, float, int]]:
    """What a model's metadata says of its integer tensors: float tensor, scale, zero point.

    Raises:
        IntqError: It cannot be read.
    """
    try:
        found = json.loads(metadata.get(GRIDS_KEY, "{}"))
        return {str(q): (str(x), float(scale), int(zp)) for q, (x, scale, zp) in found.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise IntqError(
            f"metadata {GRIDS_KEY} cannot be read ({error}); expected a JSON object of "
            "[tensor, scale, zero point]; quantize the model again"
        ) from error


class CannotLowerError(IntqError):
    """Why one node has no integer form; the node stays float."""


@dataclass(frozen=True, kw_only=True)
class Operand:
    """An integer tensor and what it means: real = (q - zero_point) * scale.

    Attributes:
        tensor: Of the grid's type.
        scale: Real units per step.
        zero_point: The integer of real 0.
        grid: The integers it may hold.
    """

    tensor: gs.Tensor
    scale: float
    zero_point: int
    grid: Grid

    @property
    def low(self) -> float:
        """The lowest real value."""
        return (self.grid.low - self.zero_point) * self.scale

    @property
    def high(self) -> float:
        """The highest real value."""
        return (self.grid.high - self.zero_point) * self.scale

    def same_grid(self, other: Operand) -> bool:
        """Whether equal integers mean equal values."""
        mine, its = ((x.scale, x.zero_point, x.grid) for x in (self, other))
        return mine == its

    def stored(self, builder: Builder) -> Value:
        """The integers as they are."""
        return builder.value(self.tensor, self.grid.low, self.grid.high)

    def centred(self, builder: Builder) -> Any:
        """The integers less the zero point: real = centred * scale."""
        q = self.stored(builder)
        return q - self.zero_point if self.zero_point else q


@dataclass(frozen=True, kw_only=True)
class Site:
    """One place to rewrite.

    Attributes:
        node: The operator.
        bias: Values of the constant vector that a following Add adds, None without.
        chain: The nodes that go: the operator, its Add and activation, the QuantizeLinear.
        result: The integers to produce; the tensor is the QuantizeLinear's output.
        first: The lowest integer to produce: an activation's lower end, or the grid's.
        last: The highest.
        index: Which output of the operator this is.
    """

    node: gs.Node
    bias: npt.NDArray[Any] | None
    chain: tuple[gs.Node, ...]
    result: Operand
    first: int
    last: int
    index: int = 0

    def operand(self, index: int) -> Operand:
        """Input `index` as integers.

        Raises:
            CannotLowerError: It is not dequantized with one constant scale.
        """
        found = operand(self.node.inputs[index])
        if found is None:
            raise CannotLowerError(f"its input {self.node.inputs[index].name!r} is not quantized")
        return found

    def values(self, index: int) -> npt.NDArray[Any] | None:
        """The float values of input `index` where it is constant, stored as integers or not."""
        if index >= len(self.node.inputs):
            return None
        return constant_values(self.node.inputs[index])


Emit = Callable[[Site, Builder], "Value | gs.Tensor"]
Wanted = Callable[[gs.Node], object]


def lower(
    model: gs.Graph,
    ctx: Context,
    ops: Collection[str],
    emit: Emit,
    *,
    where: Wanted | None = None,
    optional: bool = False,
    target: str = "integer",
) -> int:
    """Rewrite every place whose operator is one of `ops`; return how many were.

    A node that cannot be rewritten is noted with the reason by `ctx.remain`.

    Args:
        model: The graph.
        ctx: Takes the notes.
        ops: Operators.
        emit: Emits the nodes of one place.
        where: Tells which of their nodes are meant; all by default.
        optional: Another pass can rewrite what is left: it is noted by `ctx.skip`.
        target: "integer"; or "tensorrt", where other nodes than islands stay float.

    Raises:
        IntqError: Unknown target.
    """
    if target not in TARGETS:
        raise IntqError(f"target {target!r}; expected one of: {', '.join(TARGETS)}")
    builder, count = Builder(model, Names(model), {}, target=target), 0
    note = ctx.skip if optional or target == "tensorrt" else ctx.remain
    meant = [n for n in model.nodes if n.op in ops and is_float(n) and not _is_fused(model, n)]
    if target == "tensorrt":
        meant = [n for n in meant if is_island(model, n)]
    for node in [n for n in meant if where is None or where(n)]:
        before = len(model.nodes)
        builder.name = node.name
        try:
            sites = [find(model, node, index) for index in _read(model, node)]
            emitted = [emit(site, builder) for site in sites]
        except IntqError as error:
            remove(model, model.nodes[before:])
            note(node, str(error))
            continue
        for site, found in zip(sites, emitted, strict=True):
            _put(model, site, found.tensor if isinstance(found, Value) else found)
        count += 1
    if count:
        model.cleanup(remove_unused_graph_inputs=False)
    return count


def is_float(node: gs.Node) -> bool:
    """Whether a node is float arithmetic, which integer-only models must not have."""
    if node.op in {QUANTIZE, DEQUANTIZE}:
        return False
    return any(t.dtype == np.float32 for t in (*node.outputs, *node.inputs) if not t.is_empty())


def is_island(model: gs.Graph, node: gs.Node) -> bool:
    """Whether all that a function computes with is quantized, and its result, once."""
    reader = sole_consumer(model, fused(model, node)[-1].outputs[0])
    computed = [t for t in arguments(node) if not t.is_empty() and constant_values(t) is None]
    quantized = all(operand(t) is not None for t in computed)
    return quantized and reader is not None and reader.op == QUANTIZE


def find(model: gs.Graph, node: gs.Node, index: int = 0) -> Site:
    """The place that `node` heads, with its output `index`.

    Raises:
        CannotLowerError: Its result is not quantized, or by several nodes.
    """
    *chain, last = fused(model, node)
    tensor = last.outputs[index]
    quantize = sole_consumer(model, tensor)
    if quantize is None or quantize.op != QUANTIZE:
        raise CannotLowerError("its result is not quantized once; run complete_qdq before")
    result = _result(quantize)
    chain = [*chain, last]
    first, highest = result.grid.low, result.grid.high
    for fuse in chain[1:]:
        if fuse.op in FUSED:
            first, highest = activation_limits(fuse, result)
    biases = [constant_values(t) for n in chain[1:] if n.op == "Add" for t in n.inputs]
    return Site(
        node=node,
        bias=next((b for b in biases if b is not None), None),
        chain=(*chain, quantize),
        result=result,
        first=first,
        last=highest,
        index=index,
    )


def fused(model: gs.Graph, node: gs.Node) -> list[gs.Node]:
    """`node`, then its bias Add and its activation, where nothing else reads what is between."""
    chain = [node]
    for suits in (_is_bias_of, _is_activation_of):
        reader = sole_consumer(model, chain[-1].outputs[0])
        if reader is not None and len(node.outputs) == 1 and suits(reader, chain[-1]):
            chain.append(reader)
    return chain


def operand(tensor: gs.Tensor) -> Operand | None:
    """The integers behind a dequantized tensor; None if it is not, or with several scales."""
    maker = dequantizer(tensor)
    return None if maker is None else parameters(maker, maker.inputs[0])


def parameters(node: gs.Node, tensor: gs.Tensor) -> Operand | None:
    """`tensor` with the scale and zero point of a Q or DQ node; None unless constant scalars."""
    scale, zero_point = constant(node, 1), constant(node, 2)
    dtype = None if tensor.dtype is None else np.dtype(tensor.dtype).name
    if scale is None or scale.size != 1 or dtype is None or dtype not in GRIDS:
        return None
    return Operand(
        tensor=tensor,
        scale=float(scale.reshape(())),
        zero_point=0 if zero_point is None else int(zero_point.reshape(())),
        grid=GRIDS[dtype],
    )


def constant_values(tensor: gs.Tensor) -> npt.NDArray[Any] | None:
    """The values of a constant, be it stored in float or dequantized from stored integers."""
    if isinstance(tensor, gs.Constant):
        values: npt.NDArray[Any] = tensor.values
        return values
    maker = dequantizer(tensor)
    stored = constant(maker, 0) if maker is not None else None
    if maker is None or stored is None:
        return None
    scale, zero_point = constant(maker, 1), constant(maker, 2)
    if scale is None or maker.attrs.get("block_size", 0):
        return None
    zeros = np.zeros(1) if zero_point is None else zero_point.astype(np.float64)
    axis = maker.attrs.get("axis", 1) if scale.size > 1 else 0
    shape = [-1 if i == axis % stored.ndim else 1 for i in range(stored.ndim)]
    scales = scale.astype(np.float64).reshape(shape if scale.size > 1 else ())
    zeros = zeros.reshape(shape if zeros.size > 1 else ())
    return np.asarray((stored.astype(np.float64) - zeros) * scales, np.float32)


def readers(tensor: gs.Tensor, through: Collection[str]) -> Iterator[gs.Node]:
    """The nodes that read a tensor, also behind nodes of the operators `through`."""
    for node in tensor.outputs:
        if node.op in through:
            for output in node.outputs:
                yield from readers(output, through)
        else:
            yield node


def _is_fused(model: gs.Graph, node: gs.Node) -> bool:
    """Whether `node` is the bias Add or the activation of an operator, and goes with it."""
    makers = [m for t in node.inputs if (m := producer(t)) is not None and is_float(m)]
    return any(node is other for maker in makers for other in fused(model, maker)[1:])


def _read(model: gs.Graph, node: gs.Node) -> list[int]:
    """The outputs that anybody reads, of an operator with several."""
    read = [t.outputs or any(t is o for o in model.outputs) for t in node.outputs]
    return [i for i, used in enumerate(read) if used or len(read) == 1]


def _is_bias_of(reader: gs.Node, maker: gs.Node) -> bool:
    return maker.op == "MatMul" and is_bias(reader)


def _is_activation_of(reader: gs.Node, maker: gs.Node) -> bool:
    limits = all(isinstance(t, gs.Constant) or t.is_empty() for t in reader.inputs[1:])
    return reader.op in FUSED and maker.op not in FUSED and limits


def _result(quantize: gs.Node) -> Operand:
    found = parameters(quantize, quantize.outputs[0])
    if found is None:
        raise CannotLowerError("its result has no single constant scale")
    return found


def activation_limits(activation: gs.Node, result: Operand) -> tuple[int, int]:
    """The integers of an activation's ends: rounding keeps order, so it may follow.

    Raises:
        CannotLowerError: They are computed at run time.
    """
    ends = (0.0, np.inf)
    if activation.op == "Clip":
        ends = _limit(activation, 1, -np.inf), _limit(activation, 2, np.inf)
    grid = result.grid
    steps = np.rint(np.asarray(ends) / result.scale) + result.zero_point
    first, last = (int(q) for q in np.clip(steps, grid.low, grid.high))
    return min(first, last), last


def _limit(clip: gs.Node, index: int, absent: float) -> float:
    if not has_input(clip, index):
        return absent
    values = constant_values(clip.inputs[index])
    if values is None:
        raise CannotLowerError("its limits are computed at run time")
    return float(values.reshape(()))


def _put(model: gs.Graph, site: Site, emitted: gs.Tensor) -> None:
    """Let the readers of the place's result read `emitted`, which takes over its name."""
    result = site.result.tensor
    if emitted.dtype != result.dtype:
        raise AssertionError(f"{site.node.name}: {emitted.dtype}, expected {result.dtype}")
    emitted.shape = result.shape if emitted.shape is None else emitted.shape
    name = result.name
    replace_uses(model, result, emitted)
    remove(model, site.chain)
    if producer(emitted) is not None:
        emitted.name, result.name = name, f"{name}_replaced"
