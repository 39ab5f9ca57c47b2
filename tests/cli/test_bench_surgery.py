"""`surgeon bench surgery`: a saved surgery end to end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import surgeon

from .harness import Run

pytestmark = pytest.mark.usefixtures("small_machine")


def test_a_saved_surgery_is_timed_end_to_end(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*args: object, **options: object) -> object:
        def fails(*inputs: object, **named: object) -> None:
            raise RuntimeError("no C++ compiler was found")

        return fails

    monkeypatch.setattr(torch, "compile", no_compiler)  # it takes longer than everything else here
    before = surgeon.get_tau(surgeon.load("bert-moe"))
    args = (
        "--seconds",
        "0.0001",
        "--dense",
        "bert",
        "--tau",
        "0,0.9",
        "--batch",
        "5",
        "--length",
        "3",
        "-o",
        "times.png",
    )
    result = run("bench", "surgery", "bert-moe", *args, "--output", "json")
    assert result.code == 0, result.err
    found = result.json
    assert set(found) == {"model", "batch", "length", "machine", "times", "notes"}
    assert (found["batch"], found["length"]) == (5, 3)
    times = found["times"]
    assert times["dense"] > 0
    assert times["compiled"] is None
    assert times["why"] == {
        f"The {model} was not compiled": "no C++ compiler was found" for model in ("dense model", "rewritten model")
    }
    assert [setting["tau"] for setting in times["settings"]] == [None, 0.0, 0.9]
    stored, every, few = times["settings"]
    assert every["executed"] == 1.0 > few["executed"]
    for setting in (stored, every, few):
        assert setting["torch"] > 0
        assert setting["compiled"] is None
        assert setting["gain"] == times["dense"] / setting["ours"]
    assert "was not compiled: no C++ compiler was found" in found["notes"][0]
    assert surgeon.get_tau(surgeon.load("bert-moe")) == before


def test_experts_that_are_still_masked_are_skipped_all_the_same(run: Run) -> None:
    result = run("-q", "bench", "surgery", "masked", "--seconds", "0.0001", "--batch", "3")
    assert result.code == 0, result.err
    assert "as stored" in result.out
    assert "3 samples" in result.out
    assert "The dense model was not timed. To compare with it, give it with --dense." in result.out
    assert "gain" in result.out


def test_a_model_without_experts_is_refused(run: Run) -> None:
    result = run("-q", "bench", "surgery", "bert", "--seconds", "0.0001")
    assert result.code == 2
    assert (
        "The model has no layers that skip, so there is nothing to compare. Apply moeify, sparsify-inputs or "
        in result.err
    )


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "Missing argument 'DIR'. See surgeon bench surgery --help."),
        (("masked", "--tokens", "3"), "No such option: --tokens"),
        (("masked", "--tau", "2"), "--tau 2: give numbers from 0 to 1, separated by commas."),
        (("masked", "--batch", "0"), "--batch and --length must be at least 1."),
        (("masked", "--length", "0"), "--batch and --length must be at least 1."),
        (("bert-moe", "--length", "100000"), "The model cannot be called with this number of samples or tokens ("),
        (("masked", "--device", "tpu"), "--device tpu: give cpu or cuda."),
        (("masked", "-o", "times.csv"), "Cannot write times.csv: give a name that ends in .json (numbers)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_work_is_refused(run: Run, args: tuple[str, ...], words: str) -> None:
    result = run("bench", "surgery", *args)
    assert (result.code, result.out) == (2, "")
    assert words in result.err
