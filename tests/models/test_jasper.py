"""Jasper: sizes as published, dense connections, padding that changes nothing, `.nemo` files."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onnx_intq.frontend import Frontend
from onnx_intq.graph import load
from onnx_intq.models.export import export
from onnx_intq.models.jasper import jasper_config
from onnx_intq.models.jasper_block import BlockConfig
from onnx_intq.models.nemo import load_weights, read_nemo, write_nemo
from onnx_intq.models.nemo_config import nemo_from_network, network_from_nemo
from onnx_intq.models.quartznet import QuartzNet, QuartzNetConfig
from onnx_intq.models.zoo import untrained
from onnx_intq.runtime import Session
from onnx_intq.torch_graph import TorchGraph
from onnx_intq.transform import IntqError

ROUNDING = 1e-12
"""Bound for float64: 2**-53 times some hundred additions of values of order 1, times a margin."""
SINGLE = 1e-4
"""For float32: 2**-24 times some hundred additions in 10 layers, times a margin."""
FRONTEND = Frontend(features=4)


def dense(filters: int, *, kernel: int = 3, dilation: int = 1) -> BlockConfig:
    return BlockConfig(
        filters=filters,
        kernel=kernel,
        repeat=2,
        dilation=dilation,
        residual=True,
        residual_dense=True,
    )


def tiny(*, kernel: int = 3, stride: int = 2, dilation: int = 1) -> QuartzNetConfig:
    return QuartzNetConfig(
        blocks=(
            BlockConfig(filters=6, kernel=kernel, stride=stride, dropout=0.1),
            dense(5, kernel=kernel, dilation=dilation),
            dense(7, kernel=kernel, dilation=dilation),
            dense(4, kernel=kernel, dilation=dilation),
            BlockConfig(filters=8, kernel=1),
        ),
        labels=("a", "b", "c"),
        features=4,
    )


def blocks(network: QuartzNet) -> list[Any]:
    return list(network.encoder.encoder)


@pytest.fixture(scope="module")
def network() -> QuartzNet:
    return untrained(tiny(), seed=0)


def test_parameter_count_is_the_published_one() -> None:
    # The paper's abstract and table: 333 million.
    with torch.device("meta"):
        network = QuartzNet(jasper_config())
    assert sum(p.numel() for p in network.parameters()) == 332_632_349


def test_parameters_are_nemos() -> None:
    """The third dense block has a 1x1 convolution for each of three inputs."""
    with torch.device("meta"):
        state = QuartzNet(tiny()).state_dict()
    shapes = {
        name: list(values.shape)
        for name, values in state.items()
        if re.fullmatch(r"encoder\.encoder\.3\.res\.\d\.(0\.conv|1)\.weight", name)
    }
    assert shapes == {
        "encoder.encoder.3.res.0.0.conv.weight": [4, 6, 1],
        "encoder.encoder.3.res.0.1.weight": [4],
        "encoder.encoder.3.res.1.0.conv.weight": [4, 5, 1],
        "encoder.encoder.3.res.1.1.weight": [4],
        "encoder.encoder.3.res.2.0.conv.weight": [4, 7, 1],
        "encoder.encoder.3.res.2.1.weight": [4],
    }


def test_dense_blocks_add_the_inputs_of_all_before(network: QuartzNet) -> None:
    """With its own convolutions at 0, a block gives the sum of its 1x1 ones."""
    first, _, last = blocks(network)[1:4]
    signals = [torch.randn(2, channels, 9) for channels in (6, 5, 7)]
    with torch.no_grad():
        kept = last.mconv[-1].weight.clone(), last.mconv[-1].bias.clone()
        last.mconv[-1].weight.zero_()
        last.mconv[-1].bias.zero_()
        found, _ = last(signals[-1], None, signals[:-1])
        branches = [
            norm(conv(signal, None)[0])
            for (conv, norm), signal in zip(last.res, signals, strict=True)
        ]
        last.mconv[-1].weight.copy_(kept[0])
        last.mconv[-1].bias.copy_(kept[1])
    assert len(first.res) == 1
    torch.testing.assert_close(found, sum(branches).relu(), rtol=0, atol=SINGLE)


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    kernel=st.sampled_from([1, 3, 9]),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    seed=st.integers(0, 9),
)
def test_padded_batch_gives_what_each_utterance_gives_alone(
    lengths: list[int], kernel: int, stride: int, dilation: int, seed: int
) -> None:
    torch.manual_seed(seed)
    network = QuartzNet(tiny(kernel=kernel, stride=stride, dilation=dilation)).double().eval()
    batch = torch.randn(len(lengths), 4, max(lengths), dtype=torch.float64)
    with torch.no_grad():
        together, valid = network(batch, torch.tensor(lengths))
        for row, (length, frames) in enumerate(zip(lengths, valid, strict=True)):
            (alone,) = network(batch[row : row + 1, :, :length])
            assert len(alone) == frames
            torch.testing.assert_close(together[row, :frames], alone, rtol=0, atol=ROUNDING)


def test_every_parameter_is_trained() -> None:
    network = QuartzNet(tiny()).train()
    network(torch.randn(3, 4, 20), torch.tensor([20, 11, 6]))[0].square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in network.parameters())


@pytest.mark.parametrize("lengths", [False, True])
def test_exported_file_computes_the_same(network: QuartzNet, tmp_path: Path, lengths: bool) -> None:
    path = tmp_path / "m.onnx"
    export(network, path, frontend=FRONTEND, labels=network.config.labels, lengths=lengths)
    batch, valid = torch.randn(3, 4, 23), torch.tensor([23, 7, 12])
    feeds = {"audio_signal": batch} | ({"length": valid} if lengths else {})
    session = Session(path, threads=1)
    with torch.no_grad():
        wanted = network(*feeds.values())
        ours = TorchGraph(load(path))(feeds)["log_probs"]
    wanted = wanted[0] if lengths else wanted
    found = session.run({name: values.numpy() for name, values in feeds.items()})["log_probs"]
    np.testing.assert_allclose(found, wanted.numpy(), rtol=0, atol=SINGLE)
    torch.testing.assert_close(ours, wanted, rtol=0, atol=SINGLE)


def test_exported_graph_keeps_batchnorm(network: QuartzNet, tmp_path: Path) -> None:
    export(network, tmp_path / "m.onnx", frontend=FRONTEND, labels=network.config.labels)
    ops = [node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node]
    convolutions = 1 + 3 * 2 + (1 + 2 + 3) + 1
    assert ops.count("BatchNormalization") == convolutions
    assert ops.count("Conv") == convolutions + 1
    assert ops.count("Add") == 1 + 2 + 3
    assert set(ops) == {"BatchNormalization", "Conv", "Add", "Relu", "Transpose", "LogSoftmax"}


def test_nemo_file_reads_back(network: QuartzNet, tmp_path: Path) -> None:
    write_nemo(tmp_path / "m.nemo", network, FRONTEND)
    again = read_nemo(tmp_path / "m.nemo").network
    assert again.config == network.config
    state = again.state_dict()
    assert all(torch.equal(values, state[name]) for name, values in network.state_dict().items())


def test_published_configuration_reads_back() -> None:
    config, frontend = jasper_config(), Frontend()
    assert network_from_nemo(nemo_from_network(config, frontend)) == config


def test_weights_that_do_not_fit_are_listed(network: QuartzNet) -> None:
    weights = dict(network.state_dict())
    del weights["encoder.encoder.3.res.2.1.bias"]
    weights["encoder.encoder.3.res.3.0.conv.weight"] = torch.zeros(4, 4, 1)
    weights["encoder.encoder.1.res.0.0.conv.weight"] = torch.zeros(5, 5, 1)
    with pytest.raises(IntqError) as raised:
        load_weights(QuartzNet(network.config), weights)
    assert "1 missing (encoder.encoder.3.res.2.1.bias)" in str(raised.value)
    assert "1 unexpected (encoder.encoder.3.res.3.0.conv.weight)" in str(raised.value)
    assert "res.0.0.conv.weight [5, 5, 1] instead of [5, 6, 1]" in str(raised.value)


def test_residual_blocks_behind_dense_ones_are_refused() -> None:
    plain = BlockConfig(filters=4, kernel=3)
    residual = BlockConfig(filters=4, kernel=3, residual=True)
    for blocks in ((dense(4), plain, dense(4)), (dense(4), residual), (dense(4), plain, residual)):
        with pytest.raises(IntqError, match="stands behind those with residual_dense"):
            QuartzNetConfig(blocks=blocks)
    assert QuartzNetConfig(blocks=(residual, dense(4), dense(4), plain)).blocks


def test_dense_without_residual_is_refused() -> None:
    with pytest.raises(IntqError, match="residual_dense needs residual"):
        BlockConfig(filters=4, kernel=3, residual_dense=True)
