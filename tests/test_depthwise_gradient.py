"""The gradient of depthwise filters, against torch's own."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given
from hypothesis import strategies as st

from onnx_intq.depthwise import depthwise_conv1d
from onnx_intq.depthwise_gradient import FEWEST, convolve, filter_gradient

SIZES = st.integers(1, 40)


@given(st.integers(1, 3), st.integers(1, 5), SIZES, SIZES, st.data())
def test_it_is_the_gradient_of_conv2d(
    batch: int, channels: int, frames: int, taps: int, data: st.DataObject
) -> None:
    before = data.draw(st.integers(max(0, (taps - frames + 1) // 2), taps - 1))
    if frames + 2 * before < taps:
        before = taps - 1
    generator = torch.Generator().manual_seed(taps)
    image = torch.randn(batch, channels, 1, frames, generator=generator, dtype=torch.float64)
    filters = torch.randn(channels, 1, 1, taps, generator=generator, dtype=torch.float64)
    filters.requires_grad_()
    expected = F.conv2d(image, filters, None, 1, (0, before), groups=channels)
    gradient = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    (wanted,) = torch.autograd.grad(expected, filters, gradient)
    found = filter_gradient(image, gradient, taps, before)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("inputs_too", [False, True])
def test_both_gradients_of_the_convolution(inputs_too: bool) -> None:
    image = torch.randn(2, 4, 1, 50, dtype=torch.float64, requires_grad=inputs_too)
    filters = torch.randn(4, 1, 1, 9, dtype=torch.float64, requires_grad=True)
    wanted = [image, filters] if inputs_too else [filters]
    expected = F.conv2d(image, filters, None, 1, (0, 4), groups=4)
    found = convolve(image, filters, 4)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    weights = torch.randn(expected.shape, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad(found, wanted, weights),
        torch.autograd.grad(expected, wanted, weights),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("taps", [FEWEST - 1, FEWEST + 1])
@pytest.mark.parametrize("biased", [False, True])
def test_training_a_depthwise_layer_takes_it(taps: int, biased: bool) -> None:
    x = torch.randn(2, 4, 60)
    weight = torch.randn(4, 1, taps, requires_grad=True)
    bias = torch.randn(4, requires_grad=True) if biased else None
    margins = (taps // 2, taps // 2)
    fast = depthwise_conv1d(x, weight, bias, 1, margins)
    plain = F.conv1d(x, weight, bias, padding=taps // 2, groups=4)
    torch.testing.assert_close(fast, plain, rtol=0, atol=1e-5)
    (a,), (b,) = (torch.autograd.grad(y.square().sum(), [weight]) for y in (fast, plain))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4 * float(b.detach().abs().max()))
