"""Commands on a surgery whose tokens halt."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest

import surgeon
from surgeon.exits.halting import find_halts

from .harness import Run, run_surgeon

PLACE = "bert.encoder.layer.halting.0"


@pytest.fixture(scope="module")
def made(shelf: Path) -> str:
    with contextlib.chdir(shelf):
        result = run_surgeon(
            "apply", "--passes", "halt-tokens,lower", "--data", "reviews.csv", "bert", "-o", "halting",
            "--set", "halt-tokens.steps=2", "--set", "halt-tokens.gamma=2", "--set", "halt-tokens.beta=0",
        )  # fmt: skip
        assert result.code == 0, result.err
        assert "behind which tokens halt" in result.out
    return str(shelf / "halting")


@pytest.fixture
def halting(made: str, run: Run) -> str:
    shutil.copytree(made, "mine")
    return "mine"


def test_tau_is_set_and_shown(run: Run, halting: str) -> None:
    assert surgeon.get_tau(surgeon.load(halting)) == {PLACE: 0.5}
    assert run("set", halting, "--tau", "*.halting.*:1").code == 0
    graph = surgeon.load(halting)
    assert surgeon.get_tau(graph) == {PLACE: 1.0}
    assert [site.form for site in find_halts(graph)] == ["dynamic"]
    assert "1 halting place" in run("-q", "inspect", halting).out
    (found,) = run("-q", "inspect", halting, "--output", "json").json["halting"]
    assert (found["path"], found["form"], found["tau"], found["executed"]) == (PLACE, "dynamic", 1.0, 0.0)
    assert 0.3 < found["share"] < 0.6


def test_it_is_swept(run: Run, halting: str) -> None:
    data = ("--data", "reviews.csv")
    points = run("-q", "sweep", halting, *data, "--tau", "0.6,1", "--output", "json").json["points"]
    assert [point["tau"] for point in points][:2] == [0.0, 0.6]
    executed = [point["executed"] for point in points if point["tau"] is not None]  # not those of the stored tau
    assert executed[0] == 1.0
    assert 0.0 < executed[1] < 1.0
    assert executed[-1] == 0.0


def test_what_cannot_be_written_is_said(run: Run, halting: str) -> None:
    result = run("export", halting, "-o", "out")
    assert result.code == 2
    assert "has token halting" in result.err
    assert not Path("out").exists()
