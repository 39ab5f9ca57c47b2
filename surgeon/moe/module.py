"""A feed-forward layer as a mixture of experts: the module that passes put into a graph.

Before `lower`, a layer is one `call_module` node of an `MoE`. After `lower`, the graph has the router's ops and one
`surgeon::dynamic_k_ffn` node instead. A saved graph has ops in both cases.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from surgeon.graph.traced import aten
from surgeon.kernels.experts import Experts
from surgeon.moe.filling import fill, silent_bias
from surgeon.moe.ops import masked_ffn, selection_threshold
from surgeon.moe.router import Router, Step
from surgeon.sites.ffn import FFNWeights


class MoE(nn.Module):
    """A feed-forward layer split into experts of equal size, in ordinary trainable torch code.

    The module computes every expert and masks out those that the rule does not select at tau, so it costs as much as
    the dense layer. `lower` replaces it by an op that skips these experts. With tau = 0 every expert counts, and the
    output is the dense layer's. The rule is one of `kernels.selection.RULES`. It starts as "max", which skips experts
    whose score is below tau times the token's largest score.

    The first `shared` experts always run, and the router scores the others.

    Parameters (E experts of s neurons): w1 [E, s, d_in], b1 [E, s], gate [E, s, d_in], b_gate [E, s], w2 [E, s, d_out],
    b2 [d_out]. Those that the dense layer does not have are None. Buffer tau: a scalar in [0, 1].
    """

    tau: Tensor

    def __init__(
        self, weights: FFNWeights, labels: Tensor, experts: int, activation: str, router: Router, *, shared: int = 0
    ) -> None:
        """Split the weights by `labels` [h]: neuron i belongs to expert labels[i].

        Experts with fewer neurons than the largest are filled up (see `surgeon.moe.filling`).
        router: scores the experts after the first `shared`, which always run.
        """
        super().__init__()
        counts = torch.bincount(labels, minlength=experts)
        size, order = int(counts.max()), torch.argsort(labels, stable=True)
        # The place of a neuron: its rank among the neurons of its expert, after all places of the experts before.
        starts = counts.cumsum(0) - counts
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order)) - starts[labels[order]] + size * labels[order]

        def rows(value: Tensor | None, filling: float = 0.0) -> nn.Parameter | None:
            if value is None:
                return None
            # Copy the weights, because the traced model keeps its own.
            filled = fill(value.detach(), places, experts * size, filling)
            return nn.Parameter(filled.reshape(experts, size, *value.shape[1:]))

        silent, b1 = silent_bias(weights, activation), weights.b1
        if silent and b1 is None and experts * size > len(order):
            b1 = weights.w1.new_zeros(len(order))
        self.w1, self.b1 = rows(weights.w1), rows(b1, silent)
        self.gate, self.b_gate = rows(weights.gate), rows(weights.b_gate)
        self.w2 = rows(weights.w2)
        self.b2 = None if weights.b2 is None else nn.Parameter(weights.b2.detach().clone())
        self.activation, self.shared, self.rule = activation, shared, "max"
        self.router = router
        self.register_buffer("tau", torch.zeros((), dtype=torch.float32, device=weights.w1.device))

    @property
    def weights(self) -> Experts:
        """The experts' weights."""
        assert self.w1 is not None
        assert self.w2 is not None
        return Experts(self.w1, self.b1, self.gate, self.b_gate, self.w2)

    @property
    def routed(self) -> Experts:
        """The weights of the experts that the router scores."""
        return self.weights.after(self.shared)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer: x [..., d_in] → [..., d_out]."""
        scores, threshold = self.route(x)
        return masked_ffn(  # type: ignore[no-any-return]
            x, scores, threshold, self.w1, self.b1, self.gate, self.b_gate, self.w2, self.b2, self.activation
        )

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores [..., E] and the threshold [...] below which an expert is skipped, for x [..., d_in]."""
        return self.select(lambda op, *args: op(*args), self.router(x), self.tau)

    def select(self, step: Step, scores: Any, tau: Any) -> tuple[Any, Any]:
        """Return the scores of all experts and the threshold. `step` runs the ops or adds them to a graph."""
        threshold = step(selection_threshold, scores, tau, self.rule)
        if self.shared:
            scores = step(aten.constant_pad_nd.default, scores, [self.shared, 0], float("inf"))
        return scores, threshold
