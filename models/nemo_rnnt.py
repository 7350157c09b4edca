"""Translates the `model_config.yaml` of an RNN-T to our configuration and back.

The sections `decoder` and `joint` are NeMo's. `encoder` names a class of ours: NeMo's RNNEncoder
has projections and norms between its layers.
"""

from __future__ import annotations

from collections.abc import Mapping

from onnx_intq.models.nemo_fields import Section, class_name, real, refuse, text, whole
from onnx_intq.models.rnnt import RnntConfig
from onnx_intq.transform import IntqError

ENCODER = "onnx_intq.models.rnnt_encoder.LstmEncoder"
DECODER = "nemo.collections.asr.modules.RNNTDecoder"
JOINT = "nemo.collections.asr.modules.RNNTJoint"
_ONLY: dict[str, dict[str, object]] = {
    "encoder": {"subsampling": "stacking"},
    "decoder": {"blank_as_pad": True, "normalization_mode": None, "random_state_sampling": False},
    "joint": {"num_extra_outputs": 0},
}
"""Options that change the result, with the only value that is supported (NeMo's default)."""


def is_rnnt(config: Section) -> bool:
    """Whether the configuration has the parts of an RNN-T."""
    decoder = config.get("decoder")
    target = str(decoder.get("_target_")) if isinstance(decoder, Mapping) else ""
    return class_name(target) == class_name(DECODER)


def rnnt_from_nemo(config: Section, labels: tuple[str, ...]) -> RnntConfig:
    """Read `encoder`, `decoder` and `joint`; options that are absent have NeMo's defaults.

    Raises:
        IntqError: A section is missing or of another class, or an option has the wrong type or a
            value that is not supported.
    """
    targets = {"encoder": ENCODER, "decoder": DECODER, "joint": JOINT}
    encoder, decoder, joint = (_checked(config, *each) for each in targets.items())
    prednet = _part(decoder, "decoder", "prednet")
    jointnet = _part(joint, "joint", "jointnet")
    return RnntConfig(
        labels=labels,
        features=whole("encoder.feat_in", encoder.get("feat_in")),
        factor=whole("encoder.subsampling_factor", encoder.get("subsampling_factor")),
        width=whole("encoder.d_model", encoder.get("d_model")),
        layers=whole("encoder.n_layers", encoder.get("n_layers")),
        predictor=whole("prednet.pred_hidden", prednet.get("pred_hidden")),
        predictor_layers=whole("prednet.pred_rnn_layers", prednet.get("pred_rnn_layers")),
        joint=whole("jointnet.joint_hidden", jointnet.get("joint_hidden")),
        activation=text("jointnet.activation", jointnet.get("activation")),
        dropout=real("jointnet.dropout", jointnet.get("dropout", 0.0)),
    )


def nemo_from_rnnt(config: RnntConfig) -> dict[str, object]:
    """The sections that `rnnt_from_nemo` reads back."""
    labels = list(config.labels)
    return {
        "encoder": {
            "_target_": ENCODER,
            "feat_in": config.features,
            "n_layers": config.layers,
            "d_model": config.width,
            "subsampling": "stacking",
            "subsampling_factor": config.factor,
        },
        "decoder": {
            "_target_": DECODER,
            "blank_as_pad": True,
            "normalization_mode": None,
            "random_state_sampling": False,
            "vocab_size": len(labels),
            "prednet": {
                "pred_hidden": config.predictor,
                "pred_rnn_layers": config.predictor_layers,
                "dropout": 0.0,
            },
        },
        "joint": {
            "_target_": JOINT,
            "num_classes": len(labels),
            "vocabulary": labels,
            "log_softmax": None,
            "jointnet": {
                "encoder_hidden": config.width,
                "pred_hidden": config.predictor,
                "joint_hidden": config.joint,
                "activation": config.activation,
                "dropout": config.dropout,
            },
        },
    }


def _checked(config: Section, name: str, target: str) -> Section:
    found = _part(config, "configuration", name)
    if class_name(str(found.get("_target_"))) != class_name(target):
        raise IntqError(
            f"{name} is {found.get('_target_')}; of RNN-Ts only {target} is supported; "
            "export the model to ONNX with NeMo instead"
        )
    refuse(name, found, _ONLY[name])
    return found


def _part(section: Section, where: str, name: str) -> Section:
    found = section.get(name)
    if not isinstance(found, Mapping):
        raise IntqError(f"{where} has no section {name!r}; expected an RNN-T model's")
    return found
