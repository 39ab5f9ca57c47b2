"""`surgeon passes` and `surgeon explain`: what passes promise, and why they change a place or leave it."""

from __future__ import annotations

import re
from typing import get_args

import pytest

from surgeon.jobs.inspect import LOOKS_FOR
from surgeon.passes.contract import SiteKind
from surgeon.passes.registry import all_passes

from .harness import NET, Run, run_surgeon


def test_passes_are_listed_with_what_they_promise() -> None:
    result = run_surgeon("passes")
    lines = {
        line.split()[0]: line
        for line in result.out.splitlines()
        if line.split()[:1] and line.split()[0] in all_passes()
    }
    assert set(lines) == set(all_passes())
    assert re.search(r"^sparsify +stays until trained +to train +Put a sparsity tap", lines["sparsify"])
    assert re.search(r"^mlpify +changes +needed ", lines["mlpify"])
    assert re.search(r"^lower +stays +Lower each", lines["lower"])


@pytest.mark.parametrize("name", list(all_passes()))
def test_a_pass_is_shown_with_options_and_a_living_example(name: str) -> None:
    result = run_surgeon("-q", "passes", name, "--example")
    assert result.code == 0
    without = run_surgeon("passes", name)
    assert (without.code, without.err) == (0, "")
    assert result.out.startswith(without.out.rstrip("\n") + "\n\nexample")
    assert f"--set {name}.OPTION=VALUE" in result.out
    assert bool(re.search(r"^    \+ ", result.out, re.MULTILINE)) == (
        name not in ("recover", "refit")
    )  # which change weights
    shown = run_surgeon("-q", "passes", name, "--example", "--output", "json").json
    assert {
        "name",
        "summary",
        "description",
        "works_on",
        "preserves",
        "needs_data",
        "trains",
        "options",
        "example",
    } <= set(shown)
    assert shown["description"].startswith(shown["summary"])
    assert all(part in result.out for part in shown["description"].split("\n\n"))
    assert shown["description"].split() == str(all_passes()[name].__doc__).split()
    assert [option["name"] for option in shown["options"]][-2:] == ["only", "skip"]
    assert all(option["help"] and option["type"] for option in shown["options"])
    assert shown["example"]["report"]["matched"]


def test_only_a_pass_has_an_example() -> None:
    result = run_surgeon("passes", "--example")
    assert result.code == 2
    assert "--example runs one pass. Name it" in result.err


def test_options_are_described_in_words() -> None:
    options = {one["name"]: one for one in run_surgeon("-q", "passes", "moeify", "--output", "json").json["options"]}
    assert options["experts"]["type"] == "integer at least 1 or PATTERN:integer,... or none"
    assert options["experts"]["default"] is None
    assert options["schedule"]["type"] == "constant|linear|cosine"
    assert options["tau"]["type"] == "number from 0 to 1"
    assert options["only"]["type"] == "list"
    assert next(iter(options)) == "experts"


def test_explain_names_every_candidate_and_the_first_condition_that_failed(run: Run) -> None:
    result = run("-q", "explain", *NET, "--passes", "sparsify,moeify,lower")
    assert result.code == 0
    assert "sparsify  changes 2 of 3 candidates" in result.out
    assert re.search(r"✓ +blocks\.0\.mlp +FFN 16→64→16 gelu", result.out)
    assert re.search(r"✗ +pooler +tanh between linears 16→16→3 is a pooler", result.out)
    # lower is asked about the graph that moeify leaves
    assert re.search(r"lower  changes 2 of 2 candidates\n +✓ +blocks\.0\.mlp\.moe", result.out)


def test_explain_says_which_value_does_not_fit(run: Run) -> None:
    options = ("--passes", "moeify", "--set", "moeify.experts=65", "--at", "*.1.mlp", "--output", "json")
    (one,) = run("-q", "explain", *NET, *options).json["passes"]
    assert one["matched"] == []
    (rejected,) = one["rejected"]
    assert (rejected["path"], rejected["code"]) == ("blocks.1.mlp", "too-few-neurons")
    assert rejected["reason"] == "65 experts were asked for, but it has 64 neurons"


def test_explain_says_where_there_is_no_candidate(run: Run) -> None:
    result = run("-q", "explain", *NET, "--passes", "moeify", "--at", "blocks.7.mlp")
    assert result.code == 2
    assert "No candidate at 'blocks.7.mlp': nothing there looks like a feed-forward layer." in result.err
    assert "Nearest candidates: blocks.1.mlp, blocks.0.mlp." in result.err
    result = run("-q", "explain", "nets:linear", "--inputs", "nets:inputs", "--passes", "moeify")
    assert "moeify  finds no feed-forward layer" in result.out


def test_every_kind_of_site_has_words() -> None:
    assert set(get_args(SiteKind)) == set(LOOKS_FOR)
