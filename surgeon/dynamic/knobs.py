"""The settings that can be changed after training: tau, the selection rule, and compensation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from surgeon.dynamic.site import DynamicSite, find_dynamic, no_dynamic, tau_of
from surgeon.errors import UsageError
from surgeon.graph.patterns import first_fit, matches
from surgeon.inputs.skipping import find_skipping
from surgeon.kernels.selection import check_rule
from surgeon.moe.int8 import Int8MoE
from surgeon.moe.module import SKIPPED_MEAN, MoE
from surgeon.moe.site import find_moes

Value = TypeVar("Value")
Site = TypeVar("Site", bound=DynamicSite)


def set_tau(model: nn.Module, tau: float | Mapping[str, float], path: str | None = None) -> list[str]:
    """Set tau, which says what each layer skips. A larger tau is cheaper, and at 0 everything runs.

    For the rule "max", an expert is skipped if its score is below tau times the largest score (D2DMoE, section 3.4).
    `surgeon.kernels.selection.RULES` names the others. A layer that skips inputs or neurons skips a share tau of
    them, as measured on the data that it was calibrated on. The change takes effect at the next call, in every form of
    the layers, and needs no retraining.

    Args:
        model: a graph, or a model with converted layers (see `surgeon.graft`).
        tau: a value in [0, 1], or values by path pattern. The first pattern that matches a layer counts. Layers without
            a match keep their tau.
        path: the path of a layer, of its experts or of what selects inputs, or a pattern with `*`. The default is all
            layers.

    Returns:
        The paths of the experts, or of what selects inputs, that were set, in the model's order.

    Raises:
        UsageError: tau is outside [0, 1], the model has no layers that skip, or no layer has the path.
    """
    wanted = tau if isinstance(tau, Mapping) else {path or "*": tau}
    for value in wanted.values():
        if not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
            raise UsageError(f"tau is {value!r}, but must be a number from 0 to 1, or such numbers by path.")
    sites = find_dynamic(model)
    if not sites:
        raise no_dynamic("The model", "there is nothing to set")
    chosen = _chosen(sites, wanted)
    with torch.no_grad():
        for site, value in chosen:
            if abs(float(site.tau) - value) > 1e-6:
                _reset_compensation(model, site)
            site.tau.fill_(value)
    return [site.path for site, _ in chosen]


def get_tau(model: nn.Module) -> dict[str, float]:
    """Return the tau of every layer, by the path of its experts or of what selects inputs."""
    return {site.path: tau_of(site) for site in find_dynamic(model)}


def set_rule(model: nn.Module, rule: str | Mapping[str, str], path: str | None = None) -> list[str]:
    """Set the rule that selects experts from scores and tau. It needs no retraining.

    Args:
        rule: one of `surgeon.kernels.selection.RULES`, or rules by path pattern.
        path: as in `set_tau`.

    Returns:
        The paths of the experts that were set, in the model's order.

    Raises:
        UsageError: there is no such rule or no such layer, or the model has no experts.
    """
    wanted = rule if isinstance(rule, Mapping) else {path or "*": rule}
    for value in wanted.values():
        check_rule(value)
    sites = find_moes(model)
    if not sites:
        raise UsageError("The model has no experts, so there is no rule to set. Apply moeify first.")
    chosen = _chosen(sites, wanted)
    changed = [(site, value) for site, value in chosen if site.rule != value]
    for site, value in changed:
        _reset_compensation(model, site)
        module: Any = model.get_submodule(site.path)
        if isinstance(module, MoE | Int8MoE):
            module.rule = value
            continue
        for node in site.nodes:
            threshold = node if site.form == "int8" else node.args[2]
            assert isinstance(threshold, Node)
            threshold.update_arg(2, value)
    if changed and isinstance(model, GraphModule):  # an unchanged graph keeps its `torch.compile` cache
        model.recompile()
    return [site.path for site, _ in chosen]


def get_rule(model: nn.Module) -> dict[str, str]:
    """Return the selection rule of every layer, by the path of its experts.

    Args:
        model: a graph, or a model with converted layers. Layers that skip inputs or neurons have no rule.
    """
    return {site.path: site.rule for site in find_moes(model)}


def compensated(model: nn.Module) -> list[str]:
    """Return the layers that add the mean of what they skip (`surgeon.measure.compensation`), as paths of experts."""
    # A mean that is no longer valid is set to zero.
    return [path for path, mean in get_knobs(model).means.items() if bool(mean.any())]


@dataclass(frozen=True)
class Knobs:
    """The settings that can be changed after training, by layer: tau, rule, and the mean of what is skipped."""

    taus: dict[str, float]
    rules: dict[str, str]
    means: dict[str, Tensor]


def get_knobs(model: nn.Module) -> Knobs:
    """Return the present settings."""
    means = {site.path: getattr(model.get_submodule(site.path), SKIPPED_MEAN, None) for site in find_moes(model)}
    kept = {path: mean.clone() for path, mean in means.items() if isinstance(mean, Tensor)}
    return Knobs(get_tau(model), get_rule(model), kept)


def set_knobs(model: nn.Module, knobs: Knobs) -> None:
    """Restore all settings."""
    set_tau(model, knobs.taus)
    if knobs.rules:
        set_rule(model, knobs.rules)
    with torch.no_grad():
        for path, mean in knobs.means.items():
            getattr(model.get_submodule(path), SKIPPED_MEAN).copy_(mean)


@contextlib.contextmanager
def nothing_skipped(model: nn.Module) -> Iterator[None]:
    """Let the layers that skip inputs or neurons skip none inside the block.

    Two forms of a model that agree up to rounding may skip others, those that lie at a threshold, and then differ by
    more. They are compared with everything read.
    """
    taus = [(site.tau, site.tau.clone()) for site in find_skipping(model)]
    try:
        with torch.no_grad():
            for tau, _ in taus:
                tau.zero_()
        yield
    finally:
        with torch.no_grad():
            for tau, value in taus:
                tau.copy_(value)


def _reset_compensation(model: nn.Module, site: DynamicSite) -> None:
    """Set the mean of what is skipped to zero, because other experts are skipped from now on."""
    mean = getattr(model.get_submodule(site.path), SKIPPED_MEAN, None)
    if mean is not None:
        with torch.no_grad():
            mean.zero_()


def _chosen(sites: Sequence[Site], wanted: Mapping[str, Value]) -> list[tuple[Site, Value]]:
    """Return every layer that a pattern matches, with the value of the first such pattern.

    Raises:
        UsageError: a pattern matches no layer.
    """
    for pattern in wanted:
        if not isinstance(pattern, str):
            raise UsageError(f"The path {pattern!r} is no text. Layers are named by their paths, such as '*.0.*'.")
        if not any(matches([pattern], *_names(site)) for site in sites):
            raise UsageError(f"No layer '{pattern}'. Layers that can be set: {', '.join(site.path for site in sites)}.")
    return [(site, value) for site in sites if (value := first_fit(wanted, *_names(site))) is not None]


def _names(site: DynamicSite) -> tuple[str, str]:
    """Return the path of the experts, or of what selects inputs, and the path of the layer that it came from."""
    return site.path, site.path.rpartition(".")[0]
