"""What the parts of an RNN-T cost."""

from pathlib import Path

import pytest

from onnx_intq.transducer_cost import folder_cost
from onnx_intq.transform import IntqError


def test_the_parts(rnnt: Path) -> None:
    """Of the fixture: 4 features, 3 frames joined, width 8, predictor 6, joint 5, 3 classes."""
    found = folder_cost(rnnt, seconds=6.0, batch=2)
    frames = 2 * 600 // 3
    stack, layers = 12 * 8, 2 * 4 * 8 * (8 + 8)
    assert found["encoder"].macs == frames * (stack + layers)
    assert found["predictor"].macs == 2 * 2 * 4 * 6 * (6 + 6)
    assert found["joint"].inputs == {"encoded": (2, 200, 8), "predicted": (2, 1, 6)}
    assert found["joint"].macs == frames * (8 * 5 + 5 * 3) + 2 * 6 * 5


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(IntqError, match=r"holds no encoder.onnx"):
        folder_cost(tmp_path)
