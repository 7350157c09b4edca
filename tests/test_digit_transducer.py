"""What train_digits.py does otherwise for an RNN-T, and the RNN-T that is shipped."""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from onnx_intq.frontend import FixedNormalization, log_mel
from onnx_intq.models.nemo import build, read_nemo
from onnx_intq.models.rnnt import Rnnt, RnntConfig
from onnx_intq.models.zoo import PRETRAINED, zoo_names
from onnx_intq.transducer_loss import transducer_loss

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(Path(__file__).parents[1] / "tools")
    models = importlib.import_module("digit_models")
    strings = importlib.import_module("digit_strings")
    transducer = importlib.import_module("digit_transducer")
    trainer = importlib.import_module("train_digits")

RECIPE = models.RECIPES["rnnt"]
SMALL = RnntConfig(labels=models.PIECES, width=24, layers=1, predictor=8, joint=16)


@pytest.fixture(scope="module")
def voices() -> Any:
    """Tones in place of digits: longer for higher ones."""
    rng = np.random.default_rng(0)
    digits = tuple(
        (rng.standard_normal(1500 + 100 * digit).astype(np.float32),) for digit in range(10)
    )
    return [strings.Voice(speaker=name, digits=digits) for name in ("ann", "bob")]


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1, user_api="blas"):
        yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    torch.set_num_threads(threads)


def test_structure_is_small_as_it_says() -> None:
    parameters = sum(p.numel() for p in build(RECIPE.config).parameters())
    assert f"{parameters:,} parameters" in models.rnnt_digits_config.__doc__
    assert parameters <= 1_000_000


def test_front_end_has_the_training_strings_means_and_deviations(voices: Any) -> None:
    frontend = transducer.fixed_frontend(models.FRONTEND, voices, seed=1)
    assert frontend == transducer.fixed_frontend(models.FRONTEND, voices, seed=1)
    assert frontend != transducer.fixed_frontend(models.FRONTEND, voices, seed=2)
    assert isinstance(frontend.normalize, FixedNormalization)
    rng = np.random.default_rng(5)
    drawn = [strings.draw(rng, voice, strings.TRAINING) for voice in voices * 30]
    heard = [strings.record(rng, string.samples, strings.TRAINING) for string in drawn]
    frames = np.concatenate([log_mel(each, frontend) for each in heard], axis=1)
    # Of other strings: levels of 60 of them differ by 30 dB.
    assert np.abs(frames.mean(axis=1)).max() < 0.5
    assert np.abs(frames.std(axis=1) - 1).max() < 0.3


def test_loss_is_the_mean_over_the_strings(voices: Any) -> None:
    network = build(SMALL)
    batch = next(trainer.batches(np.random.default_rng(0), voices, 3, models.PIECES))
    found = transducer.loss(network, batch.features, batch.targets, batch.lengths)
    parts = batch.targets.split(batch.lengths.tolist())
    alone = []
    for features, labels in zip(batch.features, parts, strict=True):
        logits = network(features[None], labels[None])
        frames = torch.tensor([logits.shape[1]])
        sizes = frames, torch.tensor([len(labels)])
        alone.append(transducer_loss(logits, labels[None], *sizes, len(models.PIECES)))
    torch.testing.assert_close(found, torch.cat(alone).mean())


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_training_learns_and_repeats_itself(voices: Any) -> None:
    plan = trainer.Plan(steps=25, batch=2, settling=2, rate=1e-2)
    first, second = (trainer.train(voices, plan, SMALL) for _ in range(2))
    assert isinstance(first, Rnnt)
    assert not first.training
    for name, values in first.state_dict().items():
        assert torch.equal(values, second.state_dict()[name]), name
    batch = next(trainer.batches(np.random.default_rng(5), voices, 8, models.PIECES))
    untrained = build(SMALL)
    before, after = (
        transducer.loss(each, batch.features, batch.targets, batch.lengths).item()
        for each in (untrained, first)
    )
    assert after < before / 2


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_command_trains_writes_and_scores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "assets" / "fsdd"
    folder.mkdir(parents=True)
    for digit in range(10):
        for index in (0, 5):
            tone = 0.1 * np.sin(np.arange(900 + 80 * digit) * (0.2 + index / 50))
            soundfile.write(folder / f"{digit}_ann_{index}.wav", tone, strings.RATE)
    monkeypatch.setattr(trainer, "HELD_OUT_STRINGS", 4)
    monkeypatch.setattr(transducer, "MEASURED", 3)
    output = tmp_path / "m.nemo"
    arguments = ("train", "--model", "rnnt", "-o", str(output), "--assets", str(folder.parent))
    assert trainer.main([*arguments, "--steps", "2", "--batch", "1"]) == 0
    model = read_nemo(output)
    assert model.network.config == RECIPE.config
    assert isinstance(model.frontend.normalize, FixedNormalization)
    assert json.loads(capsys.readouterr().out)["utterances"] == 4


def test_shipped_rnnt_is_that_of_the_tool_and_small() -> None:
    file = PRETRAINED / "digits-rnnt.nemo"
    model = read_nemo(file)
    assert "digits-rnnt" in zoo_names()
    assert model.network.config == RECIPE.config
    assert isinstance(model.frontend.normalize, FixedNormalization)
    assert file.stat().st_size < 4_000_000
