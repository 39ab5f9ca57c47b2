"""What a search for settings tried and chose: what the record of a surgery keeps of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Options = dict[str, dict[str, Any]]
"""Options by pass, in place of the recipe's."""


@dataclass(frozen=True)
class Trial:
    """One setting, trained for a few steps and judged on the validation part of the training data.

    name: what it changes in the recipe, in words. options: the same as options.
    steps: of sparsify; the other passes train in proportion.
    loss: where the converted layers cost the search's share of the dense ones; None if there is none.
    why: there is none: "too costly" if the layers do not get that cheap, or "diverged".
    """

    name: str
    options: Options
    steps: int
    loss: float | None
    seconds: float
    why: str = ""


@dataclass(frozen=True)
class Search:
    """A search that is done.

    budget_minutes: for the whole run. share: of the dense layers' multiply-adds, routers counted, at which settings are
    compared. train, validation: samples of the training data. dense_loss: of the dense model on the validation part.
    trials: in the order in which they ran. chosen: the name of the best setting.
    options: what the full run has in place of the recipe's options: the best setting, and steps if time is short.
    """

    budget_minutes: float
    share: float
    train: int
    validation: int
    dense_loss: float
    trials: tuple[Trial, ...]
    chosen: str
    options: Options


def merged(*parts: Mapping[str, Mapping[str, Any]]) -> Options:
    """Return the options of all parts; of an option given twice, the last."""
    found: Options = {}
    for part in parts:
        for name, options in part.items():
            found[name] = {**found.get(name, {}), **options}
    return found
