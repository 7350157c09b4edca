"""Stores int8 and uint8 constants of at most 128 distinct values as packed indices to a table.

Before: `y = f(x, w)`, w an int8 constant on a grid or codebook of 5 bits.
After: `y = f(x, Gather(table, Cast(BitwiseOr(low, BitShift(high, 4)))))`, low UINT4, high 8 to a
byte. The file shrinks; a runtime that folds constants, as onnxruntime does, has w in memory again.
Condition: the packed constant is smaller, its decoding included. In bodies, too, where the decoding
moves to the outermost graph, so that it does not run again and again.
The opset is raised to 18, or to 21 where an index has 4 bits or more.
Law: outputs do not change, and what was w has the same values.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnx_intq.graph import Names, convert_opset, subgraphs
from onnx_intq.packing import Packer, index_bits, packed_bytes, required_opset
from onnx_intq.transform import Context, Pass, PassError


@dataclass(frozen=True, kw_only=True)
class PackWeights(Pass):
    """Pack constants of few distinct values.

    Attributes:
        bits: Constants whose indices need more are left as they are, 1..7.
    """

    bits: int = 7

    def run(self, model: gs.Graph, ctx: Context) -> int:
        """Pack; return how many constants were, equal ones counted once."""
        if self.bits not in range(1, 8):
            raise PassError(f"indices of {self.bits} bits; expected 1..7")
        found = self._groups(model)
        if not found:
            return 0
        needed = max(required_opset(index_bits(group[0].values)) for group in found)
        if model.opset < needed:
            convert_opset(model, needed)
            found = self._groups(model)  # the graph was built anew
        packer, names, taken = Packer(model), Names(model), set[str]()
        for group in found:
            name = group[0].name if group[0].name not in taken else names.new(group[0].name)
            taken.add(name)
            made = packer.decoded(group[0].values, name)
            for constant in group:
                _let_read(made, constant)
        packer.finish()
        return len(found)

    def _groups(self, model: gs.Graph) -> list[list[gs.Constant]]:
        """The constants to pack, equal ones together, in graph order."""
        found: dict[tuple[str, tuple[int, ...], bytes], list[gs.Constant]] = {}
        for tensor in _constants(model):
            values = tensor.values
            if index_bits(values) <= self.bits and packed_bytes(values) < values.nbytes:
                digest = hashlib.sha256(np.ascontiguousarray(values).data).digest()
                found.setdefault((values.dtype.name, values.shape, digest), []).append(tensor)
        return list(found.values())


def _constants(model: gs.Graph) -> list[gs.Constant]:
    """The int8 and uint8 constants that nodes read, those that are results themselves left out."""
    found, results = dict[int, gs.Constant](), set[int]()
    for graph in subgraphs(model):
        results |= {id(tensor) for tensor in graph.outputs}
        for tensor in (t for node in graph.nodes for t in node.inputs):
            if isinstance(tensor, gs.Constant) and tensor.dtype in (np.int8, np.uint8):
                found[id(tensor)] = tensor
    return [tensor for key, tensor in found.items() if key not in results]


def _let_read(made: gs.Variable, constant: gs.Constant) -> None:
    for node in list(constant.outputs):
        node.inputs = [made if t is constant else t for t in node.inputs]
