import math

import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq.entropy import Entropies, attentions, entropy, fit_scale, similarity_entropy
from onnx_intq.graph import graph_from_model

NETWORK = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[4, 8] q, float[4, 8] v) => (float[4, 8] y, float[4, 8] z) {
        t = Transpose (q)
        scores = MatMul (q, t)
        weights = Softmax (scores)
        y = MatMul (weights, v)
        other = MatMul (scores, v)
        z = Relu (other)
    }
"""


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("deviation", [0.05, 0.3, 2.0])
def test_the_entropy_of_a_gaussian_is_known(deviation: float) -> None:
    values = normal(2, 4000) * deviation + 0.3
    found = entropy(values)
    expected = 0.5 * math.log(2 * math.pi * math.e * deviation**2)
    # Silverman's width for 4000 values is 0.2 deviations: the estimate is 0.02 too wide; the
    # sample's own deviation is off by 0.01.
    torch.testing.assert_close(found, torch.full((2,), expected), rtol=0, atol=0.06)


@settings(derandomize=True, deadline=None, max_examples=20)
@given(st.floats(-3, 3), st.floats(0.2, 4))
def test_entropy_knows_no_place_and_grows_with_the_logarithm_of_the_scale(
    place: float, scale: float
) -> None:
    values = normal(1, 500)
    moved = entropy(values * scale + place) - entropy(values)
    # NARROWEST is at most 2 % of the kernels' width here.
    torch.testing.assert_close(moved, torch.full((1,), math.log(scale)), rtol=0, atol=0.03)


def test_equal_tokens_have_a_finite_entropy_that_can_be_differentiated() -> None:
    x = torch.ones(1, 12, 8, requires_grad=True)
    found = similarity_entropy(x)
    assert found.item() < -4
    found.backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


def test_varied_tokens_have_more_entropy_than_similar_ones() -> None:
    noise = normal(2, 300, 16)
    found = [similarity_entropy(noise * s + 1).item() for s in (0.05, 0.2, 1.0)]
    assert found == sorted(found)
    assert found[0] < found[-1] - 1


def test_heads_are_averaged() -> None:
    x = normal(2, 4, 20, 8)
    expected = similarity_entropy(x.mean(1))
    torch.testing.assert_close(similarity_entropy(x), expected, rtol=0, atol=0)


def test_attention_is_the_product_of_a_softmax() -> None:
    (found,) = attentions(graph_from_model(onnx.parser.parse_model(NETWORK)))
    assert found.tap == "y"
    objective = Entropies([found])
    assert objective.names == [found.name]
    y = normal(1, 40, 8)
    parts = objective.parts({"y": y})
    assert parts.tolist() == [-similarity_entropy(y).item()]


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.floats(-4, 3), st.floats(-3, 3))
def test_the_scale_is_found_within_an_octave(octave: float, place: float) -> None:
    tried: list[tuple[float, float]] = []

    def cost(gain: float, offset: float) -> float:
        tried.append((gain, offset))
        return (math.log2(gain) - octave) ** 2 + (offset / 2**octave - place) ** 2

    gain, offset = fit_scale(cost)
    assert abs(math.log2(gain) - octave) <= 0.25
    assert abs(offset / 2**octave - place) <= 0.5
    assert len(tried) == len(set(tried)) <= 20
    assert cost(gain, offset) == min(cost(*pair) for pair in list(tried))
