"""A Conformer's block: what it adds to what, and which sizes it refuses."""

import pytest
import torch
from torch import nn

from onnx_intq.models.conformer_block import (
    ConformerBlock,
    ConformerBlockConfig,
    ConvolutionModule,
)
from onnx_intq.models.relative_attention import RelativePositions
from onnx_intq.transform import IntqError

CONFIG = ConformerBlockConfig(width=8, heads=2, kernel=5, expansion=3)


def test_adds_half_of_each_feed_forward_and_all_of_the_rest() -> None:
    torch.manual_seed(0)
    block, hidden = ConformerBlock(CONFIG).double().eval(), torch.randn(2, 6, 8).double()
    positions = RelativePositions(8, longest=9).double()(hidden, None, nn.Identity())
    with torch.no_grad():
        found = block(hidden, positions, None)
        wanted = hidden + block.feed_forward1(block.norm_feed_forward1(hidden)) / 2
        wanted = wanted + block.self_attn(block.norm_self_att(wanted), positions)
        wanted = wanted + block.conv(block.norm_conv(wanted), None)
        wanted = wanted + block.feed_forward2(block.norm_feed_forward2(wanted)) / 2
        wanted = block.norm_out(wanted)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_convolution_sees_zeros_beyond_the_mask() -> None:
    torch.manual_seed(0)
    module, hidden = ConvolutionModule(8, 5).double().eval(), torch.randn(1, 6, 8).double()
    mask = (torch.arange(6) < 4)[None, None]
    masked, alone = module(hidden, mask)[:, :4], module(hidden[:, :4], None)
    torch.testing.assert_close(masked, alone, rtol=0, atol=1e-12)


def test_convolution_is_gated_and_normalised() -> None:
    module = ConvolutionModule(4, 3)
    hidden = torch.randn(3, 20, 4)
    outputs: list[torch.Tensor] = []
    module.batch_norm.register_forward_hook(lambda _, given, __: outputs.append(given[0]))
    module.train()(hidden, None)
    value, gate = module.pointwise_conv1(hidden.transpose(1, 2)).chunk(2, dim=1)
    wanted = module.depthwise_conv(value * gate.sigmoid())
    torch.testing.assert_close(outputs[0], wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"width": 0}, "sizes must be at least 1"),
        ({"expansion": 0}, "sizes must be at least 1"),
        ({"heads": 3}, "must be even, .* and a multiple of the heads"),
        ({"width": 9, "heads": 3}, "must be even"),
        ({"kernel": 4}, "an even kernel cannot be centred"),
        ({"dropout": 1.0}, "dropout must lie in"),
        ({"attention_dropout": -0.1}, "dropout must lie in"),
    ],
)
def test_refuses_sizes_that_cannot_be_built(change: dict[str, float], reason: str) -> None:
    settings = {"width": 8, "heads": 2} | change
    with pytest.raises(IntqError, match=reason):
        ConformerBlockConfig(**settings)  # type: ignore[arg-type]
