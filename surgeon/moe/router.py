"""Routers, which predict from a layer's input how large the output of each expert will be.

This module defines what a router should predict (`Objective`) and its loss. `surgeon.moe.closed_form` fits routers
without training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgeon.collective import largest, mean
from surgeon.kernels.activations import ACTIVATIONS
from surgeon.kernels.experts import Experts, hidden
from surgeon.kernels.scores import HIDDEN, OUTPUT, Hidden, Output, neuron_size
from surgeon.sites.ffn import FFNWeights

Objective = Literal["norm", "relative", "log", "activation"]
Labels = Literal["output", "hidden"]
Step = Callable[..., Any]

# For "log", differences below this share of the token's largest norm do not matter.
_LOG_FLOOR = 0.01


@dataclass(frozen=True)
class Goal:
    """What a router learns to predict.

    objective: the quantity to predict, see `target`. labels: whether norms are of the experts' outputs or of their
    hidden activations. underestimate: weight of the errors of scores that are too low.
    """

    objective: Objective = "relative"
    labels: Labels = "output"
    underestimate: float = 1.0

    def loss(self, router: Router, x: Tensor, experts: Experts, activation: str) -> Tensor:
        """Return the router's loss on inputs x [N, d_in] of the experts that it scores, a scalar."""
        return self.error(router, x, self.wanted(x, experts, activation))

    def wanted(self, x: Tensor, experts: Experts, activation: str) -> Tensor:
        """Return the target of a router for inputs x [N, d_in] of these experts: [N, E], without gradients."""
        with torch.no_grad():
            return target(self.objective, x, experts, activation, self.labels)

    def error(self, router: Router, x: Tensor, wanted: Tensor) -> Tensor:
        """Return the router's loss on x against the target `wanted`, a scalar."""
        # Cross entropy takes logits, because scores of exactly 0 or 1 have no gradient.
        given = router.logits(x) if self.objective == "activation" else router(x)
        return router_loss(self.objective, given, wanted, self.underestimate)


class Router(nn.Module):
    """Scores experts: r(x) = |W_b relu(W_a x)| (D2DMoE, section 3.3), x [..., d_in] → [..., experts], never negative.

    hidden: "relu", or "tanh" as in MoEfication. output: "abs" as published, "relu" or "softplus" for a regression,
    "exp" for the objective "log", and "sigmoid" for "activation". goal: what passes train the router for.
    fc1 is the trunk. The routers of several layers that read the same input may share it. A router with one linear
    layer, |W x|, has no trunk.

    A router with an activation has no trunk either. Its scores are the sizes of hidden values: |activation(W x)|, or
    |activation(W x) · (U x)| with U in `up` if the layer is gated.
    """

    fc1: nn.Linear | None
    up: nn.Linear | None

    def __init__(
        self,
        d_in: int,
        width: int | None,
        experts: int,
        *,
        bias: bool = False,
        hidden: Hidden = "relu",
        output: Output = "abs",
        activation: str | None = None,
        gated: bool = False,
        goal: Goal | None = None,
        like: Tensor | None = None,
    ) -> None:
        """Make a router with random weights, on the device and in the dtype of `like`.

        width: the width of the trunk, or None for a router with one linear layer. activation: that of the experts, for
        scores that are sizes of hidden values; gated: whether the experts are gated, which matters only then.
        """
        super().__init__()
        device, dtype = (None, None) if like is None else (like.device, like.dtype)
        options: Any = {"bias": bias, "device": device, "dtype": dtype}
        self.fc1 = None if width is None else nn.Linear(d_in, width, **options)
        self.fc2 = nn.Linear(d_in if width is None else width, experts, **options)
        self.up = nn.Linear(d_in, experts, **options) if gated and activation is not None else None
        self.hidden, self.output, self.activation, self.goal = hidden, output, activation, goal or Goal()

    @property
    def first(self) -> nn.Linear:
        """The linear layer that reads the input."""
        return self.fc2 if self.fc1 is None else self.fc1

    def start_from_centres(self, rows: Tensor) -> None:
        """Score by the product of x and the mean of an expert's normalised weight rows (MoEfication's "param centre").

        Args:
            rows: [experts, s, d_in]. In a router with two layers, the first must be as wide as the number of experts,
                and the second becomes the identity.
        """
        with torch.no_grad():
            # Filling neurons have no direction, so they do not count.
            normalised = F.normalize(rows.float(), dim=-1)
            self.first.weight.copy_(normalised.sum(1) / normalised.any(-1).sum(1, keepdim=True).clamp_min(1))
            if self.fc1 is not None:
                nn.init.eye_(self.fc2.weight)

    def start_from_neurons(self, neurons: Tensor, weights: FFNWeights) -> None:
        """Score every expert by the hidden value of one neuron, whose weight rows get the length 1 (CMoE).

        Args:
            neurons: the neuron of each expert among those of `weights`, int64 [experts].
        """
        w1, b1, gate, b_gate = (
            None if rows is None else rows.detach()[neurons]
            for rows in (weights.w1, weights.b1, weights.gate, weights.b_gate)
        )
        linears = [(self.fc2, w1, b1)] if gate is None else [(self.fc2, gate, b_gate), (self.up, w1, b1)]
        with torch.no_grad():
            for linear, weight, bias in linears:
                assert linear is not None
                assert weight is not None
                length = weight.float().norm(dim=1).clamp_min(1e-12)
                linear.weight.copy_(weight / length[:, None])
                if linear.bias is not None:
                    linear.bias.copy_(torch.zeros_like(length) if bias is None else bias / length)

    def forward(self, x: Tensor) -> Tensor:
        """Score the experts."""
        # The linear layers are called as modules, so that hooks of theirs run (weights that are kept on disk).
        return self.steps(lambda op, *args: op(*args), x, lambda name, x: getattr(self, name)(x))  # type: ignore[no-any-return]

    def logits(self, x: Tensor) -> Tensor:
        """Return the scores before the last op (abs, relu, softplus, exp or sigmoid)."""
        return self._logits(lambda op, *args: op(*args), x, lambda name, x: getattr(self, name)(x))  # type: ignore[no-any-return]

    def steps(self, step: Step, x: Any, linear: Callable[[str, Any], Any]) -> Any:
        """Go through the router op by op. `step(op, *args)` runs an ATen op or adds it to a graph.

        linear: does the same for the layer of a name, "fc1", "fc2" or "up", on an input.
        """
        if self.activation is not None:
            up = None if self.up is None else linear("up", x)
            return step(neuron_size, linear("fc2", x), up, self.activation)
        op, *arguments = OUTPUT[self.output]
        return step(op, self._logits(step, x, linear), *arguments)

    def _logits(self, step: Step, x: Any, linear: Callable[[str, Any], Any]) -> Any:
        if self.fc1 is not None:
            x = step(HIDDEN[self.hidden], linear("fc1", x))
        return linear("fc2", x)


def expert_norms(x: Tensor, experts: Experts, activation: str, labels: Labels = "output") -> Tensor:
    """Return the L2 norm of every expert's output without b2 (D2DMoE, section 3.3): x [N, d_in] → [N, E], float32.

    With `labels` "hidden" it is the norm of the expert's hidden activations. The norm of the output is computed with
    the Gram matrix of the output weights, ‖h W2‖² = h (W2 W2ᵀ) hᵀ, so that no tensor [E, N, d_out] is needed.
    """
    h = _hidden(x, experts, activation)
    return h.norm(dim=-1) if labels == "hidden" else _norms(h, experts.w2)


def activation_sums(x: Tensor, experts: Experts, activation: str) -> Tensor:
    """Return the sum of each expert's positive activations, the label of MoEfication: [N, d_in] → [N, E]."""
    return _hidden(x, experts, activation).clamp_min(0.0).sum(-1)


def _hidden(x: Tensor, experts: Experts, activation: str) -> Tensor:
    """Compute the hidden activations by expert: [N, d_in] → [N, E, s], float32."""
    h = hidden(x, experts.flat(), ACTIVATIONS[activation]).float()
    return h.view(len(h), *experts.w1.shape[:2])


def _norms(h: Tensor, w2: Tensor) -> Tensor:
    h, w2 = h.transpose(0, 1), w2.float()  # [E, N, s], [E, s, d_out]
    if w2.shape[1] < w2.shape[2]:
        squared = ((h @ (w2 @ w2.transpose(1, 2))) * h).sum(-1)
    else:
        squared = torch.stack([(part @ weights).square().sum(-1) for part, weights in zip(h, w2, strict=True)])
    return squared.clamp_min(0.0).sqrt().t()


def target(objective: Objective, x: Tensor, experts: Experts, activation: str, labels: Labels = "output") -> Tensor:
    """Return what the router should predict: its logits for "log", its scores for other objectives. [N, d_in] → [N, E].

    norm: the norms of the experts' outputs (D2DMoE), or of their hidden activations if `labels` is "hidden".
    relative: these norms divided by the token's largest, because the rules compare nothing else.
    log: the logarithm of the relative norms.
    activation: the sums of activations divided by the largest sum in x (MoEfication).
    """
    if objective == "activation":
        sums = activation_sums(x, experts, activation)
        return sums / largest(sums).clamp_min(1e-12)
    norms = expert_norms(x, experts, activation, labels)
    if objective == "norm":
        return norms
    shares = norms / norms.amax(-1, keepdim=True).clamp_min(1e-12)
    return (shares + _LOG_FLOOR).log() if objective == "log" else shares


def router_loss(objective: Objective, scores: Tensor, wanted: Tensor, underestimate: float = 1.0) -> Tensor:
    """Return the loss of the scores, a scalar: mean squared error, or binary cross entropy for "activation".

    scores: for "activation", the logits before the sigmoid, so that a saturated wrong score still has a gradient.
    underestimate: weight of the errors of experts whose score is too low. Above 1, experts are skipped more cautiously.
    """
    scores = scores.float()
    if objective == "activation":
        return mean(F.binary_cross_entropy_with_logits(scores, wanted, reduction="none"))
    error = (scores.log() if objective == "log" else scores) - wanted
    if underestimate == 1.0:
        return mean(error.square())
    return mean(error.square() * torch.where(error < 0, underestimate, 1.0))
