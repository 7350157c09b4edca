"""Translates the section `encoder` of a NeMo Conformer model to our configuration and back."""

from __future__ import annotations

from onnx_intq.models.conformer import ConformerConfig
from onnx_intq.models.conformer_block import ConformerBlockConfig
from onnx_intq.models.nemo_fields import Section, flag, real, refuse, text, whole

TARGET = "nemo.collections.asr.modules.ConformerEncoder"
_ONLY: dict[str, object] = {
    "att_context_size": None,
    "att_context_style": "regular",
    "causal_downsampling": False,
    "conv_context_size": None,
    "conv_norm_type": "batch_norm",
    "feat_out": -1,
    "reduction": None,
    "self_attention_model": "rel_pos",
    "use_bias": True,
}
"""Options that change the result, with the only value that is supported (NeMo's default)."""
_UNLIMITED = ([-1, -1], [[-1, -1]])
"""Other ways to say that attention sees all frames."""


def conformer_from_nemo(encoder: Section, labels: tuple[str, ...]) -> ConformerConfig:
    """Read `encoder`; options that are absent have NeMo's defaults.

    Raises:
        IntqError: An option has the wrong type, or a value that is not supported.
    """
    refuse("encoder", _plain(encoder), _ONLY)

    def number(name: str, default: object = None) -> int:
        return whole(f"encoder.{name}", encoder.get(name, default))

    def rate(name: str, default: float) -> float:
        return real(f"encoder.{name}", encoder.get(name, default))

    channels = number("subsampling_conv_channels", -1)
    return ConformerConfig(
        block=ConformerBlockConfig(
            width=number("d_model"),
            heads=number("n_heads", 4),
            kernel=number("conv_kernel_size", 31),
            expansion=number("ff_expansion_factor", 4),
            dropout=rate("dropout", 0.1),
            attention_dropout=rate("dropout_att", 0.0),
        ),
        layers=number("n_layers"),
        labels=labels,
        features=number("feat_in"),
        subsampling=text("encoder.subsampling", encoder.get("subsampling", "striding")),
        factor=number("subsampling_factor", 4),
        channels=None if channels == -1 else channels,
        scaled=flag("encoder.xscaling", encoder.get("xscaling", True)),
        longest=number("pos_emb_max_len", 5000),
        input_dropout=rate("dropout_pre_encoder", 0.1),
        position_dropout=rate("dropout_emb", 0.1),
    )


def nemo_from_conformer(config: ConformerConfig) -> dict[str, object]:
    """The section `encoder` that `conformer_from_nemo` reads back, and NeMo too."""
    block = config.block
    return {
        "_target_": TARGET,
        "feat_in": config.features,
        "feat_out": -1,
        "n_layers": config.layers,
        "d_model": block.width,
        "subsampling": config.subsampling,
        "subsampling_factor": config.factor,
        "subsampling_conv_channels": -1 if config.channels is None else config.channels,
        "ff_expansion_factor": block.expansion,
        "self_attention_model": "rel_pos",
        "n_heads": block.heads,
        "xscaling": config.scaled,
        "untie_biases": True,
        "pos_emb_max_len": config.longest,
        "conv_kernel_size": block.kernel,
        "conv_norm_type": "batch_norm",
        "dropout": block.dropout,
        "dropout_pre_encoder": config.input_dropout,
        "dropout_emb": config.position_dropout,
        "dropout_att": block.attention_dropout,
    }


def _plain(encoder: Section) -> Section:
    """The section with one way of saying that contexts are whole, and the width comes out."""
    plain = dict(encoder)
    if plain.get("att_context_size") in _UNLIMITED:
        plain["att_context_size"] = None
    if plain.get("feat_out") in {0, None, plain.get("d_model")}:
        plain["feat_out"] = -1
    kernel = plain.get("conv_kernel_size", 31)
    if isinstance(kernel, int) and plain.get("conv_context_size") == [kernel // 2] * 2:
        plain["conv_context_size"] = None
    return plain
