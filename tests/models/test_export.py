"""Exported files: clean graphs, the same function, the same bytes, metadata, padded batches."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq import graph
from onnx_intq.frontend import Frontend
from onnx_intq.models.export import OPSETS, export, export_named, zoo_names
from onnx_intq.models.jasper_block import BlockConfig
from onnx_intq.models.nemo import read_nemo, write_nemo
from onnx_intq.models.quartznet import QuartzNet, QuartzNetConfig
from onnx_intq.models.zoo import untrained
from onnx_intq.runtime import Session
from onnx_intq.speech import FRONTEND_KEY, LABELS_KEY, labels_from_json
from onnx_intq.transform import IntqError

NETWORK = QuartzNetConfig(
    blocks=(
        BlockConfig(filters=8, kernel=5, stride=2, separable=True),
        BlockConfig(filters=8, kernel=5, repeat=3, residual=True, separable=True, dropout=0.2),
        BlockConfig(filters=12, kernel=5, dilation=2, separable=True),
        BlockConfig(filters=16, kernel=1),
    ),
    labels=(" ", "a", "ß"),
    features=6,
)
FRONTEND = Frontend(features=6)
ROUNDING = 1e-5
"""For float32 and some ten layers of order 1: 2**-24 times 16 terms times 10, with a margin."""


@pytest.fixture(scope="module")
def network() -> QuartzNet:
    return untrained(NETWORK, seed=0)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, network: QuartzNet) -> dict[bool, Path]:
    """The network exported without (False) and with (True) lengths."""
    folder = tmp_path_factory.mktemp("export")
    paths = {lengths: folder / f"{lengths}.onnx" for lengths in (False, True)}
    for lengths, path in paths.items():
        export(network, path, frontend=FRONTEND, labels=NETWORK.labels, lengths=lengths)
    return paths


@pytest.fixture(scope="module")
def sessions(files: dict[bool, Path]) -> dict[bool, Session]:
    return {lengths: Session(path, threads=1) for lengths, path in files.items()}


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def shapes(values: Iterable[onnx.ValueInfoProto]) -> dict[str, list[str | int]]:
    return {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in values
    }


def test_graph_is_clean(files: dict[bool, Path]) -> None:
    assert operators(files[False]) == {
        "Conv": 13,
        "BatchNormalization": 7,
        "Relu": 6,
        "Add": 1,
        "Transpose": 1,
        "LogSoftmax": 1,
    }


def test_batch_and_time_are_dynamic(files: dict[bool, Path]) -> None:
    model = onnx.load(files[True]).graph
    assert shapes(model.input) == {"audio_signal": ["batch", 6, "time"], "length": ["batch"]}
    assert shapes(model.output) == {
        "log_probs": ["batch", "frames", 4],
        "encoded_length": ["batch"],
    }
    plain = onnx.load(files[False]).graph
    assert shapes(plain.input) == {"audio_signal": ["batch", 6, "time"]}
    assert shapes(plain.output) == {"log_probs": ["batch", "frames", 4]}


def test_nodes_and_weights_are_named_after_modules(
    files: dict[bool, Path], network: QuartzNet
) -> None:
    model = onnx.load(files[False]).graph
    names = {node.name for node in model.node}
    assert "/encoder/encoder.1/mconv.0/conv/Conv" in names
    assert "/encoder/encoder.1/res.0.1/BatchNormalization" in names
    parameters = {n for n in network.state_dict() if not n.endswith("num_batches_tracked")}
    assert {tensor.name for tensor in model.initializer} == parameters


def test_equal_parameters_stay_apart(files: dict[bool, Path]) -> None:
    # All means of a new BatchNorm are equal; a shared initializer would tie their quantization.
    for node in onnx.load(files[False]).graph.node:
        assert node.op_type != "Identity"


def test_batchnorm_is_in_inference_form(files: dict[bool, Path]) -> None:
    for node in onnx.load(files[False]).graph.node:
        if node.op_type == "BatchNormalization":
            modes = [a.i for a in node.attribute if a.name == "training_mode"]
            assert len(node.output) == 1
            assert modes in ([], [0])


def test_masks_stand_before_wide_kernels_only(files: dict[bool, Path]) -> None:
    found = operators(files[True])
    assert found["Where"] == 5
    assert (found["Conv"], found["BatchNormalization"]) == (13, 7)


@settings(derandomize=True, deadline=None, max_examples=10)
@given(batch=st.integers(1, 4), frames=st.integers(1, 90), seed=st.integers(0, 99))
def test_export_computes_what_torch_computes(
    sessions: dict[bool, Session], network: QuartzNet, batch: int, frames: int, seed: int
) -> None:
    signal = np.random.default_rng(seed).standard_normal((batch, 6, frames), np.float32)
    found = sessions[False].run({"audio_signal": signal})["log_probs"]
    with torch.no_grad():
        expected = network(torch.from_numpy(signal)).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=ROUNDING)


@settings(derandomize=True, deadline=None, max_examples=10)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_padded_batch_gives_what_each_utterance_gives_alone(
    sessions: dict[bool, Session], lengths: list[int], seed: int
) -> None:
    generator = np.random.default_rng(seed)
    signal = generator.standard_normal((len(lengths), 6, max(lengths)), np.float32)
    feeds = {"audio_signal": signal, "length": np.array(lengths)}
    together = sessions[True].run(feeds)
    for row, length in enumerate(lengths):
        expected = sessions[False].run({"audio_signal": signal[row : row + 1, :, :length]})[
            "log_probs"
        ]
        frames = together["encoded_length"][row]
        assert frames == expected.shape[1]
        found = together["log_probs"][row : row + 1, :frames]
        np.testing.assert_allclose(found, expected, rtol=0, atol=ROUNDING)


def test_same_bytes_again(tmp_path: Path, files: dict[bool, Path], network: QuartzNet) -> None:
    for lengths, path in files.items():
        again = tmp_path / "again.onnx"
        export(network, again, frontend=FRONTEND, labels=NETWORK.labels, lengths=lengths)
        assert again.read_bytes() == path.read_bytes()


def test_metadata_says_how_features_and_labels_are_made(files: dict[bool, Path]) -> None:
    found = graph.metadata(graph.load(files[False]))
    assert Frontend.from_json(found[FRONTEND_KEY]) == FRONTEND
    assert labels_from_json(found[LABELS_KEY]) == NETWORK.labels
    assert "onnx_intq.version" in found


def test_module_is_left_as_it_was(tmp_path: Path, network: QuartzNet) -> None:
    network.train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    export(network, tmp_path / "m.onnx", frontend=FRONTEND, labels=NETWORK.labels)
    assert network.training
    assert all(torch.equal(network.state_dict()[name], before[name]) for name in before)
    network.eval()


@pytest.mark.parametrize("opset", OPSETS)
def test_every_opset_runs(
    tmp_path: Path, files: dict[bool, Path], network: QuartzNet, opset: int
) -> None:
    path = tmp_path / "m.onnx"
    export(network, path, frontend=FRONTEND, labels=NETWORK.labels, opset=opset)
    assert [(o.domain, o.version) for o in onnx.load(path).opset_import] == [("", opset)]
    assert operators(path) == operators(files[False])
    signal = {"audio_signal": np.ones((2, 6, 20), np.float32)}
    found, expected = (Session(p, threads=1).run(signal)["log_probs"] for p in (path, files[False]))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("opset", [16, 24])
def test_refuses_other_opsets(tmp_path: Path, opset: int) -> None:
    with pytest.raises(IntqError, match=f"opset is {opset}; expected 17 to 23"):
        export_named("quartznet5x5", tmp_path / "m.onnx", opset=opset)
    assert not list(tmp_path.iterdir())


def test_nemo_file_is_exported_by_path(
    tmp_path: Path, files: dict[bool, Path], network: QuartzNet
) -> None:
    source, path = tmp_path / "m.nemo", tmp_path / "m.onnx"
    write_nemo(source, network, FRONTEND)
    export_named(str(source), path)
    found = graph.load(path)
    assert graph.metadata(found)["onnx_intq.source_sha256"] == graph.sha256(source)
    signal = {"audio_signal": np.ones((1, 6, 9), np.float32)}
    found, expected = (Session(p, threads=1).run(signal)["log_probs"] for p in (path, files[False]))
    np.testing.assert_array_equal(found, expected)


def test_weights_replace_those_of_the_source(tmp_path: Path, network: QuartzNet) -> None:
    source, weights = tmp_path / "m.nemo", tmp_path / "w.pt"
    write_nemo(source, network, FRONTEND)
    torch.save({n: torch.zeros_like(t) for n, t in network.state_dict().items()}, weights)
    export_named(str(source), tmp_path / "m.onnx", weights=weights)
    signal = {"audio_signal": np.ones((1, 6, 9), np.float32)}
    found = Session(tmp_path / "m.onnx").run(signal)["log_probs"]
    np.testing.assert_allclose(found, np.log(0.25), rtol=1e-6)
    recorded = graph.metadata(graph.load(tmp_path / "m.onnx"))["onnx_intq.source_sha256"]
    assert recorded == graph.sha256(weights)


def test_refuses_to_overwrite_its_input(tmp_path: Path, network: QuartzNet) -> None:
    source = tmp_path / "m.nemo"
    write_nemo(source, network, FRONTEND)
    with pytest.raises(IntqError, match="output is the input file"):
        export_named(str(source), source)
    assert read_nemo(source).network.config == NETWORK


def test_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(IntqError, match="quartznet10x5"):
        export_named("quartznet", tmp_path / "m.onnx")
    assert "quartznet10x5" in zoo_names()


@pytest.mark.slow
def test_untrained_network_is_exported_by_name(tmp_path: Path) -> None:
    for path in (tmp_path / "a.onnx", tmp_path / "b.onnx"):
        export_named("quartznet5x5", path)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert graph.metadata(graph.load(tmp_path / "a.onnx"))["onnx_intq.seed"] == "0"


@pytest.mark.slow
def test_real_model_keeps_all_93_batchnorms_and_its_function(tmp_path: Path, assets: Path) -> None:
    source = assets / "quartznet15x5.nemo"
    export_named(str(source), tmp_path / "m.onnx")
    assert operators(tmp_path / "m.onnx") == {
        "Conv": 171,
        "BatchNormalization": 93,
        "Relu": 78,
        "Add": 15,
        "Transpose": 1,
        "LogSoftmax": 1,
    }
    signal = np.random.default_rng(0).standard_normal((1, 64, 200), np.float32)
    network = read_nemo(source).network
    with torch.no_grad():
        single = network(torch.from_numpy(signal)).numpy()
        exact = network.double()(torch.from_numpy(signal).double()).numpy()
    found = Session(tmp_path / "m.onnx", threads=1).run({"audio_signal": signal})["log_probs"]
    # Rounding over 171 convolutions moves torch's own float32 result by about 1e-4 here.
    rounding = np.abs(single - exact).max()
    assert rounding < 1e-3
    assert np.abs(found - exact).max() <= max(1e-4, 4 * rounding)
