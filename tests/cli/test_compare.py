"""`surgeon compare`: several surgeries and their dense model in one table."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from surgeon.progress import Progress
from surgeon.render.screen import Screen
from surgeon.surgery.record import RECORD

from .harness import NET, Run, answer_in, recorded, run_surgeon

pytestmark = pytest.mark.usefixtures("traced_once")

REVIEWS = ("--data", "reviews.csv", "--eval-fraction", "0.25")
QUICK = ("--set", "moeify.router=neurons", "--set", "moeify.epochs=0")


@pytest.fixture(scope="module")
def made(shelf: Path) -> Path:
    """Surgeries whose records have the dense model's scores: `four` and `eight`, of one dense model."""
    with contextlib.chdir(shelf):
        for name, experts in (("four", 4), ("eight", 8)):
            result = run_surgeon(
                "apply", "--passes", "moeify,lower", "bert", *REVIEWS, "-o", name, *QUICK, "--set",
                f"moeify.experts={experts}",
            )  # fmt: skip
            assert result.code == 0, result.err
    return shelf


@pytest.fixture
def both(run: Run, made: Path, tmp_path: Path) -> tuple[str, str]:
    for name in ("four", "eight"):
        (tmp_path / name).symlink_to(made / name)
    return "four", "eight"


def rewritten(name: str, change: Callable[[Any], None]) -> None:
    """A copy of `eight` with another record."""
    shutil.copytree(Path("eight").resolve(), name)
    record = recorded(Path(name))
    change(record)
    (Path(name) / RECORD).write_text(json.dumps(record))


def test_surgeries_stand_in_one_table(run: Run, both: tuple[str, str], tmp_path: Path) -> None:
    files = [part for name in ("a.json", "a.csv", "a.md", "a.png", "a.svg") for part in ("-o", name)]
    result = run("compare", "four", "big=eight", *REVIEWS, "--tau", "0.5,0.9", *files, "--output", "json")
    assert result.code == 0, result.err
    found = result.json
    assert found["surgeries"] == {"four": "four", "big": "eight"}
    assert (found["found"]["task"], found["found"]["keep"], found["notes"]) == ("sequence-classification", 0.99, [])
    dense = recorded(Path("four"))["quality"]["before"]
    assert found["found"]["dense"]["quality"] == dense
    assert found["found"]["wanted"] == pytest.approx(0.99 * dense["value"])
    assert [curve["surgery"] for curve in found["found"]["curves"]] == ["four", "big"]
    for curve, name in zip(found["found"]["curves"], ("four", "eight"), strict=True):
        swept = run("-q", "sweep", name, *REVIEWS, "--tau", "0.5,0.9", "--no-oracle", "--output", "json").json
        assert curve["points"] == swept["points"]
    assert answer_in((tmp_path / "a.json").read_text()) == found
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "a.svg").read_text()
    assert "| surgery | converted layers at 99% |" in (tmp_path / "a.md").read_text()
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 1 + 1 + 2 * 3
    for words in ("loading four ...", "loading eight ...", "sweep four  ", "sweep big  ", "Written to a.csv."):
        assert words in result.err


def test_the_dense_model_can_be_given(run: Run, both: tuple[str, str]) -> None:
    args = ("-q", "compare", *both, "--data", "reviews.csv", "--eval-fraction", "0.5", "--tau", "0.9")
    unknown = run(*args)
    assert unknown.code == 2
    assert "not recorded in four, eight. Give the model with --dense." in unknown.err
    known = run(*args, "--dense", "bert", "--time", "--output", "json").json
    assert known["found"]["dense"]["quality"]["samples"] == 20
    assert known["found"]["dense"]["milliseconds"] > 0
    assert all(point["milliseconds"] > 0 for curve in known["found"]["curves"] for point in curve["points"])
    assert [note.partition(":")[0] for note in known["notes"]] == ["four, eight"]  # made with other data


def test_without_labels_agreement_is_kept(run: Run, both: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("the film was good\na dull plot\nvery poor\nthe plot was great\n")
    args = ("-q", "compare", *both, "--data", "texts.txt", "--task", "imitate", "--eval-fraction", "0", "--tau", "0.9")
    found = run(*args, "--dense", "bert", "--output", "json").json["found"]
    assert (found["task"], found["wanted"], found["dense"]["quality"]) == (None, 0.99, None)
    assert found["curves"][0]["points"][0]["quality"]["name"] == "top-1 agreement"
    refused = run(*args)
    assert refused.code == 2
    assert "Without labels, quality is agreement with the dense model. Give the model with --dense." in refused.err


def test_all_read_the_data_with_one_seed(run: Run, both: tuple[str, str]) -> None:
    rewritten("third", lambda record: record["recipe"].update(seed=3))
    args = (*REVIEWS, "--tau", "0.9", "--dense", "bert", "--output", "json")
    first, second = (run("-q", "compare", *names, *args).json for names in (("third", "four"), ("four", "third")))
    (note,) = first["notes"]
    assert note.startswith("third, four: The data, or how it is read (--seed,")
    assert second["notes"] == []
    assert second["found"]["curves"][0]["points"] != first["found"]["curves"][1]["points"]  # of other samples


def test_a_stored_tau_of_each_layer_is_measured(run: Run, both: tuple[str, str]) -> None:
    assert run("set", "four", "--tau", "*.0.*:0.9,*:0.2", "-o", "mixed").code == 0
    result = run("-q", "compare", "mixed", "eight", *REVIEWS, "--tau", "0.9", "-o", "a.png")
    assert result.code == 0, result.err
    assert "as stored" in result.out


def test_an_interrupted_comparison_shows_what_it_has(
    run: Run, both: tuple[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shown = Screen.progress

    def interrupt(self: Screen, moment: Progress) -> None:
        shown(self, moment)
        if moment.what == "sweep eight":
            raise KeyboardInterrupt

    monkeypatch.setattr(Screen, "progress", interrupt)
    result = run("compare", *both, *REVIEWS, "--tau", "0.9", "-o", "a.json")
    assert result.code == 130
    assert "interrupted; eight not measured" in result.err
    found = answer_in((tmp_path / "a.json").read_text())["found"]
    assert ([curve["surgery"] for curve in found["curves"]], found["unmeasured"]) == (["four"], ["eight"])
    assert "four" in result.out
    nothing = run("compare", "eight", *REVIEWS, "--tau", "0.9", "-o", "b.json")
    assert (nothing.code, nothing.out) == (130, "")
    assert not (tmp_path / "b.json").exists()


def test_what_cannot_be_compared_is_refused(run: Run, both: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "four").symlink_to(tmp_path / "eight")
    torch.manual_seed(0)
    shutil.copytree(Path("bert").resolve(), tmp_path / "bert3")
    config = transformers.BertConfig.from_pretrained("bert", num_labels=3)
    transformers.BertForSequenceClassification(config).save_pretrained("bert3")
    assert run("-q", "apply", "--passes", "moeify", "bert3", "-o", "three", "--set", "moeify.experts=4").code == 0
    rewritten("words", lambda record: record["trace"].update(task="masked-lm"))
    rewritten("stranger", lambda record: record["input"].update(sha256="0" * 64))
    for surgeries, words in (
        (("four", "./four"), "four is given twice."),
        (("four", "x=runs/../four"), "runs/../four is given twice, also as four."),
        (("four", "runs/four"), "four and runs/four are both called four. Name one: four-2=runs/four, for example."),
        (("four", "=eight"), "'=eight' names nothing."),
        (("four", "bert"), "bert has no layers that skip, so tau changes nothing. Apply moeify, sparsify-inputs"),
        (("four", "words"), "four was made for sequence-classification, words for masked-lm."),
        (("four", "three"), "The outputs of four and three differ: 2 and 3 classes or values."),
        (("four", "masked"), "masked: "),
        (("four", "stranger"), "four and stranger were made from different dense models."),
    ):
        result = run("-q", "compare", *surgeries, *REVIEWS, "--tau", "0.9")
        assert (result.code, result.out) == (2, ""), (surgeries, result.err)
        assert words in result.err
    assert run("-q", "compare", "four", "nowhere", *REVIEWS).code == 3
    for options, words in (
        (("--keep", "1.5"), "must be above 0 and at most 1"),
        (("-o", "a.txt"), "ends in .json (numbers), .csv (a line for each setting), .md (tables), "),
        (("--rule", "best"), "No selection rule 'best'."),
    ):
        result = run("-q", "compare", *both, *REVIEWS, *options)
        assert (result.code, result.out) == (2, "")
        assert words in result.err


def test_models_of_unknown_task_are_compared_by_labels(run: Run, tmp_path: Path) -> None:
    for experts in ("4", "8"):
        args = ("--passes", "moeify,lower", *NET, "--set", f"moeify.experts={experts}", "-o", f"net{experts}")
        assert run("-q", "apply", *args).code == 0
    result = run("-q", "compare", "net4", "net8", "--data", "nets:split", "--tau", "0.5", "--dense", "nets:gelu",
                 "--output", "json")  # fmt: skip
    assert result.code == 0, result.err
    assert result.json["found"]["task"] == "classification"
