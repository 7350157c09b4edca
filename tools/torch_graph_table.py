"""Prints how TorchGraph does on the models inside the onnx package: matches, and why others do not.

Usage: python tools/torch_graph_table.py [KIND ...]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import torch

from onnx_intq.graph import first_line, graph_from_model
from onnx_intq.torch_graph import TorchGraph
from onnx_intq.torch_ops.dtypes import tensor_from_numpy
from onnx_intq.transform import IntqError

DATA = Path(onnx.__file__).parent / "backend" / "test" / "data"
KINDS = ("light", "pytorch-converted", "pytorch-operator")
RTOL, ATOL = 1e-3, 1e-7
"""Those of onnx's own backend tests (`onnx/backend/test/loader`)."""

Array = npt.NDArray[np.generic]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model with the inputs and outputs stored beside it."""

    kind: str
    name: str
    model: onnx.ModelProto
    inputs: list[Array]
    outputs: list[Array]


def cases(kind: str) -> Iterator[Case]:
    """The cases of one folder, in order of name."""
    folder = DATA / kind
    for path in sorted(folder.glob("*.onnx")) + sorted(folder.glob("*/model.onnx")):
        model = onnx.load(str(path))
        if kind == "light":  # these come without inputs; onnx's runner feeds a ramp from 0 to 1
            name, stored = path.stem, sorted(folder.glob(f"{path.stem}_output_*.pb"))
            inputs = [_ramp(value) for value in _fed(model)]
        else:
            name, stored = path.parent.name, sorted(path.parent.glob("test_data_set_0/output_*.pb"))
            inputs = [_array(f) for f in sorted(path.parent.glob("test_data_set_0/input_*.pb"))]
        outputs = [_array(f) for f in stored]
        yield Case(kind=kind, name=name, model=model, inputs=inputs, outputs=outputs)


def outcome(case: Case) -> str:
    """The word match, or why the stored outputs are not reached."""
    try:
        net = TorchGraph(graph_from_model(case.model))
        names = [value.name for value in _fed(case.model)]
        feeds = {n: tensor_from_numpy(a) for n, a in zip(names, case.inputs, strict=True)}
        with torch.no_grad():
            found = list(net(feeds).values())
    except IntqError as error:
        return first_line(error)
    for have, want in zip(found, case.outputs, strict=True):
        if have.shape != want.shape:
            return f"shape {list(have.shape)}; expected {list(want.shape)}"
        wrong = ~np.isclose(have.numpy(), want, rtol=RTOL, atol=ATOL, equal_nan=True)
        if wrong.any():
            worst = np.abs(have.numpy() - want)[wrong].max()
            return f"{wrong.sum()} of {wrong.size} elements differ, by {worst:.2g} at most"
    return "match"


def _fed(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    held = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in held]


def _ramp(value: onnx.ValueInfoProto) -> Array:
    shape = [d.dim_value or 1 for d in value.type.tensor_type.shape.dim]
    size = int(np.prod(shape))
    return (np.arange(size).reshape(shape) / size).astype(np.float32)


def _array(path: Path) -> Array:
    array: Array = onnx.numpy_helper.to_array(onnx.load_tensor(str(path)))
    return array


def main(kinds: list[str]) -> None:
    """Print one line per kind, then one per case that does not match."""
    for kind in kinds:
        found = {case.name: outcome(case) for case in cases(kind)}
        failed = {name: why for name, why in found.items() if why != "match"}
        print(f"{kind:18} {len(found) - len(failed):3} of {len(found)} match")
        for name, why in failed.items():
            print(f"    {name}: {why}")


if __name__ == "__main__":
    main(sys.argv[1:] or list(KINDS))
