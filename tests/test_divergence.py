import math

import onnx
import pytest
import torch

from onnx_intq.divergence import Divergences, Norm, batch_norms, divergence
from onnx_intq.graph import graph_from_model

NETWORK = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[batch, 3, time] x) => (float[batch, 3, time] y)
    <float[3] one = {1.0, 1.0, 1.0}, float[3] zero = {0.0, 0.0, 0.0},
     float[3] mean = {1.0, -0.5, 0.0}, float[3] variance = {4.0, 0.25, 0.0}> {
        h = Neg(x)
        STATISTICS
        y = BatchNormalization <epsilon = 0.001> (h, one, zero, moved, variance)
    }
"""


def norms(moved: str) -> list[Norm]:
    text = NETWORK.replace("STATISTICS", "moved = Neg(mean)") if moved != "mean" else NETWORK
    text = text.replace("STATISTICS", "").replace("moved, var", f"{moved}, var")
    return batch_norms(graph_from_model(onnx.parser.parse_model(text)))


def test_the_divergence_is_that_of_two_gaussians() -> None:
    x = torch.randn(64, 2, 512, generator=torch.Generator().manual_seed(0)) * 2 + 1
    norm = Norm("n", "x", torch.tensor([1.0, 0.0]), torch.tensor([4.0, 1.0]), 0.0)
    # Channel 0 fits. Channel 1: of N(0, 1) from N(1, 4), ln 2 - 1/2 + (1 + 1) / 8. The sample's
    # mean and deviation are off by about 2 / sqrt(32768), five times which is allowed.
    expected = (0 + math.log(2) - 0.5 + 2 / 8) / 2
    assert divergence(x, norm).item() == pytest.approx(expected, abs=10 / math.sqrt(64 * 512))
    objective = Divergences([norm])
    assert objective.names == ["n"]
    assert objective.taps == ["x"]
    assert objective.parts({"x": x}).tolist() == [divergence(x, norm).item()]


def test_a_dead_channel_weighs_no_more_than_others() -> None:
    (norm,) = norms("mean")
    assert norm.tap == "h"
    assert norm.variance.tolist() == pytest.approx([4.001, 0.251, 0.001])
    x = torch.zeros(2, 3, 8)
    assert divergence(x, norm).item() < 5000


def test_statistics_computed_at_run_time_do_not_count() -> None:
    assert norms("moved") == []
