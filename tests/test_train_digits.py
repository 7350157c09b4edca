"""The tools that make the shipped model: strings of digits, the network, its training."""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import nn

from onnx_intq.manifest import read_manifest
from onnx_intq.models.nemo import read_nemo
from onnx_intq.models.quartznet import QuartzNet
from onnx_intq.models.zoo import PRETRAINED, zoo_names
from onnx_intq.speech import features_of, greedy, read_audio
from onnx_intq.transform import IntqError

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(Path(__file__).parents[1] / "tools")
    strings = importlib.import_module("digit_strings")
    trainer = importlib.import_module("train_digits")

DRY = strings.Style(gap=(0.05, 0.1), level=(0, 0), noise=(200, 200), peak=(0, 0))
"""Digits at one level; between and around them nothing."""
LENGTHS = [1000 + 100 * digit for digit in range(10)]
SEEDS = st.integers(0, 2**32 - 1)
few = settings(derandomize=True, deadline=None, max_examples=20)


def generator(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def fsdd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two speakers' tones: the digit is the length, held-out recordings are an octave higher."""
    folder: Path = tmp_path_factory.mktemp("assets") / "fsdd"
    folder.mkdir()
    for digit, length in enumerate(LENGTHS):
        for index in (0, 4, 5, 12):
            pitch = 400 if index < 5 else 200
            tone = 0.1 * np.sin(2 * np.pi * pitch * np.arange(length) / strings.RATE)
            for speaker in ("ann", "bob_b"):
                soundfile.write(folder / f"{digit}_{speaker}_{index}.wav", tone, strings.RATE)
    return folder


@pytest.fixture(scope="module")
def voices(fsdd: Path) -> Any:
    return strings.read_voices(fsdd, held_out=False)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Train with one thread, and undo what the command sets for its whole process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1, user_api="blas"):
        yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    torch.set_num_threads(threads)


def pitch(samples: npt.NDArray[np.float32]) -> float:
    spectrum = np.abs(np.fft.rfft(samples, strings.RATE))
    return float(spectrum.argmax())


def heard(samples: npt.NDArray[np.float32]) -> list[str]:
    """The digits by the lengths of what is not silent for 10 ms or more."""
    loud = np.flatnonzero(np.abs(samples) > 1e-6)
    ends = np.flatnonzero(np.diff(loud) > 80)
    first, last = loud[np.append(0, ends + 1)], loud[np.append(ends, len(loud) - 1)]
    spans = last - first + 1
    return [strings.WORDS[int(np.abs(np.array(LENGTHS) - span).argmin())] for span in spans]


def test_training_and_test_set_are_disjoint_halves(fsdd: Path) -> None:
    for held_out, expected in ((True, 400), (False, 200)):
        found = strings.read_voices(fsdd, held_out=held_out)
        assert [voice.speaker for voice in found] == ["ann", "bob_b"]
        takes = [take for voice in found for digit in voice.digits for take in digit]
        assert len(takes) == 2 * 10 * 2
        assert all(abs(pitch(take) - expected) <= 8 for take in takes)  # 1/8 s: bins of 8 Hz


def test_recordings_have_one_level_and_start_and_end_softly(voices: Any) -> None:
    for take in (take for digit in voices[0].digits for take in digit):
        assert np.sqrt(np.mean(take**2)) == pytest.approx(strings.LEVEL, rel=1e-5)
        assert abs(take[-1]) < strings.LEVEL / strings.FADE


def test_incomplete_data_is_refused(fsdd: Path, tmp_path: Path) -> None:
    def refusal(name: str, content: npt.NDArray[np.float64] | None = None) -> str:
        folder = tmp_path / name
        folder.mkdir()
        if content is not None:
            soundfile.write(folder / name, content, strings.RATE)
        with pytest.raises(IntqError) as caught:
            strings.read_voices(folder, held_out=True)
        return str(caught.value)

    assert "change --assets" in refusal("nothing")
    assert "speaker ann lacks a digit" in refusal("3_ann_0.wav", np.ones(1000))
    assert "is silent" in refusal("3_ann_1.wav", np.zeros(1000))
    for name in ("ann.wav", "x_ann_0.wav", "3_ann_x.wav", "10_ann_0.wav"):
        assert "expected a name <digit>_<speaker>_<index>.wav" in refusal(name, np.ones(1000))


@few
@given(SEEDS)
def test_text_is_what_is_heard(voices: Any, seed: int) -> None:
    string = strings.draw(generator(seed), voices[1], DRY)
    assert string.speaker == "bob_b"
    assert heard(string.samples) == string.text.split()
    assert 2 <= len(string.text.split()) <= 7


@pytest.mark.slow
@few
@given(SEEDS, st.floats(0.8, 1.2))
def test_speed_divides_the_length(voices: Any, seed: int, factor: float) -> None:
    fast = strings.Style(speed=(factor, factor))
    plain = len(strings.draw(generator(seed), voices[0], strings.Style()).samples)
    quick = len(strings.draw(generator(seed), voices[0], fast).samples)
    # The factor is rounded to 1/RATE, the length up to a whole sample.
    assert quick == pytest.approx(plain / factor, rel=1 / strings.RATE, abs=1)


@few
@given(SEEDS, st.floats(0, 2), st.floats(-30, 0), st.integers(0, 4000))
def test_peak_and_length_are_as_asked(seed: int, slope: float, peak: float, spare: int) -> None:
    style = strings.Style(slope=(slope, slope), peak=(peak, peak))
    speech = np.sin(np.arange(4000, dtype=np.float32))
    samples = strings.record(generator(seed), speech, style, len(speech) + spare)
    assert len(samples) == len(speech) + spare
    assert np.abs(samples).max() == pytest.approx(10 ** (peak / 20), rel=1e-5)


@few
@given(SEEDS)
def test_noise_is_as_strong_as_asked(seed: int) -> None:
    style = strings.Style(noise=(10, 10), slope=(0, 0))
    speech = np.sin(np.arange(4000, dtype=np.float32))
    samples = strings.record(generator(seed), speech, style, len(speech))
    heard = np.dot(samples, speech) / np.dot(speech, speech) * speech
    ratio = np.mean(heard**2) / np.mean((samples - heard) ** 2)
    # Speech and noise correlate by 1 / sqrt(4000) in standard deviation; noise has 1 / sqrt(10) of
    # the amplitude, and the ratio goes with the square. Six deviations.
    assert ratio == pytest.approx(10, rel=6 * 2 / np.sqrt(10 * 4000))


@few
@given(SEEDS, st.floats(0, 2))
def test_noise_falls_with_frequency_as_asked(seed: int, slope: float) -> None:
    style = strings.Style(noise=(-200, -200), slope=(slope, slope))
    samples = strings.record(generator(seed), np.ones(1, np.float32), style, 8192)
    power = np.abs(np.fft.rfft(samples.astype(np.float64)))[1:-1] ** 2
    frequency = np.log(np.arange(1, len(power) + 1))
    found = -np.polyfit(frequency, np.log(power), 1)[0]
    # Log-power deviates by pi / sqrt(6), log-frequency by nearly 1; six deviations of the slope.
    assert found == pytest.approx(slope, abs=6 * np.pi / np.sqrt(6 * len(power)))


def test_without_a_length_the_edges_are_those_of_the_style() -> None:
    style = strings.Style(edge=(0.2, 0.2), noise=(200, 200))
    samples = strings.record(generator(0), np.ones(100, np.float32), style)
    assert np.flatnonzero(np.abs(samples) > 1e-6).tolist() == list(range(1600, 1700))


def test_held_out_strings_do_not_depend_on_each_other(fsdd: Path) -> None:
    held_out = strings.read_voices(fsdd, held_out=True)
    again = strings.read_voices(fsdd, held_out=True)
    made = [strings.held_out_string(held_out, number, seed=0) for number in range(4)]
    assert [string.speaker for string in made] == ["ann", "bob_b"] * 2
    last = strings.held_out_string(again, 3, seed=0)
    assert last.text == made[3].text
    assert np.array_equal(last.samples, made[3].samples)
    assert len({string.samples.tobytes() for string in made}) == 4
    other = strings.held_out_string(held_out, 3, seed=1)
    assert not np.array_equal(other.samples, made[3].samples)


def test_written_strings_read_back(fsdd: Path, tmp_path: Path) -> None:
    held_out = strings.read_voices(fsdd, held_out=True)
    made = [strings.held_out_string(held_out, number, seed=0) for number in range(3)]
    for folder in ("once", "twice"):
        strings.write_strings(tmp_path / folder, made)
    utterances = read_manifest(tmp_path / "once" / "manifest.json")
    assert [u.text for u in utterances] == [string.text for string in made]
    assert [u.split for u in utterances] == [string.speaker for string in made]
    for utterance, string in zip(utterances, made, strict=True):
        samples = read_audio(utterance.audio, strings.RATE)
        assert np.abs(samples - string.samples).max() <= 2**-16  # half a step of 16 bits
    assert len(list((tmp_path / "once").iterdir())) == 4
    for file in (tmp_path / "once").iterdir():
        assert file.read_bytes() == (tmp_path / "twice" / file.name).read_bytes()


def test_full_scale_is_clipped_not_wrapped(tmp_path: Path) -> None:
    loud = strings.DigitString(speaker="ann", text="one", samples=np.ones(800, np.float32))
    strings.write_strings(tmp_path / "loud", [loud])
    samples = read_audio(tmp_path / "loud" / "000_ann.flac", strings.RATE)
    assert samples.min() == 1 - 2**-15


def test_batches_hold_labels_of_what_was_drawn(voices: Any) -> None:
    batch = next(trainer.batches(generator(0), voices, 2))
    size, mels, _ = batch.features.shape
    assert (size, mels) == (2, trainer.FRONTEND.features)
    assert batch.features.dtype == torch.float32
    letters = [trainer.ENGLISH[label] for label in batch.targets.tolist()]
    for length in batch.lengths.tolist():
        text = "".join(letters[:length])
        letters = letters[length:]
        assert set(text.split()) <= set(strings.WORDS)
    assert not letters


@few
@given(SEEDS)
def test_masks_are_bands_of_mels_and_spans_of_frames(seed: int) -> None:
    features = torch.ones(3, 64, 100)
    trainer.mask(generator(seed), features)
    for string in features:
        mels, frames = (string == 0).all(dim=1), (string == 0).all(dim=0)
        assert torch.equal(string == 0, mels[:, None] | frames[None, :])
        assert int(mels.sum()) <= trainer.MASKS * trainer.MASKED_MELS
        assert int(frames.sum()) <= trainer.MASKS * trainer.MASKED_FRAMES


@pytest.mark.usefixtures("one_thread")
def test_network_is_small_and_quickening_keeps_its_function() -> None:
    torch.manual_seed(0)
    network = QuartzNet(trainer.digits_config()).eval()
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert f"{parameters:,} parameters" in trainer.digits_config.__doc__
    assert parameters <= 300_000
    features = torch.randn(1, 64, 50)
    with torch.no_grad():
        before, names = network(features), list(network.state_dict())
        after = trainer.quicken(network)(features)
    assert list(network.state_dict()) == names
    assert sum(isinstance(module, trainer.Depthwise) for module in network.modules()) == 10
    # Log-probabilities of size 1 to 10, each through some 20 layers of float32 sums.
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)


def test_settling_gives_the_mean_of_the_batches_statistics() -> None:
    norm = nn.BatchNorm1d(2, momentum=0.3)
    network = nn.Sequential(norm, nn.Dropout(0.5)).train()
    features = [torch.randn(4, 2, 50), 3 + 2 * torch.randn(4, 2, 50)]
    none = torch.zeros(0)
    batches = [trainer.Batch(features=each, targets=none, lengths=none) for each in features]
    trainer.settle(network, batches)
    means = torch.stack([each.mean(dim=(0, 2)) for each in features]).mean(dim=0)
    variances = torch.stack([each.var(dim=(0, 2)) for each in features]).mean(dim=0)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    torch.testing.assert_close(norm.running_mean, means, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.running_var, variances, rtol=1e-5, atol=1e-6)
    assert norm.momentum == 0.3


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_training_learns_and_repeats_itself(voices: Any) -> None:
    plan = trainer.Plan(steps=10, batch=1, settling=2)
    states = [trainer.train(voices, plan).state_dict() for _ in range(2)]
    for name, values in states[0].items():
        assert torch.equal(values, states[1][name]), name
    network = QuartzNet(trainer.digits_config())
    batch = next(trainer.batches(generator(5), voices, 8))
    before = loss(network, batch)
    network.load_state_dict(states[0])
    assert loss(network, batch) < before / 2


def loss(network: QuartzNet, batch: Any) -> float:
    """Of the untrained network the loss is that of guessing, some 20 times the trained one's."""
    with torch.no_grad():
        log_probs = network.eval()(batch.features).transpose(0, 1)
    frames = torch.full((len(batch.lengths),), len(log_probs))
    return nn.functional.ctc_loss(log_probs, batch.targets, frames, batch.lengths, blank=28).item()


def test_command_writes_the_test_set(fsdd: Path, tmp_path: Path) -> None:
    arguments = ["test-set", "-o", str(tmp_path / "set"), "--count", "2", "--seed", "3"]
    assert trainer.main([*arguments, "--assets", str(fsdd.parent)]) == 0
    first, second = read_manifest(tmp_path / "set" / "manifest.json")
    assert (first.split, second.split) == ("ann", "bob_b")


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_command_trains_writes_and_scores(
    fsdd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "small.nemo"
    arguments = ["train", "-o", str(output), "--assets", str(fsdd.parent)]
    assert trainer.main([*arguments, "--steps", "2", "--batch", "1"]) == 0
    assert read_nemo(output).network.config == trainer.digits_config()
    printed = capsys.readouterr()
    assert json.loads(printed.out)["utterances"] == trainer.HELD_OUT_STRINGS
    assert printed.err == ""  # fewer steps than one line of progress


@pytest.mark.usefixtures("one_thread")
def test_training_that_takes_too_long_leaves_nothing(
    fsdd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "-o", str(tmp_path / "m.nemo"), "--assets", str(fsdd.parent)]
    assert trainer.main([*arguments, "--minutes", "0", "--batch", "1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: stopped at step 1 of ")
    assert not list(tmp_path.iterdir())


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = str(tmp_path / "nowhere")
    assert trainer.main(["test-set", "-o", str(tmp_path / "set"), "--assets", nowhere]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "change --assets" in line
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("option", ["--steps", "--batch", "--threads"])
def test_numbers_are_above_zero(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        trainer.main(["train", "-o", "m.nemo", option, "0"])
    assert caught.value.code == 2
    assert f"argument {option}: 0; expected at least 1" in capsys.readouterr().err


def test_shipped_model_is_that_of_the_tool_and_small() -> None:
    file = PRETRAINED / "digits.nemo"
    model = read_nemo(file)
    assert "digits" in zoo_names()
    assert model.network.config == trainer.digits_config()
    assert model.frontend == trainer.FRONTEND
    assert file.stat().st_size < 2_000_000


@pytest.mark.usefixtures("one_thread")
def test_shipped_model_understands_the_shipped_speech() -> None:
    model = read_nemo(PRETRAINED / "digits.nemo")
    utterances = read_manifest(PRETRAINED / "digits" / "manifest.json")
    wrong = 0
    for utterance in utterances:
        assert utterance.text is not None
        features = torch.from_numpy(features_of(utterance, model.frontend))
        with torch.no_grad():
            (log_probs,) = model.network(features.unsqueeze(0))
        wrong += greedy(log_probs.numpy(), trainer.ENGLISH) != utterance.text
    assert len(utterances) == 16
    assert len({utterance.split for utterance in utterances}) == 6
    assert wrong <= 1


@pytest.mark.slow
def test_shipped_speech_is_the_beginning_of_the_test_set(assets: Path) -> None:
    voices = strings.read_voices(assets / "fsdd", held_out=True)
    utterances = read_manifest(PRETRAINED / "digits" / "manifest.json")
    for number, utterance in enumerate(utterances):
        string = strings.held_out_string(voices, number, seed=0)
        assert utterance.text == string.text
        samples = read_audio(utterance.audio, strings.RATE)
        assert np.abs(samples - string.samples).max() <= 2**-16


@pytest.mark.slow
def test_no_recording_is_in_both_sets(assets: Path) -> None:
    training, test = (
        [
            take.tobytes()
            for voice in strings.read_voices(assets / "fsdd", held_out=held_out)
            for digit in voice.digits
            for take in digit
        ]
        for held_out in (False, True)
    )
    assert (len(training), len(test)) == (2700, 300)
    assert not set(training) & set(test)
