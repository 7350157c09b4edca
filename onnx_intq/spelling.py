"""Transcripts as the labels of a model: characters, or pieces of words."""

from __future__ import annotations

from collections.abc import Sequence

from onnx_intq.speech import WORD_START
from onnx_intq.transform import IntqError


def spell(text: str, labels: Sequence[str]) -> list[int]:
    """Numbers of the fewest labels that a text consists of.

    Law: `speech.greedy`'s text of these labels, with blanks between equal ones, is the text in
    single spaces, but for a space before it where the labels are pieces of words. Text that cannot
    be spelt as it is, is tried in small letters.

    Args:
        text: What was said.
        labels: Without the blank.

    Raises:
        IntqError: Some of the text is in no label.
    """
    plain = " ".join(text.split())
    numbers = {label: number for number, label in reversed(list(enumerate(labels)))}
    pieces = any(label.startswith(WORD_START) for label in labels)
    reached = 0
    for variant in dict.fromkeys((plain, plain.lower())):
        marked = WORD_START + variant.replace(" ", WORD_START) if pieces and variant else variant
        found, reached = _fewest(marked, numbers)
        if found is not None:
            return found
    lost = plain[max(0, reached - pieces) :][:10]
    raise IntqError(
        f"transcript {plain[:40]!r} has no labels from {lost!r} on; expected text of the model's "
        f"{len(labels)} labels; correct the manifest or leave the utterance out"
    )


def _fewest(text: str, numbers: dict[str, int]) -> tuple[list[int] | None, int]:
    """The fewest labels, and how far the text can be spelt."""
    longest = max(map(len, numbers))
    best: dict[int, tuple[int, int]] = {0: (0, 0)}  # end -> labels so far, length of the last
    for end in range(1, len(text) + 1):
        options = [
            (best[end - size][0] + 1, size)
            for size in range(1, min(longest, end) + 1)
            if end - size in best and text[end - size : end] in numbers
        ]
        if options:
            best[end] = min(options, key=lambda option: (option[0], -option[1]))
    if len(text) not in best:
        return None, max(best)
    found, end = list[int](), len(text)
    while end:
        size = best[end][1]
        found.append(numbers[text[end - size : end]])
        end -= size
    return found[::-1], len(text)
