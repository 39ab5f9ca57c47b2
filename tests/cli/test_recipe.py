"""`surgeon recipe`: files are written, checked and shown, and repeat what made a surgery."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from surgeon.surgery.artifact import load
from surgeon.surgery.recipes import BY_FAMILY

from .harness import Run, recorded

pytestmark = pytest.mark.usefixtures("traced_once")

TRAINED = (
    "apply", "bert", "--data", "reviews.csv", "--seed", "5", "--tau", "0.05",
    "--passes", "swap-activation,sparsify,moeify,sparsify-inputs,recover,lower",
    "--set", "swap-activation.epochs=0.1", "--set", "sparsify.steps=2", "--set", "moeify.expert_size=*.0:8,*:4",
    "--set", "moeify.steps=2", "--set", "recover.steps=2", "--set", "recover.distill=0.5",
)  # fmt: skip


def test_the_recipe_of_a_surgery_makes_the_same_weights_again(run: Run) -> None:
    assert run("-q", *TRAINED, "-o", "first").code == 0
    written = run("recipe", "init", "--from", "first", "-o", "r.yaml")
    assert written.code == 0, written.err
    text = Path("r.yaml").read_text(encoding="utf-8")
    assert text.startswith("# What was done to make first.\n")
    assert "\nseed: 5\n" in text
    assert "\ntau: 0.05\n" in text
    assert "\n      # Number of neurons in each expert, instead of the number of experts.\n" in text
    assert run("recipe", "check", "r.yaml").code == 0
    again = run("apply", "bert", "--data", "reviews.csv", "--recipe", "r.yaml", "-o", "again")
    assert again.code == 0, again.err
    assert "differ" not in again.err
    first, second = load("first").state_dict(), load("again").state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    for key in ("recipe", "tau", "rule", "input", "model_sha256"):
        assert recorded(Path("first"))[key] == recorded(Path("again"))[key], key


def test_other_models_data_and_layers_are_told(run: Run) -> None:
    Path("r.yaml").write_text(
        "fingerprint: '12'\ndata: other.csv\nmodel: {path: other, kind: hf, sha256: '34'}\nrule: {'*.9.moe': top_k}\n"
        "passes: [moeify: {steps: 1}, lower]\n",
        encoding="utf-8",
    )
    result = run("apply", "bert", "--recipe", "r.yaml", "--data", "reviews.csv", "-o", "out")
    assert result.code == 0, result.err
    said = " ".join(result.err.split())
    assert "note: The recipe was recorded for another model (other), so results will differ." in said
    assert "note: The recipe was recorded with other data (other.csv), so results will differ." in said
    assert "The recipe has a rule for layers that are not there: *.9.moe." in " ".join(result.out.split())


def test_tau_of_a_recipe_needs_fitted_routers(run: Run) -> None:
    Path("r.yaml").write_text("tau: 0.5\npasses: [moeify, lower]\n", encoding="utf-8")
    result = run("apply", "bert", "--recipe", "r.yaml", "-o", "out")
    assert result.code == 0, result.err
    assert "tau of the recipe was not set, because no routers were fitted." in result.out
    assert set(recorded(Path("out"))["tau"].values()) == {0.0}


def test_recipes_are_written_once(run: Run) -> None:
    assert run("recipe", "init", "cmoe").code == 0
    assert "  - moeify:\n" in Path("recipe.yaml").read_text(encoding="utf-8")
    for args, words, code in (
        (("cmoe",), "recipe.yaml exists. Give another file, or overwrite it.", 4),
        ((), "Name a recipe (surgeon passes lists them), or give --from DIR", 2),
        (("cmoe", "--from", "bert-moe"), "Name a recipe (surgeon passes lists them), or give --from DIR", 2),
        (("cmoe", "-o", "r.txt"), "Cannot write r.txt: give a name that ends in .yaml.", 2),
        (("cmo", "-o", "r.yaml"), "There is no recipe and no file cmo. Recipes: ", 2),
        (("d2dmoe", "-o", "r.yaml"), "The recipe d2dmoe depends on the kind of model.", 2),
        (("--from", "bert", "-o", "r.yaml"), "bert is not a saved surgery", 3),
    ):
        result = run("recipe", "init", *args)
        assert (result.code, result.out) == (code, "")
        assert words in " ".join(result.err.split())
    done = run("recipe", "init", "relufy", "--overwrite", "--output", "json")
    assert done.json == {"file": "recipe.yaml", "passes": ["swap-activation"]}


def test_check_lists_all_that_is_wrong(run: Run) -> None:
    Path("r.yaml").write_text("passes:\n  - moeify: {expert: 4}\n  - lowr\n", encoding="utf-8")
    result = run("recipe", "check", "r.yaml")
    assert (result.code, result.err) == (1, "")
    assert result.out.splitlines() == [
        "r.yaml:2: moeify has no option 'expert'. Did you mean 'experts'?",
        "r.yaml:3: No pass 'lowr'. Did you mean 'lower'?",
    ]
    found = run("recipe", "check", "r.yaml", "--output", "json")
    assert (found.code, found.json["passes"]) == (1, [])
    assert [problem["line"] for problem in found.json["problems"]] == [2, 3]
    refused = run("apply", "bert", "--recipe", "r.yaml")
    assert refused.code == 2
    assert "r.yaml:2: moeify has no option 'expert'." in refused.err
    assert "r.yaml:3: No pass 'lowr'." in refused.err
    Path("r.yaml").write_text("passes:\n  - lower\n  - moeify: {experts: 4}\n", encoding="utf-8")
    wrong = "r.yaml:3: moeify must run before lower. Swap the two passes."
    assert run("recipe", "check", "r.yaml").out == f"{wrong}\n"
    assert wrong in run("apply", "bert", "--recipe", "r.yaml").err
    assert run("recipe", "check", "no.yaml").code == 2


@pytest.mark.parametrize("name", ["recommended", "d2dmoe", "bert-moe", "r.yaml"])
def test_show(run: Run, name: str) -> None:
    Path("r.yaml").write_text("seed: 3\npasses: [moeify: {experts: {'*.0': 2, '*': 4}}, lower]\n", encoding="utf-8")
    result = run("recipe", "show", name)
    assert result.code == 0, result.err
    assert result.out.startswith(name)
    shown = json.loads(run("recipe", "show", name, "--output", "json").out)
    if name == "d2dmoe":
        assert shown["by_family"] == BY_FAMILY["d2dmoe"][1]
        assert "d2dmoe-gemma" in result.out
        return
    for step in shown["passes"]:
        assert step["name"] in result.out
        assert all(option in result.out for option in step["options"])
    if name == "r.yaml":
        assert "*.0: 2, *: 4" in result.out
        assert shown["passes"][0]["options"] == {"experts": {"*.0": 2, "*": 4}}
        assert shown["recipe"]["seed"] == 3
    if name == "bert-moe":
        assert shown["recipe"]["model"]["sha256"] == recorded(Path("bert-moe"))["input"]["sha256"]


def test_passes_of_ones_own(run: Run) -> None:
    Path("mine.py").write_text(
        "from surgeon.passes import Lower\n\n\nclass Mine(Lower):\n    '''Lower.'''\n\n    name = 'mine'\n",
        encoding="utf-8",
    )
    options = ("--passes", "moeify,mine.py:Mine", "--set", "mine.py:Mine.skip=*.0.moe", "--set", "moeify.experts=4")
    result = run("-q", "apply", "bert", *options, "-o", "out")
    assert result.code == 0, result.err
    assert recorded(Path("out"))["passes"][1]["name"] == "mine"
    assert run("-q", "apply", "bert", "--recipe", "out", "--set", "mine.only=*.1.moe", "-o", "again").code == 0
    assert "Lower." in run("passes", "mine.py:Mine").out
