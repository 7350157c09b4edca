"""BPE vocabularies: the pieces of a SentencePiece model trained here, and the text they give."""

import io
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from onnx_intq.frontend import Frontend
from onnx_intq.models.conformer import Conformer, ConformerConfig
from onnx_intq.models.conformer_block import ConformerBlockConfig
from onnx_intq.models.export import export_named
from onnx_intq.models.nemo import CONFIG, WEIGHTS, read_nemo
from onnx_intq.models.nemo_config import nemo_from_network
from onnx_intq.models.tokenizer import pieces
from onnx_intq.runtime import Session
from onnx_intq.speech import LABELS_KEY, greedy, labels_from_json
from onnx_intq.transform import IntqError

SENTENCES = [f"the {noun} is {verb} the house" for noun in ("cat", "dog") for verb in ("in", "by")]


@pytest.fixture(scope="module")
def tokenizer() -> bytes:
    """A BPE model of 24 pieces."""
    sentencepiece = pytest.importorskip("sentencepiece")
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=written,
        vocab_size=24,
        model_type="bpe",
        bos_id=-1,
        eos_id=-1,
        minloglevel=2,
    )
    return written.getvalue()


def nemo_file(path: Path, tokenizer: bytes, labels: tuple[str, ...], *, listed: bool) -> Conformer:
    """A file as NeMo saves one: with the pieces listed, or with the tokenizer alone."""
    block = ConformerBlockConfig(width=8, heads=2, kernel=3, expansion=1)
    config = ConformerConfig(block=block, layers=1, labels=labels, features=4, longest=20)
    network = Conformer(config)
    settings = nemo_from_network(config, Frontend(features=4))
    settings["tokenizer"] = {"type": "bpe", "model_path": "nemo:0f_tokenizer.model"}
    if not listed:
        del settings["labels"]
        decoder = settings["decoder"]
        assert isinstance(decoder, dict)
        decoder |= {"vocabulary": [], "num_classes": -1}
    weights = io.BytesIO()
    torch.save(network.state_dict(), weights)
    members = {
        CONFIG: yaml.safe_dump(settings).encode(),
        WEIGHTS: weights.getvalue(),
        "0f_tokenizer.model": tokenizer,
        "0f_vocab.txt": b"##x",
    }
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return network


def test_pieces_decode_to_the_text_they_encode(tokenizer: bytes) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer)
    labels = pieces(tokenizer)
    assert len(labels) == 24
    for sentence in [*SENTENCES, "tot"]:
        numbers = processor.encode(sentence)
        frames = [n for number in numbers for n in (24, number, number)]
        assert greedy(np.eye(25)[frames], labels).strip() == sentence


@pytest.mark.parametrize("listed", [True, False])
def test_labels_are_the_pieces(tmp_path: Path, tokenizer: bytes, listed: bool) -> None:
    path, labels = tmp_path / "m.nemo", pieces(tokenizer)
    network = nemo_file(path, tokenizer, labels, listed=listed)
    found = read_nemo(path).network
    assert found.config.labels == labels
    state = network.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in found.state_dict().items())
    export_named(str(path), tmp_path / "m.onnx")
    assert labels_from_json(Session(tmp_path / "m.onnx", threads=1).metadata[LABELS_KEY]) == labels


def test_listed_pieces_need_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    nemo_file(tmp_path / "m.nemo", b"", ("▁a", "b"), listed=True)
    assert read_nemo(tmp_path / "m.nemo").network.config.labels == ("▁a", "b")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    nemo_file(tmp_path / "m.nemo", b"", ("▁a", "b"), listed=False)
    with pytest.raises(IntqError, match=r"m.nemo: .*; run: pip install 'onnx_intq\[bpe\]'$"):
        read_nemo(tmp_path / "m.nemo")


@pytest.mark.parametrize("content", [b"", b"no model", b"\x0a\xff"])
def test_refuses_what_is_no_tokenizer(content: bytes) -> None:
    pytest.importorskip("sentencepiece")
    with pytest.raises(IntqError, match="tokenizer is no SentencePiece model") as caught:
        pieces(content)
    assert "\n" not in str(caught.value)
