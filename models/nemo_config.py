"""Translates the `model_config.yaml` of a NeMo QuartzNet model to our configuration and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from onnx_intq.frontend import RENAMED, Frontend
from onnx_intq.models.jasper_block import BlockConfig
from onnx_intq.models.quartznet import QuartzNetConfig
from onnx_intq.transform import IntqError

Section = Mapping[str, object]

_TARGETS = {
    "preprocessor": "nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor",
    "encoder": "nemo.collections.asr.modules.ConvASREncoder",
    "decoder": "nemo.collections.asr.modules.ConvASRDecoder",
}
_ONLY: dict[str, dict[str, object]] = {
    "encoder": {
        "frame_splicing": 1,
        "normalization_mode": "batch",
        "quantize": False,
        "residual_mode": "add",
    },
    "jasper": {
        "future_context": -1,
        "groups": 1,
        "heads": -1,
        "kernel_size_factor": 1,
        "quantize": False,
        "residual_dense": False,
        "residual_mode": "add",
        "se": False,
        "stride_last": False,
    },
}
"""Options that change the result, with the only value that is supported (NeMo's default)."""


def network_from_nemo(config: Section) -> QuartzNetConfig:
    """Read `encoder`, `decoder` and the labels.

    Raises:
        IntqError: A part is missing, is no QuartzNet's, or uses an option that is not supported.
    """
    encoder, decoder = _section(config, "encoder"), _section(config, "decoder")
    vocabulary = decoder.get("vocabulary") or config.get("labels")
    network = QuartzNetConfig(
        blocks=tuple(
            _block(f"encoder.jasper[{number}]", entry)
            for number, entry in enumerate(_items("encoder.jasper", encoder.get("jasper")))
        ),
        labels=tuple(_text("a label", label) for label in _items("decoder.vocabulary", vocabulary)),
        features=_whole("encoder.feat_in", encoder.get("feat_in")),
        activation=_text("encoder.activation", encoder.get("activation", "relu")),
    )
    classes = decoder.get("num_classes", -1)
    if classes not in (-1, len(network.labels)):
        raise IntqError(
            f"decoder.num_classes is {classes!r}, but there are {len(network.labels)} labels; "
            "expected the labels without the blank; correct the configuration"
        )
    return network


def frontend_from_nemo(config: Section) -> Frontend:
    """Read `preprocessor`; settings that are absent have NeMo's defaults.

    Raises:
        IntqError: It is missing, no log-mel front end, uses an unsupported option, or gives
            another number of features than the encoder takes.
    """
    frontend = Frontend.from_settings(_section(config, "preprocessor"))
    taken = _section(config, "encoder").get("feat_in")
    if taken != frontend.features:
        raise IntqError(
            f"preprocessor.features is {frontend.features}, but encoder.feat_in is {taken!r}; "
            "expected the same number; correct the configuration"
        )
    return frontend


def nemo_from_network(network: QuartzNetConfig, frontend: Frontend) -> dict[str, object]:
    """The configuration that the two functions above read back, and NeMo too.

    Law: `network_from_nemo(nemo_from_network(n, f)) == n`, and likewise for the front end.
    """
    theirs = {ours: name for name, ours in RENAMED.items()}
    preprocessor = {theirs.get(key, key): value for key, value in asdict(frontend).items()}
    lists = ("kernel", "stride", "dilation")
    blocks = [
        {key: [value] if key in lists else value for key, value in asdict(block).items()}
        for block in network.blocks
    ]
    labels = list(network.labels)
    return {
        "sample_rate": frontend.sample_rate,
        "labels": labels,
        "preprocessor": {"_target_": _TARGETS["preprocessor"], "dither": 0.0, **preprocessor},
        "encoder": {
            "_target_": _TARGETS["encoder"],
            "feat_in": network.features,
            "activation": network.activation,
            "conv_mask": True,
            "jasper": blocks,
        },
        "decoder": {
            "_target_": _TARGETS["decoder"],
            "feat_in": network.blocks[-1].filters,
            "num_classes": len(labels),
            "vocabulary": labels,
        },
    }


def _section(config: Section, name: str) -> Section:
    found = config.get(name)
    if not isinstance(found, Mapping):
        raise IntqError(f"configuration has no section {name!r}; expected a NeMo CTC model's")
    target, expected = str(found.get("_target_")), _TARGETS[name]
    if _class_name(target) != _class_name(expected):
        raise IntqError(
            f"{name} is {target}; only {expected} (QuartzNet) is supported; "
            "export the model to ONNX with NeMo instead"
        )
    _refuse(name, found, _ONLY.get(name, {}))
    return found


def _class_name(target: str) -> str:
    return target.rpartition(".")[2]


def _refuse(where: str, found: Section, only: Mapping[str, object]) -> None:
    for key, value in only.items():
        if found.get(key, value) != value:
            raise IntqError(
                f"{where}.{key} is {found[key]!r}; only {value!r} is supported; "
                "export the model to ONNX with NeMo instead"
            )


def _block(where: str, entry: object) -> BlockConfig:
    if not isinstance(entry, Mapping):
        raise IntqError(f"{where} is {entry!r}; expected a block's settings")
    _refuse(where, entry, _ONLY["jasper"])
    return BlockConfig(
        filters=_whole(f"{where}.filters", entry.get("filters")),
        kernel=_only_one(f"{where}.kernel", entry.get("kernel")),
        repeat=_whole(f"{where}.repeat", entry.get("repeat")),
        stride=_only_one(f"{where}.stride", entry.get("stride", 1)),
        dilation=_only_one(f"{where}.dilation", entry.get("dilation", 1)),
        dropout=_real(f"{where}.dropout", entry.get("dropout", 0.0)),
        residual=_flag(f"{where}.residual", entry.get("residual", False)),
        separable=_flag(f"{where}.separable", entry.get("separable", False)),
    )


def _items(where: str, value: object) -> list[object]:
    if not isinstance(value, list) or not value:
        raise IntqError(f"{where} is {value!r}; expected a list that is not empty")
    return value


def _only_one(where: str, value: object) -> int:
    return _whole(where, value[0] if isinstance(value, list) and len(value) == 1 else value)


def _whole(where: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise IntqError(f"{where} is {value!r}; expected a whole number")
    return value


def _real(where: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise IntqError(f"{where} is {value!r}; expected a number")
    return float(value)


def _flag(where: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise IntqError(f"{where} is {value!r}; expected true or false")
    return value


def _text(where: str, value: object) -> str:
    if not isinstance(value, str):
        raise IntqError(f"{where} is {value!r}; expected text")
    return value
