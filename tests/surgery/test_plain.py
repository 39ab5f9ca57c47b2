"""`to_dict` of what users get: plain JSON values, the same as on the command line and in files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import surgeon
from surgeon.measure.sweep import sweep
from surgeon.passes import Lower, Moeify
from surgeon.passes.report import PassReport
from surgeon.surgery.artifact import DIFF, load_diff
from tests.cli.harness import run_surgeon
from tests.small_models import stack, vectors

TAU = 0.05  # which no float32 is


@pytest.fixture(scope="module")
def surgery() -> surgeon.Surgery:
    made = surgeon.Pipeline([Moeify(experts=4, lr=TAU), Lower()]).run(stack("relu"), inputs=vectors())
    return made.set_tau(TAU)


def plain(value: Any) -> Any:
    """The value, which JSON has to give back as it is."""
    assert json.loads(json.dumps(value, allow_nan=False)) == value
    return value


def test_the_diff_is_that_of_the_file_and_of_the_command_line(surgery: surgeon.Surgery, tmp_path: Path) -> None:
    found = plain(surgery.diff().to_dict())
    assert found.keys() == {"passes", "nodes"}
    assert found["passes"][0]["report"] == plain(surgery.reports[0].to_dict())
    assert found["passes"][0]["report"]["options"] == {"experts": 4, "lr": TAU}
    assert found["passes"][0]["graph"]["added"]
    saved = surgery.save(tmp_path / "saved")
    assert json.loads((saved / DIFF).read_text(encoding="utf-8")) == found
    assert run_surgeon("diff", str(saved), "--output", "json").json == found
    assert load_diff(saved) == surgery.diff()
    assert PassReport.from_dict(found["passes"][0]["report"]) == surgery.reports[0]


def test_numbers_are_as_they_were_typed(surgery: surgeon.Surgery, tmp_path: Path) -> None:
    assert set(surgeon.get_tau(surgery.graph).values()) == {TAU}
    saved = surgery.save(tmp_path / "saved")
    assert set(json.loads((saved / "surgery.json").read_text(encoding="utf-8"))["tau"].values()) == {TAU}
    assert plain(surgery.recipe.to_dict())["tau"] == {"*": TAU}
    for args in (("inspect", str(saved)), ("set", str(saved))):
        assert "0.0500000" not in run_surgeon(*args, "--output", "json").out


def test_points_and_comparisons(surgery: surgeon.Surgery) -> None:
    batches, dense = [vectors()], stack("relu")
    points = [plain(point.to_dict()) for point in sweep(surgery.graph, batches, None, [0.0, TAU], inputs=vectors())]
    assert [point["tau"] for point in points] == [0.0, TAU]
    assert points[0]["quality"]["value"] == 1.0
    assert "scores" not in points[0]
    found = surgeon.compare({"ours": surgery.graph}, batches, None, dense=dense, taus=[TAU])
    assert plain(found.to_dict())["curves"][0]["points"]
    sites, rejected = surgeon.find_ffns(surgeon.trace(dense, vectors()))
    assert sites
    assert all(plain(one.to_dict())["code"] for one in rejected)
