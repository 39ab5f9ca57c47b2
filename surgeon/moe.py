"""A feed-forward layer as a mixture of experts: the module, where it stands in a graph, and the knob tau.

Before `lower`, a site is one `call_module` node of an `MoE`. After it, the router's ops and one
`surgeon::dynamic_k_ffn` node stand in the graph. A saved graph holds ops in both cases.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

import surgeon.kernels.dynamic_k  # noqa: F401  (registers the ops)
from surgeon.errors import UsageError
from surgeon.graph import attribute
from surgeon.kernels.activations import ACTIVATIONS
from surgeon.sites import FFNWeights

dynamic_k_ffn = torch.ops.surgeon.dynamic_k_ffn.default
masked_ffn = torch.ops.surgeon.masked_ffn.default


class Router(nn.Module):
    """Predicts the norm of every expert's output: r(x) = |W_b relu(W_a x)|, without biases (D2DMoE, section 3.3).

    x [..., d_in] → scores [..., experts], never negative.
    """

    def __init__(self, d_in: int, width: int, experts: int, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.fc1 = nn.Linear(d_in, width, bias=False, device=device, dtype=dtype)
        self.fc2 = nn.Linear(width, experts, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Score the experts."""
        return self.fc2(F.relu(self.fc1(x))).abs()  # type: ignore[no-any-return]


class MoE(nn.Module):
    """A feed-forward layer split into experts of equal size, in ordinary trainable torch code.

    Every expert is computed and those whose score is below tau times the token's largest score are masked out, so this
    module costs what the dense layer does; `lower` replaces it by an op that skips them. With tau = 0 every expert
    counts and the output is the dense layer's.

    Parameters (E experts of s neurons): w1 [E, s, d_in], b1 [E, s], gate [E, s, d_in], b_gate [E, s], w2 [E, s, d_out],
    b2 [d_out]; those that the dense layer lacks are None. Buffer tau: a scalar in [0, 1].
    """

    tau: Tensor

    def __init__(self, weights: FFNWeights, labels: Tensor, experts: int, activation: str, router_width: int) -> None:
        """Split the weights by `labels` [h]: neuron i belongs to expert labels[i]; every expert has h / experts."""
        super().__init__()
        order = torch.argsort(labels, stable=True)
        hidden, d_in = weights.w1.shape

        def rows(value: Tensor | None) -> nn.Parameter | None:
            if value is None:
                return None
            # Copies: the model that was traced keeps its own weights.
            split = value.detach()[order.to(value.device)].reshape(experts, hidden // experts, *value.shape[1:])
            return nn.Parameter(split.contiguous())

        self.w1, self.b1 = rows(weights.w1), rows(weights.b1)
        self.gate, self.b_gate = rows(weights.gate), rows(weights.b_gate)
        self.w2 = rows(weights.w2)
        self.b2 = None if weights.b2 is None else nn.Parameter(weights.b2.detach().clone())
        self.activation = activation
        self.router = Router(d_in, router_width, experts, device=weights.w1.device, dtype=weights.w1.dtype)
        self.register_buffer("tau", torch.zeros((), dtype=torch.float32, device=weights.w1.device))

    @property
    def experts(self) -> int:
        """Number of experts."""
        assert self.w1 is not None
        return int(self.w1.shape[0])

    def forward(self, x: Tensor) -> Tensor:
        """X [..., d_in] → [..., d_out]."""
        scores, threshold = self.route(x)
        return masked_ffn(  # type: ignore[no-any-return]
            x, scores, threshold, self.w1, self.b1, self.gate, self.b_gate, self.w2, self.b2, self.activation
        )

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [..., E] and the threshold [...] below which an expert is skipped; x [..., d_in]."""
        scores = self.router(x)
        return scores, scores.amax(dim=-1) * self.tau

    def expert_norms(self, x: Tensor) -> Tensor:
        """The router's target: the L2 norm of every expert's output, b2 left out. x [N, d_in] → [N, E], float32.

        Through the Gram matrix of each expert's output weights, ‖h W2‖² = h (W2 W2ᵀ) hᵀ, so that no [E, N, d_out]
        is ever held (D2DMoE, section 3.3).
        """
        assert self.w1 is not None
        assert self.w2 is not None
        act = ACTIVATIONS[self.activation].fn
        experts, size, d_in = self.w1.shape

        def linear(weight: Tensor, bias: Tensor | None) -> Tensor:
            flat = None if bias is None else bias.reshape(-1)
            return F.linear(x, weight.reshape(experts * size, d_in), flat).reshape(-1, experts, size)

        first = linear(self.w1, self.b1)
        hidden = act(first) if self.gate is None else act(linear(self.gate, self.b_gate)) * first
        hidden = hidden.float().transpose(0, 1)  # [E, N, s]
        w2 = self.w2.float()
        if size < w2.shape[-1]:
            squared = ((hidden @ (w2 @ w2.transpose(1, 2))) * hidden).sum(-1)
        else:
            squared = torch.stack([(h @ w).square().sum(-1) for h, w in zip(hidden, w2, strict=True)])
        return squared.clamp_min(0.0).sqrt().t()


@dataclass(frozen=True, eq=False)
class MoESite:
    """A converted feed-forward layer in a graph.

    path: the module path of the expert weights, `encoder.layer.0.moe`. nodes: every execution of it.
    form: "module" (one `call_module` node), "masked" (reference op) or "dynamic" (the op that skips experts).
    """

    path: str
    form: Literal["module", "masked", "dynamic"]
    nodes: tuple[Node, ...]
    w1: Tensor
    gate: Tensor | None
    w2: Tensor
    router_parameters: int
    tau: Tensor

    @property
    def experts(self) -> int:
        """Number of experts."""
        return int(self.w1.shape[0])

    @property
    def expert_multiply_adds(self) -> int:
        """Multiply-adds of one expert for one token."""
        size, d_in = self.w1.shape[1:]
        return int(size * (d_in * (2 if self.gate is not None else 1) + self.w2.shape[2]))

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds for one token when every expert runs, router included (it has one weight per multiply-add)."""
        return self.experts * self.expert_multiply_adds + self.router_parameters

    @property
    def describe(self) -> str:
        """`48 experts × 32, router 128`-style summary."""
        return f"{self.experts} experts × {self.w1.shape[1]}"


def find_moes(graph: GraphModule) -> list[MoESite]:
    """Every mixture of experts in the graph, in topological order."""
    found: dict[str, list[Node]] = {}
    forms: dict[str, Literal["module", "masked", "dynamic"]] = {}
    for node in graph.graph.nodes:
        if node.op == "call_module" and isinstance(graph.get_submodule(str(node.target)), MoE):
            path, form = str(node.target), "module"
        elif node.op == "call_function" and node.target in (dynamic_k_ffn, masked_ffn):
            w1 = node.args[3]
            assert isinstance(w1, Node)
            path, form = str(w1.target).rpartition(".")[0], "dynamic" if node.target is dynamic_k_ffn else "masked"
        else:
            continue
        found.setdefault(path, []).append(node)
        forms[path] = form  # type: ignore[assignment]
    return [_site(graph, path, forms[path], nodes) for path, nodes in found.items()]


def _site(graph: GraphModule, path: str, form: Literal["module", "masked", "dynamic"], nodes: list[Node]) -> MoESite:
    module = graph.get_submodule(path)
    router = attribute(graph, f"{path}.router")
    return MoESite(
        path,
        form,
        tuple(nodes),
        module.w1,  # type: ignore[arg-type]
        getattr(module, "gate", None),
        module.w2,  # type: ignore[arg-type]
        sum(parameter.numel() for parameter in router.parameters()),
        module.tau,  # type: ignore[arg-type]
    )


def set_tau(graph: GraphModule, tau: float | Mapping[str, float], path: str | None = None) -> list[str]:
    """Set the share of the largest router score below which an expert is skipped; larger is cheaper, 0 runs all.

    Takes effect at the next call, in every form of the graph, and needs no retraining (D2DMoE, section 3.4).

    Args:
        tau: one value in [0, 1], or a value for each path.
        path: which layers: the path of the feed-forward layer or of its experts, or a pattern with `*`. All by default.

    Returns:
        The paths that were set.

    Raises:
        UsageError: tau is outside [0, 1], the graph has no experts, or no layer has that path.
    """
    sites = find_moes(graph)
    if not sites:
        raise UsageError("The graph has no experts to set tau for. Apply moeify first.")
    wanted = tau if isinstance(tau, Mapping) else {path or "*": tau}
    chosen: dict[str, tuple[MoESite, float]] = {}
    for pattern, value in wanted.items():
        if not 0.0 <= value <= 1.0:
            raise UsageError(f"tau is {value}, but it is a share of the largest score: give a value from 0 to 1.")
        matching = [site for site in sites if _matches(site.path, pattern)]
        if not matching:
            raise UsageError(f"No layer '{pattern}'. Layers with experts: {', '.join(site.path for site in sites)}.")
        chosen.update({site.path: (site, value) for site in matching})
    with torch.no_grad():
        for site, value in chosen.values():
            site.tau.fill_(value)
    return list(chosen)


def get_tau(graph: GraphModule) -> dict[str, float]:
    """The tau of every layer, by the path of its experts."""
    return {site.path: float(site.tau) for site in find_moes(graph)}


def _matches(path: str, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in (path, path.rpartition(".")[0]))
