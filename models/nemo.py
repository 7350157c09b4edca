"""Reads and writes NeMo's `.nemo` files, of CTC models and RNN-Ts, running nothing inside them.

A `.nemo` file is a tar archive, gzipped or not, that holds `model_config.yaml`,
`model_weights.ckpt` and, with a BPE vocabulary, a tokenizer. Members are read in memory, never
extracted, and the weights are loaded without unpickling anything but tensors.
"""

from __future__ import annotations

import io
import lzma
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
import yaml
from torch import Tensor, nn

from onnx_intq.frontend import Frontend
from onnx_intq.graph import first_line, write_atomically
from onnx_intq.models.conformer import Conformer, ConformerConfig
from onnx_intq.models.nemo_config import (
    CtcConfig,
    NetworkConfig,
    frontend_from_nemo,
    lists_labels,
    nemo_from_network,
    network_from_nemo,
)
from onnx_intq.models.quartznet import QuartzNet
from onnx_intq.models.rnnt import Rnnt, RnntConfig
from onnx_intq.models.tokenizer import pieces
from onnx_intq.transform import IntqError

CONFIG = "model_config.yaml"
WEIGHTS = "model_weights.ckpt"
TOKENIZER = ".model"
"""How the name of a SentencePiece model ends."""
MODULES = ("encoder.", "decoder.", "joint.")
"""Prefixes of the parameters that make up the network; the front end's buffers are derived."""
SHOWN = 3
"""Names an error lists of each kind of mismatch before it only counts."""


CtcNetwork = QuartzNet | Conformer
Network = CtcNetwork | Rnnt


@dataclass(frozen=True, kw_only=True)
class NemoModel:
    """A network in evaluation mode, and the front end its features come from."""

    network: Network
    frontend: Frontend


def read_nemo(path: str | Path) -> NemoModel:
    """Build the model a `.nemo` file describes and load its weights.

    Raises:
        IntqError: The file is missing, unsafe, incomplete or of another network; the message names
            it and what does not fit.
    """
    members = _read_members(Path(path))
    try:
        config = _parse_config(members[CONFIG])
        network, frontend = build(_network(config, members)), frontend_from_nemo(config)
        load_weights(network, _parse_weights(members[WEIGHTS]))
    except IntqError as error:
        raise IntqError(f"{path}: {error}") from error
    return NemoModel(network=network.eval(), frontend=frontend)


def build(config: NetworkConfig) -> Network:
    """The network of a configuration, with initial weights."""
    return Rnnt(config) if isinstance(config, RnntConfig) else build_ctc(config)


def build_ctc(config: CtcConfig) -> CtcNetwork:
    """The network of a CTC model's configuration, with initial weights."""
    return Conformer(config) if isinstance(config, ConformerConfig) else QuartzNet(config)


def write_nemo(path: str | Path, network: Network, frontend: Frontend) -> None:
    """Write a `.nemo` file that `read_nemo` reads; same model, same bytes.

    NeMo reads it with `strict=False`: it makes the front end's window and filters itself. Labels
    are written as a list, also those that came from a tokenizer, which is left out.

    Raises:
        IntqError: The file cannot be written.
    """
    weights = io.BytesIO()
    torch.save(dict(network.state_dict()), weights)
    config = yaml.safe_dump(nemo_from_network(network.config, frontend), sort_keys=False)
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, content in ((CONFIG, config.encode()), (WEIGHTS, weights.getvalue())):
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    write_atomically(path, lambda target: target.write_bytes(archive.getvalue()))


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a PyTorch state dict, tensors only.

    Raises:
        IntqError: The file is missing, or holds something other than tensors by name.
    """
    try:
        return _parse_weights(Path(path).read_bytes())
    except OSError as error:
        raise IntqError(f"{path}: cannot be read ({error.strerror}); expected weights") from error
    except IntqError as error:
        raise IntqError(f"{path}: {error}") from error


def load_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy `weights` into `network`; every parameter must be there, finite, and fit.

    Names outside `MODULES` (the front end's filters, the loss) are left out, and BatchNorm's
    counter of batches may be absent, as in files of older versions.

    Raises:
        IntqError: Listing what is missing, unexpected, of another shape or not finite.
    """
    given = {name: tensor for name, tensor in weights.items() if name.startswith(MODULES)}
    wanted = network.state_dict()
    missing = [n for n in wanted if n not in given and not n.endswith(".num_batches_tracked")]
    unexpected = [name for name in given if name not in wanted]
    common = [name for name in wanted if name in given]
    shapes = [
        f"{name} {list(given[name].shape)} instead of {list(wanted[name].shape)}"
        for name in common
        if given[name].shape != wanted[name].shape
    ]
    infinite = [name for name in common if not given[name].isfinite().all()]
    kinds = {"missing": missing, "unexpected": unexpected}
    kinds |= {"of another shape": shapes, "not finite": infinite}
    if found := [_shorten(kind, names) for kind, names in kinds.items() if names]:
        raise IntqError(f"weights do not fit the network: {'; '.join(found)}")
    network.load_state_dict({**wanted, **given})


def _shorten(kind: str, names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} {kind} ({', '.join(names[:SHOWN])}{more})"


def _read_members(path: Path) -> dict[str, bytes]:
    if not path.is_file():
        raise IntqError(f"{path}: no such file; expected a .nemo file; check the path")
    try:
        with tarfile.open(path) as tar:
            members = dict(_wanted_members(tar))
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise IntqError(
            f"{path}: not a tar archive ({first_line(error)}); expected a .nemo file"
        ) from error
    except IntqError as error:
        raise IntqError(f"{path}: {error}") from error
    for name in (CONFIG, WEIGHTS):
        if name not in members:
            raise IntqError(f"{path}: holds no {name}; expected a .nemo file; save it with NeMo")
    return members


def _network(config: Mapping[str, object], members: Mapping[str, bytes]) -> NetworkConfig:
    """The network's configuration; its labels from the tokenizer only if they are not listed."""
    tokenizer = next((members[name] for name in members if name.endswith(TOKENIZER)), None)
    if tokenizer is None or lists_labels(config):
        return network_from_nemo(config)
    return network_from_nemo(config, pieces(tokenizer))


def _wanted_members(tar: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
    for member in tar:
        name = PurePosixPath(member.name)
        if name.is_absolute() or ".." in name.parts or not (member.isfile() or member.isdir()):
            raise IntqError(
                f"archive member {member.name!r} is unsafe; expected plain files inside the "
                "archive; do not use this file"
            )
        content = tar.extractfile(member)
        wanted = str(name) in (CONFIG, WEIGHTS) or name.suffix == TOKENIZER
        if content is not None and wanted:
            yield str(name), content.read()


def _parse_config(content: bytes) -> Mapping[str, object]:
    try:
        config = yaml.safe_load(content)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise IntqError(f"{CONFIG}: not readable as YAML ({first_line(error)})") from error
    if not isinstance(config, dict):
        raise IntqError(f"{CONFIG}: holds {type(config).__name__}; expected a mapping")
    return config


def _parse_weights(content: bytes) -> dict[str, Tensor]:
    try:
        weights = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # of any kind, as the file may hold anything
        raise IntqError(
            f"weights are not a PyTorch file of tensors only ({first_line(error)}); "
            "expected a state dict; nothing else is loaded, because it could run code"
        ) from error
    named = isinstance(weights, dict) and all(isinstance(t, Tensor) for t in weights.values())
    if not named:
        raise IntqError("weights are not tensors by name; expected a PyTorch state dict")
    return dict(weights)
