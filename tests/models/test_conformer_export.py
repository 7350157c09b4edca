"""Exported Conformers: clean graphs with BatchNorm, and the same function everywhere."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq.frontend import Frontend
from onnx_intq.graph import load
from onnx_intq.models.conformer import Conformer, ConformerConfig
from onnx_intq.models.conformer_block import ConformerBlockConfig
from onnx_intq.models.export import export
from onnx_intq.models.zoo import untrained
from onnx_intq.runtime import Session
from onnx_intq.torch_graph import TorchGraph

CONFIG = ConformerConfig(
    block=ConformerBlockConfig(width=16, heads=2, kernel=5, expansion=2),
    layers=2,
    labels=("a", "b"),
    features=8,
    longest=64,
)
ROUNDING = 1e-5
"""For float32 and some forty layers of order 1: 2**-24 times 16 terms times 10, with a margin."""
BLOCK = {
    "MatMul": 12,
    "Add": 15,
    "Reshape": 7,
    "Transpose": 8,
    "Mul": 7,
    "LayerNormalization": 5,
    "Sigmoid": 4,
    "Conv": 3,
    "Slice": 2,
    "BatchNormalization": 1,
    "Softmax": 1,
    "Split": 1,
}
"""66 operators: attention has 32 of them, the shift of its scores 4 of these."""
AROUND = {
    "Conv": 3,
    "Relu": 2,
    "Transpose": 4,
    "Unsqueeze": 1,
    "Reshape": 1,
    "MatMul": 1,
    "Add": 2,
    "Mul": 1,
    "Shape": 1,
    "Slice": 2,
    "Sub": 1,
    "Concat": 1,
    "LogSoftmax": 1,
}
"""Sub-sampling, the positions of all blocks, and the decoder."""


def written(folder: Path, config: ConformerConfig) -> tuple[Conformer, dict[bool, Path]]:
    """A network exported without (False) and with (True) lengths."""
    network = untrained(config, seed=0)
    paths = {lengths: folder / f"{lengths}.onnx" for lengths in (False, True)}
    for lengths, path in paths.items():
        frontend = Frontend(features=config.features)
        export(network, path, frontend=frontend, labels=config.labels, lengths=lengths)
    return network, paths


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> tuple[Conformer, dict[bool, Path]]:
    return written(tmp_path_factory.mktemp("export"), CONFIG)


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def test_graph_is_clean(network: tuple[Conformer, dict[bool, Path]]) -> None:
    found = operators(network[1][False])
    assert found == Counter(AROUND) + Counter(BLOCK) + Counter(BLOCK)
    assert sum(BLOCK.values()) == 66


def test_masks_are_two_selections_in_a_block(network: tuple[Conformer, dict[bool, Path]]) -> None:
    more = operators(network[1][True]) - operators(network[1][False])
    assert more["Where"] == 2 * CONFIG.layers + 2
    assert {"MatMul", "Reshape", "Mul", "Add", "Concat", "Softmax"}.isdisjoint(more)


def test_weights_are_named_after_modules(network: tuple[Conformer, dict[bool, Path]]) -> None:
    module, paths = network
    names = {t.name: t for t in onnx.load(paths[True]).graph.initializer}
    assert not any(name.startswith("onnx::") for name in names)
    folded = {"self_attn.pos_bias_u", "self_attn.pos_bias_v", "num_batches_tracked"}
    for name, tensor in module.state_dict().items():
        if not name.endswith(tuple(folded)):
            values = onnx.numpy_helper.to_array(names[name])
            linear = isinstance(module.get_submodule(name.rpartition(".")[0]), torch.nn.Linear)
            np.testing.assert_array_equal(values.T if linear else values, tensor.numpy())


def test_results_are_named_after_modules(network: tuple[Conformer, dict[bool, Path]]) -> None:
    producers = {
        name: n.op_type for n in onnx.load(network[1][False]).graph.node for name in n.output
    }
    block = "encoder.layers.1"
    assert producers[f"{block}.feed_forward1.linear1"] == "Add"
    assert producers[f"{block}.feed_forward1.activation"] == "Mul"
    assert producers[f"{block}.conv.batch_norm"] == "BatchNormalization"


@settings(max_examples=10)
@given(batch=st.integers(1, 3), frames=st.integers(1, 90), seed=st.integers(0, 99))
def test_onnx_computes_what_torch_computes(
    network: tuple[Conformer, dict[bool, Path]], batch: int, frames: int, seed: int
) -> None:
    module, paths = network
    signal = np.random.default_rng(seed).standard_normal((batch, 8, frames), np.float32)
    found = Session(paths[False], threads=1).run({"audio_signal": signal})["log_probs"]
    with torch.no_grad():
        expected = module(torch.from_numpy(signal)).numpy()
        again = TorchGraph(load(paths[False]))({"audio_signal": torch.from_numpy(signal)})
    np.testing.assert_allclose(found, expected, rtol=0, atol=ROUNDING)
    np.testing.assert_allclose(again["log_probs"].numpy(), expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("opset", [20, 23])
def test_newer_opsets_compute_the_same(
    network: tuple[Conformer, dict[bool, Path]], tmp_path: Path, opset: int
) -> None:
    module, paths = network
    path, frontend = tmp_path / "m.onnx", Frontend(features=CONFIG.features)
    export(module, path, frontend=frontend, labels=CONFIG.labels, opset=opset, lengths=True)
    assert onnx.load(path).opset_import[0].version == opset
    signal = np.random.default_rng(0).standard_normal((2, 8, 50), np.float32)
    feeds = {"audio_signal": signal, "length": np.array([50, 31])}
    found, expected = (Session(p, threads=1).run(feeds) for p in (path, paths[True]))
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("subsampling", ["striding", "vggnet"])
def test_padded_batch_gives_what_each_utterance_gives_alone(
    tmp_path: Path, subsampling: str
) -> None:
    _, paths = written(tmp_path, replace(CONFIG, subsampling=subsampling, channels=4))
    alone, together = (Session(paths[key], threads=1) for key in (False, True))
    lengths, graph = np.array([70, 1, 33, 42]), TorchGraph(load(paths[True]))
    signal = np.random.default_rng(0).standard_normal((4, 8, 70), np.float32)
    feeds = {"audio_signal": signal, "length": lengths}
    found = together.run(feeds)
    again = graph({name: torch.from_numpy(values) for name, values in feeds.items()})
    for row, length in enumerate(lengths):
        frames = found["encoded_length"][row]
        wanted = alone.run({"audio_signal": signal[row : row + 1, :, :length]})["log_probs"][0]
        assert len(wanted) == frames == -(-length // 4)
        for outputs in (found["log_probs"], again["log_probs"].numpy()):
            np.testing.assert_allclose(outputs[row, :frames], wanted, rtol=0, atol=ROUNDING)
