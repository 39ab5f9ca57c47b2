"""Without labels: training for the dense model's outputs, and quality as agreement with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from .harness import NET, Run, recorded


@pytest.fixture
def texts(tmp_path: Path) -> tuple[str, ...]:
    words = ["the", "film", "was", "a", "plot", "very", "good", "fine", "great", "bad", "poor", "dull"]
    lines = [" ".join(words[(number * step) % 12] for step in range(1, 6)) for number in range(60)]
    (tmp_path / "texts.txt").write_text("\n".join(lines))
    return ("--data", "texts.txt", "--task", "imitate", "--eval-fraction", "0.25")


def test_texts_alone_train_and_measure(run: Run, texts: tuple[str, ...]) -> None:
    passes = ("--passes", "swap-activation,moeify,lower", "--set", "swap-activation.steps=3", "--set", "moeify.steps=3")
    found = run("-q", "apply", *passes, "bert", *texts, "--tau", "0.5", "-o", "made", "--output", "json")
    assert found.code == 0, found.err
    done = found.json
    assert list(done["passes"][0]["fit"]["losses"][0][1]) == ["divergence"]
    assert (done["quality"], done["notes"]) == (None, ["The example inputs are two rows of the data."])
    assert [one["name"] for one in done["agreement"]] == ["top-1 agreement", "KL divergence"]
    assert [one["samples"] for one in done["agreement"]] == [15, 15]
    quality = recorded(Path("made"))["quality"]
    assert (quality["before"], quality["after"], quality["scores"]) == (None, None, "")
    assert quality["agreement"] == done["agreement"]
    sweep = ("-q", "sweep", "made", *texts, "--tau", "0.9", "--no-oracle")
    beside = run(*sweep, "--dense", "bert", "--output", "json").json
    assert (beside["task"], beside["dense"]["quality"]) == (None, None)
    for point in beside["points"]:
        assert point["quality"] == point["agreement"][0]
        assert (point["quality"]["name"], point["quality"]["change"]) == ("top-1 agreement", None)
    alone = run(*sweep, "--output", "json").json
    assert alone["points"][0]["quality"]["value"] == 1.0
    assert alone["points"][0]["agreement"][1]["value"] == pytest.approx(0.0, abs=1e-6)
    assert any("Agreement is with this surgery at tau 0" in note for note in alone["notes"])
    tuned = run("-q", "tune", "made", *texts, "--budget", "0.95", "--dense", "bert", "-o", "tuned")
    assert tuned.code == 0, tuned.err
    assert "agreement with the dense model: top-1 agreement " in tuned.out
    assert "within the budget" not in tuned.out


def test_labels_are_measured_too_where_there_are_any(run: Run) -> None:
    data = ("--data", "reviews.csv", "--task", "imitate", "--eval-fraction", "0.25")
    found = run("-q", "apply", "--passes", "moeify", "bert", *data, "--set", "moeify.steps=1", "--output", "json").json
    assert found["quality"]["after"]["name"] == "accuracy"
    assert found["quality"]["after"]["change"]["samples"] == 10
    assert len(found["agreement"]) == 2


def test_later_measurements_are_paired_with_the_recorded_scores(run: Run) -> None:
    data = ("--data", "reviews.csv", "--eval-fraction", "0.25")
    assert run("-q", "apply", "--passes", "moeify,lower", "bert", *data, "--set", "moeify.steps=1").code == 0
    args = ("-q", "sweep", "bert-surgery", *data, "--tau", "0.9", "--no-oracle", "--output", "json")
    points, beside = run(*args).json["points"], run(*args, "--dense", "bert").json["points"]
    assert [point["quality"] for point in points] == [point["quality"] for point in beside]
    assert {point["quality"]["change"]["samples"] for point in points} == {10}
    assert ([point["agreement"] for point in points], len(beside[0]["agreement"])) == ([[], []], 2)
    record = Path("bert-surgery/surgery.json")
    record.write_text(record.read_text().replace('"scores": "', '"scores": "?'))
    damaged = run(*args)
    assert damaged.code == 3
    assert "the recorded scores of the dense model are damaged" in damaged.err


def test_labels_tell_what_the_outputs_of_ones_own_modules_are(run: Run) -> None:
    data = ("--data", "nets:split", "--task", "imitate")
    options = ("--set", "moeify.steps=1", "--set", "sparsify.steps=1")
    found = run("-q", "apply", "--passes", "sparsify,moeify", *NET, *data, *options, "--output", "json").json
    assert [one["name"] for one in found["agreement"]] == ["top-1 agreement", "KL divergence"]
    assert found["quality"]["after"]["name"] == "accuracy"
