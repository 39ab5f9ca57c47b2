"""Find layers whose routers share a trunk: replaced projections of the same attention that read the same input.

In an encoder-decoder model the keys and values of every decoder layer read the encoder's output. A small trunk cannot
represent the neurons of all these layers, so layers must also belong to the same attention.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.fx import GraphModule, Node

from surgeon.graph.walk import walk_users
from surgeon.moe.module import MoE
from surgeon.moe.site import find_moes
from surgeon.sites.ffn import FFN
from surgeon.sites.linear import find_linears


def trunk_groups(graph: GraphModule, sites: Sequence[FFN]) -> list[list[FFN]]:
    """Group the sites that share a trunk. A site that is not a replaced projection has a group of its own."""
    order = {node: place for place, node in enumerate(graph.graph.nodes)}
    linears = {linear.core for linear in find_linears(graph)[0]}
    linears |= {node for moe in find_moes(graph) for node in moe.nodes}
    groups: dict[object, list[FFN]] = defaultdict(list)
    for site in sites:
        if site.is_projection:
            call = site.calls[0]
            groups[call.x, _meeting_point(call.output, linears, order)].append(site)
        else:
            groups[site].append(site)
    return list(groups.values())


def trunk_of(graph: GraphModule, site: FFN, group: Sequence[str]) -> nn.Linear | None:
    """Return the trunk of a group, given by its paths, if a site of the group already has a router; else None."""
    for node in site.calls[0].x.users:
        if node.op == "call_module" and str(node.target).rpartition(".")[0] in group:
            module = graph.get_submodule(str(node.target))
            if isinstance(module, MoE):
                return module.router.fc1
    return None


def _meeting_point(output: Node, linears: set[Node], order: Mapping[Node, int]) -> Node | None:
    """Return the first linear layer that reads the values. For queries, keys and values it mixes the heads."""

    def through(user: Node) -> bool:
        # Do not follow sizes: they carry no values.
        return user not in linears and not isinstance(user.meta.get("val"), int | torch.SymInt)

    found = (user for user in walk_users(output, through) if user in linears)
    return min(found, key=lambda node: order[node], default=None)
