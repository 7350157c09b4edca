"""Jasper with dense residual connections, under NeMo's structure and parameter names.

Li et al., "Jasper: An End-to-End Convolutional Neural Acoustic Model", Interspeech 2019, table 1
and section 2.2 (JasperDR-10x5). NeMo builds it, as QuartzNet, of its JasperBlock in a
`ConvASREncoder`; so it is a `QuartzNet` of other blocks: plain convolutions, not separable ones,
and a residual connection from the input of every earlier block of the body.
"""

from __future__ import annotations

from onnx_intq.models.jasper_block import BlockConfig
from onnx_intq.models.quartznet import QuartzNetConfig

BODY = ((256, 11, 0.2), (384, 13, 0.2), (512, 17, 0.2), (640, 21, 0.3), (768, 25, 0.3))
"""Filters, kernel in frames and dropout of the five kinds of body blocks, each there twice."""
TWICE = 2


def jasper_config(repeat: int = 5) -> QuartzNetConfig:
    """JasperDR-10xR: 10 dense residual blocks of `repeat` convolutions each (published: 5)."""
    body = [
        BlockConfig(
            filters=filters,
            kernel=kernel,
            repeat=repeat,
            dropout=dropout,
            residual=True,
            residual_dense=True,
        )
        for filters, kernel, dropout in BODY
        for _ in range(TWICE)
    ]
    first = BlockConfig(filters=256, kernel=11, stride=2, dropout=0.2)
    wide = BlockConfig(filters=896, kernel=29, dilation=2, dropout=0.4)
    last = BlockConfig(filters=1024, kernel=1, dropout=0.4)
    return QuartzNetConfig(blocks=(first, *body, wide, last))
