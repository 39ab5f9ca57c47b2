"""Count what the blocks of a model cost for the tokens that have not halted.

A linear layer costs the same for every token. The products of an attention cost as many times the number of tokens as
there are tokens, so that they fall with its square. Padding counts in neither.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from surgeon.exits.blocks import is_layer
from surgeon.exits.halting import HaltSite
from surgeon.graph.ops import PRODUCTS
from surgeon.graph.traced import is_call
from surgeon.kernels.token_halting import halted


class LiveTokens:
    """Which tokens of the present call have not halted at a place. live, real: bool [B, T], real for no padding."""

    def __init__(self, total: Tensor, real: Tensor | None) -> None:
        self.real = torch.ones_like(total, dtype=torch.bool) if real is None else real
        self.live = ~halted(total) & self.real

    def shares(self, *, squared: bool) -> tuple[float, float]:
        """Return the shares of what is computed for all tokens that real and that live ones cost.

        squared: whether the cost is that of an attention.
        """
        rows, length = self.live.shape
        power = 2 if squared else 1
        whole = max(1, rows * length**power)
        real, live = (int((part.sum(-1) ** power).sum()) for part in (self.real, self.live))
        return real / whole, live / whole


def attention_products(graph: GraphModule, sites: Sequence[HaltSite]) -> set[Node]:
    """Return the nodes of the blocks that multiply tokens with one another."""
    nodes = (node for site in sites for node in site.block)
    return {node for node in nodes if is_call(node, *PRODUCTS) and not is_layer(graph, node)}
