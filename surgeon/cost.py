"""Count what a graph costs: parameters, multiply-adds, and the share of the experts that really ran."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils.flop_counter import FlopCounterMode

from surgeon.graph import flat_inputs, tensor_key
from surgeon.kernels.dynamic_k import selected
from surgeon.moe import MoE, MoESite, find_moes
from surgeon.report import Cost


def parameter_count(graph: GraphModule) -> int:
    """Numbers in the graph's parameters; memory shared under several names counts once."""
    return sum({tensor_key(parameter): parameter.numel() for parameter in graph.parameters()}.values())


def measure(graph: GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Cost, dict[str, float]]:
    """The cost of one call, and for each expert layer the share of its expert-token pairs that ran.

    One multiply-add is two of the operations that `torch.utils.flop_counter` counts. The graph is run once, in the mode
    it is in.
    """
    meter = _Meter(graph)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        meter.run(*flat_inputs(graph, args, kwargs), enable_io_processing=False)
    counted = counter.get_total_flops() // 2
    shares, everything, skipped_by_op, skipped_by_mask = {}, 0.0, 0.0, 0.0
    for site in meter.sites.values():
        ran, pairs = meter.ran[site.path], meter.pairs[site.path]
        shares[site.path] = ran / pairs if pairs else 1.0
        skipped = (pairs - ran) * site.expert_multiply_adds
        everything += pairs * site.expert_multiply_adds
        if site.form == "dynamic":
            skipped_by_op += skipped
        else:
            skipped_by_mask += skipped
    executed = 1.0 - (skipped_by_op + skipped_by_mask) / everything if everything else None
    return (
        Cost(parameter_count(graph), int(counted + skipped_by_op), int(counted - skipped_by_mask), executed),
        shares,
    )


class _Meter(Interpreter):
    """Runs a graph and counts, at every expert layer, the expert-token pairs that ran."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.sites: dict[str, MoESite] = {site.path: site for site in find_moes(graph)}
        self._site_of: dict[Node, MoESite] = {node: site for site in self.sites.values() for node in site.nodes}
        self.ran: dict[str, float] = defaultdict(float)
        self.pairs: dict[str, int] = defaultdict(int)

    def run_node(self, n: Node) -> Any:
        site = self._site_of.get(n)
        if site is not None:
            args, _ = self.fetch_args_kwargs_from_env(n)
            if site.form == "module":
                module = self.submodules[str(n.target)]
                assert isinstance(module, MoE)
                # Outside the count: the module computes its scores again when it runs.
                with torch.utils._python_dispatch._disable_current_modes():
                    scores: Tensor = module.router(args[0])
                    threshold = scores.amax(dim=-1) * module.tau
            else:
                scores, threshold = args[1], args[2]
            with torch.utils._python_dispatch._disable_current_modes():
                self.ran[site.path] += float(selected(scores, threshold).sum())
            self.pairs[site.path] += math.prod(scores.shape)
        return super().run_node(n)
