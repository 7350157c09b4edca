"""Puts QuantizeLinear/DequantizeLinear pairs on the activations, as `onnx_intq.placement` decides.

Before: `y = Conv(x, w)`.   After: `y = Conv(DequantizeLinear(QuantizeLinear(x, s, z), s, z), w)`.
Target ort: unsigned, zero point from the range; inputs and outputs, so that onnxruntime fuses
QLinearConv and QLinearAdd. Target tensorrt: signed, zero point 0, inputs only.
Condition: the tensor has a range (fact "calibrated"). What stays float is named with the reason.
Tensors that a pass before has found to need 16 bits get them; so do, for target integer, products
that only LSTM layers read, and what such a product takes from the model's inputs.
Addends of a sum get scales that make float and integer arithmetic agree (`onnx_intq.alignment`).
Law: a quantized tensor moves by at most half a step where it lies inside its range.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from onnx_intq.alignment import addend_scale
from onnx_intq.graph import Names, convert_opset
from onnx_intq.grid import Grid, affine, symmetric
from onnx_intq.lowering import fused
from onnx_intq.moving import users
from onnx_intq.pairs import append_pair, let_read
from onnx_intq.placement import WEIGHTED, Plan, computer, plan
from onnx_intq.recurrent_states import state_ranges
from onnx_intq.transform import Context, Pass, PassError, Range

PER_CHANNEL_OPSET, SIXTEEN_BIT_OPSET = 13, 21
"""Opsets that brought DequantizeLinear's axis, and 16-bit QuantizeLinear."""


@dataclass(frozen=True, kw_only=True)
class InsertQdq(Pass):
    """Quantize activations.

    Attributes:
        target: "ort", "integer" or "tensorrt".
        bits: 8 or 16.
        keep: Glob patterns of nodes that stay float.
        wide: Glob patterns of nodes whose inputs get 16 bits, for target "ort".
        tables: For target "integer": functions will be tables, of 8-bit arguments.
        scores: Names of results that stay float, or get 16 bits later: see `placement.plan`.
    """

    target: str = "ort"
    bits: int = 8
    keep: tuple[str, ...] = ()
    wide: tuple[str, ...] = ()
    tables: bool = False
    scores: tuple[str, ...] = ()

    needs: ClassVar[frozenset[str]] = frozenset({"bn-folded", "calibrated"})
    gives: ClassVar[frozenset[str]] = frozenset({"quantized"})
    exact: ClassVar[bool] = False

    def run(self, model: gs.Graph, ctx: Context) -> int:
        """Insert the pairs; return how many nodes run on quantized inputs."""
        sixteen = self.bits == 16 or bool(self.wide or ctx.wide)
        if self.bits not in {8, 16} or (sixteen and self.target == "tensorrt"):
            bits = 16 if sixteen else self.bits
            raise PassError(f"{bits}-bit activations; expected 8, or 16 but for tensorrt")
        recurrent = self.target == "integer" and any(n.op == "LSTM" for n in model.nodes)
        convert_opset(model, SIXTEEN_BIT_OPSET if sixteen or recurrent else PER_CHANNEL_OPSET)
        target, floats = self.target, ctx.floats
        chosen = plan(model, target, self.keep, floats, tables=self.tables, scores=self.scores)
        for node, why in chosen.skipped:
            ctx.skip(node, why)
        ranges = {n: _range(t, chosen, ctx, 8) for n, t in chosen.tensors.items()}
        if self.target != "tensorrt" and not sixteen:
            _align_addends(model, chosen, ranges)
        states = state_ranges(model, ctx.limits)
        ranges |= {n: states[id(t)] for n, t in chosen.tensors.items() if id(t) in states}
        layered = {n for n, t in chosen.tensors.items() if recurrent and _is_layered(model, t)}
        quantized, names = {id(node) for node in chosen.nodes}, Names(model)
        for name, tensor in chosen.tensors.items():
            everyone = name in chosen.integers
            readers = [n for n in tensor.outputs if everyone or id(n) in quantized]
            wide = name in layered or chosen.first(tensor).name in ctx.wide
            bits = 16 if wide else self._bits([n for n in readers if id(n) in quantized])
            limits = ranges[name] if bits == 8 else _range(tensor, chosen, ctx, bits)
            dq = self._append_pair(model, tensor, limits, bits, names)
            let_read(readers, tensor, dq)
            if everyone and any(tensor is t for t in model.outputs):
                model.outputs = [dq if t is tensor else t for t in model.outputs]
                tensor.name, dq.name = names.new(f"{name}_float"), name
        return len(chosen.nodes)

    def _bits(self, readers: list[gs.Node]) -> int:
        wide = any(fnmatchcase(n.name, pattern) for n in readers for pattern in self.wide)
        return 16 if wide else self.bits

    def _append_pair(
        self, model: gs.Graph, tensor: gs.Tensor, limits: Range, bits: int, names: Names
    ) -> gs.Variable:
        scale, zero_point, dtype = self._scale(*limits, bits)
        _, dequantize = append_pair(model, tensor, scale, zero_point, dtype, names)
        return dequantize.outputs[0]

    def _scale(
        self, low: float, high: float, bits: int
    ) -> tuple[np.float32, int, np.dtype[np.generic]]:
        if self.target == "tensorrt":
            grid = Grid(bits, signed=True)
            return *symmetric(low, high, grid), grid.dtype
        grid = Grid(bits, signed=False)
        return *affine(low, high, grid), grid.dtype


def _is_layered(model: gs.Graph, tensor: gs.Tensor) -> bool:
    """Whether a tensor goes to LSTM layers alone, or is the model's input to such a product."""
    if not any(tensor is t for t in model.inputs):
        return _feeds_layers(tensor)
    products = list(users(tensor))
    results = [fused(model, node)[-1].outputs[0] for node in products if node.op in WEIGHTED]
    return 0 < len(products) == len(results) and all(map(_feeds_layers, results))


def _feeds_layers(tensor: gs.Tensor) -> bool:
    """Whether a product's result goes to LSTM layers alone.

    Its values reach far, and so do not their gates; 16 bits cost a second product outside the loop.
    """
    maker = computer(tensor)
    read = {node.op for node in users(tensor)}
    return maker is not None and maker.op in WEIGHTED and read == {"LSTM"}


def _align_addends(model: gs.Graph, chosen: Plan, ranges: dict[str, Range]) -> None:
    """Widen the ranges of addends a little: see `onnx_intq.alignment`. Sums come before addends."""
    grid, fixed, same = Grid(8, signed=False), set[str](), dict[str, list[str]]()
    for tensor_name, tensor in chosen.tensors.items():
        same.setdefault(chosen.first(tensor).name, []).append(tensor_name)
    for node in reversed([n for n in chosen.nodes if n.op == "Add"]):
        total = fused(model, node)[-1].outputs[0].name
        for name in {chosen.first(t).name for t in node.inputs} - fixed:
            if total not in ranges or name == total:
                continue
            fixed.add(name)
            scales = (float(affine(*ranges[n], grid)[0]) for n in (name, total))
            scale, wanted = next(scales), next(scales)
            factor = float(addend_scale(scale, wanted)) / scale
            low, high = ranges[name]
            ranges.update(dict.fromkeys(same[name], (low * factor, high * factor)))


def _range(tensor: gs.Tensor, chosen: Plan, ctx: Context, bits: int) -> Range:
    """The tensor's range; behind operators that only move values, that of their input.

    What a pass has made since calibration takes the range of where its values are moved to.
    """
    first = chosen.first(tensor)
    limits = ctx.limits(first.name, bits)
    if limits is None:
        moved = (n for n, t in chosen.tensors.items() if chosen.first(t) is first)
        known = (ctx.limits(name, bits) for name in moved)
        limits = next((found for found in known if found is not None), None)
    if limits is None:
        raise PassError(
            f"tensor {first.name!r} has no range; expected one per quantized tensor; "
            "calibrate this very model"
        )
    return limits
