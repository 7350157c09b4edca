"""Sub-sampling: how many frames it gives, and that padding changes none of them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from onnx_intq.models.subsampling import STAGES, Subsampling

ROUNDING = 1e-12
"""For float64: 2**-53 times some hundred additions of values of order 1, times a margin."""


def valid(lengths: list[int], frames: int) -> Tensor:
    return (torch.arange(frames) < torch.tensor(lengths)[:, None])[:, None]


@pytest.mark.parametrize("kind", STAGES)
@pytest.mark.parametrize(("frames", "factor", "expected"), [(1, 4, 1), (9, 4, 3), (16, 8, 2)])
def test_gives_one_frame_for_each_that_has_begun(
    kind: str, frames: int, factor: int, expected: int
) -> None:
    layers = Subsampling(kind, factor, features=7, channels=3, width=5)
    found, mask = layers(torch.randn(2, 7, frames), None)
    assert found.shape == (2, expected, 5)
    assert mask is None


@pytest.mark.parametrize(
    ("kind", "kinds"),
    [
        ("striding", [nn.Conv2d, nn.ReLU] * 2),
        ("vggnet", [nn.Conv2d, nn.ReLU, nn.Conv2d, nn.ReLU, nn.MaxPool2d] * 2),
    ],
)
def test_layers_stand_where_nemo_has_them(kind: str, kinds: list[type]) -> None:
    layers = Subsampling(kind, 4, features=8, channels=3, width=5)
    assert [type(layer) for layer in layers.conv] == kinds
    assert layers.out.in_features == 3 * 2


@settings(max_examples=40)
@given(
    kind=st.sampled_from(list(STAGES)),
    factor=st.sampled_from([2, 4, 8]),
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=3),
)
def test_padded_batch_gives_what_each_utterance_gives_alone(
    kind: str, factor: int, lengths: list[int]
) -> None:
    torch.manual_seed(0)
    layers = Subsampling(kind, factor, features=6, channels=3, width=5).double()
    batch = torch.randn(len(lengths), 6, max(lengths), dtype=torch.float64)
    together, mask = layers(batch, valid(lengths, max(lengths)))
    for row, length in enumerate(lengths):
        alone, _ = layers(batch[row : row + 1, :, :length], None)
        frames = int(mask[row].sum())
        assert alone.shape[1] == frames
        torch.testing.assert_close(together[row, :frames], alone[0], rtol=0, atol=ROUNDING)
