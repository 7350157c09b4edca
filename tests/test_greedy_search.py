"""Greedy decoding against networks whose scores are known."""

from typing import Any, cast

import numpy as np
import pytest

from onnx_intq.greedy_search import MOST, GreedySearch
from onnx_intq.transducer import States, Transducer

NONE = np.zeros((1, 1, 1), np.float32)


class Scripted:
    """A network of two labels and the blank that writes `script[frame]` at that frame.

    It predicts how many labels it has seen.
    """

    def __init__(self, script: list[str]) -> None:
        self.script = script
        self.seen: list[int] = []

    def start(self, part: str) -> States:
        assert part == "predictor"
        return States(h=NONE, c=NONE)

    def predict(self, labels: Any, states: States) -> tuple[Any, States]:
        self.seen += labels.tolist()
        after = States(h=states.h + 1, c=states.c)
        return after.h, after

    def log_probs(self, frame: Any, predicted: Any, classes: int) -> Any:
        assert classes == 3
        place = int(frame[0])
        before = sum(map(len, self.script[:place]))
        written = int(predicted[0, 0, 0]) - 1 - before  # the blank at the start counts, too
        wanted = self.script[place][written : written + 1] or "-"
        return np.log(np.where(np.arange(3) == "ab-".index(wanted), 0.8, 0.1))[np.newaxis]


def frames(*numbers: int) -> Any:
    return np.array(numbers, np.float32)[:, np.newaxis]


def test_labels_are_written_until_the_blank() -> None:
    network = Scripted(["", "ab", "", "aab", "b"])
    search = GreedySearch(cast("Transducer", network), 3)
    search.accept(frames(0, 1, 2, 3, 4))
    assert search.labels == [0, 1, 0, 0, 1, 1]
    assert network.seen == [2, 0, 1, 0, 0, 1, 1]  # it starts with the blank


def test_chunks_do_not_matter() -> None:
    search = GreedySearch(cast("Transducer", Scripted(["a", "", "b", "ab"])), 3)
    search.accept(frames(0))
    search.accept(frames())
    search.accept(frames(1, 2))
    assert search.labels == [0, 1]
    search.accept(frames(3))
    assert search.labels == [0, 1, 0, 1]


@pytest.mark.parametrize("most", [1, 3, MOST])
def test_a_frame_has_no_more_labels_than_allowed(most: int) -> None:
    search = GreedySearch(cast("Transducer", Scripted(["a" * 99])), 3, most)
    search.accept(frames(0))
    assert search.labels == [0] * most
