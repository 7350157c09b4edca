"""What an RNN-T's graphs cost for one utterance."""

from __future__ import annotations

from pathlib import Path

from onnx_intq.cost import Cost, cost
from onnx_intq.shapes import infer
from onnx_intq.transducer_folder import load_parts


def folder_cost(folder: str | Path, *, seconds: float = 10.0, batch: int = 1) -> dict[str, Cost]:
    """Count the parts of an RNN-T, by name.

    The encoder for all of the audio; the predictor for one label; the joint for all frames that the
    encoder gives, with one label each. Greedy search runs the predictor once more for each label
    that it writes, and the joint on one frame more.

    Args:
        folder: Float, Q/DQ or integer-only.
        seconds: Length of the audio.
        batch: Utterances in one run.

    Raises:
        IntqError: As for `cost`, or the folder is no RNN-T's.
    """
    graphs = load_parts(folder)
    encoder = cost(graphs["encoder"], seconds=seconds, batch=batch)
    frames = infer(graphs["encoder"], encoder.inputs).get("encoded", ())[1:]
    shapes = {t.name: list(t.shape or ()) for t in graphs["joint"].inputs}
    known = {"encoded": (batch, *frames), "predicted": (batch, 1, *shapes["predicted"][2:])}
    return {
        "encoder": encoder,
        "predictor": cost(graphs["predictor"], batch=batch),
        "joint": cost(graphs["joint"], shapes=known),
    }
