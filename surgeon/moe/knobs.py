"""The knobs that are set after training: tau, the selection rule, and compensation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from surgeon.errors import UsageError
from surgeon.graph.patterns import first_fit, matches
from surgeon.kernels.selection import check_rule
from surgeon.moe.site import MoESite, find_moes

# Buffer of a layer's module that holds the mean output of what it skips, see `surgeon.measure.compensation`.
SKIPPED_MEAN = "skipped_mean"

Value = TypeVar("Value")


def set_tau(graph: GraphModule, tau: float | Mapping[str, float], path: str | None = None) -> list[str]:
    """Set the knob of every layer's selection rule; larger is cheaper, 0 runs all experts.

    For the rule "max" it is the share of the largest score below which an expert is skipped (D2DMoE, section 3.4); see
    `surgeon.kernels.selection` for the others. Takes effect at the next call, in every form of the graph, and needs no
    retraining.

    Args:
        tau: one value in [0, 1], or values by path, of which the first that fits a layer counts. Layers that none fits
            keep what they have.
        path: which layers: the path of the feed-forward layer or of its experts, or a pattern with `*`. All by default.

    Returns:
        The paths of the experts that were set, in the graph's order.

    Raises:
        UsageError: tau is outside [0, 1], the graph has no experts, or a path is that of no layer.
    """
    wanted = tau if isinstance(tau, Mapping) else {path or "*": tau}
    for value in wanted.values():
        if not 0.0 <= value <= 1.0:
            raise UsageError(f"tau is {value}, but it is a share: give a value from 0 to 1.")
    chosen = _chosen(graph, wanted)
    with torch.no_grad():
        for site, value in chosen:
            if abs(float(site.tau) - value) > 1e-6:
                _reset_compensation(graph, site)
            site.tau.fill_(value)
    return [site.path for site, _ in chosen]


def get_tau(graph: GraphModule) -> dict[str, float]:
    """The tau of every layer, by the path of its experts."""
    return {site.path: float(site.tau) for site in find_moes(graph)}


def set_rule(graph: GraphModule, rule: str | Mapping[str, str], path: str | None = None) -> list[str]:
    """Set the rule by which scores and tau select experts, without retraining.

    Args:
        rule: one of `surgeon.kernels.selection.RULES`, or rules by path. path: as in `set_tau`.

    Returns:
        The paths of the experts that were set, in the graph's order.

    Raises:
        UsageError: there is no such rule or no such layer, or the graph has no experts.
    """
    wanted = rule if isinstance(rule, Mapping) else {path or "*": rule}
    for value in wanted.values():
        check_rule(value)
    chosen = _chosen(graph, wanted)
    changed = [(site, value) for site, value in chosen if site.rule != value]
    for site, value in changed:
        _reset_compensation(graph, site)
        for node in site.nodes:
            if site.form == "module":
                module: Any = graph.get_submodule(site.path)
                module.rule = value
            else:
                threshold = node.args[2]
                assert isinstance(threshold, Node)
                threshold.update_arg(2, value)
    if changed:  # a graph that is as it was keeps what `torch.compile` made of it
        graph.recompile()
    return [site.path for site, _ in chosen]


def get_rule(graph: GraphModule) -> dict[str, str]:
    """The selection rule of every layer, by the path of its experts."""
    return {site.path: site.rule for site in find_moes(graph)}


def compensated(graph: GraphModule) -> list[str]:
    """The layers that add the mean of what they skip (`surgeon.measure.compensation`), by the path of their experts."""
    # A mean that no longer holds is set to zero.
    return [path for path, mean in get_knobs(graph).means.items() if bool(mean.any())]


@dataclass(frozen=True)
class Knobs:
    """All that can be set after training, by layer: tau, rule, and the mean of what is skipped where it is added."""

    taus: dict[str, float]
    rules: dict[str, str]
    means: dict[str, Tensor]


def get_knobs(graph: GraphModule) -> Knobs:
    """The knobs as they are now."""
    means = {site.path: getattr(graph.get_submodule(site.path), SKIPPED_MEAN, None) for site in find_moes(graph)}
    kept = {path: mean.clone() for path, mean in means.items() if isinstance(mean, Tensor)}
    return Knobs(get_tau(graph), get_rule(graph), kept)


def set_knobs(graph: GraphModule, knobs: Knobs) -> None:
    """Put all of them back."""
    set_tau(graph, knobs.taus)
    set_rule(graph, knobs.rules)
    with torch.no_grad():
        for path, mean in knobs.means.items():
            getattr(graph.get_submodule(path), SKIPPED_MEAN).copy_(mean)


def _reset_compensation(graph: GraphModule, site: MoESite) -> None:
    """Other experts are skipped from now on, so the mean of what was skipped is no longer added."""
    mean = getattr(graph.get_submodule(site.path), SKIPPED_MEAN, None)
    if mean is not None:
        with torch.no_grad():
            mean.zero_()


def _chosen(graph: GraphModule, wanted: Mapping[str, Value]) -> list[tuple[MoESite, Value]]:
    """Every layer that a pattern fits, with the value of the first that does.

    Raises:
        UsageError: the graph has no experts, or a pattern fits no layer.
    """
    sites = find_moes(graph)
    if not sites:
        raise UsageError("The graph has no experts to set anything for. Apply moeify first.")
    for pattern in wanted:
        if not any(matches([pattern], *_names(site)) for site in sites):
            raise UsageError(f"No layer '{pattern}'. Layers with experts: {', '.join(site.path for site in sites)}.")
    return [(site, value) for site in sites if (value := first_fit(wanted, *_names(site))) is not None]


def _names(site: MoESite) -> tuple[str, str]:
    """The path of the experts, and that of the feed-forward layer they came from."""
    return site.path, site.path.rpartition(".")[0]
