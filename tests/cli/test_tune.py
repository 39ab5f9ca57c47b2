"""`surgeon tune`: a tau for each layer within a budget, stored in the surgery."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import surgeon
from surgeon.surgery.artifact import load, load_diff, load_with_inputs
from tests.worked_time import DENSE, milliseconds, replace_clock

from .harness import NET, Run, left, recorded

pytestmark = pytest.mark.usefixtures("traced_once")

REVIEWS = ("--data", "reviews.csv", "--eval-fraction", "0.25")
OTHER = (
    "The data, or how it is read (--seed, --limit, --eval-fraction, ...), differs from what the surgery was made with"
)


@pytest.fixture(scope="module")
def trained(shelf: Path) -> Path:
    """A surgery whose routers know something, and whose record holds its quality."""
    import contextlib

    from .harness import run_surgeon

    with contextlib.chdir(shelf):
        result = run_surgeon(
            "apply", "--passes", "swap-activation,moeify,lower", "bert", *REVIEWS, "-o", "trained", "--set",
            "moeify.experts=8", "--set", "moeify.router=neurons", "--set", "moeify.epochs=0",
        )  # fmt: skip
    assert result.code == 0, result.err
    return shelf / "trained"


def test_the_result_is_stored_where_it_is_wanted(run: Run, trained: Path, tmp_path: Path) -> None:
    result = run("tune", str(trained), *REVIEWS, "--budget", "0.85", "--samples", "16", "-o", "tuned")
    assert result.code == 0, result.err
    assert left(tmp_path) == {"tuned"}
    lines = [line.split() for line in result.out.splitlines()]
    assert lines[0] == ["layer", "tau", "ran"]
    assert [line[0] for line in lines[1:3]] == list(surgeon.get_tau(load(trained)))
    assert "accuracy: " in result.out
    assert result.out.rstrip().endswith("Saved to tuned.\nNext, to time it:\n  surgeon bench surgery tuned")
    assert "tuning  " in result.err
    taus = surgeon.get_tau(load("tuned"))
    assert [f"{tau:.3g}" for tau in taus.values()] == [line[1] for line in lines[1:3]]
    assert set(surgeon.get_tau(load(trained)).values()) == {0.0}


def test_layers_for_which_skipping_does_not_pay_become_dense(run: Run, trained: Path) -> None:
    budget = ("--budget", "1", "--densify", "--samples", "16")
    result = run("tune", str(trained), *REVIEWS, *budget, "-o", "tuned")
    assert result.code == 0, result.err
    layers = list(surgeon.get_tau(load(trained)))
    assert [line.split()[:2] for line in result.out.splitlines()[1:3]] == [[path, "dense"] for path in layers]
    assert result.out.rstrip().endswith("Saved to tuned.")  # there is nothing left to time
    found = load("tuned")
    assert not surgeon.get_tau(found)
    assert len(surgeon.find_ffns(found)[0]) == len(layers)
    last = load_diff(Path("tuned")).passes[-1].report
    assert (last.name, last.matched, last.options["only"]) == ("densify", layers, layers)
    assert last.after is not None
    assert last.after.multiply_adds == load_diff(trained).passes[0].report.before.multiply_adds  # type: ignore[union-attr]
    result = run("tune", str(trained), *REVIEWS, *budget, "--metric", "ms", "--dense", "bert")
    assert result.code == 2
    assert "--densify counts multiply-adds. Give --metric flops." in result.err


def test_without_a_place_it_replaces_the_surgery(run: Run, trained: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(trained, tmp_path / "mine")
    found = run("-q", "tune", "mine", *REVIEWS, "--budget", "0.85", "--output", "json").json
    assert set(found) == {
        "model", "directory", "budget", "metric", "tuned", "quality", "notes", "agreement", "agreed_with"
    }  # fmt: skip
    assert [one["change"]["samples"] for one in found["quality"]] == [10, 10]  # from the recorded dense model
    assert found["directory"] == "mine"
    tuned = found["tuned"]
    assert tuned["cost"] <= 0.85
    assert tuned["damage"] <= tuned["uniform_damage"]
    assert [one["items"] for one in found["quality"]] == [10, 10]
    assert surgeon.get_tau(load("mine")) == pytest.approx(tuned["taus"])
    before, after = recorded(trained), recorded(Path("mine"))
    assert after["tau"] == pytest.approx(tuned["taus"])
    assert [one["name"] for one in after["passes"]] == [one["name"] for one in before["passes"]]
    assert after["quality"]["before"] == before["quality"]["before"]
    assert (after["input"], after["recipe"]["passes"]) == (before["input"], before["recipe"]["passes"])
    assert [one.report for one in load_diff(Path("mine")).passes] == [one.report for one in load_diff(trained).passes]


def test_the_record_knows_the_dense_quality_on_the_same_data_only(run: Run, trained: Path) -> None:
    args = ("-q", "sweep", str(trained), "--tau", "0.5", "--no-oracle", "--output", "json")
    known = run(*args, *REVIEWS).json["dense"]["quality"]
    assert known == recorded(trained)["quality"]["before"]
    assert run(*args, "--data", "reviews.csv").json["dense"]["quality"] is None


def test_quality_that_is_not_measured_is_said(run: Run, trained: Path) -> None:
    args = ("-q", "tune", str(trained), "--data", "reviews.csv", "--budget", "0.9", "--eval-fraction", "0")
    shown = run(*args, "-o", "tuned").out
    assert "note: Quality was not measured: no data was held out for it." in shown
    found = run(*args, "-o", "again", "--output", "json").json
    assert found["quality"] is None
    assert [note.partition(":")[0] for note in found["notes"]] == [OTHER, "Quality was not measured"]
    # What the record had was measured at another tau.
    assert recorded(trained)["quality"]["after"]["items"] == 10
    assert recorded(Path("tuned"))["quality"] == recorded(trained)["quality"] | {"after": None, "agreement": []}


def test_what_the_labels_tell_is_enough(run: Run, shelf: Path) -> None:
    made = run("-q", "apply", "--passes", "moeify,lower", *NET, "--set", "moeify.experts=4", "-o", "net")
    assert made.code == 0
    data = ("--data", "nets:split")
    assert [one["task"] for one in (run("-q", "sweep", "net", *data, "--output", "json").json,)] == ["classification"]
    found = run("-q", "tune", "net", *data, "--budget", "0.95", "--output", "json").json
    assert (found["notes"], [one["name"] for one in found["quality"]]) == ([], ["accuracy"] * 2)


def test_the_mean_of_what_is_skipped_can_be_added(run: Run, trained: Path) -> None:
    args = ("-q", "tune", str(trained), *REVIEWS, "--budget", "0.8", "--samples", "24", "--output", "json")
    plain, added = run(*args, "-o", "plain").json, run(*args, "-o", "added", "--compensate").json
    assert plain["tuned"]["taus"] == added["tuned"]["taus"]
    graphs = load("plain"), load("added")
    assert recorded(Path("plain"))["compensated"] == []
    skipping = [path for path, share in added["tuned"]["shares"].items() if share < 1.0]
    assert recorded(Path("added"))["compensated"] == skipping != []
    inputs = load_with_inputs("added")[1][1]
    assert not torch.allclose(graphs[0](**inputs).logits, graphs[1](**inputs).logits, atol=1e-6)
    surgeon.set_tau(graphs[0], 0.0)
    surgeon.set_tau(graphs[1], 0.0)
    assert torch.allclose(graphs[0](**inputs).logits, graphs[1](**inputs).logits, atol=1e-6)


def test_what_tuning_drops_and_what_it_cannot_add_is_said(run: Run, trained: Path) -> None:
    added = run("-q", "set", str(trained), "--tau", "0.3", "--compensate", *REVIEWS, "-o", "added")
    assert added.code == 0, added.err
    count = len(recorded(Path("added"))["compensated"])
    assert count
    args = ("-q", "tune", "added", *REVIEWS, "--output", "json")
    (dropped,) = run(*args, "--budget", "0.8", "-o", "dropped").json["notes"]
    assert dropped.startswith(f"Compensation was dropped in {count} of 2 layers, which skip other experts now.")
    assert recorded(Path("dropped"))["compensated"] == []
    nothing, fits = run(*args, "--budget", "1.5", "--compensate", "-o", "every").json["notes"]
    assert nothing == "--compensate added nothing: no expert is skipped, or the skipped ones output zero on this data."
    assert re.fullmatch(r"A budget of 150% allows everything\. At tau 0 the model costs 1\d\d\.\d% .*", fits)


def test_what_was_held_out_is_held_out_again(run: Run, trained: Path) -> None:
    made = run(
        "-q", "apply", "--passes", "moeify", "bert", *REVIEWS, "--seed", "3", "-o", "third", "--set",
        "moeify.experts=4", "--set", "moeify.epochs=0",
    )  # fmt: skip
    assert made.code == 0, made.err
    sweep = ("-q", "sweep", "third", *REVIEWS, "--tau", "0.5", "--no-oracle", "--output", "json")
    same, other = run(*sweep).json, run(*sweep, "--seed", "0").json
    assert (same["notes"], same["dense"]["quality"]) == ([], recorded(Path("third"))["quality"]["before"])
    assert [note.partition(":")[0] for note in other["notes"]] == [OTHER]
    shown = run(*sweep[:-2], "--limit", "30")
    assert f"note: {OTHER}: the surgery may have been trained on what is held out now." in " ".join(shown.out.split())
    tuned = run("-q", "tune", "third", *REVIEWS, "--budget", "1.5", "--seed", "4", "-o", "tuned", "--output", "json")
    assert OTHER in tuned.json["notes"][0]
    # The surgeries that go on from it, with data or without, know it too.
    assert run("-q", "set", "third", "--tau", "0.5", "-o", "set").code == 0
    again = run("-q", "apply", "--passes", "lower", "set", *REVIEWS, "-o", "again")
    assert again.code == 0, again.err
    assert again.out.rstrip().endswith("surgeon sweep again --data reviews.csv --eval-fraction 0.25")
    recipes = [recorded(Path(name))["recipe"] for name in ("third", "set", "again")]
    assert [one["seed"] for one in recipes] == [3, 3, 3]
    assert len({one["fingerprint"] for one in recipes}) == 1


def test_milliseconds_are_shares_of_the_dense_models(run: Run, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_clock(monkeypatch)
    args = ("--budget", "0.8", "--metric", "ms", "-o", "tuned", "--output", "json")
    found = run("-q", "tune", str(trained), *REVIEWS, *args, "--dense", "bert").json
    tuned = found["tuned"]
    assert (found["metric"], found["notes"]) == ("ms", [])
    assert 0.7 < tuned["cost"] <= 0.8
    assert tuned["cost"] == pytest.approx(milliseconds(tuned["shares"]) / DENSE, rel=1e-6)


def test_what_cannot_be_done_exits_with_2_and_stores_nothing(run: Run, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for args, words in (
        ((str(trained), "--budget", "0.01"), "A budget of 1% cannot be met. With the least that can run"),
        ((str(trained), "--budget", "0"), "The budget is 0.0, but must be a positive share"),
        ((str(trained), "--budget", "40"), "The budget is 40, but must be a share of the dense model's cost: 0.4"),
        (
            ("nowhere", "--budget", "0.5", "--metric", "ms"),
            "--metric ms compares with the time of the dense model.",
        ),
        ((str(trained), "--budget", "0.5", "-o", "full"), "full is not empty and not a saved surgery"),
        (("bert", "--budget", "0.5"), "The model has no layers that skip, so tau changes nothing."),
    ):
        result = run("-q", "tune", *args, *REVIEWS, *(() if "-o" in args else ("-o", "out")))
        assert (result.code, result.out) == (2, ""), words
        assert words in result.err
    assert left(tmp_path) == {"full"}
    assert set(surgeon.get_tau(load(trained)).values()) == {0.0}
