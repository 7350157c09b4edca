"""Translates the `model_config.yaml` of a NeMo model to our configuration and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from onnx_intq.frontend import RENAMED, Frontend
from onnx_intq.models.conformer import ConformerConfig
from onnx_intq.models.jasper_block import BlockConfig
from onnx_intq.models.nemo_conformer import TARGET as CONFORMER
from onnx_intq.models.nemo_conformer import conformer_from_nemo, nemo_from_conformer
from onnx_intq.models.nemo_fields import (
    Section,
    class_name,
    flag,
    items,
    only_one,
    real,
    refuse,
    text,
    whole,
)
from onnx_intq.models.nemo_rnnt import is_rnnt, nemo_from_rnnt, rnnt_from_nemo
from onnx_intq.models.quartznet import QuartzNetConfig
from onnx_intq.models.rnnt import RnntConfig
from onnx_intq.transform import IntqError

CtcConfig = QuartzNetConfig | ConformerConfig
NetworkConfig = CtcConfig | RnntConfig
_CONVOLUTIONS = "nemo.collections.asr.modules.ConvASREncoder"
_TARGETS = {
    "preprocessor": ("nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor",),
    "encoder": (_CONVOLUTIONS, CONFORMER),
    "decoder": ("nemo.collections.asr.modules.ConvASRDecoder",),
}
"""The classes that each section may name; those of encoders: QuartzNet and Jasper, Conformer."""
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
        "residual_mode": "add",
        "se": False,
        "stride_last": False,
    },
}
"""Options that change the result, with the only value that is supported (NeMo's default)."""


def network_from_nemo(config: Section, pieces: Sequence[str] = ()) -> NetworkConfig:
    """Read `encoder`, `decoder` and the labels.

    Args:
        config: The whole configuration.
        pieces: The labels where the configuration lists none: those of a tokenizer's file.

    Raises:
        IntqError: A part is missing, is of no network that is known here, or uses options that are
            not supported.
    """
    if is_rnnt(config):
        return rnnt_from_nemo(config, _labels(config, pieces, "joint"))
    encoder, decoder = _section(config, "encoder"), _section(config, "decoder")
    labels = _labels(config, pieces, "decoder")
    classes = decoder.get("num_classes", -1)
    if classes not in (-1, len(labels)):
        raise IntqError(
            f"decoder.num_classes is {classes!r}, but there are {len(labels)} labels; "
            "expected the labels without the blank; correct the configuration"
        )
    if class_name(str(encoder.get("_target_"))) == class_name(CONFORMER):
        return conformer_from_nemo(encoder, labels)
    return _convolutions_from_nemo(encoder, labels)


def lists_labels(config: Section) -> bool:
    """Whether the configuration itself lists the labels, as all that NeMo has saved do."""
    sections = [config.get("decoder"), config.get("joint")]
    return bool(
        config.get("labels")
        or any(isinstance(s, Mapping) and s.get("vocabulary") for s in sections)
    )


def _labels(config: Section, pieces: Sequence[str], lister: str) -> tuple[str, ...]:
    """The labels that the section `lister` or the configuration lists, or the pieces."""
    section = config.get(lister)
    listed = section.get("vocabulary") if isinstance(section, Mapping) else None
    found = listed or config.get("labels") or [*pieces]
    return tuple(text("a label", label) for label in items(f"{lister}.vocabulary", found))


def _convolutions_from_nemo(encoder: Section, labels: tuple[str, ...]) -> QuartzNetConfig:
    refuse("encoder", encoder, _ONLY["encoder"])
    return QuartzNetConfig(
        blocks=tuple(
            _block(f"encoder.jasper[{number}]", entry)
            for number, entry in enumerate(items("encoder.jasper", encoder.get("jasper")))
        ),
        labels=labels,
        features=whole("encoder.feat_in", encoder.get("feat_in")),
        activation=text("encoder.activation", encoder.get("activation", "relu")),
    )


def frontend_from_nemo(config: Section) -> Frontend:
    """Read `preprocessor`; settings that are absent have NeMo's defaults.

    Raises:
        IntqError: It is missing, no log-mel front end, uses an unsupported option, or gives
            another number of features than the encoder takes.
    """
    frontend = Frontend.from_settings(_section(config, "preprocessor"))
    encoder = config.get("encoder")
    taken = encoder.get("feat_in") if isinstance(encoder, Mapping) else None
    if taken != frontend.features:
        raise IntqError(
            f"preprocessor.features is {frontend.features}, but encoder.feat_in is {taken!r}; "
            "expected the same number; correct the configuration"
        )
    return frontend


def nemo_from_network(network: NetworkConfig, frontend: Frontend) -> dict[str, object]:
    """The configuration that the two functions above read back, and NeMo too.

    Law: `network_from_nemo(nemo_from_network(n, f)) == n`, and likewise for the front end.
    """
    theirs = {ours: name for name, ours in RENAMED.items()}
    preprocessor = {theirs.get(key, key): value for key, value in asdict(frontend).items()}
    labels = list(network.labels)
    common: dict[str, object] = {
        "sample_rate": frontend.sample_rate,
        "labels": labels,
        "preprocessor": {"_target_": _TARGETS["preprocessor"][0], "dither": 0.0, **preprocessor},
    }
    if isinstance(network, RnntConfig):
        return common | nemo_from_rnnt(network)
    if isinstance(network, ConformerConfig):
        encoder, width = nemo_from_conformer(network), network.block.width
    else:
        encoder, width = _nemo_from_convolutions(network), network.blocks[-1].filters
    return common | {
        "encoder": encoder,
        "decoder": {
            "_target_": _TARGETS["decoder"][0],
            "feat_in": width,
            "num_classes": len(labels),
            "vocabulary": labels,
        },
    }


def _nemo_from_convolutions(network: QuartzNetConfig) -> dict[str, object]:
    lists = ("kernel", "stride", "dilation")
    return {
        "_target_": _CONVOLUTIONS,
        "feat_in": network.features,
        "activation": network.activation,
        "conv_mask": True,
        "jasper": [
            {key: [value] if key in lists else value for key, value in asdict(block).items()}
            for block in network.blocks
        ],
    }


def _section(config: Section, name: str) -> Section:
    found = config.get(name)
    if not isinstance(found, Mapping):
        raise IntqError(f"configuration has no section {name!r}; expected a NeMo CTC model's")
    target, expected = str(found.get("_target_")), _TARGETS[name]
    if class_name(target) not in map(class_name, expected):
        raise IntqError(
            f"{name} is {target}; only {' and '.join(expected)} (QuartzNet, Jasper, Conformer) "
            "is supported; export the model to ONNX with NeMo instead"
        )
    return found


def _block(where: str, entry: object) -> BlockConfig:
    if not isinstance(entry, Mapping):
        raise IntqError(f"{where} is {entry!r}; expected a block's settings")
    refuse(where, entry, _ONLY["jasper"])
    return BlockConfig(
        filters=whole(f"{where}.filters", entry.get("filters")),
        kernel=only_one(f"{where}.kernel", entry.get("kernel")),
        repeat=whole(f"{where}.repeat", entry.get("repeat")),
        stride=only_one(f"{where}.stride", entry.get("stride", 1)),
        dilation=only_one(f"{where}.dilation", entry.get("dilation", 1)),
        dropout=real(f"{where}.dropout", entry.get("dropout", 0.0)),
        residual=flag(f"{where}.residual", entry.get("residual", False)),
        residual_dense=flag(f"{where}.residual_dense", entry.get("residual_dense", False)),
        separable=flag(f"{where}.separable", entry.get("separable", False)),
    )
