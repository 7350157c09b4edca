"""A reshape that copies dimensions: ONNX's meaning of 0 and -1, in torch."""

import numpy as np
import onnx.helper
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from onnx_intq.models.copied_dimensions import reshape


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((0, -1, 2, 3), (2, 4, 2, 3)),
        ((0, 0, -1), (2, 4, 6)),
        ((-1, 6), (8, 6)),
        ((0, 2, -1, 0), (2, 2, 12, 1)),
    ],
)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_is_what_onnx_computes(
    sizes: tuple[int, ...], expected: tuple[int, ...], as_tensor: bool
) -> None:
    signal = torch.arange(48.0).reshape(2, 4, 6, 1)
    found = reshape(signal, torch.tensor(sizes)) if as_tensor else reshape(signal, *sizes)
    node = onnx.helper.make_node("Reshape", ["x", "shape"], ["y"])
    (result,) = ReferenceEvaluator(node).run(None, {"x": signal.numpy(), "shape": np.array(sizes)})
    wanted = np.asarray(result)
    assert tuple(found.shape) == wanted.shape == expected
    np.testing.assert_array_equal(found.numpy(), wanted)


def test_gradients_pass() -> None:
    signal = torch.ones(2, 6, requires_grad=True)
    (reshape(signal, 0, 2, -1) * 3).sum().backward()  # type: ignore[no-untyped-call]
    assert signal.grad is not None
    assert (signal.grad == 3).all()
