"""NeMo's configuration: what is read, what is refused and how that is said."""

import copy
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq.frontend import Frontend
from onnx_intq.models.jasper_block import BlockConfig
from onnx_intq.models.nemo_config import (
    frontend_from_nemo,
    nemo_from_network,
    network_from_nemo,
)
from onnx_intq.models.quartznet import ACTIVATIONS, QuartzNetConfig
from onnx_intq.transform import IntqError

CONFIG = """
labels: &labels [a, b]
preprocessor:
  _target_: nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor
  features: 8
  window: hamming
  preemph: 0.5
  dither: 1.0e-05
  pad_to: 16
encoder:
  _target_: nemo.collections.asr.modules.conv_asr.ConvASREncoder
  feat_in: 8
  activation: swish
  conv_mask: true
  jasper:
  - {filters: 4, repeat: 1, kernel: [3], stride: [2], dilation: [1], dropout: 0.1, residual: false,
     separable: true, se: false, se_context_size: -1}
  - {filters: 5, repeat: 2, kernel: 5, residual: true, heads: -1}
decoder:
  _target_: nemo.collections.asr.modules.ConvASRDecoder
  feat_in: 5
  num_classes: 2
  vocabulary: *labels
"""


def config(path: str = "", value: object = None) -> Any:
    """The configuration above with one value changed, or removed where it is None."""
    changed = copy.deepcopy(yaml.safe_load(CONFIG))
    *folders, key = path.split(".")
    section = changed
    for folder in folders:
        section = section[int(folder) if folder.isdigit() else folder]
    section.pop(key, None)
    if value is not None:
        section[key] = value
    return changed


def test_reads_the_network() -> None:
    assert network_from_nemo(config()) == QuartzNetConfig(
        blocks=(
            BlockConfig(filters=4, kernel=3, stride=2, dropout=0.1, separable=True),
            BlockConfig(filters=5, kernel=5, repeat=2, residual=True),
        ),
        labels=("a", "b"),
        features=8,
        activation="swish",
    )


def test_reads_the_front_end() -> None:
    expected = Frontend(features=8, window="hamming", preemphasis=0.5)
    assert frontend_from_nemo(config()) == expected


def test_labels_may_stand_at_the_top_only() -> None:
    assert network_from_nemo(config("decoder.vocabulary")).labels == ("a", "b")


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("encoder", None, "no section 'encoder'"),
        ("encoder._target_", "x.RNNEncoder", "encoder is x.RNNEncoder; only .*Jasper, Conformer"),
        ("decoder._target_", None, "decoder is None"),
        ("decoder.num_classes", 28, "num_classes is 28, but there are 2 labels"),
        ("encoder.normalization_mode", "group", "encoder.normalization_mode is 'group'; only"),
        ("encoder.jasper", [], "encoder.jasper is .*a list that is not empty"),
        ("encoder.jasper", ["x"], r"encoder.jasper\[0\] is 'x'"),
        ("encoder.jasper.1.se", True, r"encoder.jasper\[1\].se is True; only False"),
        ("encoder.jasper.0.residual_dense", True, "residual_dense needs residual"),
        ("encoder.jasper.1.filters", None, r"encoder.jasper\[1\].filters is None; .* whole"),
        ("encoder.jasper.1.filters", True, "filters is True; expected a whole number"),
        ("encoder.jasper.1.kernel", [3, 3], r"kernel is \[3, 3\]; expected a whole number"),
        ("encoder.jasper.1.kernel", [4], "even kernel"),
        ("encoder.jasper.1.repeat", "${repeat}", r"repeat is '\$\{repeat\}'"),
        ("encoder.jasper.1.dropout", "no", "dropout is 'no'; expected a number"),
        ("encoder.jasper.1.residual", 1, "residual is 1; expected true or false"),
        ("encoder.activation", 3, "encoder.activation is 3; expected text"),
        ("encoder.activation", "sine", "unknown activation 'sine'"),
        ("decoder.vocabulary", [1, 2], "a label is 1; expected text"),
    ],
)
def test_refuses_network(path: str, value: object, reason: str) -> None:
    with pytest.raises(IntqError, match=reason):
        network_from_nemo(config(path, value))


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("preprocessor", "x", "no section 'preprocessor'"),
        ("preprocessor._target_", "x.AudioToMFCCPreprocessor", "AudioToMFCCPreprocessor; only"),
        ("preprocessor.features", 9, "features is 9, but encoder.feat_in is 8"),
        ("preprocessor.frame_splicing", 2, "frame_splicing is 2"),
    ],
)
def test_refuses_front_end(path: str, value: object, reason: str) -> None:
    with pytest.raises(IntqError, match=reason):
        frontend_from_nemo(config(path, value))


BLOCKS = st.builds(
    BlockConfig,
    filters=st.integers(1, 9),
    kernel=st.sampled_from([1, 3, 5]),
    repeat=st.integers(1, 3),
    dilation=st.integers(1, 3),
    dropout=st.floats(0, 0.5),
    residual=st.booleans(),
    separable=st.booleans(),
)


@settings(derandomize=True, deadline=None, max_examples=25)
@given(
    blocks=st.lists(BLOCKS, min_size=1, max_size=3),
    labels=st.lists(st.text(min_size=1), min_size=1),
    activation=st.sampled_from(list(ACTIVATIONS)),
    frontend=st.builds(
        Frontend,
        features=st.integers(1, 9),
        preemphasis=st.sampled_from([None, 0.9]),
        normalize=st.sampled_from([None, "all_features"]),
    ),
)
def test_reads_back_what_it_writes(
    blocks: list[BlockConfig], labels: list[str], activation: str, frontend: Frontend
) -> None:
    network = QuartzNetConfig(
        blocks=tuple(blocks),
        labels=tuple(labels),
        features=frontend.features,
        activation=activation,
    )
    written = yaml.safe_load(yaml.safe_dump(nemo_from_network(network, frontend)))
    assert network_from_nemo(written) == network
    assert frontend_from_nemo(written) == frontend
