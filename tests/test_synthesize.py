from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch

from onnx_intq.frontend import Frontend
from onnx_intq.graph import graph_from_model, metadata
from onnx_intq.speech import FRONTEND_KEY
from onnx_intq.synthesize import RECIPES, Recipe, synthesize
from onnx_intq.transform import IntqError

BODY = """
    h = Conv(x, w)
    n = BatchNormalization <epsilon = 0.001> (h, gamma, beta, mean, variance)
    y = Relu(n)
"""
Command = Callable[..., tuple[int, str, str]]
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


def test_a_loss_that_is_not_finite_is_refused() -> None:
    with pytest.raises(IntqError, match=r"became nan at step 0.*lower --lr"):
        list(synthesize(network(variance="nan, 1.0, 1.0"), SHORT))


def test_a_model_without_batch_norm_is_refused() -> None:
    with pytest.raises(IntqError, match=r"no BatchNormalization.*--method entropy.*--data"):
        list(synthesize(network(body="y = Conv(x, w)"), SHORT))


def test_a_model_without_attention_has_no_entropy() -> None:
    with pytest.raises(IntqError, match=r"no attention.*--method kl.*--data"):
        list(synthesize(network(), RECIPES["entropy"]))


TRANSFORMER = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[SHAPE] mel) => (float[batch, time, 16] y)
    <float one = {1.0}, float[16] shift = {BIAS}, float[16] ones = {ONES}> {
        moved = Transpose <perm = [0, 2, 1]> (mel)
        biased = Add(moved, shift)
        x = LayerNormalization <axis = -1> (biased, ones)
        key = Transpose <perm = [0, 2, 1]> (x)
        scores = MatMul(x, key)
        weights = Softmax <axis = -1> (scores)
        mixed = MatMul(weights, x)
        y = Add(mixed, x)
    }
"""
VARIED = Recipe(method="entropy", batches=3, batch_size=2, frames=60, steps=4, lr=0.1)


def transformer(shape: str = "batch, 16, time") -> gs.Graph:
    """One attention behind a LayerNorm that sees input of size 3 on a bias of 3."""
    text = TRANSFORMER.replace("SHAPE", shape).replace("ONES", ", ".join(["1.0"] * 16))
    bias = ", ".join(f"{3.0 * (-1) ** i}" for i in range(16))
    return graph_from_model(onnx.parser.parse_model(text.replace("BIAS", bias)))


def test_the_tokens_of_a_transformer_become_more_varied() -> None:
    for result in synthesize(transformer(), VARIED):
        assert result.measure == "negative_entropy"
        assert len(result.after) == 1
        assert sum(result.after.values()) < sum(result.before.values())
        assert sum(result.after.values()) == pytest.approx(min(result.losses), rel=1e-4)


def test_the_scale_of_the_input_is_found_where_no_front_end_records_it() -> None:
    (result, *_) = synthesize(transformer(), replace(VARIED, steps=0))
    assert result.batch["mel"].std() > 2  # weaker input drowns in the bias of 3
    graph = transformer()
    metadata(graph)[FRONTEND_KEY] = Frontend().to_json()
    (result, *_) = synthesize(graph, replace(VARIED, steps=0))
    np.testing.assert_allclose(result.batch["mel"].std(2, ddof=1), 1, atol=1e-5)


def test_spectrograms_of_fixed_length_end_in_silence() -> None:
    first, *others = synthesize(transformer("1, 16, 100"), replace(VARIED, steps=0))
    assert not _silence(first.batch["mel"])
    assert all(20 <= _silence(result.batch["mel"]) <= 80 for result in others)
    for result in synthesize(transformer(), replace(VARIED, steps=0)):
        assert not _silence(result.batch["mel"])


def _silence(mel: npt.NDArray[np.float32]) -> int:
    """How many of the last frames hold the least value only."""
    return int((mel == mel.min()).all((0, 1)).sum())


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


def test_a_transformer_is_quantized_without_data(tmp_path: Path, command: Command) -> None:
    model, out = tmp_path / "m.onnx", tmp_path / "q.onnx"
    onnx.save(gs.export_onnx(transformer()), model)
    code, _, err = command("quantize", model, "-o", out)
    assert (code, err.count("\n")) == (2, 1)
    assert "--method entropy" in err
    code, _, err = command("quantize", model, "-o", out, "--method", "entropy")
    assert (code, err) == (0, "")
    record = {entry.key: entry.value for entry in onnx.load(out).metadata_props}
    assert record["onnx_intq.synthesis"] == str(RECIPES["entropy"])
    feeds = tmp_path / "f.npz"
    code, told, err = command("synthesize", model, "-o", feeds, "--method", "entropy", "--steps", 1)
    assert (code, err) == (0, "")
    assert "minus the entropy of similarities per attention, first batch: the 1 largest" in told
