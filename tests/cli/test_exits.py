"""Commands on a surgery with early exits."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest

import surgeon
from surgeon.exits.site import find_exits

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
