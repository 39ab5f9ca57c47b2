"""Count what a graph costs: parameters, multiply-adds, and the share of the experts that really ran."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from surgeon.graph import flat_inputs, tensor_key
from surgeon.kernels.dynamic_k import selected
from surgeon.moe import MoE, MoESite, find_moes
from surgeon.report import Cost


def _attention_flops(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


# Attention as it runs on CPUs, for which torch has no formula.
_ALSO_COUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


@dataclass
class LayerRun:
    """What one expert layer ran: expert-token pairs in all and those that ran, and the multiply-adds of one pair."""

    pairs: int = 0
    ran: int = 0
    per_pair: int = 0

    @property
    def share(self) -> float:
        """Share of the pairs that ran."""
        return self.ran / self.pairs if self.pairs else 1.0

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds if every pair had run."""
        return self.pairs * self.per_pair


def parameter_count(graph: GraphModule) -> int:
    """Numbers in the graph's parameters; memory shared under several names counts once."""
    return sum({tensor_key(parameter): parameter.numel() for parameter in graph.parameters()}.values())


def measure(graph: GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Cost, dict[str, LayerRun]]:
    """The cost of one call, and what each expert layer ran in it, by path.

    One multiply-add is two of the operations that `torch.utils.flop_counter` counts. The graph is run once, in the mode
    it is in.
    """
    meter = ExpertMeter(graph)
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_ALSO_COUNTED) as counter:
        meter.call(args, kwargs)
    counted = counter.get_total_flops() // 2
    # The masked form computes what it then drops, and the count has it; the dynamic form never does.
    dropped = dict.fromkeys(("module", "masked", "dynamic"), 0)
    for site in meter.sites.values():
        layer = meter.layers[site.path]
        dropped[site.form] += (layer.pairs - layer.ran) * layer.per_pair
    everything = sum(layer.multiply_adds for layer in meter.layers.values())
    executed = 1.0 - sum(dropped.values()) / everything if everything else None
    cost = Cost(
        parameter_count(graph),
        counted + dropped["dynamic"],
        counted - dropped["module"] - dropped["masked"],
        executed,
    )
    return cost, meter.layers


class ExpertMeter(Interpreter):
    """Runs a graph and counts, at every expert layer, the expert-token pairs that ran; adds up over calls.

    token_mask: given the leading dimensions of a layer's tokens, which of them count (True); None counts all.
    """

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.sites: dict[str, MoESite] = {site.path: site for site in find_moes(graph)}
        self.layers = {path: LayerRun(per_pair=site.expert_multiply_adds) for path, site in self.sites.items()}
        self.token_mask: Callable[[Sequence[int]], Tensor | None] | None = None
        self._site_of: dict[Node, MoESite] = {node: site for site in self.sites.values() for node in site.nodes}
        self._out_spec = graph.graph._codegen.pytree_info.out_spec  # type: ignore[attr-defined]

    def call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call the graph with its own arguments; returns its output."""
        assert isinstance(self.module, GraphModule)
        flat = self.run(*flat_inputs(self.module, args, kwargs), enable_io_processing=False)
        return flat if self._out_spec is None else pytree.tree_unflatten(list(flat), self._out_spec)

    def run_node(self, n: Node) -> Any:
        """Run one node, after looking at what a router selected if it is an expert layer."""
        site = self._site_of.get(n)
        if site is not None:
            args, _ = self.fetch_args_kwargs_from_env(n)
            # Looking costs nothing that should be counted.
            with _disable_current_modes(), torch.no_grad():
                self._count(site, n, args)
        return super().run_node(n)

    def _count(self, site: MoESite, node: Node, args: tuple[Any, ...]) -> None:
        if site.form == "module":
            moe = self.submodules[str(node.target)]
            assert isinstance(moe, MoE)
            scores, threshold = moe.route(args[0])
        else:
            scores, threshold = args[1], args[2]
        ran = selected(scores, threshold)
        mask = None if self.token_mask is None else self.token_mask(ran.shape[:-1])
        if mask is not None:
            ran = ran[mask]
        layer = self.layers[site.path]
        layer.pairs += math.prod(ran.shape)
        layer.ran += int(ran.sum())
