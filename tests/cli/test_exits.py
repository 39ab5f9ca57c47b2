"""Commands on a surgery with early exits."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest

import surgeon
from surgeon.exits.site import find_exits
from surgeon.passes import SiteRefused

from .harness import Run, run_surgeon

PLACE = "bert.encoder.layer.exits.0"


@pytest.fixture(scope="module")
def made(shelf: Path) -> str:
    with contextlib.chdir(shelf):
        result = run_surgeon(
            "apply", "--passes", "early-exit,lower", "--data", "reviews.csv", "bert", "-o", "leaving",
            "--set", "early-exit.steps=2",
        )  # fmt: skip
        assert result.code == 0, result.err
        assert "exit with 2 classes from its token 0" in result.out
        assert "surgeon sweep leaving --data reviews.csv" in result.out
    return str(shelf / "leaving")


@pytest.fixture
def leaving(made: str, run: Run) -> str:
    shutil.copytree(made, "mine")
    return "mine"


def test_tau_is_set_and_shown(run: Run, leaving: str) -> None:
    assert run("set", leaving, "--tau", "*.exits.*:1").code == 0
    graph = surgeon.load(leaving)
    assert surgeon.get_tau(graph) == {PLACE: 1.0}
    assert [site.form for site in find_exits(graph)] == ["dynamic"]
    result = run("-q", "inspect", leaving)
    assert "1 early exit" in result.out
    (found,) = run("-q", "inspect", leaving, "--output", "json").json["exits"]
    assert (found["path"], found["shape"], found["form"], found["tau"]) == (PLACE, [2], "dynamic", 1.0)
    assert found["executed"] == 0.0
    assert 0.4 < found["share"] < 0.6


def test_they_are_measured_and_tuned(run: Run, leaving: str) -> None:
    data = ("--data", "reviews.csv")
    points = run("-q", "sweep", leaving, *data, "--tau", "1", "--output", "json").json["points"]
    assert [point["tau"] for point in points] == [0.0, 1.0]
    assert [point["executed"] for point in points] == [1.0, 0.0]
    assert [point["layers"] for point in points] == [1.0, 0.0]
    assert points[1]["relative"] < 0.6
    result = run("tune", leaving, *data, "--budget", "0.9")
    assert result.code == 0, result.err
    assert 0 < surgeon.get_tau(surgeon.load(leaving))[PLACE] < 1


def test_what_cannot_be_written_is_said(run: Run, leaving: str) -> None:
    result = run("export", leaving, "-o", "out")
    assert result.code == 2
    assert "has early exits" in result.err
    assert not Path("out").exists()


def test_what_lower_refused_is_not_to_be_lowered_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise SiteRefused("needs-batch-size", "an op needs the size of the batch")

    monkeypatch.setattr("surgeon.passes.lower.Lower._lower_exit", refuse)
    result = run("apply", "bert", "--passes", "moeify,early-exit,lower", "--set", "moeify.experts=4", "-o", "left",
                 "--data", "reviews.csv", "--set", "moeify.steps=1", "--set", "early-exit.steps=1")  # fmt: skip
    assert result.code == 0, result.err
    assert result.out.splitlines()[-1] == "  surgeon sweep left --data reviews.csv"
    page = run("report", "left", "-o", "left.html")
    assert page.code == 0, page.err
    text = Path("left.html").read_text(encoding="utf-8")
    assert f"<td>{PLACE}</td><td>samples leave behind " in text
    assert "Use the exits without lower, or put" in text
    assert "At tau 0 everything runs." in text
