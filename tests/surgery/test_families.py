"""Which published recipe is the one for a model, and that recipes hold the published values."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from surgeon.errors import UsageError
from surgeon.surgery.families import choose
from surgeon.surgery.recipe import build
from surgeon.surgery.recipes import BY_FAMILY, RECIPES, all_recipes
from tests.small_models import hugging_face


@pytest.mark.parametrize(("name", "task", "want", "why"), [
    ("bert", "sequence-classification", "d2dmoe-bert", "the model reads text"),
    ("vit", "image-classification", "d2dmoe-vit", "the model reads images"),
    ("vit", "classification", "d2dmoe-vit", "the model reads images"),
    ("vit", None, "d2dmoe-vit", "the model reads images"),
    ("gpt2", "causal-lm", "d2dmoe-gpt2", "a language model without gated layers"),
    ("llama", "causal-lm", "d2dmoe-gemma", "a language model with gated layers"),
    ("phi3", "causal-lm", "d2dmoe-gemma", "a language model with gated layers"),
    ("bert", "feature-extraction", "d2dmoe-bert", "the model reads tokens"),
])  # fmt: skip
def test_the_family_comes_from_task_layers_and_inputs(
    traces: Any, name: str, task: str | None, want: str, why: str
) -> None:
    chosen, reason = choose("d2dmoe", traces(name), task, hugging_face(name)[1])
    assert chosen == want
    assert reason.startswith(f"d2dmoe is {want} here, since ")
    assert why in reason


@pytest.mark.parametrize(("name", "recipe", "task", "words"), [
    ("bert", "d2dmoe", "ctc", "since it is for ctc. Name the recipe to use: d2dmoe-vit, d2dmoe-bert, d2dmoe-gpt2, "),
    ("bert", "d2dmoe", None, "since its task is unknown and it reads no images."),
    ("gpt2", "d2dmoe-attention", "causal-lm", "without gated layers. Name the recipe to use: d2dmoe-attention-vit, "),
])  # fmt: skip
def test_nothing_is_guessed(traces: Any, name: str, recipe: str, task: str | None, words: str) -> None:
    with pytest.raises(UsageError) as error:
        choose(recipe, traces(name), task, torch.zeros(2, 3))
    assert words in str(error.value)


def test_what_a_recipe_stands_for_exists_and_comes_after_it() -> None:
    names = list(all_recipes())
    assert sorted(names) == sorted([*RECIPES, *BY_FAMILY])
    for name, (_, members) in BY_FAMILY.items():
        assert all(names.index(member) > names.index(name) for member in members.values())
        assert len({tuple(step for step, _ in RECIPES[member][1]) for member in members.values()}) == 1


def built(name: str) -> dict[str, Any]:
    return {step: build([step], {step: options})[0] for step, options in RECIPES[name][1]}


def test_penalties_and_routers_are_the_published_ones() -> None:
    found = {}
    for name in ("d2dmoe-vit", "d2dmoe-bert", "d2dmoe-gpt2", "d2dmoe-gpt2-gelu", "d2dmoe-gemma"):
        passes = built(name)
        sparse, routed = passes["sparsify"], passes["moeify"]
        found[name] = (sparse.penalty, sparse.alpha, sparse.alpha_schedule, routed.expert_size, routed.router_width)
        assert (routed.split, routed.router, routed.objective) == ("weights", "trained", "norm")
        assert ("swap-activation" in passes) == (name != "d2dmoe-gpt2-gelu")
    assert found == {
        "d2dmoe-vit": ("hoyer", 0.2, "linear_warmup", 6, 128),
        "d2dmoe-bert": ("l1", 1e-4, "constant", 24, 128),
        "d2dmoe-gpt2": ("l1", 5e-4, "constant", 4, 128),
        "d2dmoe-gpt2-gelu": ("l1", 5e-5, "constant", 4, 128),
        "d2dmoe-gemma": ("hoyer", 1e-3, "constant", 32, 512),
    }
    mlpify = built("d2dmoe-attention-vit")["mlpify"]
    assert (mlpify.penalty, mlpify.alpha, mlpify.alpha_schedule) == ("hoyer", 1e-3, "linear")
    assert (built("d2dmoe-gpt2")["moeify"].steps, built("d2dmoe-gpt2")["moeify"].lr) == (5000, 3e-3)
