"""Another model as the teacher: `surgeon apply --teacher`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from .harness import DATA, NET, Run, recorded

pytestmark = pytest.mark.usefixtures("traced_once")

TRAIN = ("--passes", "swap-activation,moeify", "--set", "swap-activation.steps=4", "--set", "moeify.steps=1")
DISTILL = (*TRAIN, "--set", "swap-activation.distill=0.5")


@pytest.fixture
def wide(run: Run, tmp_path: Path) -> Any:
    """Writes a wider BERT for the same texts and returns its name."""

    def write(name: str = "wide", **options: Any) -> str:
        torch.manual_seed(1)
        config = BertConfig(
            num_hidden_layers=3, num_attention_heads=4, hidden_size=32, intermediate_size=64, vocab_size=40,
            max_position_embeddings=32, **{"num_labels": 2} | options,
        )  # fmt: skip
        BertForSequenceClassification(config).save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(tmp_path / "bert").save_pretrained(tmp_path / name)
        return name

    return write


def test_passes_learn_from_a_larger_bert_which_is_recorded(run: Run, wide: Any) -> None:
    data = ("bert", "--data", "reviews.csv")
    found = run("-q", "--output", "json", "apply", *DISTILL, *data, "--teacher", wide(), "-o", "out")
    assert found.code == 0, found.err
    own = run("-q", "--output", "json", "apply", *DISTILL, *data, "-o", "own")
    divergence = [one.json["passes"][0]["fit"]["losses"][0][1]["divergence"] for one in (found, own)]
    assert divergence[0] != divergence[1]
    teacher = recorded(Path("out"))["recipe"]["teacher"]
    assert (Path(teacher["path"]).name, teacher["kind"]) == ("wide", "hf")
    assert len(teacher["sha256"]) == 64
    assert recorded(Path("own"))["recipe"]["teacher"] is None
    again = run("apply", "--recipe", "out", *data, "-o", "again")
    assert again.code == 0, again.err
    assert "note: The recipe's passes learned from a teacher (" in again.err
    assert "Without --teacher they learn from the model itself." in " ".join(again.err.split())
    assert run("-q", "apply", "--passes", "lower", "out", "-o", "lowered").code == 0
    assert recorded(Path("lowered"))["recipe"]["teacher"] == teacher
    exported = run("-q", "export", "out", "-o", "exported")
    assert exported.code == 0, exported.err
    assert "Distilled from `wide`, not from the model itself." in Path("exported/README.md").read_text()


def test_texts_without_labels_are_for_the_teacher_to_answer(run: Run, wide: Any) -> None:
    data = ("bert", "--data", "reviews.csv", "--task", "imitate", "--eval-fraction", "0.25")
    found = run("-q", "--output", "json", "apply", *TRAIN, *data, "--teacher", wide(), "-o", "out")
    assert found.code == 0, found.err
    assert list(found.json["passes"][0]["fit"]["losses"][0][1]) == ["divergence"]
    alone = run("-q", "--output", "json", "apply", *TRAIN, *data, "-o", "alone")
    first = [one.json["passes"][0]["fit"]["losses"][0][1]["divergence"] for one in (found, alone)]
    assert first[0] != first[1]


def test_a_dry_run_checks_the_teacher_too(run: Run, wide: Any) -> None:
    assert run("-q", "apply", *DISTILL, "bert", "--dry-run", "--teacher", wide()).code == 0
    wrong = run("-q", "apply", *DISTILL, "bert", "--dry-run", "--teacher", wide("three", num_labels=3))
    assert wrong.code == 2
    assert "The teacher answers [2, 3] on the example inputs, and the model [2, 2]." in wrong.err


def test_teachers_that_do_not_fit_are_refused(run: Run, wide: Any) -> None:
    data = ("bert", "--data", "reviews.csv")
    wide("other")
    file = Path("other/tokenizer.json")
    file.write_text(file.read_text().replace('"great"', '"grand"'))
    for args, words in (
        (
            (*DISTILL, "bert", "--teacher", wide()),
            "--teacher is there to be learned from in training. Give --data too.",
        ),
        ((*TRAIN, *data, "--teacher", "wide"), "No pass learns from a teacher. swap-activation, sparsify and recover"),
        ((*DISTILL, *data, "--teacher", "other"), "The tokenizer of the teacher other has other tokens than that of b"),
        ((*DISTILL, *data, "--teacher", wide("three", num_labels=3)), "The teacher answers [2, 3] on the example inpu"),
        ((*DISTILL, *data, "--teacher", "nowhere"), "nowhere"),
    ):
        result = run("-q", "apply", *args, "-o", "out")
        assert (result.code, result.out) == (3 if "nowhere" in args else 2, "")
        assert words in " ".join(result.err.split()), result.err
        assert not Path("out").exists()


def test_only_a_run_with_the_same_teacher_is_resumed(run: Run, tmp_path: Path) -> None:
    args = ("apply", "--passes", "sparsify", *NET, *DATA, "--set", "sparsify.steps=9", "--set", "sparsify.distill=0.5")
    (tmp_path / "interrupt").write_text("2")
    assert run(*args, "--teacher", "nets:relu").code == 130
    (tmp_path / "interrupt").unlink()
    other = run("-q", *args, "--resume")
    assert other.code == 2
    assert 'Its teacher: ["nets:relu", ' in other.err
    resumed = run("-q", *args, "--teacher", "nets:relu", "--resume")
    assert resumed.code == 0, resumed.err
