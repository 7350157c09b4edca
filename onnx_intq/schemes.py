"""The schemes of quantization-aware training, by name."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from onnx_intq.gq import GeneralQuantizer
from onnx_intq.learned_scale import UniformQuantizer
from onnx_intq.s8bqat import RegularizedQuantizer
from onnx_intq.weight_quantizer import WeightQuantizer

Maker = Callable[[npt.NDArray[np.float32], int | None, int], WeightQuantizer]
"""(weight, axis, bits) -> its quantizer."""
SCHEMES: dict[str, Maker] = {
    "gq": GeneralQuantizer,
    "s8bqat": RegularizedQuantizer,
    "uniform": UniformQuantizer,
}


def quantizer(
    scheme: str, weight: npt.NDArray[np.float32], axis: int | None, bits: int
) -> WeightQuantizer:
    """A quantizer that starts from a float weight.

    Args:
        scheme: One of `SCHEMES`.
        weight: float32, any shape.
        axis: Its channel axis; None for one scale.
        bits: 1..8.
    """
    return SCHEMES[scheme](weight, axis, bits)
