"""Recipes by name: `surgeon passes` lists them, and `surgeon apply --recipe` runs them."""

from __future__ import annotations

from pathlib import Path

import pytest

import surgeon
from surgeon.measure.meter import measure
from surgeon.surgery.artifact import load, load_with_inputs
from surgeon.surgery.recipes import RECIPES

from .harness import Run, recorded, run_surgeon

TINY = {
    "mlpify": ("mlpify.steps=2",),
    "swap-activation": ("swap-activation.steps=2",),
    "sparsify": ("sparsify.steps=2",),
    "moeify": ("moeify.steps=2", "moeify.experts=4"),
    "recover": ("recover.steps=2",),
}
# Beside lower, which has nothing to train.
UNTRAINED = {(name, "swap-activation") for name in ("recommended", "d2dmoe", "d2dmoe-attention")}


def tiny(name: str) -> list[str]:
    """--set for hardly any training where this recipe trains."""
    trained = [step for step, options in RECIPES[name][1] if step != "swap-activation" or options]
    return [word for one in trained for setting in TINY.get(one, ()) for word in ("--set", setting)]


def test_recipes_are_listed_with_the_passes() -> None:
    lines = run_surgeon("passes").out.splitlines()
    for name, (what, _) in RECIPES.items():
        (line,) = [line for line in lines if line.split()[:1] == [name]]
        assert " ".join(line.split()[1:]) in what
    found = run_surgeon("passes", "--output", "json").json
    assert set(found) == {"passes", "recipes", "broken"}
    name, options = found["recipes"]["d2dmoe"]["passes"][2]
    assert name == "moeify"
    assert options.items() >= {"split": "weights", "router": "trained", "router_width": 128}.items()


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_run(run: Run, name: str) -> None:
    result = run("-q", "apply", "--recipe", name, "bert", "--data", "reviews.csv", "-o", "out", *tiny(name))
    assert result.code == 0, result.err
    record = recorded(Path("out"))
    assert [one["name"] for one in record["recipe"]["passes"]] == [step for step, _ in RECIPES[name][1]]
    for one in record["passes"]:
        assert (one["fit"] is None) == ((name, one["name"]) in UNTRAINED or one["name"] == "lower"), one["name"]
        assert one["fit"] is None or one["fit"]["steps"] == 2
    if name == "moefication":
        graph = load("out")
        assert set(surgeon.get_rule(graph).values()) == {"top_k"}
        assert set(surgeon.get_tau(graph).values()) == {0.0}
        assert record["recipe"]["passes"][1]["options"] == {
            "split": "weights", "router": "trained", "objective": "activation", "rule": "top_k", "router_width": 128,
            "epochs": 5.0, "steps": 2, "experts": 4,
        }  # fmt: skip
        surgeon.set_tau(graph, 0.5)
        _, layers = measure(graph, *load_with_inputs(Path("out"))[1])
        assert {layer.share for layer in layers.values()} == {0.5}
    if name == "d2dmoe-attention":
        assert record["recipe"]["passes"][0]["options"] == {"init": "random", "error": "mse", "steps": 2}
        layers = [one["path"] for one in record["experts"]]
        assert sum("projection_mlp" in path for path in layers) > len(layers) / 2
    if name == "relufy":  # what was recorded runs again
        again = run("-q", "apply", "--recipe", "out", "bert", "--data", "reviews.csv", "-o", "again")
        assert again.code == 0, again.err
        assert recorded(Path("again"))["recipe"]["passes"] == record["recipe"]["passes"]


def test_a_recipe_without_data_says_what_was_not_trained(run: Run) -> None:
    result = run("-q", "apply", "--recipe", "moefication", "bert", "-o", "out")
    assert result.code == 0, result.err
    assert "note: Nothing was fine-tuned, so the model has not recovered from its new activation." in result.out
    assert "note: The routers were not trained" in result.out
    assert result.out.count("not trained  ") == 2


def test_wrong_recipes(run: Run) -> None:
    for args, words in (
        (("--recipe", "d2d"), "Recipes: recommended, relufy, moefication, d2dmoe, d2dmoe-attention."),
        (("--recipe", "relufy", "--set", "moeify.experts=4"), "'moeify', which recipe relufy does not run."),
        (("--recipe", "relufy", "--set", "swap-activation.too=relu"), "has no option 'too'. Did you mean 'to'?"),
        (("--recipe", "relufy", "--passes", "lower"), "Give --recipe or --passes, not both."),
    ):
        result = run("-q", "apply", *args, "bert")
        assert (result.code, result.out) == (2, "")
        assert words in result.err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{}", "is not a valid recipe: passes: field required."),
        ("[]", "is not a valid recipe: "),
        ("passes: lower", "is not a valid recipe: Expecting value: line 1 column 1 (char 0)."),
        (
            '{"recipe": {"passes": [{"options": {}}], "seed": 0}}',
            "is not a valid recipe: passes.0.name: field",
        ),
        (
            '{"passes": [{"name": "lower", "options": 3}], "seed": 0}',
            "is not a valid recipe: passes.0.options: input",
        ),
        (
            '{"passes": [{"name": "lower"}], "seed": "x"}',
            "is not a valid recipe: seed: input should be a valid",
        ),
        ('{"passes": [{"name": "lowr"}], "seed": 0}', "No pass 'lowr'. Did you mean 'lower'?"),
    ],
)
def test_a_file_that_holds_no_recipe_is_refused(run: Run, tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "r.json").write_text(content)
    result = run("-q", "apply", "--recipe", "r.json", "bert")
    assert (result.code, result.out) == (2, "")
    assert words in result.err


def test_a_value_for_each_site_is_typed_with_its_pattern(run: Run) -> None:
    options = ("--set", "moeify.expert_size=*.0:8,*:4", "-o", "out")
    result = run("-q", "apply", "--passes", "moeify", "bert", *options)
    assert result.code == 0, result.err
    record = recorded(Path("out"))
    assert [one["experts"] for one in record["experts"]] == [4, 8]
    assert record["recipe"]["passes"][0]["options"] == {"expert_size": {"*.0": 8, "*": 4}}
    wrong = run("-q", "apply", "--passes", "moeify", "bert", "--set", "moeify.expert_size=*.0:8,4")
    assert wrong.code == 2
    assert "moeify.expert_size=*.0:8,4: write PATTERN:VALUE,PATTERN:VALUE, for example" in wrong.err
