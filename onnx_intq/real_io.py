"""Runs a model that takes and gives integers (`--io int8`) as if it took and gave real values.

ONNX models run on onnxruntime, engine files (.engine) on the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from onnx_intq.feeds import Batch
from onnx_intq.grid import dequantize, quantize
from onnx_intq.lowering import GRIDS, recorded_grids
from onnx_intq.runtime import Model, Session

if TYPE_CHECKING:
    from onnx_intq.engine_session import EngineSession

Arrays = dict[str, npt.NDArray[Any]]


class RealSession:
    """A `Session` whose integer inputs and outputs are converted by the grids the model records.

    A model without such inputs and outputs runs as it is.

    Attributes:
        inputs: As the model's; float32 where it takes integers of a recorded grid.
        outputs: The same.
        metadata: The model's.
    """

    def __init__(self, model: Model, *, threads: int | None = None) -> None:
        """Load the model.

        Args:
            model: ONNX, or the path of an engine; its sidecar says what the model recorded.
            threads: As for `Session`; without effect on an engine.

        Raises:
            IntqError: As for `Session` and, of engines, for `engine_file.load_session`.
        """
        self._session = _open(model, threads)
        self.metadata = dict(self._session.metadata)
        self._grids = recorded_grids(self.metadata)
        float32 = np.dtype(np.float32)
        self.inputs, self.outputs = (
            tuple(replace(s, dtype=float32) if s.name in self._grids else s for s in specs)
            for specs in (self._session.inputs, self._session.outputs)
        )

    def run(self, feeds: Batch, names: Sequence[str] | None = None) -> Arrays:
        """Run the model once on real values; as `Session.run`."""
        types = {spec.name: spec.dtype.name for spec in self._session.inputs}
        given = {
            name: self._quantized(name, values, types.get(name, ""))
            for name, values in feeds.items()
        }
        results = self._session.run(given, names)
        return {name: self._real(name, values) for name, values in results.items()}

    def _quantized(self, name: str, values: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
        if name not in self._grids or values.dtype.kind != "f" or dtype not in GRIDS:
            return values
        _, scale, zero_point = self._grids[name]
        steps = values.astype(np.float32) / np.float32(scale)  # in float32, as QuantizeLinear
        return quantize(steps, 1.0, zero_point, GRIDS[dtype])

    def _real(self, name: str, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if name not in self._grids or values.dtype.kind == "f":
            return values
        _, scale, zero_point = self._grids[name]
        return dequantize(values, np.float32(scale), zero_point)


def _open(model: Model, threads: int | None) -> Session | EngineSession:
    if isinstance(model, str | Path):
        from onnx_intq.engine import SUFFIX
        from onnx_intq.engine_file import load_session

        if Path(model).suffix == SUFFIX:
            return load_session(Path(model))[0]
    return Session(model, threads=threads)
