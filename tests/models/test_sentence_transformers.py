"""A directory of sentence-transformers is converted, exported, and read by sentence-transformers again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

import surgeon
from surgeon.errors import LoadError
from surgeon.models.sentence_transformers import copy_sentence_files
from tests.cli.harness import run_surgeon

TEXTS = ["the cat", "cat cat the", "the the"]


@pytest.fixture
def directory(bert: Path, tmp_path: Path) -> Path:
    transformer = Transformer(str(bert))
    SentenceTransformer(modules=[transformer, Pooling(32)], device="cpu").save(str(tmp_path / "sentences"))
    return tmp_path / "sentences"


def test_similarities_stay(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_surgeon("apply", "sentences", "--passes", "moeify,lower", "-o", "surgery").code == 0
    assert run_surgeon("export", "surgery", "-o", "out").code == 0
    dense = SentenceTransformer("sentences", device="cpu")
    ours = SentenceTransformer("out", device="cpu")
    assert len(surgeon.get_tau(ours)) == 2
    wanted, found = (model.similarity(*[model.encode(TEXTS)] * 2) for model in (dense, ours))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    ours.save("again")
    assert len(surgeon.get_tau(SentenceTransformer("again", device="cpu"))) == 2


@pytest.mark.parametrize("modules", ["{}", '[{"path": "../1_Pooling"}]', "[3]"])
def test_a_damaged_list_is_refused(directory: Path, tmp_path: Path, modules: str) -> None:
    (directory / "modules.json").write_text(modules)
    with pytest.raises(LoadError, match=r"modules\.json is damaged"):
        copy_sentence_files(directory, tmp_path / "copy")


def test_other_directories_have_none(bert: Path, tmp_path: Path) -> None:
    copy_sentence_files(bert, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
