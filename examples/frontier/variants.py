"""What a study is: a task, its dense model, and the ways to rewrite it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from surgeon.data.data import Data
from surgeon.passes import Pass, Refit, Rotate, SparsifyInputs
from surgeon.surgery.recipe import build
from surgeon.surgery.recipes import RECIPES

Passes = Sequence[Pass[Any]]


@dataclass(frozen=True)
class Variant:
    """One way to rewrite the dense model, and how to look at the result.

    passes: what to run; if there are none, another variant's result is looked at in another way. taus: for the curve
    with one tau for all layers; none if there are no experts yet. budgets: shares of the dense model's multiply-adds to
    tune for. oracle: also with the true norms. compensated: the mean of what is skipped is added. refit: how the
    weights of linear layers that skip inputs are fitted to what each budget leaves, so they are not to be lowered.
    divergence: also measured, at each budget, of the answers from the dense model's: for what trains nothing it tells
    more than the quality, which is known on few samples. starts_from: another variant, to go on from its result.
    """

    passes: Passes
    taus: Sequence[float] = ()
    budgets: Sequence[float] = ()
    oracle: bool = False
    compensated: bool = False
    refit: Refit | None = None
    divergence: bool = False
    rules: Sequence[str] | None = None
    starts_from: str | None = None


def without_training(
    layers: Sequence[str],
    budgets: Sequence[float],
    whole: Sequence[float],
    skip: Sequence[str] = (),
    *,
    tuned: bool = True,
    stream: bool = True,
) -> dict[str, Variant]:
    """Return what skips inputs and trains nothing: TEAL, WINA and ours, of feed-forward layers and of all linear ones.

    Ours is there with fitted weights alone, and with the stream turned and a low rank too, if there is such a stream.

    layers: the feed-forward ones. budgets, whole: shares of the dense model, where those skip, and where all do.
    tuned: a share for each layer, within these budgets; else all layers skip the same share, and these are its values.
    """
    where = "budgets" if tuned else "taus"
    methods: dict[str, tuple[list[Pass[Any]], dict[str, Any], Refit | None]] = {
        "teal": ([], {"criterion": "magnitude", "centre": False}, None),
        "wina": ([], {"centre": False}, None),
        "inputs": ([], {}, Refit()),
    }
    if stream:
        methods["rotated"] = ([Rotate()], {}, Refit(rank=0.25))
    found = {}
    for name, (before, options, refit) in methods.items():
        parts = ("", budgets, {"only": tuple(layers)}), ("_whole", whole, {"skip": tuple(skip)})
        for part, shares, chosen in parts:
            passes = [*before, SparsifyInputs(**chosen, **options)]
            found[f"{name}{part}"] = Variant(passes, **{where: shares}, refit=refit, divergence=True)
    return found


@dataclass(frozen=True)
class Study:
    """A task: the data and the dense model for a seed, how it is trained, and the variants.

    keep: what part of the dense quality counts as kept, 0.99 of an accuracy or 1.01 times a loss. dense: the plan of
    dense training. longer: its plan for the dense model that is trained as much again as the variants are. part: of
    the data that is measured on, if the same models are measured on several; it is in the names of these stages.
    teacher: the model for a seed whose answers dense training and the variants learn from, beside the labels.
    """

    name: str
    task: str
    keep: float
    data: Callable[[int], Data]
    model: Callable[[int], nn.Module]
    inputs: Callable[[Data], Any]
    dense: Mapping[str, Any]
    longer: Mapping[str, Any]
    variants: Mapping[str, Variant]
    calibration_batches: int = 8
    part: str = ""
    teacher: Callable[[int], nn.Module] | None = None


def recipe(name: str, **options: Any) -> list[Pass[Any]]:
    """A recipe's passes, with these options of moeify in place of its own."""
    steps = [(step, own | options if step == "moeify" else own) for step, own in RECIPES[name][1]]
    return build([step for step, _ in steps], dict(steps))
