"""The structures that train_digits.py trains, and the labels it writes digits in."""

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from onnx_intq.manifest import read_manifest
from onnx_intq.models.conformer import Conformer
from onnx_intq.models.nemo import build, read_nemo
from onnx_intq.models.zoo import PRETRAINED, zoo_names
from onnx_intq.speech import WORD_START, features_of, greedy

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(Path(__file__).parents[1] / "tools")
    models = importlib.import_module("digit_models")
    strings = importlib.import_module("digit_strings")
    trainer = importlib.import_module("train_digits")

CONFORMER = models.RECIPES["conformer"]
TEXTS = st.lists(st.sampled_from(strings.WORDS), min_size=1, max_size=7).map(" ".join)


def path_of(numbers: Sequence[int], classes: int) -> Any:
    """Log-probabilities of the path with a blank behind each label."""
    path = [step for number in numbers for step in (number, classes - 1)]
    return np.log(np.eye(classes)[path] + 1e-9)


@given(TEXTS, st.sampled_from(sorted(models.RECIPES)))
def test_decoding_gives_the_text_that_was_encoded(text: str, name: str) -> None:
    labels = models.RECIPES[name].config.labels
    numbers = models.encode(text, labels)
    heard = greedy(path_of(numbers, len(labels) + 1), labels)
    assert heard.removeprefix(" ") == text
    # Pieces start every word, the first one too; letters have a space between words only.
    assert heard.startswith(" ") == (name != "quartznet")


def test_every_piece_is_used_and_each_word_has_two_or_three() -> None:
    used = [models.encode(word, models.PIECES) for word in strings.WORDS]
    assert {number for word in used for number in word} == set(range(len(models.PIECES)))
    assert {word: len(n) for word, n in zip(strings.WORDS, used, strict=True)} == {
        word: 3 if word == "seven" else 2 for word in strings.WORDS
    }
    starts = [models.PIECES[word[0]].startswith(WORD_START) for word in used]
    rest = [models.PIECES[n].startswith(WORD_START) for word in used for n in word[1:]]
    assert all(starts)
    assert not any(rest)


def test_the_longer_of_two_labels_is_taken() -> None:
    assert models.encode("abc", ("a", "ab", "b", "c")) == [1, 3]
    assert models.encode("a.c", (".", "a", "c")) == [1, 0, 2]  # no pattern


def test_conformer_is_small_as_it_says() -> None:
    parameters = sum(p.numel() for p in build(CONFORMER.config).parameters())
    assert f"{parameters:,} parameters" in models.conformer_digits_config.__doc__
    assert parameters <= 700_000


@pytest.fixture(scope="module")
def voices() -> Any:
    """Noise in place of digits: longer for higher ones."""
    rng = np.random.default_rng(0)
    digits = tuple(
        (rng.standard_normal(1500 + 100 * digit).astype(np.float32),) for digit in range(10)
    )
    return [strings.Voice(speaker=name, digits=digits) for name in ("ann", "bob")]


def test_batches_are_written_in_the_labels_asked_for(voices: Any) -> None:
    def first(labels: Sequence[str]) -> tuple[Any, list[str]]:
        batch = next(trainer.batches(np.random.default_rng(0), voices, 2, labels))
        return batch, ["".join(labels[n] for n in batch.targets.tolist())]

    letters, (spelled,) = first(trainer.ENGLISH)
    pieces, (pieced,) = first(models.PIECES)
    assert torch.equal(letters.features, pieces.features)
    assert int(pieces.lengths.sum()) == len(pieces.targets) < len(letters.targets)
    assert pieced.replace(WORD_START, "") == spelled.replace(" ", "")


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1, user_api="blas"):
        yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_conformer_learns_and_repeats_itself(voices: Any) -> None:
    plan = trainer.Plan(steps=10, batch=2, settling=2, rate=2e-3)
    first, second = (trainer.train(voices, plan, CONFORMER.config) for _ in range(2))
    assert isinstance(first, Conformer)
    assert not first.training
    for name, values in first.state_dict().items():
        assert torch.equal(values, second.state_dict()[name]), name
    batch = next(trainer.batches(np.random.default_rng(5), voices, 8, models.PIECES))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        untrained = build(CONFORMER.config).eval()
    assert loss(first, batch) < loss(untrained, batch) / 2


def loss(network: Any, batch: Any) -> float:
    with torch.no_grad():
        log_probs = network(batch.features).transpose(0, 1)
    frames = torch.full((len(batch.lengths),), len(log_probs))
    blank = len(models.PIECES)
    return torch.nn.functional.ctc_loss(
        log_probs, batch.targets, frames, batch.lengths, blank=blank
    ).item()


def test_shipped_conformer_is_that_of_the_tool_and_small() -> None:
    file = PRETRAINED / "digits-conformer.nemo"
    model = read_nemo(file)
    assert "digits-conformer" in zoo_names()
    assert model.network.config == CONFORMER.config
    assert model.frontend == models.FRONTEND
    assert file.stat().st_size < 3_000_000


@pytest.mark.usefixtures("one_thread")
def test_shipped_conformer_understands_the_shipped_speech() -> None:
    model = read_nemo(PRETRAINED / "digits-conformer.nemo")
    utterances = read_manifest(PRETRAINED / "digits" / "manifest.json")
    wrong = 0
    for utterance in utterances:
        features = torch.from_numpy(features_of(utterance, model.frontend))
        with torch.no_grad():
            (log_probs,) = model.network(features.unsqueeze(0))
        wrong += greedy(log_probs.numpy(), models.PIECES).strip() != utterance.text
    assert len(utterances) == 16
    assert wrong <= 1
