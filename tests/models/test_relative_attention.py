"""Relative attention against its definition, one pair of frames at a time."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from onnx_intq.models.relative_attention import RelativeAttention, RelativePositions, shift
from onnx_intq.transform import IntqError

ROUNDING = 1e-12
"""For float64: 2**-53 times some hundred additions of values of order 1, times a margin."""
KEEP = nn.Identity()


def attention(width: int = 8, heads: int = 2) -> RelativeAttention:
    torch.manual_seed(0)
    module = RelativeAttention(width, heads, dropout=0.0).double()
    nn.init.normal_(module.pos_bias_u)
    nn.init.normal_(module.pos_bias_v)
    return module


def encoding(distance: int, width: int) -> list[float]:
    """The sines and cosines of a distance, interleaved (Vaswani et al., 2017, section 3.5)."""
    rates = [10000.0 ** (-i / width) for i in range(0, width, 2)]
    return [f(distance * rate) for rate in rates for f in (math.sin, math.cos)]


def by_definition(module: RelativeAttention, hidden: Tensor) -> Tensor:
    """Transformer-XL, section 3.3, frame by frame: hidden [frames, width]."""
    frames, width = hidden.shape
    shape = (frames, module.heads, module.size)
    q, k, v = (
        layer(hidden).reshape(shape)
        for layer in (module.linear_q, module.linear_k, module.linear_v)
    )
    rows = torch.zeros(frames, width, dtype=torch.float64)
    for i in range(frames):
        for h in range(module.heads):
            scores = torch.zeros(frames, dtype=torch.float64)
            for j in range(frames):
                p = module.linear_pos(torch.tensor(encoding(i - j, width), dtype=torch.float64))
                p = p.reshape(shape[1:])[h]
                content = (q[i, h] + module.pos_bias_u[h]) @ k[j, h]
                scores[j] = content + (q[i, h] + module.pos_bias_v[h]) @ p
            weights = (scores / math.sqrt(module.size)).softmax(0)
            rows[i, h * module.size : (h + 1) * module.size] = weights @ v[:, h]
    out: Tensor = module.linear_out(rows)
    return out


@pytest.mark.parametrize("frames", [1, 2, 7])
def test_is_the_definition(frames: int) -> None:
    module, hidden = attention(), torch.randn(2, frames, 8, dtype=torch.float64)
    positions = RelativePositions(8, longest=9).double()(hidden, None, KEEP)
    with torch.no_grad():
        found = module(hidden, positions)
        wanted = torch.stack([by_definition(module, row) for row in hidden])
    # The table is made in float32, as NeMo's: angles of up to 6 radians, rounded to 2**-22.
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@given(frames=st.integers(1, 6), batch=st.integers(1, 3), heads=st.integers(1, 3))
def test_shift_brings_each_distance_to_its_key(frames: int, batch: int, heads: int) -> None:
    positions = RelativePositions(4, longest=9)(torch.zeros(batch, frames, 4), None, KEEP)
    distances = torch.arange(frames, -frames, -1).float()
    moved = shift(distances.expand(batch, heads, frames, -1).contiguous(), positions)
    wanted = torch.arange(frames)[:, None] - torch.arange(frames)
    assert (moved == wanted).all()


def test_masked_frames_are_not_attended_to() -> None:
    module, hidden = attention(), torch.randn(1, 6, 8, dtype=torch.float64)
    table = RelativePositions(8, longest=9).double()
    mask = (torch.arange(6) < 4)[None, None]
    with torch.no_grad():
        masked = module(hidden, table(hidden, mask, KEEP))[:, :4]
        alone = module(hidden[:, :4], table(hidden[:, :4], None, KEEP))
    torch.testing.assert_close(masked, alone, rtol=0, atol=ROUNDING)


def test_table_is_no_parameter_and_counts_down() -> None:
    table = RelativePositions(4, longest=3)
    assert table.state_dict() == {}
    assert table.table.shape == (1, 6, 4)
    wanted = torch.tensor([encoding(distance, 4) for distance in (3, 2, 1, 0, -1, -2)])
    torch.testing.assert_close(table.table[0], wanted, rtol=0, atol=1e-6)


def test_input_longer_than_the_table_is_refused() -> None:
    table = RelativePositions(4, longest=3)
    with pytest.raises(
        IntqError, match="input has 4 frames after sub-sampling; expected at most 3"
    ):
        table(torch.zeros(1, 4, 4), None, KEEP)
