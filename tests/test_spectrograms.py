"""The picture of real, random and synthetic input: what it shows, its bytes, what it refuses."""

import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from matplotlib.figure import Figure

from onnx_intq import spectrograms
from onnx_intq.speech import labels_to_json
from onnx_intq.transform import IntqError

FRAMES = 40
Batch = dict[str, npt.NDArray[np.float32]]


@pytest.fixture
def batch() -> Batch:
    random = np.random.default_rng(1)
    return {"audio_signal": random.standard_normal((2, 4, FRAMES)).astype(np.float32)}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved from here on."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(self: Figure, *args: object, **options: object) -> None:
        figures.append(self)
        save(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def record(model: Path, **changed: str | None) -> None:
    """Change what the model records; None takes an entry out."""
    proto = onnx.load(model)
    entries: dict[str, str | None] = {entry.key: entry.value for entry in proto.metadata_props}
    entries |= {f"onnx_intq.{key}": value for key, value in changed.items()}
    onnx.helper.set_model_props(proto, {k: v for k, v in entries.items() if v is not None})
    onnx.save(proto, model)


def test_three_panels_share_scales_and_tell_their_text(
    tiny: Path, speech: Path, batch: Batch, tmp_path: Path, drawn: list[Figure]
) -> None:
    spectrograms.draw(tmp_path / "p.png", tiny, batch, speech)
    *panels, bar = drawn[0].axes
    assert [ax.get_title(loc="left") for ax in panels] == [
        "real: start of 0.wav",
        "random: uniform in [-3, 3]",
        "synthetic: first sample of the first batch",
    ]
    assert all(
        ax.get_xlabel().startswith("decodes to \N{LEFT DOUBLE QUOTATION MARK}") for ax in panels
    )
    assert {ax.get_ylabel() for ax in panels} == {"mel bin"}
    images = [ax.get_images()[0] for ax in panels]
    real, random, synthetic = (np.asarray(image.get_array()) for image in images)
    np.testing.assert_array_equal(synthetic, batch["audio_signal"][0])
    # Half a second of speech is 50 frames of 10 ms: cut to the synthetic sample's length.
    assert real.shape == random.shape == (4, FRAMES)
    assert 2.5 < np.abs(random).max() <= 3
    assert len({image.get_clim() for image in images}) == 1
    assert {ax.get_xlim() for ax in panels} == {(0, FRAMES * 0.01)}
    assert bar.get_ylabel() == "feature value"


def test_the_same_input_gives_the_same_bytes_without_metadata(
    tiny: Path, speech: Path, batch: Batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import matplotlib as mpl

    spectrograms.draw(tmp_path / "1.png", tiny, batch, speech)
    monkeypatch.setitem(mpl.rcParams, "font.size", 30)
    spectrograms.draw(tmp_path / "2.png", tiny, batch, speech)
    content = (tmp_path / "1.png").read_bytes()
    assert content == (tmp_path / "2.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert b"tEXt" not in content
    assert mpl.rcParams["font.size"] == 30


@pytest.mark.parametrize(("gone", "unit"), [("labels", "seconds"), ("frontend", "frames")])
def test_models_that_do_not_say_how_get_no_text(
    tiny: Path, batch: Batch, tmp_path: Path, drawn: list[Figure], gone: str, unit: str
) -> None:
    record(tiny, **{gone: None})
    spectrograms.draw(tmp_path / "p.png", tiny, batch)
    random, synthetic, _ = drawn[0].axes
    assert random.get_xlabel() == synthetic.get_xlabel() == ""
    assert drawn[0].get_supxlabel() == unit
    assert random.get_xlim()[1] == pytest.approx(FRAMES * (0.01 if unit == "seconds" else 1))


def test_any_text_can_be_shown(
    tiny: Path, batch: Batch, tmp_path: Path, drawn: list[Figure]
) -> None:
    long, strange = "word " * 40, "$\\nonsense$ \N{CJK UNIFIED IDEOGRAPH-4E2D}"
    record(tiny, labels=labels_to_json([long, strange]))
    spectrograms.draw(tmp_path / "p.png", tiny, batch)
    captions = [ax.get_xlabel() for ax in drawn[0].axes[:-1]]
    assert all(len(caption.splitlines()) <= spectrograms.LINES for caption in captions)
    assert any("$" in caption for caption in captions)


def test_bad_input_is_refused_before_a_batch_is_made(
    tiny: Path, speech: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spectrograms.check(tiny, speech)
    record(tiny, frontend=None)
    with pytest.raises(IntqError, match=r"does not record its front end .*; leave out --real"):
        spectrograms.check(tiny, speech)
    with pytest.raises(IntqError, match=r"nowhere\.json: cannot be read"):
        spectrograms.check(tiny, speech.with_name("nowhere.json"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(IntqError, match=r"run: pip install 'onnx_intq\[report\]'"):
        spectrograms.check(tiny)


def test_bad_batches_are_refused_and_nothing_is_written(
    tiny: Path, speech: Path, batch: Batch, tmp_path: Path
) -> None:
    before = sorted(tmp_path.iterdir())
    flat = {"audio_signal": batch["audio_signal"][0]}
    with pytest.raises(IntqError, match=r"batch holds audio_signal \[4, 40\]; .*leave out --plot"):
        spectrograms.draw(tmp_path / "p.png", tiny, flat)
    other = {"audio_signal": np.zeros((1, 5, 9), np.float32)}
    with pytest.raises(IntqError, match=r"0\.wav: has 4 mel bins, the batch 5"):
        spectrograms.draw(tmp_path / "p.png", tiny, other, speech)
    with pytest.raises(IntqError, match=r"p\.png: cannot be written: No such file or directory"):
        spectrograms.draw(tmp_path / "nowhere" / "p.png", tiny, batch)
    assert sorted(tmp_path.iterdir()) == before
