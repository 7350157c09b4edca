"""Checkpoints of a training: files of tensors and nothing else, which nobody has to unpickle.

Law: what is read is what was written; a file of another training is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from onnx_intq.files import write_atomically
from onnx_intq.transform import IntqError

ABOUT = "about"
"""Under this name lies what the training was asked for: JSON, as bytes."""


def write(path: Path, state: Mapping[str, Tensor], about: Mapping[str, object]) -> None:
    """Write a training's state.

    Args:
        path: File to write.
        state: Tensors by name.
        about: What the training was asked for; JSON.

    Raises:
        IntqError: The file cannot be written.
    """
    text = json.dumps(about, sort_keys=True).encode()
    stored = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    stored[ABOUT] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    write_atomically(path, lambda target: torch.save(stored, target))


def read(path: Path, about: Mapping[str, object]) -> dict[str, Tensor]:
    """Read a training's state.

    Args:
        path: File that `write` has written.
        about: What this training is asked for.

    Raises:
        IntqError: The file is missing, is no checkpoint, or is that of another training; the
            message names the first setting that differs.
    """
    if not path.is_file():
        raise IntqError(f"{path}: no such file; expected a checkpoint of train; check --resume")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = json.loads(bytes(state.pop(ABOUT).tolist()))
    except Exception as error:  # torch raises whatever it meets in a damaged file
        raise IntqError(
            f"{path}: is no checkpoint; expected a file written by train --checkpoint; "
            "check --resume"
        ) from error
    wanted = json.loads(json.dumps(about))
    for key in sorted({*found, *wanted}):
        if found.get(key) != wanted.get(key):
            raise IntqError(
                f"{path}: was written with {key} {found.get(key)}, not {wanted.get(key)}; expected "
                "the same training; give the same options, or leave out --resume"
            )
    return dict(state)
