"""RNN-Ts as folders: by the library and by the command line."""

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch

from onnx_intq.frontend import FixedNormalization, Frontend
from onnx_intq.models.export import export_named
from onnx_intq.models.nemo import write_nemo
from onnx_intq.models.rnnt import Rnnt, RnntConfig
from onnx_intq.models.rnnt_export import export_rnnt
from onnx_intq.speech import FRONTEND_KEY, LABELS_KEY
from onnx_intq.transducer_folder import PARTS
from onnx_intq.transform import IntqError

Command = Callable[..., tuple[int, str, str]]
FIXED = FixedNormalization(fixed_mean=(0.5,) * 4, fixed_std=(2.0,) * 4)
FRONTEND = Frontend(sample_rate=8000, features=4, normalize=FIXED)
CONFIG = RnntConfig(labels=("a", "b"), features=4, factor=2, width=4, predictor=3, joint=3)


@pytest.fixture
def nemo(tmp_path: Path) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        write_nemo(tmp_path / "m.nemo", Rnnt(CONFIG), FRONTEND)
    return tmp_path / "m.nemo"


def recorded(path: Path) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def test_the_encoder_records_front_end_and_labels(tmp_path: Path) -> None:
    export_rnnt(Rnnt(CONFIG), tmp_path / "r", frontend=FRONTEND, origin={"onnx_intq.seed": "3"})
    found = {name: recorded(tmp_path / "r" / f"{name}.onnx") for name in PARTS}
    assert Frontend.from_json(found["encoder"][FRONTEND_KEY]) == FRONTEND
    assert found["encoder"][LABELS_KEY] == '["a", "b"]'
    for name in PARTS:
        assert found[name]["onnx_intq.seed"] == "3"
        assert "onnx_intq.version" in found[name]
    assert not found["joint"].keys() & {FRONTEND_KEY, LABELS_KEY}


def test_same_file_gives_same_bytes_and_its_fingerprint(nemo: Path, tmp_path: Path) -> None:
    for folder in ("once", "twice"):
        export_named(str(nemo), tmp_path / folder)
    for name in PARTS:
        first, second = (tmp_path / folder / f"{name}.onnx" for folder in ("once", "twice"))
        assert first.read_bytes() == second.read_bytes()
        assert len(recorded(first)["onnx_intq.source_sha256"]) == 64


def test_weights_and_opset_are_taken(nemo: Path, tmp_path: Path) -> None:
    export_named(str(nemo), tmp_path / "before", opset=20)
    weights = {name: torch.ones_like(t) for name, t in Rnnt(CONFIG).state_dict().items()}
    torch.save(weights, tmp_path / "w.pt")
    export_named(str(nemo), tmp_path / "after", weights=tmp_path / "w.pt", opset=20)
    before, after = (onnx.load(tmp_path / each / "joint.onnx") for each in ("before", "after"))
    assert before.opset_import[0].version == 20
    constants = {i.name: onnx.numpy_helper.to_array(i) for i in after.graph.initializer}
    assert (constants["joint.enc.weight"] == 1).all()


def test_the_command_writes_and_replaces_a_folder(nemo: Path, command: Command) -> None:
    folder = nemo.parent / "r"
    for _ in range(2):
        assert command("export", nemo, "-o", folder) == (0, "", f"wrote {folder}\n")
        assert sorted(p.name for p in folder.iterdir()) == [f"{n}.onnx" for n in sorted(PARTS)]
    assert sorted(p.name for p in nemo.parent.iterdir()) == ["m.nemo", "r"]


def test_other_outputs_are_refused(nemo: Path, tmp_path: Path, command: Command) -> None:
    def refusal(*arguments: object) -> str:
        code, out, err = command("export", *arguments)
        assert (code, out) == (2, "")
        assert err.count("\n") == 1
        return err

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").touch()
    (tmp_path / "file").touch()
    assert "full: holds note.txt; expected a new folder" in refusal(nemo, "-o", tmp_path / "full")
    assert "file: is a file; expected the name of a f" in refusal(nemo, "-o", tmp_path / "file")
    assert "r.onnx: an RNN-T is three ONNX files" in refusal(nemo, "-o", tmp_path / "r.onnx")
    assert "leave out --lengths" in refusal(nemo, "-o", tmp_path / "r", "--lengths")
    assert "its folder does not exist" in refusal(nemo, "-o", tmp_path / "no" / "r")
    assert "is a folder; expected the name of a file" in refusal("digits", "-o", tmp_path / "full")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "full", "m.nemo"]


def test_lost_weights_are_named(nemo: Path, tmp_path: Path) -> None:
    weights = Rnnt(CONFIG).state_dict()
    del weights["joint.enc.bias"]
    torch.save(weights, tmp_path / "w.pt")
    with pytest.raises(IntqError, match=r"1 missing \(joint\.enc\.bias\)"):
        export_named(str(nemo), tmp_path / "r", weights=tmp_path / "w.pt")
    assert not (tmp_path / "r").exists()
