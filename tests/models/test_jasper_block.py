"""The block NeMo calls JasperBlock: names, lengths, masks, refusals."""

from typing import Any

import pytest
import torch

from onnx_intq.models.jasper_block import BlockConfig, JasperBlock
from onnx_intq.transform import IntqError


def parameter_names(config: BlockConfig) -> set[str]:
    return {name for name, _ in JasperBlock(3, config, torch.nn.ReLU).named_parameters()}


def test_separable_residual_names_are_nemos() -> None:
    config = BlockConfig(filters=4, kernel=3, repeat=2, residual=True, separable=True)
    assert parameter_names(config) == {
        *("mconv.0.conv.weight", "mconv.1.conv.weight", "mconv.2.weight", "mconv.2.bias"),
        *("mconv.5.conv.weight", "mconv.6.conv.weight", "mconv.7.weight", "mconv.7.bias"),
        *("res.0.0.conv.weight", "res.0.1.weight", "res.0.1.bias"),
    }


def test_plain_names_are_nemos() -> None:
    config = BlockConfig(filters=4, kernel=3, repeat=2)
    assert parameter_names(config) == {
        *("mconv.0.conv.weight", "mconv.1.weight", "mconv.1.bias"),
        *("mconv.4.conv.weight", "mconv.5.weight", "mconv.5.bias"),
    }


@pytest.mark.parametrize("frames", [1, 7, 8])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_mask_is_as_long_as_the_output(stride: int, frames: int) -> None:
    block = JasperBlock(3, BlockConfig(filters=4, kernel=5, stride=stride), torch.nn.ReLU).eval()
    mask = torch.arange(frames)[None, None] < 5
    output, output_mask = block(torch.ones(1, 3, frames), mask)
    assert output.shape[2] == output_mask.shape[2] == -(-frames // stride)
    assert output_mask.sum() == -(-min(frames, 5) // stride)


def test_dropout_acts_in_training_only() -> None:
    block = JasperBlock(3, BlockConfig(filters=64, kernel=1, dropout=0.5), torch.nn.Identity)
    signal = torch.ones(1, 3, 64)
    torch.manual_seed(0)
    trained = block.train()(signal, None)[0]
    assert 0.4 < (trained == 0).float().mean() < 0.6
    assert torch.equal(block.eval()(signal, None)[0], block(signal, None)[0])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"filters": 0}, "at least 1"),
        ({"repeat": 0}, "at least 1"),
        ({"kernel": 4}, "even kernel"),
        ({"dropout": 1.0}, "dropout"),
        ({"stride": 2, "dilation": 2}, "only one of"),
        ({"stride": 2, "residual": True}, "cannot be added"),
    ],
)
def test_refuses(options: dict[str, Any], reason: str) -> None:
    valid: dict[str, Any] = {"filters": 4, "kernel": 3}
    with pytest.raises(IntqError, match=reason):
        BlockConfig(**valid | options)
