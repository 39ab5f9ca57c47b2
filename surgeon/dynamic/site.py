"""What skips work by tau in a model: mixtures of experts, layers that skip inputs or neurons, and early exits."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from torch import nn
from torch.fx import GraphModule, Node

from surgeon.errors import UsageError
from surgeon.exits.halting import HaltSite, find_halts
from surgeon.exits.site import ExitSite, find_exits
from surgeon.inputs.skipping import SkippingSite, find_skipping
from surgeon.moe.site import MoESite, find_moes

DynamicSite: TypeAlias = MoESite | SkippingSite | ExitSite | HaltSite


def find_dynamic(model: nn.Module) -> list[DynamicSite]:
    """Return every layer that has a tau, in topological order of a graph, or in the order of a model's modules."""
    found: list[DynamicSite] = [*find_moes(model), *find_skipping(model), *find_exits(model), *find_halts(model)]
    if isinstance(model, GraphModule):
        place = {node: index for index, node in enumerate(model.graph.nodes)}
        return sorted(found, key=lambda site: place[_first(site)])
    order = {path: index for index, (path, _) in enumerate(model.named_modules())}
    return sorted(found, key=lambda site: order[site.path])


def tau_of(site: DynamicSite) -> float:
    """Return the tau of a layer as it was typed: 0.05, not the 0.05000000074505806 that float32 makes of it."""
    return float(str(np.float32(float(site.tau))))


def can_be_dense(site: DynamicSite) -> bool:
    """Whether a layer can be put back into its dense form: not if its weights are stored as small integers."""
    return not isinstance(site, ExitSite | HaltSite) and not (isinstance(site, MoESite) and site.form == "int8")


def _first(site: DynamicSite) -> Node:
    """The node at which it is known what is skipped."""
    if isinstance(site, ExitSite):
        return site.logits
    return site.total if isinstance(site, HaltSite) else site.nodes[0]


def no_dynamic(name: str, so: str, then: str = "") -> UsageError:
    """Return the error that a model has no layer with a tau.

    Args:
        name: of the model, as the sentence begins.
        so: what does not work without one.
        then: what to do after the passes that make one.
    """
    passes = "moeify, sparsify-inputs or sparsify-neurons"
    return UsageError(f"{name} has no layers that skip, so {so}. Apply {passes} first{then}.")
