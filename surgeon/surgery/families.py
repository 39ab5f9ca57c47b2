"""Find out which of the published recipes is the one for a model: the family that the model belongs to."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from surgeon.errors import UsageError
from surgeon.sites.search import find_ffns
from surgeon.surgery.recipes import BY_FAMILY, Family

_TEXT = frozenset({"sequence-classification", "token-classification", "question-answering", "masked-lm"})
# With these the inputs decide.
_OPEN = (None, "classification", "feature-extraction")


def choose(recipe: str, graph: GraphModule, task: str | None, inputs: Any) -> tuple[str, str]:
    """Return the recipe that a recipe of `BY_FAMILY` stands for, and why, as a sentence for people.

    Args:
        graph: the model, before any pass. task: that of its class, else of its data; None if unknown.
        inputs: example inputs.

    Raises:
        UsageError: nothing was published for such a model; the message names the recipes.
    """
    members = BY_FAMILY[recipe][1]
    family, why = _family(graph, task, inputs)
    if family not in members:
        raise UsageError(
            f"Recipe {recipe}: nothing was published for this model, since {why}. Name the recipe to use: "
            f"{', '.join(members.values())}."
        )
    return members[family], f"{recipe} is {members[family]} here, since {why}."


def _family(graph: GraphModule, task: str | None, inputs: Any) -> tuple[Family | None, str]:
    """Return the family, None if there is none, and the reason."""
    tensors = [value for value in pytree.tree_leaves(inputs) if isinstance(value, Tensor)]
    images = any(value.dim() == 4 and value.is_floating_point() for value in tensors)
    if task == "causal-lm":
        if any(site.gated for site in find_ffns(graph)[0]):
            return "gemma", "the model is a language model with gated layers"
        return "gpt2", "the model is a language model without gated layers"
    if task in _TEXT:
        return "bert", f"the model reads text (task {task})"
    if task == "image-classification" or (task in _OPEN and images):
        return "vit", "the model reads images"
    if task == "feature-extraction" and not any(value.is_floating_point() for value in tensors):
        return "bert", "the model reads tokens"
    return None, "its task is unknown and it reads no images" if task in (
        None,
        "classification",
    ) else f"it is for {task}"
