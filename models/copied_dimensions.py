"""A reshape whose ONNX form is one node: 0 copies a dimension, so no shape is computed for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def reshape(signal: Tensor, *sizes: int | Tensor) -> Tensor:
    """Reshape as ONNX does: 0 keeps the dimension at its place, -1 is what is left.

    Args:
        signal: Of any shape.
        sizes: The new shape, with one -1; or one int64 tensor [rank] with it.
    """
    if not torch.onnx.is_in_onnx_export():
        given = sizes[0].tolist() if isinstance(sizes[0], Tensor) else sizes
        return signal.reshape(
            [signal.shape[i] if size == 0 else int(size) for i, size in enumerate(given)]
        )
    shape = sizes[0] if isinstance(sizes[0], Tensor) else torch.tensor(sizes)
    found: Tensor = _Reshape.apply(signal, shape)  # type: ignore[no-untyped-call]
    return found


class _Reshape(torch.autograd.Function):
    """What the tracing exporter writes as the operator Reshape."""

    @staticmethod
    def forward(_: Any, signal: Tensor, shape: Tensor) -> Tensor:
        sizes = [signal.shape[i] if n == 0 else n for i, n in enumerate(shape.tolist())]
        return signal.reshape(sizes)

    @staticmethod
    def symbolic(g: Any, signal: Any, shape: Any) -> Any:
        return g.op("Reshape", signal, shape)
