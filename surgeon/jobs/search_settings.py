"""Which settings a search tries, and where there is anything to search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from surgeon.errors import UsageError
from surgeon.passes import Pass
from surgeon.processes import count
from surgeon.surgery.recipe import build
from surgeon.surgery.trials import Options

# Each changes one thing. The first is the recipe itself.
SETTINGS: tuple[tuple[str, Options], ...] = (
    ("the recipe", {}),
    ("10% of the neurons active", {"sparsify": {"target": 0.1}}),
    ("experts of 16 neurons", {"moeify": {"expert_size": 16}}),
    ("routers of width 64", {"moeify": {"router_width": 64}}),
    ("learning rates times 4", {"sparsify": {"lr": 2e-4}, "recover": {"lr": 1.2e-4}}),
    ("learning rates times 16", {"sparsify": {"lr": 8e-4}, "recover": {"lr": 4.8e-4}}),
)


def check_search(recipe: str | None, minutes: float | None, *, has_data: bool, dry_run: bool) -> None:
    """Refuse a budget where there is nothing to search, as far as this is known before the model is loaded.

    Raises:
        UsageError: the message says what to do.
    """
    if minutes is None:
        return
    if recipe != "recommended":
        raise UsageError("--budget-minutes finds the settings of --recipe recommended. Give that recipe.")
    if not minutes > 0:
        raise UsageError(f"--budget-minutes {minutes:g} must be above 0.")
    if not has_data or dry_run:
        raise UsageError("--budget-minutes trains, so it needs --data, and cannot be a --dry-run.")
    if count() > 1:
        raise UsageError("--budget-minutes runs in one process. Search in one, then run the result's surgery.json.")


def settings_for(given: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Options]]:
    """Return the settings to try: those that change nothing that the user has set.

    given: the user's options by pass.
    """
    size = {"experts", "expert_size"}

    def free(options: Options) -> bool:
        for name, own in options.items():
            fixed = set(given.get(name, {}))
            if fixed & set(own) or (fixed & size and set(own) & size):
                return False
        return True

    return [(name, options) for name, options in SETTINGS if free(options)]


def with_options(passes: Sequence[Pass[Any]], options: Options) -> list[Pass[Any]]:
    """Return the passes with other options."""
    return [
        build([one.name], {one.name: {**one.options(), **options[one.name]}})[0] if one.name in options else one
        for one in passes
    ]
