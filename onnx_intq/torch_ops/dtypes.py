"""ONNX and NumPy element types as torch types."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from onnx import TensorProto
from torch import Tensor

from onnx_intq.transform import IntqError

TORCH_DTYPES: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.BOOL: torch.bool,
    TensorProto.INT8: torch.int8,
    TensorProto.INT16: torch.int16,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
    TensorProto.UINT8: torch.uint8,
    TensorProto.UINT16: torch.uint16,
    TensorProto.UINT32: torch.uint32,
    TensorProto.UINT64: torch.uint64,
}
"""`TensorProto.DataType` -> torch dtype; strings, complex, 8-bit floats and sub-byte are absent."""


def torch_dtype(onnx_dtype: int) -> torch.dtype:
    """The torch type of a `TensorProto.DataType`.

    Raises:
        TypeError: torch has no such type.
    """
    if onnx_dtype not in TORCH_DTYPES:
        found = TensorProto.DataType.Name(onnx_dtype)
        known = ", ".join(TensorProto.DataType.Name(d) for d in TORCH_DTYPES)
        raise TypeError(f"element type {found} has no torch form; expected one of: {known}")
    return TORCH_DTYPES[onnx_dtype]


def tensor_from_numpy(values: npt.NDArray[Any]) -> Tensor:
    """A torch copy of an array; bfloat16 (ml_dtypes) included, 2- and 4-bit integers widened to 8.

    Raises:
        IntqError: torch has no such type (strings, complex, 8-bit floats).
    """
    name = values.dtype.name
    if name == "bfloat16":
        return torch.from_numpy(np.array(values).view(np.int16)).view(torch.bfloat16)
    if name in ("int4", "int2"):
        return torch.from_numpy(values.astype(np.int8))
    if name in ("uint4", "uint2"):
        return torch.from_numpy(values.astype(np.uint8))
    try:
        return torch.from_numpy(np.array(values))
    except TypeError as error:
        raise IntqError(f"element type {name} has no torch form; use a numeric type") from error
