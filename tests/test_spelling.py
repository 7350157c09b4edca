"""Transcripts as labels."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_intq.speech import greedy
from onnx_intq.spelling import spell
from onnx_intq.transform import IntqError

LETTERS = tuple(" abc'")
PIECES = ("▁", "▁a", "a", "b", "ab", "▁ab", "c", "abc")
TEXTS = st.lists(st.text("abc", min_size=1, max_size=6), max_size=5).map(" ".join)


def heard(numbers: list[int], labels: tuple[str, ...]) -> str:
    """What greedy decoding makes of labels with blanks between them."""
    path = [step for number in numbers for step in (number, len(labels))]
    return greedy(np.eye(len(labels) + 1)[path], labels) if path else ""


@given(TEXTS)
def test_the_labels_are_read_back_as_the_text(text: str) -> None:
    assert heard(spell(text, LETTERS), LETTERS) == text
    assert heard(spell(text, PIECES), PIECES).removeprefix(" ") == text


def test_the_fewest_labels_are_taken_and_the_first_of_equal_ones() -> None:
    assert spell("abc", PIECES) == [0, 7]
    assert spell("ab a", PIECES) == [5, 1]
    assert spell("a", ("a", "a")) == [0]


def test_spaces_and_capitals_do_not_matter_where_labels_are_small() -> None:
    assert spell("  A  b ", LETTERS) == spell("a b", LETTERS)
    assert spell("A", ("A", "a")) == [0]
    assert spell("", PIECES) == []


@pytest.mark.parametrize(("labels", "lost"), [(LETTERS, "'3 b'"), (PIECES, "'3 b'")])
def test_text_without_labels_is_refused(labels: tuple[str, ...], lost: str) -> None:
    with pytest.raises(IntqError, match=f"'a3 b' has no labels from {lost} on; expected text of"):
        spell("a3 b", labels)
