"""Which settings a search tries, and where there is anything to search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.fx import GraphModule

from surgeon.errors import UsageError
from surgeon.passes import Moeify, Pass, Sparsify
from surgeon.passes.trained import FineTunedPass
from surgeon.processes import count
from surgeon.surgery.recipe import build
from surgeon.surgery.trials import Options

Setting = tuple[str, Options]

AS_GIVEN = "as given"
"""The name of the setting that changes nothing."""
_RATES = (4, 16)
# Of neurons in an expert, if the passes leave it open.
_SIZE = 16


def check_search(passes: Sequence[Pass[Any]], minutes: float | None, *, has_data: bool, dry_run: bool) -> None:
    """Refuse a budget where there is nothing to search, as far as this is known before the model is loaded.

    Raises:
        UsageError: the message says what to do.
    """
    if minutes is None:
        return
    if not fine_tuned(passes) or not any(isinstance(one, Moeify) for one in passes):
        raise UsageError(
            "--budget-minutes finds settings of moeify and of passes that fine-tune, such as sparsify. Give "
            "--recipe recommended, or --passes that have both."
        )
    if not minutes > 0:
        raise UsageError(f"--budget-minutes {minutes:g} must be above 0.")
    if not has_data or dry_run:
        raise UsageError("--budget-minutes trains, so it needs --data, and cannot be a --dry-run.")
    if count() > 1:
        raise UsageError("--budget-minutes runs in one process. Search in one, then run the result's recipe.")


def fine_tuned(passes: Sequence[Pass[Any]]) -> list[FineTunedPass[Any, Any]]:
    """Return the passes that fine-tune the model."""
    return [one for one in passes if isinstance(one, FineTunedPass) and one.optimises]


def stages(
    passes: Sequence[Pass[Any]], given: Mapping[str, Mapping[str, Any]], graph: GraphModule
) -> list[list[Setting]]:
    """Return the settings to try, in stages; a later stage changes what an earlier one found best.

    Learning rates come first, since what else is best depends on them. Of every pass the first of its name counts. What
    the user has set stays.

    Args:
        given: the user's options by pass.
        graph: the model before the passes.
    """
    size = {"experts", "expert_size"}

    def free(setting: Setting) -> bool:
        for name, own in setting[1].items():
            fixed = set(given.get(name, {}))
            if fixed & set(own) or (fixed & size and set(own) & size):
                return False
        return True

    found = [_rates(passes), [*_penalties(passes), *_experts(passes, graph)]]
    return [[(AS_GIVEN, {}), *filter(free, stage)] for stage in found]


def with_options(passes: Sequence[Pass[Any]], options: Options) -> list[Pass[Any]]:
    """Return the passes with other options."""
    return [
        build([one.name], {one.name: {**one.options(), **options[one.name]}})[0] if one.name in options else one
        for one in passes
    ]


def _rates(passes: Sequence[Pass[Any]]) -> list[Setting]:
    trained = fine_tuned(passes)
    return [
        (f"learning rates times {times}", {one.name: {"lr": times * one.lr} for one in trained}) for times in _RATES
    ]


def _penalties(passes: Sequence[Pass[Any]]) -> list[Setting]:
    for one in passes:
        if not isinstance(one, Sparsify) or not one.optimises:
            continue
        if isinstance(one.target, float):
            return [(f"{2 * one.target:.0%} of the neurons active", {one.name: {"target": min(1.0, 2 * one.target)}})]
        if isinstance(one.alpha, float) and one.target is None:
            return [(f"penalty times {times}", {one.name: {"alpha": times * one.alpha}}) for times in (10, 100)]
    return []


def _experts(passes: Sequence[Pass[Any]], graph: GraphModule) -> list[Setting]:
    one = next(one for one in passes if isinstance(one, Moeify))
    found: list[Setting] = []
    if isinstance(one.experts, int):
        found.append((f"{2 * one.experts} experts", {one.name: {"experts": 2 * one.experts}}))
    elif one.expert_size is None or (isinstance(one.expert_size, int) and one.expert_size > 1):
        size = _SIZE if one.expert_size is None else int(one.expert_size) // 2
        found.append((f"experts of {size} neuron{'s' * (size > 1)}", {one.name: {"expert_size": size}}))
    # Half of a width that is given, as published methods have it, and twice the one that moeify takes by itself.
    usual = max(one.router_widths(graph), default=0) if one.router_width is None else 0
    if width := 2 * usual if one.router_width is None else one.router_width // 2:
        found.append((f"routers of width {width}", {one.name: {"router_width": width}}))
    return found
