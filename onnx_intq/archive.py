"""Batches in `.npz` files, under keys `<batch, 4 digits>/<input name>`, e.g. `0000/audio_signal`.

Laws: the batches read are the batches written; the same batches give the same bytes. One batch at
a time is in memory.
"""

from __future__ import annotations

import itertools
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from onnx_intq.graph import first_line, write_atomically
from onnx_intq.transform import IntqError

Batch = Mapping[str, npt.NDArray[Any]]
"""Input name -> array: what one run of a model takes."""
KEY = re.compile(r"(\d{4,})/(.+)\.npy")
NUMBERS = "biuf"
"""NumPy's dtype kinds that a model's input may have."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One batch in a file: its number as written, and the names of its arrays, sorted."""

    file: Path
    number: str
    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.file}: batch {self.number}"


def entries(path: Path) -> list[Entry]:
    """List the batches of a file, in order, without reading them.

    Raises:
        IntqError: It is no `.npz` file, holds nothing, has a key of another form, or two batches
            have different sets of inputs.
    """
    batches: dict[str, list[str]] = {}
    with _open(path) as archive:
        for member in archive.namelist():
            if not (match := KEY.fullmatch(member)):
                raise IntqError(
                    f"{path}: key {member.removesuffix('.npy')!r}; expected <batch>/<input name>, "
                    "for example 0000/audio_signal; write it again"
                )
            batches.setdefault(match[1], []).append(match[2])
    if not batches:
        raise IntqError(f"{path}: holds no batches; expected keys like 0000/audio_signal")
    numbers = sorted(batches, key=lambda number: (int(number), number))
    found = [Entry(file=path, number=n, names=tuple(sorted(batches[n]))) for n in numbers]
    check_same_inputs(found)
    return found


def check_same_inputs(found: Iterable[Entry]) -> None:
    """Refuse batches whose inputs are not those of the first.

    Raises:
        IntqError: Naming the batch.
    """
    first, *rest = found
    for entry in rest:
        if entry.names != first.names:
            raise IntqError(
                f"{entry} holds {', '.join(entry.names)}; expected {', '.join(first.names)} as in "
                f"{first}; complete it"
            )


def batches(found: Iterable[Entry]) -> Iterator[dict[str, npt.NDArray[Any]]]:
    """Read batches one after the other; a file stays open while its batches follow each other.

    Raises:
        IntqError: An array is damaged, pickled, empty, not numeric, or holds NaN or infinity.
    """
    for file, group in itertools.groupby(found, lambda entry: entry.file):
        with _open(file) as archive:
            for entry in group:
                batch = {name: _read(archive, entry, name) for name in entry.names}
                check_values(batch, str(entry))
                yield batch


def write(path: str | Path, batches: Iterable[Batch]) -> int:
    """Write batches as they come, whole or not at all, and return how many there were.

    Raises:
        IntqError: There are none, their inputs differ, an array is empty, not numeric or holds NaN
            or infinity, or the file cannot be written.
    """
    written: list[Entry] = []

    def write_all(target: Path) -> None:
        with zipfile.ZipFile(target, "w") as archive:
            for number, batch in enumerate(batches):
                entry = Entry(file=Path(path), number=f"{number:04d}", names=tuple(sorted(batch)))
                check_same_inputs([*written[:1], entry])
                check_values(batch, str(entry))
                for name in entry.names:
                    _write(archive, f"{entry.number}/{name}.npy", batch[name])
                written.append(entry)
        if not written:
            raise IntqError(f"{path}: no batches to write; expected at least one")

    write_atomically(path, write_all)
    return len(written)


def check_values(batch: Batch, place: str) -> None:
    """Refuse a batch without inputs, and arrays that are empty, not numeric or not finite.

    Raises:
        IntqError: Naming the input, after `place`.
    """
    if not batch:
        raise IntqError(f"{place}: holds no inputs; expected one array per input of the model")
    for name, values in batch.items():
        if values.dtype.kind not in NUMBERS:
            raise IntqError(f"{place}: input {name!r} is {values.dtype}; expected numbers")
        if not values.size:
            raise IntqError(
                f"{place}: input {name!r} is empty, {list(values.shape)}; leave the batch out"
            )
        if not np.isfinite(values).all():
            raise IntqError(
                f"{place}: input {name!r} holds NaN or infinity; expected finite values"
            )


def _open(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise IntqError(f"{path}: not an .npz file ({error}); write it again") from error
    except OSError as error:
        raise IntqError(f"{path}: cannot be read ({error.strerror}); check the path") from error


def _read(archive: zipfile.ZipFile, entry: Entry, name: str) -> npt.NDArray[Any]:
    try:
        with archive.open(f"{entry.number}/{name}.npy") as member:
            return _array(member)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise IntqError(
            f"{entry}: input {name!r} cannot be read ({first_line(error)}); expected an array "
            "without pickled objects; write it again"
        ) from error


def _array(member: IO[bytes]) -> npt.NDArray[Any]:
    found: npt.NDArray[Any] = np.lib.format.read_array(member, allow_pickle=False)
    return found


def _write(archive: zipfile.ZipFile, member: str, values: npt.NDArray[Any]) -> None:
    # ZipInfo's default date is a constant, where ZipFile.writestr would put the clock's.
    with archive.open(zipfile.ZipInfo(member), "w", force_zip64=True) as file:
        np.lib.format.write_array(file, np.asarray(values, order="C"), allow_pickle=False)
