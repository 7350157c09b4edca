"""A picture of real, random and synthetic input, with the text each decodes to.

Q-ASR, figure 3: synthetic spectrograms show the local patterns of real ones, random ones none.
Law: the same model and data give the same bytes.
"""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from onnx_intq.archive import Batch
from onnx_intq.frontend import Floats, Frontend
from onnx_intq.graph import first_line, write_atomically
from onnx_intq.manifest import read_manifest
from onnx_intq.recognizer import Recognizer
from onnx_intq.speech import FRONTEND_KEY, LABELS_KEY, features_of
from onnx_intq.transform import IntqError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

SPREAD = 3.0
"""Half-width of the uniform distribution of the random input (Q-ASR section 4.1)."""
COLOURS = (1, 99)
"""Percentiles of all values shown at which the colour scale ends."""
INCHES = (9.0, 2.4)
"""Width of the picture, and height of a panel."""
LINES, COLUMNS = 2, 100
"""Most lines and characters per line of a decoded text."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One spectrogram.

    Attributes:
        title: What it shows.
        values: float32 [mels, frames].
        text: What it decodes to, None where the model does not say how.
    """

    title: str
    values: Floats
    text: str | None


def draw(path: str | Path, model: str | Path, batch: Batch, real: str | Path | None = None) -> None:
    """Write the picture as PNG, whole or not at all.

    Panels, on one scale of time and one of colour: the first utterance of `real`, cut to the length
    of the synthetic sample; values drawn from U[-3, 3], seed 0; the first sample of `batch`. Below
    each stands its greedy transcript, where the model records its front end and labels.

    Args:
        path: Where to write.
        model: The ONNX file the batch was made for.
        batch: Feeds that hold features, float32 [batch, mels, frames].
        real: Speech: a manifest or a folder of audio.

    Raises:
        IntqError: As for `check`; the batch holds no such features; they are not of the real
            ones' form; the picture cannot be written.
    """
    scene = _Scene(model, real)
    synthetic = _features(batch)
    random = np.random.default_rng(0).uniform(-SPREAD, SPREAD, synthetic.shape)
    panels = [
        *scene.real(synthetic),
        scene.panel(f"random: uniform in [-{SPREAD:g}, {SPREAD:g}]", random.astype(np.float32)),
        scene.panel("synthetic: first sample of the first batch", synthetic),
    ]
    _write(Path(path), panels, scene.seconds)


def check(model: str | Path, real: str | Path | None = None) -> None:
    """Refuse what `draw` would refuse, before a batch is made at great expense.

    Raises:
        IntqError: matplotlib, or what decoding needs, is missing; `real` cannot be read, or the
            model does not record the front end it needs.
    """
    _Scene(model, real)


class _Scene:
    """What there is to draw before the batch is known.

    Attributes:
        seconds: Per frame; None where the model does not record its front end.
    """

    seconds: float | None

    def __init__(self, model: str | Path, real: str | Path | None) -> None:
        _require_matplotlib()
        metadata = _metadata(model)
        recorded = metadata.get(FRONTEND_KEY)
        frontend = Frontend.from_json(recorded) if recorded else None
        self.seconds = frontend.window_stride if frontend else None
        self._recognizer = Recognizer(model) if frontend and LABELS_KEY in metadata else None
        self._real: Floats | None = None
        if real is not None:
            utterance = read_manifest(real)[0]
            self._name = utterance.audio.name
            if frontend is None:
                raise IntqError(
                    f"{model}: does not record its front end (metadata key {FRONTEND_KEY}); "
                    "expected a model made by onnx-intq export; leave out --real"
                )
            self._real = features_of(utterance, frontend)

    def real(self, synthetic: Floats) -> list[Panel]:
        """The panel of real speech, if there is any."""
        if self._real is None:
            return []
        if len(self._real) != len(synthetic):
            raise IntqError(
                f"{self._name}: has {len(self._real)} mel bins, the batch {len(synthetic)}; "
                "expected the same number; leave out --real"
            )
        return [self.panel(f"real: start of {self._name}", self._real[:, : synthetic.shape[1]])]

    def panel(self, title: str, values: Floats) -> Panel:
        """A panel with its transcript."""
        text = self._recognizer.transcribe([values])[0] if self._recognizer else None
        return Panel(title=title, values=values, text=text)


def _metadata(model: str | Path) -> Mapping[str, str]:
    proto = onnx.load(str(model), load_external_data=False)
    return {entry.key: entry.value for entry in proto.metadata_props}


def _features(batch: Batch) -> Floats:
    """The first sample of the features among the feeds."""
    found = [v for v in batch.values() if v.dtype.kind == "f" and v.ndim == 3]
    if not found:
        shapes = ", ".join(f"{name} {list(values.shape)}" for name, values in batch.items())
        raise IntqError(
            f"batch holds {shapes}; expected features, float32 [batch, mels, frames], to draw; "
            "leave out --plot"
        )
    sample: Floats = found[0][0]
    return sample


def _require_matplotlib() -> None:
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise IntqError(
            f"cannot import matplotlib ({first_line(error)}); drawing needs it; "
            "run: pip install 'onnx_intq[report]'"
        ) from error


def _write(path: Path, panels: Sequence[Panel], seconds: float | None) -> None:
    import matplotlib as mpl

    with mpl.rc_context(), warnings.catch_warnings():
        mpl.rcdefaults()  # the user's settings must not change the bytes
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")
        figure = _figure(panels, seconds)
        # matplotlib would write its version into the file.
        metadata: dict[str, Any] = {"Software": None}
        write_atomically(
            path, lambda target: figure.savefig(target, format="png", dpi=120, metadata=metadata)
        )


def _figure(panels: Sequence[Panel], seconds: float | None) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(INCHES[0], INCHES[1] * len(panels)), layout="constrained")
    axes = list(figure.subplots(len(panels), 1, sharex=True))
    everything = np.concatenate([panel.values.ravel() for panel in panels])
    low, high = np.percentile(everything, COLOURS)
    images = []
    for panel, ax in zip(panels, axes, strict=True):
        images.append(_image(ax, panel.values, seconds or 1, (float(low), float(high))))
        _label(ax, panel)
    longest = max(panel.values.shape[1] for panel in panels)
    axes[0].set_xlim(0, longest * (seconds or 1))
    figure.supxlabel("seconds" if seconds else "frames", fontsize=10)
    figure.colorbar(images[0], ax=axes, label="feature value", extend="both", aspect=40)
    return figure


def _image(ax: Axes, values: Floats, step: float, limits: tuple[float, float]) -> AxesImage:
    mels, frames = values.shape
    return ax.imshow(
        values,
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        extent=(0, frames * step, 0, mels),
        vmin=limits[0],
        vmax=limits[1],
    )


def _label(ax: Axes, panel: Panel) -> None:
    # Names and texts may hold a dollar sign, which starts no formula.
    ax.set_title(panel.title, fontsize=10, loc="left", parse_math=False)
    ax.set_ylabel("mel bin")
    ax.tick_params(labelbottom=True)
    if panel.text is not None:
        quoted = f"decodes to \N{LEFT DOUBLE QUOTATION MARK}{panel.text.strip()}"
        quoted += "\N{RIGHT DOUBLE QUOTATION MARK}"
        lines = textwrap.wrap(quoted, COLUMNS, max_lines=LINES, placeholder=" ...")
        ax.set_xlabel("\n".join(lines), style="italic", parse_math=False)
