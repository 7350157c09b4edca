"""The zoo: names, reproducible untrained weights, statistics that fit them."""

from pathlib import Path

import pytest
import torch

from onnx_intq.frontend import Frontend
from onnx_intq.models import conformer, zoo
from onnx_intq.models.jasper import jasper_config
from onnx_intq.models.jasper_block import BlockConfig
from onnx_intq.models.nemo import write_nemo
from onnx_intq.models.quartznet import QuartzNet, QuartzNetConfig, quartznet_config
from onnx_intq.transform import IntqError

NETWORK = QuartzNetConfig(
    blocks=(
        BlockConfig(filters=8, kernel=3, stride=2, separable=True),
        BlockConfig(filters=8, kernel=3, repeat=3, residual=True, separable=True),
    ),
    labels=("a",),
    features=4,
)


def test_published_networks_come_first() -> None:
    assert zoo.zoo_names()[:3] == ["quartznet5x5", "quartznet10x5", "quartznet15x5"]
    assert zoo.PUBLISHED["jasper10x5dr"] == jasper_config()


def test_shipped_files_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_nemo(tmp_path / "tiny.nemo", QuartzNet(NETWORK), Frontend(features=4))
    monkeypatch.setattr(zoo, "PRETRAINED", tmp_path)
    assert zoo.zoo_names()[len(zoo.PUBLISHED) :] == ["tiny"]
    assert zoo.zoo_model("tiny").network.config == NETWORK


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(IntqError, match=r"unknown model 'x'; expected FILE.nemo or .*quartznet5x5"):
        zoo.zoo_model("x")


def test_published_network_is_ready_to_use() -> None:
    model = zoo.zoo_model("quartznet5x5")
    assert model.network.config == quartznet_config(1)
    assert model.frontend == Frontend()
    assert not model.network.training


def test_conformers_are_ready_to_use() -> None:
    names = [name for name in zoo.zoo_names() if name.startswith("conformer")]
    assert names == ["conformer-ctc-small", "conformer-ctc-medium", "conformer-ctc-large"]
    model = zoo.zoo_model("conformer-ctc-small")
    assert model.network.config == conformer.conformer_config("small")
    assert model.frontend == conformer.FRONTEND
    assert not any(module.training for module in model.network.modules())
    assert all(tensor.dtype == torch.float32 for tensor in model.network.parameters())
    biases = [t for name, t in model.network.named_parameters() if "pos_bias" in name]
    assert all(bias.std() > 0.1 for bias in biases)


def test_untrained_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = zoo.untrained(NETWORK, seed=0).state_dict()
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), drawn)
    again, other = (zoo.untrained(NETWORK, seed=seed).state_dict() for seed in (0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(
        first["decoder.decoder_layers.0.weight"], other["decoder.decoder_layers.0.weight"]
    )


def test_untrained_statistics_keep_the_signal_alive() -> None:
    network = zoo.untrained(NETWORK, seed=0)
    torch.manual_seed(0)
    outputs: list[torch.Tensor] = []
    norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm1d)]
    for norm in norms:
        norm.register_forward_hook(lambda _, __, output: outputs.append(output))
    network(torch.randn(8, 4, 512))
    assert len(outputs) == 5
    # Each channel of other noise has deviation 1 around the bias, up to sampling (2048 frames that
    # overlap: a few percent) and BatchNorm's epsilon beside a variance of some 0.01 to 1.
    for output in outputs:
        assert (output.mean(dim=(0, 2)) - zoo.NORM_BIAS).abs().max() < 0.15
        assert (output.std(dim=(0, 2)) - 1).abs().max() < 0.15
    assert all(norm.momentum == 0.1 for norm in norms)


@pytest.mark.slow
def test_untrained_network_does_not_amplify_rounding() -> None:
    network = zoo.zoo_model("quartznet15x5").network
    signal = torch.randn(1, 64, 200, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        single, exact = network(signal), network.double()(signal.double())
    # 78 layers, each adding a rounding error of some 1e-7: below 1e-4 unless it grows.
    assert (single - exact).abs().max() < 1e-4
    assert exact.std(dim=1).mean() > 0.5
