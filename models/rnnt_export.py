"""Writes an RNN-T as a folder of three ONNX files with what decoding needs in their metadata."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx_intq
from onnx_intq import graph
from onnx_intq.frontend import Frontend
from onnx_intq.models.rnnt import Rnnt
from onnx_intq.models.rnnt_graphs import graphs
from onnx_intq.speech import FRONTEND_KEY, LABELS_KEY, labels_to_json
from onnx_intq.transducer_folder import write_folder


def export_rnnt(
    network: Rnnt,
    folder: str | Path,
    *,
    frontend: Frontend,
    opset: int = 17,
    origin: Mapping[str, str] | None = None,
) -> None:
    """Write the folder, whole or not at all; see `transducer_folder` for its files.

    Args:
        network: Taken as in evaluation mode.
        folder: Where to write; an RNN-T that is there is replaced.
        frontend: What the features are made with, for the encoder's metadata.
        opset: One of `export.OPSETS`.
        origin: More metadata, such as `onnx_intq.source_sha256`.

    Raises:
        IntqError: The folder cannot be written.
    """
    made = graphs(network, opset)
    for part in made.values():
        graph.metadata(part).update({"onnx_intq.version": onnx_intq.__version__, **(origin or {})})
    labels = labels_to_json(network.config.labels)
    graph.metadata(made["encoder"]).update({FRONTEND_KEY: frontend.to_json(), LABELS_KEY: labels})

    def write(target: Path) -> None:
        for name, part in made.items():
            graph.save(part, target / f"{name}.onnx")

    write_folder(folder, write)
