"""The RNN-T loss against a sum over all alignments, and its gradient against differences."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from onnx_intq.transducer_loss import transducer_loss
from onnx_intq.transform import IntqError

SEEDS = st.integers(0, 2**32 - 1)
few = settings(max_examples=30)


def summed(log_probs: Tensor, labels: list[int], blank: int) -> float:
    """Minus the logarithm of the sum over every order of blanks and labels; [T, U + 1, V]."""
    frames = len(log_probs)
    steps = frames - 1 + len(labels)  # and one blank in the last frame
    total = 0.0
    for chosen in itertools.combinations(range(steps), len(labels)):
        t = u = 0
        score = 0.0
        for step in range(steps):
            if step in chosen:
                score += float(log_probs[t, u, labels[u]])
                u += 1
            else:
                score += float(log_probs[t, u, blank])
                t += 1
        total += math.exp(score + float(log_probs[t, u, blank]))
    return -math.log(total)


@few
@given(SEEDS, st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3)), min_size=1, max_size=3))
def test_loss_is_that_of_all_alignments(seed: int, sizes: list[tuple[int, int]]) -> None:
    generator = torch.Generator().manual_seed(seed)
    frames, lengths = (torch.tensor(each) for each in zip(*sizes, strict=True))
    shape = (len(sizes), 1 + int(frames.max()), 1 + int(lengths.max()), 4)
    logits = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    blank = seed % 4
    others = torch.tensor([label for label in range(4) if label != blank])
    labels = others[torch.randint(3, (shape[0], shape[2] - 1), generator=generator)]
    found = transducer_loss(logits, labels, frames, lengths, blank)
    for n, (time, count) in enumerate(sizes):
        expected = summed(logits[n, :time].log_softmax(-1), labels[n, :count].tolist(), blank)
        assert float(found[n]) == pytest.approx(expected, rel=1e-12)


@settings(max_examples=5)
@given(SEEDS)
def test_gradient_is_that_of_differences(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 3, 3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    labels, frames, lengths = torch.tensor([[0, 1], [1, 7]]), torch.tensor([3, 2]), [2, 1]

    def loss(values: Tensor) -> Tensor:
        return transducer_loss(values, labels, frames, torch.tensor(lengths), 2)

    assert torch.autograd.gradcheck(loss, logits)


def test_what_is_beyond_a_string_has_no_influence() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 4, 6, generator=generator, requires_grad=True)
    labels = torch.tensor([[1, 2, -1], [3, 3, 3]])
    frames, lengths = torch.tensor([4, 5]), torch.tensor([2, 3])
    found = transducer_loss(logits, labels, frames, lengths, 5)
    found.sum().backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert not logits.grad[0, 4].any()
    assert not logits.grad[0, :, 3].any()
    assert logits.grad[0, :4, :3].any()
    alone = transducer_loss(logits[:1, :4, :3], labels[:1, :2], frames[:1], lengths[:1], 5)
    torch.testing.assert_close(alone, found[:1], rtol=1e-6, atol=0)


def test_long_strings_stay_finite() -> None:
    logits = 20 * torch.randn(1, 300, 41, 5, generator=torch.Generator().manual_seed(0))
    logits.requires_grad_()
    labels = torch.arange(40)[None] % 4
    loss = transducer_loss(logits, labels, torch.tensor([300]), torch.tensor([40]), 4)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert loss.isfinite().all()
    assert gradient.isfinite().all()
    # In every frame the blank is passed once; what the softmax takes back adds up to as much.
    assert float(gradient.sum()) == pytest.approx(0, abs=1e-2)


def test_shapes_and_lengths_that_do_not_fit_are_refused() -> None:
    logits, labels = torch.zeros(2, 3, 3, 4), torch.zeros(2, 2, dtype=torch.int64)
    three, two = torch.tensor([3, 3]), torch.tensor([2, 2])
    with pytest.raises(IntqError, match=r"shapes are .*\[2, 1\].*; expected \[N, T, U \+ 1, V\]"):
        transducer_loss(logits, labels[:, :1], three, two, 3)
    with pytest.raises(IntqError, match=r"expected \[N, T, U \+ 1, V\]"):
        transducer_loss(logits, labels, three[:1], two, 3)
    for frames, lengths in (
        ([4, 3], [2, 2]),
        ([0, 3], [2, 2]),
        ([3, 3], [3, 2]),
        ([3, 3], [-1, 2]),
    ):
        with pytest.raises(IntqError, match="expected 1 to 3 frames and 0 to 2 labels"):
            transducer_loss(logits, labels, torch.tensor(frames), torch.tensor(lengths), 3)
