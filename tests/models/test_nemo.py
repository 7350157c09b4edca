"""`.nemo` files: the real one loads strictly, hostile and broken ones are refused in one line."""

import gzip
import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from onnx_intq.frontend import Frontend
from onnx_intq.models.jasper_block import BlockConfig
from onnx_intq.models.nemo import (
    CONFIG,
    WEIGHTS,
    load_weights,
    read_nemo,
    read_weights,
    write_nemo,
)
from onnx_intq.models.nemo_config import nemo_from_network
from onnx_intq.models.quartznet import QuartzNet, QuartzNetConfig, quartznet_config
from onnx_intq.transform import IntqError

NETWORK = QuartzNetConfig(
    blocks=(BlockConfig(filters=3, kernel=3, stride=2, separable=True),),
    labels=("a", "b"),
    features=2,
)
FRONTEND = Frontend(features=2)


class Trap:
    """Writes a file when unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.target,)


def saved(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def config() -> bytes:
    return yaml.safe_dump(nemo_from_network(NETWORK, FRONTEND)).encode()


def archive(path: Path, members: dict[str, bytes], *extra: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w") as tar:
        for member in extra:
            tar.addfile(member)
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(IntqError) as caught:
        read_nemo(path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(path))
    return str(caught.value)


@pytest.mark.slow
def test_reads_the_real_model_strictly(assets: Path) -> None:
    model = read_nemo(assets / "quartznet15x5.nemo")
    assert model.network.config == quartznet_config(3)
    assert model.frontend == Frontend(n_fft=512)
    assert not model.network.training
    norms = [m for m in model.network.modules() if isinstance(m, torch.nn.BatchNorm1d)]
    assert len(norms) == 93
    assert {norm.eps for norm in norms} == {1e-3}


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["tar", "gzip"])
def test_reads_back_what_it_writes(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    network, path = QuartzNet(NETWORK), tmp_path / "m.nemo"
    write_nemo(path, network, FRONTEND)
    path.write_bytes(pack(path.read_bytes()))
    found = read_nemo(path)
    assert (found.frontend, found.network.config) == (FRONTEND, NETWORK)
    for name, tensor in network.state_dict().items():
        assert torch.equal(found.network.state_dict()[name], tensor), name


def test_writes_the_same_bytes_again(tmp_path: Path) -> None:
    network = QuartzNet(NETWORK)
    for name in ("a.nemo", "b.nemo"):
        write_nemo(tmp_path / name, network, FRONTEND)
    assert (tmp_path / "a.nemo").read_bytes() == (tmp_path / "b.nemo").read_bytes()


@pytest.mark.parametrize("name", ["/etc/passwd", "../evil", "a/../../evil", CONFIG + "/.."])
def test_refuses_paths_that_lead_out(tmp_path: Path, name: str) -> None:
    assert "unsafe" in refusal(archive(tmp_path / "m.nemo", {name: b""}))
    assert sorted(tmp_path.iterdir()) == [tmp_path / "m.nemo"]


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE]
)
def test_refuses_members_that_are_no_plain_files(tmp_path: Path, kind: bytes) -> None:
    member = tarfile.TarInfo(WEIGHTS)
    member.type, member.linkname = kind, "/etc/passwd"
    assert "unsafe" in refusal(archive(tmp_path / "m.nemo", {CONFIG: config()}, member))


def test_folders_and_other_files_do_no_harm(tmp_path: Path) -> None:
    folder = tarfile.TarInfo("./")
    folder.type = tarfile.DIRTYPE
    members = {"./vocab.txt": b"x", f"./{CONFIG}": config()}
    members[WEIGHTS] = saved(QuartzNet(NETWORK).state_dict())
    assert read_nemo(archive(tmp_path / "m.nemo", members, folder)).frontend == FRONTEND


def test_code_in_the_weights_is_not_run(tmp_path: Path) -> None:
    for content in (saved({"x": Trap(tmp_path / "ran")}), pickle.dumps(Trap(tmp_path / "ran"))):
        path = archive(tmp_path / "m.nemo", {CONFIG: config(), WEIGHTS: content})
        assert "could run code" in refusal(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"!!python/object/apply:os.getcwd []", "not readable as YAML"),
        (b"a: [", "not readable as YAML"),
        (b"\xff\xfe\xfd", "not readable as YAML"),
        (b"[" * 100_000, "not readable as YAML"),
        (b"- a", "holds list; expected a mapping"),
        (b"a: 1", "no section 'encoder'"),
    ],
)
def test_refuses_bad_configurations(tmp_path: Path, text: bytes, reason: str) -> None:
    assert reason in refusal(archive(tmp_path / "m.nemo", {CONFIG: text, WEIGHTS: b""}))


@pytest.mark.parametrize("content", [b"", b"no tar" * 200, gzip.compress(b"no tar")[:-9]])
def test_refuses_what_is_no_archive(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.nemo"
    path.write_bytes(content)
    assert "not a tar archive" in refusal(path)


def test_refuses_a_damaged_archive(tmp_path: Path) -> None:
    path = tmp_path / "m.nemo"
    write_nemo(path, QuartzNet(NETWORK), FRONTEND)
    packed = bytearray(gzip.compress(path.read_bytes()))
    packed[len(packed) // 2] ^= 255
    path.write_bytes(packed)
    refusal(path)


def test_refuses_missing_parts(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "absent.nemo")
    path = archive(tmp_path / "m.nemo", {CONFIG: config()})
    assert f"holds no {WEIGHTS}" in refusal(path)
    assert f"holds no {CONFIG}" in refusal(archive(path, {WEIGHTS: b""}))


def test_says_which_weights_do_not_fit() -> None:
    network = QuartzNet(NETWORK)
    weights = dict(network.state_dict())
    before = {name: tensor.clone() for name, tensor in weights.items()}
    weights["decoder.other"] = weights.pop("decoder.decoder_layers.0.bias")
    weights["encoder.encoder.0.mconv.2.weight"] = torch.ones(4)
    weights["encoder.encoder.0.mconv.2.bias"] = torch.full((3,), torch.nan)
    with pytest.raises(IntqError) as caught:
        load_weights(network, weights)
    assert str(caught.value) == (
        "weights do not fit the network: 1 missing (decoder.decoder_layers.0.bias); "
        "1 unexpected (decoder.other); 1 of another shape (encoder.encoder.0.mconv.2.weight [4] "
        "instead of [3]); 1 not finite (encoder.encoder.0.mconv.2.bias)"
    )
    assert all(torch.equal(network.state_dict()[name], before[name]) for name in before)


def test_long_lists_of_weights_are_shortened() -> None:
    with pytest.raises(IntqError, match=r"8 missing \(.*conv.weight.* and 5 more\)$"):
        load_weights(QuartzNet(NETWORK), {})


def test_front_end_buffers_and_counters_are_optional() -> None:
    network = QuartzNet(NETWORK)
    given = {n: t + 1 for n, t in network.state_dict().items() if "num_batches" not in n}
    load_weights(network, given | {"preprocessor.featurizer.fb": torch.ones(1)})
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in given.items())


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (saved([torch.ones(1)]), "not tensors by name"),
        (saved({"state_dict": {}}), "not tensors by name"),
        (b"not torch", "not a PyTorch file"),
        (b"", "not a PyTorch file"),
    ],
)
def test_refuses_files_that_are_no_state_dict(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "w.pt"
    path.write_bytes(content)
    with pytest.raises(IntqError, match=rf"w\.pt: .*{reason}"):
        read_weights(path)


def test_refuses_weights_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(IntqError, match="cannot be read"):
        read_weights(tmp_path / "absent.pt")
