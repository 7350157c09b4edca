"""NeMo's JasperBlock, the building block of Jasper and QuartzNet, under NeMo's parameter names.

Li et al., "Jasper: An End-to-End Convolutional Neural Acoustic Model", Interspeech 2019, section 2;
the separable form: Kriman et al., "QuartzNet", ICASSP 2020, section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from onnx_intq.transform import IntqError

BATCHNORM_EPS = 1e-3


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """One entry of NeMo's `encoder.jasper` list; strides, kernels and dilations in frames.

    Raises:
        IntqError: The convolutions cannot be built, or a residual sum would not fit its block.
    """

    filters: int
    kernel: int
    repeat: int = 1
    stride: int = 1
    dilation: int = 1
    dropout: float = 0.0
    residual: bool = False
    residual_dense: bool = False
    separable: bool = False

    def __post_init__(self) -> None:
        if min(self.filters, self.kernel, self.repeat, self.stride, self.dilation) < 1:
            raise IntqError(f"{self}: sizes must be at least 1; correct the block")
        if not 0 <= self.dropout < 1:
            raise IntqError(f"{self}: dropout must lie in [0, 1); correct the block")
        if self.stride > 1 and self.dilation > 1:
            raise IntqError(f"{self}: only one of stride and dilation may exceed 1")
        if self.dilation * (self.kernel - 1) % 2:
            raise IntqError(f"{self}: an even kernel cannot be centred; expected an odd one")
        if self.residual and self.stride > 1:
            raise IntqError(
                f"{self}: the block's output is shorter than its input, so they cannot be added; "
                "expected stride 1; set residual: false"
            )
        if self.residual_dense and not self.residual:
            raise IntqError(f"{self}: residual_dense needs residual; correct the block")


class MaskedConv1d(nn.Module):
    """A convolution that sees zeros, not padding frames, past each utterance's end."""

    def __init__(self, inputs: int, filters: int, config: BlockConfig, *, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(
            inputs,
            filters,
            config.kernel,
            config.stride,
            config.dilation * (config.kernel - 1) // 2,
            config.dilation,
            groups,
            bias=False,
        )

    def forward(self, signal: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Convolve [batch, channels, time]; return the mask of the result beside it.

        The mask is bool [batch, 1, time], true where there is speech. It is selected with, not
        multiplied by: a selection keeps the values' quantization grid.
        """
        if mask is None:
            return self.conv(signal), None
        # A kernel of one frame carries nothing over from padding to speech: no mask needed.
        if self.conv.kernel_size[0] > 1:
            signal = torch.where(mask, signal, 0.0)
        (stride,) = self.conv.stride
        # Centred kernels: output frame t is valid if and only if input frame t * stride is.
        return self.conv(signal), mask if stride == 1 else mask[:, :, ::stride]


class JasperBlock(nn.Module):
    """`repeat` convolutions, each with BatchNorm, and one 1x1 convolution around all of them.

    A dense residual block has one 1x1 convolution for the input of each dense block so far: those
    of `earlier`, and its own.
    """

    def __init__(
        self,
        inputs: int,
        config: BlockConfig,
        activation: Callable[[], nn.Module],
        *,
        earlier: Sequence[int] = (),
    ) -> None:
        """Build it for an input of `inputs` channels and earlier ones of `earlier` channels."""
        super().__init__()
        steps: list[nn.Module] = []
        for step in range(config.repeat):
            if step:
                steps += [activation(), nn.Dropout(config.dropout)]
            steps += _convolutions(config.filters if step else inputs, config)
        self.mconv = nn.ModuleList(steps)
        pointwise = BlockConfig(filters=config.filters, kernel=1)
        sources = (*earlier, inputs) if config.residual else ()
        self.res = nn.ModuleList(
            nn.ModuleList(_convolutions(channels, pointwise)) for channels in sources
        )
        self.mout = nn.Sequential(activation(), nn.Dropout(config.dropout))

    def forward(
        self, signal: Tensor, mask: Tensor | None, earlier: Sequence[Tensor] = ()
    ) -> tuple[Tensor, Tensor | None]:
        """Map [batch, channels, time] to [batch, filters, time']; `earlier` are such, too."""
        output, output_mask = run_masked(self.mconv.children(), signal, mask)
        sources = (*earlier, signal) if len(self.res) else ()
        for branch, source in zip(self.res, sources, strict=True):
            output = output + run_masked(branch.children(), source, mask)[0]
        return self.mout(output), output_mask


def _convolutions(inputs: int, config: BlockConfig) -> list[nn.Module]:
    norm = nn.BatchNorm1d(config.filters, eps=BATCHNORM_EPS)
    if not config.separable:
        return [MaskedConv1d(inputs, config.filters, config), norm]
    depthwise = MaskedConv1d(inputs, inputs, config, groups=inputs)
    pointwise = BlockConfig(filters=config.filters, kernel=1)
    return [depthwise, MaskedConv1d(inputs, config.filters, pointwise), norm]


def run_masked(
    steps: Iterator[nn.Module], signal: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Run layers in a row, handing the mask [batch, 1, time] to those that use it."""
    for step in steps:
        if isinstance(step, MaskedConv1d):
            signal, mask = step(signal, mask)
        else:
            signal = step(signal)
    return signal, mask
