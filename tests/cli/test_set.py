"""`surgeon set`: tau, rule and compensation of a saved surgery, stored in it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import surgeon
from surgeon.surgery.artifact import load, load_diff, load_with_inputs

from .harness import Run, left, recorded

pytestmark = pytest.mark.usefixtures("traced_once")

FIRST, SECOND = (f"bert.encoder.layer.{index}.moe" for index in (0, 1))
REVIEWS = ("--data", "reviews.csv")


@pytest.fixture
def mine(run: Run, shelf: Path, tmp_path: Path) -> str:
    """A surgery of one's own, to be changed."""
    shutil.copytree(shelf / "bert-moe", tmp_path / "mine")
    return "mine"


def table(out: str) -> list[list[str]]:
    return [line.split() for line in out.splitlines()]


def test_without_options_it_shows_what_is_stored(run: Run, mine: str) -> None:
    before = Path("mine/model.pt2").stat().st_mtime_ns
    result = run("-q", "set", mine)
    assert table(result.out) == [["layer", "tau", "rule"], [FIRST, "0", "max"], [SECOND, "0", "max"]]
    same = {"tau": 0.0, "rule": "max", "compensated": False}
    assert run("-q", "set", mine, "--output", "json").json == {
        "model": "mine", "directory": None, "notes": [],
        "layers": {path: {"before": same, "after": same} for path in (FIRST, SECOND)},
    }  # fmt: skip
    assert Path("mine/model.pt2").stat().st_mtime_ns == before


def test_one_value_is_for_all_layers_and_stored_in_place(run: Run, mine: str, tmp_path: Path) -> None:
    earlier = recorded(Path(mine))
    result = run("-q", "set", mine, "--tau", "0.5", "--rule", "top_k")
    assert result.code == 0, result.err
    assert table(result.out)[1:] == [
        [FIRST, "0", "→", "0.5", "max", "→", "top_k"],
        [SECOND, "0", "→", "0.5", "max", "→", "top_k"],
        ["Saved", "to", "mine."],
    ]
    assert left(tmp_path) == {"mine"}
    graph, record = load(mine), recorded(Path(mine))
    assert surgeon.get_tau(graph) == record["tau"] == {FIRST: 0.5, SECOND: 0.5}
    assert surgeon.get_rule(graph) == record["rule"] == {FIRST: "top_k", SECOND: "top_k"}
    for part in ("input", "recipe", "passes", "experts", "trace"):
        assert record[part] == earlier[part]
    assert load_diff(mine) == load_diff("bert-moe")


def test_a_link_to_a_surgery_stays_one(run: Run, mine: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(mine)
    assert run("-q", "set", "link", "--tau", "0.5").code == 0
    assert (tmp_path / "link").is_symlink()
    assert left(tmp_path) == {"mine"}
    assert set(surgeon.get_tau(load("mine")).values()) == {0.5}


def test_layers_can_differ_and_the_first_pattern_that_fits_counts(run: Run, mine: str) -> None:
    result = run("-q", "set", mine, "--tau", "*.layer.1:0.25,*:0.75", "-o", "other", "--output", "json")
    assert result.json["directory"] == "other"
    assert {path: one["after"]["tau"] for path, one in result.json["layers"].items()} == {FIRST: 0.75, SECOND: 0.25}
    assert surgeon.get_tau(load("other")) == {FIRST: 0.75, SECOND: 0.25}
    assert set(surgeon.get_tau(load(mine)).values()) == {0.0}
    # What no pattern names stays as it is.
    run("-q", "set", "other", "--tau", f"{FIRST}:0.5", "--rule", "*.1.*:energy")
    assert surgeon.get_tau(load("other")) == {FIRST: 0.5, SECOND: 0.25}
    assert surgeon.get_rule(load("other")) == {FIRST: "max", SECOND: "energy"}


@pytest.mark.parametrize(
    ("text", "taus"),
    [
        ("*.layer.0:0.25,*:0.75", {"*.layer.0": 0.25, "*": 0.75}),
        ("*:0.75,*.layer.0:0.25", {"*": 0.75, "*.layer.0": 0.25}),
        ("*:0.75,*:0.25", {"*": 0.75}),
    ],
)
def test_the_command_line_and_python_choose_alike(run: Run, mine: str, text: str, taus: dict[str, float]) -> None:
    graph = load(mine)
    surgeon.set_tau(graph, taus)
    assert run("-q", "set", mine, "--tau", text).code == 0
    assert surgeon.get_tau(load(mine)) == surgeon.get_tau(graph)


def test_the_mean_of_what_is_skipped_is_added_and_dropped(run: Run, mine: str) -> None:
    result = run("-q", "set", mine, "--tau", "0.9", "--compensate", *REVIEWS, "--samples", "16")
    assert result.code == 0, result.err
    assert table(result.out)[:2] == [
        ["layer", "tau", "rule", "compensated"], [FIRST, "0", "→", "0.9", "max", "no", "→", "yes"]
    ]  # fmt: skip
    assert recorded(Path(mine))["compensated"] == [FIRST, SECOND]
    graph, again = load("bert-moe"), load(mine)
    surgeon.set_tau(graph, 0.9)
    inputs = load_with_inputs(mine)[1][1]
    with torch.no_grad():
        assert not torch.allclose(again(**inputs).logits, graph(**inputs).logits, atol=1e-6)
    result = run("-q", "set", mine, "--tau", "*.layer.0:0.5")
    assert "note: Compensation was dropped in 1 of 2 layers, which skip" in " ".join(result.out.split())
    assert recorded(Path(mine))["compensated"] == [SECOND]
    # A recipe does not measure means, and says so.
    assert "compensated, which is measured on data after the passes, by surgeon set or" in " ".join(
        run("recipe", "show", mine).out.split()
    )


def test_where_nothing_is_skipped_there_is_no_mean_to_add(run: Run, mine: str) -> None:
    result = run("-q", "set", mine, "--compensate", *REVIEWS)
    assert result.code == 0, result.err
    assert (
        "note: --compensate added nothing: no expert is skipped, or the skipped ones output zero on this data."
        in result.out
    )
    assert recorded(Path(mine))["compensated"] == []


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("mine", "--tau", "*.layer.7:0.1"), 2, f"No layer '*.layer.7'. Layers that can be set: {FIRST}, {SECOND}."),
        (("mine", "--tau", "0.5", "--rule", "pooler:max"), 2, f"No layer 'pooler'. Layers that can be set: {FIRST}"),
        (("mine", "--tau", "0.1,0.2"), 2, "--tau 0.1,0.2: 0.1,0.2 is not a number from 0 to 1. Write --tau 0.2 or"),
        (("mine", "--tau", "*:nan"), 2, "--tau *:nan: nan is not a number from 0 to 1."),
        (("mine", "--tau", "much"), 2, "--tau much: much is not a number from 0 to 1."),
        (("mine", "--tau", "*:1.5"), 2, "--tau *:1.5: 1.5 is not a number from 0 to 1."),
        (("mine", "--tau", "a:0.5,b"), 2, "--tau a:0.5,b: write PATTERN:VALUE,PATTERN:VALUE"),
        (("mine", "--rule", "best"), 2, "No selection rule 'best'. There are: max, cumulative, energy, top_k."),
        (("mine", "--compensate"), 2, "--compensate measures the mean output of skipped experts on data"),
        (("mine", "--tau", "0.5", *REVIEWS), 2, "Only --compensate reads --data."),
        (("mine", "--tau", "0.5", "--limit", "3"), 2, "--limit says how to read data. Give --data too."),
        (("mine", "-o", "other"), 2, "There is nothing to store with -o. Give --tau, --rule or --compensate."),
        (("mine", "--tau", "0.5", "-o", "masked"), 2, "masked exists. Give another directory with -o"),
        (("bert", "--tau", "0.5"), 3, "bert is not a saved surgery: it has no surgery.json."),
    ],
)
def test_what_cannot_be_set_is_said_and_nothing_is_stored(
    run: Run, mine: str, shelf: Path, tmp_path: Path, args: tuple[str, ...], code: int, words: str
) -> None:
    result = run("-q", "set", *args)
    assert (result.code, result.out) == (code, "")
    assert words in result.err
    assert left(tmp_path) == {"mine"}
    assert all(file.read_bytes() == (shelf / "bert-moe" / file.name).read_bytes() for file in Path("mine").iterdir())
