"""Recipes by name: `surgeon passes` lists them, and `surgeon apply --recipe` runs them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

import surgeon
from surgeon.measure.meter import measure
from surgeon.surgery.artifact import load, load_with_inputs
from surgeon.surgery.recipes import BY_FAMILY, RECIPES, all_recipes

from .harness import NET, Run, recorded, run_surgeon

pytestmark = pytest.mark.usefixtures("traced_once")

TINY = {
    "mlpify": ("mlpify.steps=2",),
    "swap-activation": ("swap-activation.steps=2",),
    "sparsify": ("sparsify.steps=2", "sparsify.accumulate=1"),
    "moeify": ("moeify.steps=2", "moeify.expert_size=4"),
    "recover": ("recover.steps=2",),
}
# Beside sparsify-inputs and lower, which have nothing to train.
UNTRAINED = {(name, "swap-activation") for name in RECIPES if name.startswith(("recommended", "d2dmoe"))}


@pytest.fixture
def vit(tmp_path: Path) -> str:
    """A tiny image classifier, beside a folder `images` with images of two classes."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8, patch_size=4, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_labels=2,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    for number, name in enumerate(("cat", "dog")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(6):
            Image.new("RGB", (8, 8), (255 * number, 40 * index, 0)).save(tmp_path / "images" / name / f"{index}.png")
    return "vit"


def tiny(name: str) -> list[str]:
    """--set for hardly any training where this recipe trains."""
    if name == "cmoe":  # it trains nothing
        return ["--set", "moeify.experts=4", "--set", "moeify.shared=1"]
    trained = [step for step, options in RECIPES[name][1] if step != "swap-activation" or options]
    return [word for one in trained for setting in TINY.get(one, ()) for word in ("--set", setting)]


def test_recipes_are_listed_with_the_passes() -> None:
    lines = run_surgeon("passes").out.splitlines()
    for name, what in all_recipes().items():
        (line,) = [line for line in lines if line.split()[:1] == [name]]
        assert " ".join(line.split()[1:]) in what
    found = run_surgeon("passes", "--output", "json").json
    assert set(found) == {"passes", "recipes", "broken"}
    assert set(found["recipes"]) == {*RECIPES, *BY_FAMILY}
    assert found["recipes"]["d2dmoe"]["by_family"]["gemma"] == "d2dmoe-gemma"
    name, options = found["recipes"]["d2dmoe-gemma"]["passes"][2]
    assert name == "moeify"
    assert options.items() >= {"split": "weights", "router": "trained", "router_width": 512}.items()


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_run(run: Run, vit: str, name: str) -> None:
    of = (vit, "--data", "images") if name.endswith("vit") else ("bert", "--data", "reviews.csv")
    result = run("-q", "apply", "--recipe", name, *of, "-o", "out", *tiny(name))
    assert result.code == 0, result.err
    record = recorded(Path("out"))
    assert [one["name"] for one in record["recipe"]["passes"]] == [step for step, _ in RECIPES[name][1]]
    for one in record["passes"]:
        assert (one["fit"] is None) == (
            (name, one["name"]) in UNTRAINED or one["name"] in ("rotate", "sparsify-inputs", "lower")
        ), one["name"]
        assert one["fit"] is None or one["fit"]["steps"] == (0 if name == "cmoe" else 2)
    if name == "moefication":
        graph = load("out")
        assert set(surgeon.get_rule(graph).values()) == {"top_k"}
        assert set(surgeon.get_tau(graph).values()) == {0.0}
        assert record["recipe"]["passes"][1]["options"] == {
            "split": "weights", "router": "trained", "objective": "activation", "rule": "top_k", "router_width": 128,
            "epochs": 5.0, "steps": 2, "expert_size": 4,
        }  # fmt: skip
        surgeon.set_tau(graph, 0.5)
        _, layers = measure(graph, *load_with_inputs(Path("out"))[1])
        assert {layer.share for layer in layers.values()} == {0.5}
    if name == "d2dmoe-attention-bert":
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


def test_a_recipe_of_a_family_says_which_it_took(run: Run, vit: str) -> None:
    for args, name, why in (
        (("bert", "--recipe", "d2dmoe"), "d2dmoe-bert", "reads text (task sequence-classification)"),
        ((vit, "--recipe", "d2dmoe"), "d2dmoe-vit", "reads images"),
        (("bert", "--recipe", "d2dmoe-attention"), "d2dmoe-attention-bert", "reads text"),
    ):
        result = run("apply", *args, "--dry-run", "--set", "moeify.lr=0.5")
        assert result.code == 0, result.err
        assert f"note: {args[-1]} is {name} here, since the model {why}" in " ".join(result.err.split())
    found = run("-q", "--output", "json", "apply", "bert", "--recipe", "d2dmoe", "--dry-run", "--set", "moeify.lr=0.5")
    options = {one["name"]: one["options"] for one in found.json["passes"]}
    assert options["sparsify"] == {"penalty": "l1", "alpha": 1e-4, "alpha_schedule": "constant"}
    assert (options["moeify"]["expert_size"], options["moeify"]["epochs"], options["moeify"]["lr"]) == (24, 10, 0.5)
    assert any("d2dmoe is d2dmoe-bert here" in note for note in found.json["notes"])
    unknown = run("-q", "apply", *NET, "--recipe", "d2dmoe", "--dry-run")
    assert unknown.code == 2
    assert "since its task is unknown and it reads no images. Name the recipe to use: d2dmoe-vit, " in unknown.err


def test_image_recipes_are_refused_for_texts(run: Run) -> None:
    result = run("-q", "apply", "bert", "--recipe", "d2dmoe-vit", "--data", "reviews.csv")
    assert result.code == 2
    assert "sparsify: label_smoothing and mixup and cutmix are for image classification, but the task is " in result.err


def test_wrong_recipes(run: Run) -> None:
    for args, words in (
        (
            ("--recipe", "d2d"),
            "There is no recipe and no file d2d. Recipes: recommended, recommended-whole, recommended-rotated, ",
        ),
        (
            ("--recipe", "relufy", "--set", "moeify.experts=4"),
            "'moeify', which is not among the passes: swap-activation.",
        ),
        (("--recipe", "relufy", "--set", "swap-activation.too=relu"), "has no option 'too'. Did you mean 'to'?"),
        (("--recipe", "relufy", "--passes", "lower"), "Give --recipe or --passes, not both."),
    ):
        result = run("-q", "apply", *args, "bert")
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
