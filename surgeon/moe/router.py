"""Routers: predict from a layer's input how large every expert's output will be, and learn to.

What a router should predict (`Objective`), what it is penalised with, and a closed-form fit that needs no training:
some of the layer's own neurons as features, and ridge regression from them to the experts' norms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgeon.graph.traced import aten
from surgeon.kernels.activations import ACTIVATIONS
from surgeon.kernels.experts import Experts, hidden

Objective = Literal["norm", "relative", "log", "activation"]
Labels = Literal["output", "hidden"]
Output = Literal["abs", "relu", "softplus", "exp", "sigmoid"]
Step = Callable[..., Any]

# Below this share of the token's largest norm, differences do not matter for "log".
_LOG_FLOOR = 0.01

_HIDDEN = {"relu": aten.relu.default, "tanh": aten.tanh.default}
# Each output as an op and its further arguments.
_OUTPUT: dict[Output, tuple[Any, ...]] = {
    "abs": (aten.abs.default,),
    "relu": (aten.relu.default,),
    # Close to a ReLU on targets from 0 to 1, but above zero down to -2, where float32 ends: equal scores could not be
    # told apart by a rule.
    "softplus": (aten.softplus.default, 50.0),
    "exp": (aten.exp.default,),
    "sigmoid": (aten.sigmoid.default,),
}


@dataclass(frozen=True)
class Goal:
    """What a router learns to predict.

    labels: the norms of what the objective speaks of. underestimate: weight of the errors of scores that are too low.
    """

    objective: Objective = "relative"
    labels: Labels = "output"
    underestimate: float = 1.0

    def loss(self, router: Router, x: Tensor, experts: Experts, activation: str) -> Tensor:
        """How far the router is from it on inputs x [N, d_in] of the experts it scores: a scalar."""
        return self.error(router, x, self.wanted(x, experts, activation))

    def wanted(self, x: Tensor, experts: Experts, activation: str) -> Tensor:
        """What a router should say to inputs x [N, d_in] of these experts: [N, E], without gradients."""
        with torch.no_grad():
            return target(self.objective, x, experts, activation, self.labels)

    def error(self, router: Router, x: Tensor, wanted: Tensor) -> Tensor:
        """How far the router is from what was wanted on x: a scalar."""
        # Cross entropy wants logits: scores that are exactly 0 or 1 have no gradient.
        given = router.logits(x) if self.objective == "activation" else router(x)
        return router_loss(self.objective, given, wanted, self.underestimate)


class Router(nn.Module):
    """Scores experts: r(x) = |W_b relu(W_a x)| (D2DMoE, section 3.3), x [..., d_in] → [..., experts], never negative.

    hidden: "relu", or "tanh" as in MoEfication. output: "abs" as published, "relu" or "softplus" of a regression, or
    "exp" and "sigmoid" as objectives need.
    fc1, the trunk, may be shared by the routers of several layers that read the same input; a router of one linear
    layer, |W x|, has none. goal: what every pass that trains the router trains it for.
    """

    fc1: nn.Linear | None

    def __init__(
        self,
        d_in: int,
        width: int | None,
        experts: int,
        *,
        bias: bool = False,
        hidden: Literal["relu", "tanh"] = "relu",
        output: Output = "abs",
        goal: Goal | None = None,
        like: Tensor | None = None,
    ) -> None:
        """Make a router with random weights, of the device and dtype of `like`; width None: of one linear layer."""
        super().__init__()
        device, dtype = (None, None) if like is None else (like.device, like.dtype)
        options: Any = {"bias": bias, "device": device, "dtype": dtype}
        self.fc1 = None if width is None else nn.Linear(d_in, width, **options)
        self.fc2 = nn.Linear(d_in if width is None else width, experts, **options)
        self.hidden, self.output, self.goal = hidden, output, goal or Goal()

    @property
    def first(self) -> nn.Linear:
        """The linear layer that reads the input."""
        return self.fc2 if self.fc1 is None else self.fc1

    def start_from_centres(self, rows: Tensor) -> None:
        """Score by the product of x and the mean of an expert's normalised weight rows (MoEfication's "param centre").

        Args:
            rows: [experts, s, d_in]. Of two layers the second becomes the identity, so the first is as wide as there
                are experts.
        """
        with torch.no_grad():
            self.first.weight.copy_(F.normalize(rows.float(), dim=-1).mean(1))
            if self.fc1 is not None:
                nn.init.eye_(self.fc2.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Score the experts."""
        return self.steps(lambda op, *args: op(*args), x, lambda name: self.get_parameter(name))  # type: ignore[no-any-return]

    def logits(self, x: Tensor) -> Tensor:
        """What goes into the last op: the scores before abs, relu, softplus, exp or sigmoid."""
        return self._logits(lambda op, *args: op(*args), x, lambda name: self.get_parameter(name))  # type: ignore[no-any-return]

    def steps(self, step: Step, x: Any, parameter: Callable[[str], Any]) -> Any:
        """The router as a sequence of ATen ops, run or written into a graph by `step(op, *args)`."""
        op, *arguments = _OUTPUT[self.output]
        return step(op, self._logits(step, x, parameter), *arguments)

    def _logits(self, step: Step, x: Any, parameter: Callable[[str], Any]) -> Any:
        def linear(x: Any, layer: nn.Linear, name: str) -> Any:
            bias = () if layer.bias is None else (parameter(f"{name}.bias"),)
            return step(aten.linear.default, x, parameter(f"{name}.weight"), *bias)

        if self.fc1 is not None:
            x = step(_HIDDEN[self.hidden], linear(x, self.fc1, "fc1"))
        return linear(x, self.fc2, "fc2")


def expert_norms(x: Tensor, experts: Experts, activation: str, labels: Labels = "output") -> Tensor:
    """The L2 norm of every expert's output, b2 left out (D2DMoE, section 3.3): x [N, d_in] → [N, E], float32.

    Or that of its hidden activations, if `labels` says so. Through the Gram matrix of each expert's output weights,
    ‖h W2‖² = h (W2 W2ᵀ) hᵀ, so that no [E, N, d_out] is ever held.
    """
    h = _hidden(x, experts, activation)
    return h.norm(dim=-1) if labels == "hidden" else _norms(h, experts.w2)


def activation_sums(x: Tensor, experts: Experts, activation: str) -> Tensor:
    """The sum of every expert's activations without those below zero, MoEfication's label: [N, d_in] → [N, E]."""
    return _hidden(x, experts, activation).clamp_min(0.0).sum(-1)


def _hidden(x: Tensor, experts: Experts, activation: str) -> Tensor:
    """The hidden activations by expert: [N, d_in] → [N, E, s], float32."""
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
    """What the router's last linear should give for "log", and its scores for the others: [N, d_in] → [N, E].

    norm: the norms of the experts' outputs (D2DMoE), or of what `labels` says. relative: those over the token's
    largest, which is all that the rules compare. log: the logarithm of that. activation: sums of activations over the
    largest in x (MoEfication).
    """
    if objective == "activation":
        sums = activation_sums(x, experts, activation)
        return sums / sums.amax().clamp_min(1e-12)
    norms = expert_norms(x, experts, activation, labels)
    if objective == "norm":
        return norms
    shares = norms / norms.amax(-1, keepdim=True).clamp_min(1e-12)
    return (shares + _LOG_FLOOR).log() if objective == "log" else shares


def router_loss(objective: Objective, scores: Tensor, wanted: Tensor, underestimate: float = 1.0) -> Tensor:
    """How wrong scores are, a scalar: mean squared error, or binary cross entropy for "activation".

    scores: for "activation" the logits, whose sigmoid the scores are: one that is certain and wrong has a gradient.
    underestimate: weight of the errors of experts whose score is too low; above 1, experts are skipped more cautiously.
    """
    scores = scores.float()
    if objective == "activation":
        return F.binary_cross_entropy_with_logits(scores, wanted)
    error = (scores.log() if objective == "log" else scores) - wanted
    if underestimate == 1.0:
        return error.square().mean()
    return (error.square() * torch.where(error < 0, underestimate, 1.0)).mean()
