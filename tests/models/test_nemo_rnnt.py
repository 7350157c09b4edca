"""RNN-Ts in NeMo's configuration: what is written reads back, what is other is refused."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onnx_intq.frontend import FixedNormalization, Frontend
from onnx_intq.models.nemo import read_nemo, write_nemo
from onnx_intq.models.nemo_config import (
    frontend_from_nemo,
    lists_labels,
    nemo_from_network,
    network_from_nemo,
)
from onnx_intq.models.rnnt import Rnnt, RnntConfig
from onnx_intq.models.rnnt_joint import ACTIVATIONS
from onnx_intq.transform import IntqError

SIZES = st.integers(1, 9)
CONFIG = RnntConfig(labels=("a", "b"), features=2, factor=2, width=4, predictor=3, joint=3)
FIXED = FixedNormalization(fixed_mean=(0.5, -1.0), fixed_std=(2.0, 3.0))
FRONTEND = Frontend(features=2, normalize=FIXED)


@given(
    st.builds(
        RnntConfig,
        labels=st.lists(st.text(min_size=1), min_size=1).map(tuple),
        features=SIZES,
        factor=SIZES,
        width=SIZES,
        layers=SIZES,
        predictor=SIZES,
        predictor_layers=SIZES,
        joint=SIZES,
        activation=st.sampled_from(sorted(ACTIVATIONS)),
        dropout=st.floats(0, 0.9),
    )
)
def test_what_is_written_reads_back(config: RnntConfig) -> None:
    frontend = Frontend(features=config.features)
    settings = nemo_from_network(config, frontend)
    assert network_from_nemo(settings) == config
    assert frontend_from_nemo(settings) == frontend


def test_files_read_back(tmp_path: Path) -> None:
    network = Rnnt(CONFIG)
    write_nemo(tmp_path / "m.nemo", network, FRONTEND)
    model = read_nemo(tmp_path / "m.nemo")
    assert model.frontend == FRONTEND
    assert model.network.config == CONFIG
    for name, values in network.state_dict().items():
        assert torch.equal(model.network.state_dict()[name], values)


def test_names_of_parameters_are_nemos() -> None:
    names = list(Rnnt(RnntConfig(labels=("a",), layers=1, dropout=0.1)).state_dict())
    lstm = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    assert names == [
        *(f"encoder.pre_encode.proj_out.{name}" for name in ("weight", "bias")),
        *(f"encoder.layers.0.{name}" for name in lstm),
        "decoder.prediction.embed.weight",
        *(f"decoder.prediction.dec_rnn.lstm.{name}" for name in lstm),
        *(f"joint.{part}.{n}" for part in ("enc", "pred") for n in ("weight", "bias")),
        *(f"joint.joint_net.2.{name}" for name in ("weight", "bias")),  # behind the dropout
    ]


def settings(path: str, value: object) -> Any:
    changed = copy.deepcopy(nemo_from_network(CONFIG, FRONTEND))
    *folders, key = path.split(".")
    section: Any = changed
    for folder in folders:
        section = section[folder]
    section[key] = value
    return changed


def test_labels_may_stand_in_either_place() -> None:
    assert network_from_nemo(settings("labels", None)) == CONFIG
    bare = settings("labels", None)
    bare["joint"]["vocabulary"] = []
    assert network_from_nemo(bare, ("x",)).labels == ("x",)
    assert not lists_labels(bare)
    assert lists_labels(settings("labels", None))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("encoder", None, "configuration has no section 'encoder'; expected an RNN-T"),
        ("joint", None, "has no section 'joint'"),
        ("joint.jointnet", 3, "joint has no section 'jointnet'"),
        ("encoder._target_", "x.RNNEncoder", "encoder is x.RNNEncoder; of RNN-Ts only onnx_intq"),
        ("joint._target_", "x.HATJoint", "joint is x.HATJoint; of RNN-Ts only nemo"),
        ("encoder.subsampling", "vggnet", "subsampling is 'vggnet'; only 'stacking' is supported"),
        ("decoder.blank_as_pad", False, "blank_as_pad is False; only True is supported"),
        ("decoder.prednet.pred_hidden", "3", "prednet.pred_hidden is '3'; expected a whole number"),
        ("joint.jointnet.activation", "selu", "unknown activation 'selu'"),
    ],
)
def test_others_are_refused(path: str, value: object, message: str) -> None:
    with pytest.raises(IntqError, match=message):
        network_from_nemo(settings(path, value))
