"""Depthwise 1-D convolution against torch's own."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from onnx_intq.depthwise import channels_last_conv1d, depthwise_conv1d

SHAPES = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "channels": st.integers(1, 35),
        "spare": st.integers(0, 20),
        "taps": st.integers(1, 9),
        "stride": st.integers(1, 3),
        "before": st.integers(0, 9),
        "after": st.integers(0, 9),
        "dilation": st.integers(1, 4),
    }
)


def plain(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, sides: tuple[int, int], step: int
) -> Tensor:
    return F.conv1d(F.pad(x, sides), weight, bias, stride, 0, step, weight.shape[0])


def close(have: Tensor, want: Tensor) -> bool:
    """Within 1e-4 of the largest value: sums of at most a few hundred float32 terms."""
    return bool((have - want).abs().max() <= 1e-4 * want.abs().max())


@settings(derandomize=True, deadline=None, max_examples=60)
@given(shape=SHAPES, has_bias=st.booleans(), channels_last=st.booleans())
def test_values_and_gradients_are_those_of_conv1d(
    shape: dict[str, int], has_bias: bool, channels_last: bool
) -> None:
    torch.manual_seed(0)
    channels, taps, step = shape["channels"], shape["taps"], shape["dilation"]
    sides = (shape["before"], shape["after"])
    frames = (taps - 1) * step + 1 + shape["spare"]
    x = torch.randn(shape["batch"], channels, frames)
    if channels_last:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    inputs = [x, torch.randn(channels, 1, taps), *([torch.randn(channels)] if has_bias else [])]
    outcomes = []
    for function in (depthwise_conv1d, plain):
        given_ = [t.detach().requires_grad_() for t in inputs]
        bias = given_[2] if has_bias else None
        y = function(given_[0], given_[1], bias, shape["stride"], sides, step)
        sense = torch.linspace(1, 2, y.numel()).reshape(y.shape)
        outcomes.append([y, *torch.autograd.grad(y, given_, sense)])
    for have, want in zip(*outcomes, strict=True):
        assert close(have, want)


@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 3), (2, 2)])
def test_the_gradient_is_that_of_finite_differences(stride: int, dilation: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 11, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 1, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, w, b: channels_last_conv1d(x, w, b, stride, (2, 1), dilation), (x, weight, bias)
    )


@pytest.mark.parametrize("dilation", [1, 2])
def test_the_output_has_channels_innermost(dilation: int) -> None:
    y = depthwise_conv1d(torch.randn(2, 8, 20), torch.randn(8, 1, 3), dilation=dilation)
    assert y.shape == (2, 8, 20 - 2 * dilation)
    assert y.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("padding", [(2, 2), (1, 3)])
def test_types_without_a_fast_kernel_go_to_conv1d(padding: tuple[int, int]) -> None:
    x, weight = torch.randn(2, 4, 9).double(), torch.randn(4, 1, 5).double()
    y = depthwise_conv1d(x, weight, padding=padding)
    assert torch.equal(y, plain(x, weight, None, 1, padding, 1))


@pytest.mark.parametrize("cast", [True, False])
@pytest.mark.parametrize(("channels", "dilation"), [(8, 1), (16, 2), (20, 1)])
def test_few_channels_and_many_taps_end_in_bfloat16(
    channels: int, dilation: int, cast: bool
) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, channels, 80), torch.randn(channels, 1, 33), torch.ones(1)
    bias = bias.expand(channels)
    sides = (16 * dilation, 16 * dilation)
    want = plain(x, weight, bias, 1, sides, dilation)
    dtype = torch.float32 if cast else torch.bfloat16
    given_ = [t.to(dtype).detach().requires_grad_() for t in (x, weight, bias)]
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        y = depthwise_conv1d(given_[0], given_[1], given_[2], 1, sides, dilation)
    assert y.dtype == torch.bfloat16
    assert (y.float() - want).abs().max() < 0.02 * want.abs().max()
    gradients = torch.autograd.grad(y.float().square().mean(), given_)
    assert [gradient.dtype for gradient in gradients] == [dtype] * 3
