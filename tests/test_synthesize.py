import math

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch

from onnx_intq.frontend import Frontend
from onnx_intq.graph import graph_from_model, metadata
from onnx_intq.speech import FRONTEND_KEY
from onnx_intq.synthesize import (
    RECIPES,
    Norm,
    Recipe,
    batch_norms,
    divergence,
    synthesize,
)
from onnx_intq.transform import IntqError

BODY = """
    h = Conv(x, w)
    n = BatchNormalization <epsilon = 0.001> (h, gamma, beta, mean, variance)
    y = Relu(n)
"""
SHORT = Recipe(batches=2, batch_size=3, frames=24, steps=15, lr=0.1)


def network(
    inputs: str = "float[batch, 2, time] x",
    *,
    variance: str = "4.0, 0.25, 0.0",
    body: str = BODY,
) -> gs.Graph:
    text = f"""
    <ir_version: 8, opset_import: ["" : 17]>
    net ({inputs}) => (float[batch, 3, time] y)
    <float[3, 2, 1] w = {{1.0, 0.5, -1.0, 0.25, 0.0, 0.0}}, float[3] gamma = {{1.0, 1.0, 1.0}},
     float[3] beta = {{0.0, 0.0, 0.0}}, float[3] mean = {{1.0, -0.5, 0.0}},
     float[3] variance = {{{variance}}}> {{ {body} }}
    """
    return graph_from_model(onnx.parser.parse_model(text))


@pytest.mark.parametrize("method", ["kl", "qasr"])
def test_the_statistics_come_closer_to_those_the_network_holds(method: str) -> None:
    recipe = Recipe(**{**vars(SHORT), "method": method, "steps": 60})
    for result in synthesize(network(), recipe):
        assert sum(result.after.values()) < 0.2 * sum(result.before.values())
        assert sum(result.after.values()) == pytest.approx(min(result.losses), rel=1e-4)


def test_batches_have_the_shape_and_the_number_asked_for() -> None:
    ticks: list[tuple[int, int]] = []
    results = list(synthesize(network(), SHORT, progress=lambda *tick: ticks.append(tick)))
    assert [r.batch["x"].shape for r in results] == [(3, 2, 24)] * 2
    assert results[0].batch["x"].dtype == np.float32
    assert ticks[0] == (1, 30)
    assert ticks[-1][1] == 30


def test_fixed_axes_of_the_model_win_over_the_recipe() -> None:
    (result, *_) = synthesize(network("float[2, 2, 7] x"), SHORT)
    assert result.batch["x"].shape == (2, 2, 7)


def test_the_same_seed_gives_the_same_bytes_and_batches_differ() -> None:
    runs = [[r.batch["x"] for r in synthesize(network(), SHORT)] for _ in range(2)]
    assert all(np.array_equal(a, b) for a, b in zip(*runs, strict=True))
    assert not np.array_equal(runs[0][0], runs[0][1])


def test_features_are_normalized_where_the_front_end_does_so() -> None:
    graph = network()
    metadata(graph)[FRONTEND_KEY] = Frontend().to_json()
    for result in synthesize(graph, SHORT):
        # 24 float32 values of size 1: rounding moves a mean or variance by some 1e-7.
        np.testing.assert_allclose(result.batch["x"].mean(2), 0, atol=1e-5)
        np.testing.assert_allclose(result.batch["x"].std(2, ddof=1), 1, atol=1e-5)


def test_features_are_free_where_the_front_end_does_not_normalize() -> None:
    graph = network()
    metadata(graph)[FRONTEND_KEY] = Frontend(normalize=None).to_json()
    (result, *_) = synthesize(graph, SHORT)
    assert np.abs(result.batch["x"].mean(2)).max() > 0.1


def test_random_data_is_uniform_and_needs_no_batch_norm() -> None:
    graph = network(body="y = Conv(x, w)")
    (result, _) = synthesize(graph, RECIPES["random"])
    assert result.batch["x"].shape == (8, 2, 320)
    assert 2.9 < np.abs(result.batch["x"]).max() <= 3
    assert result.losses == []
    assert result.before == result.after == {}


def test_the_papers_recipe_starts_from_its_uniform_distribution() -> None:
    recipe = Recipe(**{**vars(RECIPES["qasr"]), "batches": 1, "steps": 0})
    (result,) = synthesize(network(), recipe)
    assert result.batch["x"].shape == (8, 2, 500)
    assert 0.29 < np.abs(result.batch["x"]).max() <= 0.3


def test_lengths_are_full() -> None:
    body = BODY.replace("y = Relu(n)", "s = Cast <to = 1> (length) m = ReduceMin(s) y = Mul(n, m)")
    inputs = "float[batch, 2, time] x, int64[batch] length"
    (result, *_) = synthesize(network(inputs, body=body), SHORT)
    assert result.batch["length"].tolist() == [24, 24, 24]


def test_a_search_that_stalls_ends_early() -> None:
    recipe = Recipe(**{**vars(SHORT), "batches": 1, "steps": 500, "patience": 5, "lr": 1e-9})
    (result,) = synthesize(network(), recipe)
    assert len(result.losses) == 6


def test_the_divergence_is_that_of_two_gaussians() -> None:
    x = torch.randn(64, 2, 512, generator=torch.Generator().manual_seed(0)) * 2 + 1
    norm = Norm("n", "x", torch.tensor([1.0, 0.0]), torch.tensor([4.0, 1.0]), 0.0)
    # Channel 0 fits. Channel 1: of N(0, 1) from N(1, 4), ln 2 - 1/2 + (1 + 1) / 8. The sample's
    # mean and deviation are off by about 2 / sqrt(32768), five times which is allowed.
    expected = (0 + math.log(2) - 0.5 + 2 / 8) / 2
    assert divergence(x, norm).item() == pytest.approx(expected, abs=10 / math.sqrt(64 * 512))


def test_a_dead_channel_weighs_no_more_than_others() -> None:
    (norm,) = batch_norms(network())
    assert norm.variance.tolist() == pytest.approx([4.001, 0.251, 0.001])
    x = torch.zeros(2, 3, 8)
    assert divergence(x, norm).item() < 5000


def test_a_loss_that_is_not_finite_is_refused() -> None:
    with pytest.raises(IntqError, match=r"became nan at step 0.*lower --lr"):
        list(synthesize(network(variance="nan, 1.0, 1.0"), SHORT))


def test_a_model_without_batch_norm_is_refused() -> None:
    with pytest.raises(IntqError, match=r"no BatchNormalization.*--data"):
        list(synthesize(network(body="y = Conv(x, w)"), SHORT))


def test_statistics_computed_at_run_time_do_not_count() -> None:
    body = BODY.replace("h, gamma, beta, mean", "h, gamma, beta, moved")
    assert batch_norms(network(body="moved = Neg(mean)" + body)) == []


def test_other_integers_are_refused() -> None:
    inputs = "float[batch, 2, time] x, int64[batch, time] tokens"
    with pytest.raises(IntqError, match=r"tokens.*cannot be optimised"):
        list(synthesize(network(inputs), SHORT))


def test_a_third_open_axis_is_refused() -> None:
    with pytest.raises(IntqError, match="dynamic axes other than batch and time"):
        list(synthesize(network("float[batch, bands, time] x"), SHORT))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_an_absent_device_is_refused() -> None:
    with pytest.raises(IntqError, match="no CUDA device found"):
        list(synthesize(network(), SHORT, device="cuda"))
