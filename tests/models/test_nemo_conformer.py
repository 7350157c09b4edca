"""The section `encoder` of NeMo's Conformers: what is read, what is refused and how it is said."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq.frontend import Frontend
from onnx_intq.models.conformer import FRONTEND, Conformer, ConformerConfig, conformer_config
from onnx_intq.models.conformer_block import ConformerBlockConfig
from onnx_intq.models.nemo import read_nemo, write_nemo
from onnx_intq.models.nemo_config import frontend_from_nemo, nemo_from_network, network_from_nemo
from onnx_intq.models.nemo_conformer import conformer_from_nemo
from onnx_intq.transform import IntqError

PUBLISHED = """
preprocessor:
  _target_: nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor
  sample_rate: 16000
  normalize: per_feature
  window_size: 0.025
  window_stride: 0.01
  window: hann
  features: 80
  n_fft: 512
  log: true
  frame_splicing: 1
  dither: 1.0e-05
  pad_to: 0
  pad_value: 0.0
encoder:
  _target_: nemo.collections.asr.modules.ConformerEncoder
  feat_in: 80
  feat_out: -1
  n_layers: 18
  d_model: 512
  subsampling: striding
  subsampling_factor: 4
  subsampling_conv_channels: -1
  causal_downsampling: false
  ff_expansion_factor: 4
  self_attention_model: rel_pos
  n_heads: 8
  att_context_size: [-1, -1]
  att_context_style: regular
  xscaling: true
  untie_biases: true
  pos_emb_max_len: 5000
  conv_kernel_size: 31
  conv_norm_type: batch_norm
  conv_context_size: null
  dropout: 0.1
  dropout_pre_encoder: 0.1
  dropout_emb: 0.0
  dropout_att: 0.1
  stochastic_depth_drop_prob: 0.0
decoder:
  _target_: nemo.collections.asr.modules.ConvASRDecoder
  feat_in: 512
  num_classes: 28
  vocabulary: [" ", a, b, c, d, e, f, g, h, i, j, k, l, m, "n", o, p, q, r, s, t, u, v, w, x, "y",
    z, "'"]
"""
"""The settings of stt_en_conformer_ctc_large, with characters."""
TINY = ConformerConfig(
    block=ConformerBlockConfig(width=8, heads=2, kernel=3, expansion=2),
    layers=1,
    labels=("a", "▁b"),
    features=4,
    longest=20,
)


def encoder(**changes: object) -> dict[str, Any]:
    section: dict[str, Any] = yaml.safe_load(PUBLISHED)["encoder"]
    return section | changes


def test_reads_the_published_settings() -> None:
    config = yaml.safe_load(PUBLISHED)
    assert network_from_nemo(config) == conformer_config("large")
    assert frontend_from_nemo(config) == FRONTEND


def test_absent_options_have_the_defaults_of_nemo() -> None:
    section = {"feat_in": 80, "n_layers": 2, "d_model": 16}
    found = conformer_from_nemo(section, ("a",))
    block = ConformerBlockConfig(width=16, heads=4, attention_dropout=0.0)
    assert found == ConformerConfig(block=block, layers=2, labels=("a",), position_dropout=0.1)


@pytest.mark.parametrize(
    "changes",
    [
        {"att_context_size": None},
        {"att_context_size": [[-1, -1]]},
        {"feat_out": 512},
        {"feat_out": None},
        {"conv_context_size": [15, 15]},
        {"untie_biases": False},
        {"use_pytorch_sdpa": True},
    ],
)
def test_options_that_change_nothing_are_accepted(changes: dict[str, object]) -> None:
    wanted = conformer_from_nemo(encoder(), ("a",))
    assert conformer_from_nemo(encoder(**changes), ("a",)) == wanted


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"conv_norm_type": "layer_norm"}, "encoder.conv_norm_type is 'layer_norm'; only 'batch_n"),
        ({"self_attention_model": "abs_pos"}, "self_attention_model is 'abs_pos'; only 'rel_pos'"),
        ({"att_context_size": [128, 0]}, r"att_context_size is \[128, 0\]"),
        ({"conv_context_size": "causal"}, "conv_context_size is 'causal'"),
        ({"feat_out": 640}, "feat_out is 640"),
        ({"use_bias": False}, "use_bias is False"),
        ({"subsampling": "dw_striding"}, "unknown sub-sampling 'dw_striding'; expected one of"),
        ({"d_model": None}, "encoder.d_model is None; expected a whole number"),
        ({"xscaling": 1}, "encoder.xscaling is 1; expected true or false"),
        ({"dropout": "no"}, "encoder.dropout is 'no'; expected a number"),
        ({"conv_kernel_size": "x"}, "encoder.conv_kernel_size is 'x'; expected a whole number"),
    ],
)
def test_refuses_what_is_not_supported(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(IntqError, match=reason):
        conformer_from_nemo(encoder(**changes), ("a",))


def test_says_all_that_is_not_supported_in_one_line() -> None:
    section = encoder(use_bias=False, reduction="pooling")
    with pytest.raises(IntqError) as caught:
        conformer_from_nemo(section, ("a",))
    assert str(caught.value) == (
        "encoder.reduction is 'pooling'; only None is supported; encoder.use_bias is False; only "
        "True is supported; export the model to ONNX with NeMo instead"
    )


@settings(max_examples=25)
@given(
    heads=st.integers(1, 3),
    layers=st.integers(1, 3),
    subsampling=st.sampled_from(["striding", "vggnet"]),
    factor=st.sampled_from([2, 4]),
    channels=st.none() | st.integers(1, 9),
    scaled=st.booleans(),
    rate=st.floats(0, 0.5),
)
def test_reads_back_what_it_writes(
    heads: int,
    layers: int,
    subsampling: str,
    factor: int,
    channels: int | None,
    scaled: bool,
    rate: float,
) -> None:
    config = ConformerConfig(
        block=ConformerBlockConfig(width=4 * heads, heads=heads, dropout=rate, kernel=7),
        layers=layers,
        labels=("a", "▁b"),
        features=9,
        subsampling=subsampling,
        factor=factor,
        channels=channels,
        scaled=scaled,
        longest=100,
        input_dropout=rate,
        position_dropout=rate / 2,
    )
    written = yaml.safe_load(yaml.safe_dump(nemo_from_network(config, Frontend(features=9))))
    assert network_from_nemo(written) == config
    assert frontend_from_nemo(written) == Frontend(features=9)


def test_nemo_file_reads_back(tmp_path: Path) -> None:
    network, path = Conformer(TINY), tmp_path / "m.nemo"
    write_nemo(path, network, Frontend(features=4))
    found = read_nemo(path)
    assert (found.network.config, found.frontend) == (TINY, Frontend(features=4))
    assert not found.network.training
    for name, tensor in network.state_dict().items():
        assert torch.equal(found.network.state_dict()[name], tensor), name


def test_weights_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "m.nemo"
    network = Conformer(replace(TINY, layers=2))
    network.config = TINY
    write_nemo(path, network, Frontend(features=4))
    with pytest.raises(
        IntqError, match=r"m.nemo: weights .* 40 unexpected \(encoder.layers.1.*37 mo"
    ):
        read_nemo(path)


def test_parameters_have_the_names_of_nemo() -> None:
    names = set(Conformer(TINY).state_dict())
    block = {name.removeprefix("encoder.layers.0.") for name in names if "layers.0." in name}
    linear = ("feed_forward1.linear1", "feed_forward2.linear2", "self_attn.linear_q")
    norms = ("norm_feed_forward1", "norm_self_att", "norm_conv", "norm_feed_forward2", "norm_out")
    convolutions = ("conv.pointwise_conv1", "conv.depthwise_conv", "conv.pointwise_conv2")
    for module in (*linear, *norms, *convolutions, "conv.batch_norm", "self_attn.linear_out"):
        assert {f"{module}.weight", f"{module}.bias"} <= block
    assert {"self_attn.pos_bias_u", "self_attn.pos_bias_v", "self_attn.linear_pos.weight"} <= block
    assert "self_attn.linear_pos.bias" not in block
    assert {"encoder.pre_encode.conv.2.weight", "encoder.pre_encode.out.bias"} <= names
    assert "decoder.decoder_layers.0.weight" in names
    assert not any("pos_enc" in name for name in names)
