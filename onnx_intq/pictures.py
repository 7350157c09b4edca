"""matplotlib figures, written as PNG.

Law: the same figure gives the same bytes, whatever the user's settings.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnx_intq.graph import first_line, write_atomically
from onnx_intq.transform import IntqError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def require_matplotlib() -> None:
    """Refuse to go on without matplotlib, rather now than after long work.

    Raises:
        IntqError: It cannot be imported.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise IntqError(
            f"cannot import matplotlib ({first_line(error)}); drawing needs it; "
            "run: pip install 'onnx_intq[report]'"
        ) from error


def write_png(path: Path, draw: Callable[[], Figure]) -> None:
    """Write the figure that `draw` makes, whole or not at all.

    Raises:
        IntqError: It cannot be written.
    """
    import matplotlib as mpl

    with mpl.rc_context(), warnings.catch_warnings():
        mpl.rcdefaults()  # the user's settings must not change the bytes
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")
        figure = draw()
        # matplotlib would write its version into the file.
        metadata: dict[str, Any] = {"Software": None}
        write_atomically(
            path, lambda target: figure.savefig(target, format="png", dpi=120, metadata=metadata)
        )
