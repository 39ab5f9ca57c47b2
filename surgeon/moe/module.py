"""A feed-forward layer as a mixture of experts: the module, where it stands in a graph, and the knob tau.

Before `lower`, a site is one `call_module` node of an `MoE`. After it, the router's ops and one
`surgeon::dynamic_k_ffn` node stand in the graph. A saved graph holds ops in both cases.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

import surgeon.kernels.dynamic_k  # noqa: F401  (registers the ops)
from surgeon.errors import UsageError
from surgeon.graph.traced import aten, is_call, tensor_key, tensor_of
from surgeon.kernels.selection import check_rule
from surgeon.kernels.torch.backend import Experts
from surgeon.moe.router import Router, Step
from surgeon.sites.ffn import FFNWeights

dynamic_k_ffn = torch.ops.surgeon.dynamic_k_ffn.default
masked_ffn = torch.ops.surgeon.masked_ffn.default
# Buffer of a layer's module that holds the mean output of what it skips, see `surgeon.measure.compensation`.
SKIPPED_MEAN = "skipped_mean"
selection_threshold = torch.ops.surgeon.selection_threshold.default


class MoE(nn.Module):
    """A feed-forward layer split into experts of equal size, in ordinary trainable torch code.

    Every expert is computed and those that the rule leaves out at tau are masked out, so this module costs what the
    dense layer does; `lower` replaces it by an op that skips them. With tau = 0 every expert counts and the output is
    the dense layer's. The rule, one of `kernels.selection.RULES`, is "max" at first: left out is what scores below tau
    times the token's largest score.

    The first `shared` experts always run and the router scores the others.

    Parameters (E experts of s neurons): w1 [E, s, d_in], b1 [E, s], gate [E, s, d_in], b_gate [E, s], w2 [E, s, d_out],
    b2 [d_out]; those that the dense layer lacks are None. Buffer tau: a scalar in [0, 1].
    """

    tau: Tensor

    def __init__(
        self, weights: FFNWeights, labels: Tensor, experts: int, activation: str, router: Router, *, shared: int = 0
    ) -> None:
        """Split the weights by `labels` [h]: neuron i belongs to expert labels[i]; every expert has h / experts.

        router: scores the experts from `shared` on; those before it always run.
        """
        super().__init__()
        order = torch.argsort(labels, stable=True)
        hidden, _ = weights.w1.shape

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
        """X [..., d_in] → [..., d_out]."""
        scores, threshold = self.route(x)
        return masked_ffn(  # type: ignore[no-any-return]
            x, scores, threshold, self.w1, self.b1, self.gate, self.b_gate, self.w2, self.b2, self.activation
        )

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [..., E] and the threshold [...] below which an expert is skipped; x [..., d_in]."""
        return self.select(lambda op, *args: op(*args), self.router(x), self.tau)

    def select(self, step: Step, scores: Any, tau: Any) -> tuple[Any, Any]:
        """From the router's scores to those of all experts and the threshold, run or written into a graph by `step`."""
        threshold = step(selection_threshold, scores, tau, self.rule)
        if self.shared:
            scores = step(aten.constant_pad_nd.default, scores, [self.shared, 0], float("inf"))
        return scores, threshold


@dataclass(frozen=True, eq=False)
class MoESite:
    """A converted feed-forward layer in a graph.

    path: the module path of the expert weights, `encoder.layer.0.moe`. nodes: every execution of it.
    form: "module" (one `call_module` node), "masked" (reference op) or "dynamic" (the op that skips experts).
    shared: how many of the experts always run. router_parameters: weights of the matrices that score the rest; a trunk
    that several layers share counts for the first of them. rule: one of `kernels.selection.RULES`.
    """

    path: str
    form: Literal["module", "masked", "dynamic"]
    nodes: tuple[Node, ...]
    weights: Experts
    activation: str
    shared: int
    router_parameters: int
    tau: Tensor
    rule: str

    @property
    def w1(self) -> Tensor:
        """The first linear's weights, [E, s, d_in]."""
        return self.weights.w1

    @property
    def routed(self) -> Experts:
        """The weights of the experts that the router scores."""
        return self.weights.after(self.shared)

    @property
    def experts(self) -> int:
        """Number of experts."""
        return int(self.w1.shape[0])

    @property
    def expert_multiply_adds(self) -> int:
        """Multiply-adds of one expert for one token."""
        size, d_in = self.w1.shape[1:]
        return int(size * (d_in * (2 if self.weights.gate is not None else 1) + self.weights.w2.shape[2]))

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds for one token when every expert runs, router included (it has one weight per multiply-add)."""
        return self.experts * self.expert_multiply_adds + self.router_parameters

    @property
    def describe(self) -> str:
        """`48 experts × 32`, `1 expert × 8`, and how many of them always run."""
        always = f", {self.shared} of them always on" if self.shared else ""
        return f"{self.experts} expert{'s' * (self.experts != 1)} × {self.w1.shape[1]}{always}"


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
    counted: set[tuple[object, ...]] = set()
    return [_site(graph, path, forms[path], nodes, counted) for path, nodes in found.items()]


def _site(
    graph: GraphModule,
    path: str,
    form: Literal["module", "masked", "dynamic"],
    nodes: list[Node],
    counted: set[tuple[object, ...]],
) -> MoESite:
    module: Any = graph.get_submodule(path)
    if form == "module":
        router = [parameter for parameter in module.router.parameters() if parameter.dim() == 2]
        activation, shared, rule = module.activation, module.shared, module.rule
    else:
        scores, threshold, activation = nodes[0].args[1], nodes[0].args[2], str(nodes[0].args[9])
        read = [tensor_of(graph, node) for node in router_nodes(nodes[0])]
        router, shared = [tensor for tensor in read if tensor is not None and tensor.dim() == 2], 0
        assert isinstance(scores, Node)
        assert isinstance(threshold, Node)
        if is_call(scores, aten.constant_pad_nd.default):
            shared = scores.args[1][0]  # type: ignore[index]
        rule = str(threshold.args[2])
    fresh = {tensor_key(weight): weight.numel() for weight in router if tensor_key(weight) not in counted}
    counted.update(fresh)
    weights = Experts(*(getattr(module, name, None) for name in Experts._fields))  # type: ignore[arg-type]
    return MoESite(path, form, tuple(nodes), weights, str(activation), shared, sum(fresh.values()), module.tau, rule)


def router_nodes(node: Node) -> list[Node]:
    """The nodes between the input and the scores of an expert layer in op form, parameters included."""
    x, scores = node.args[0], node.args[1]
    assert isinstance(scores, Node)
    found: dict[Node, None] = {}
    stack = [scores]
    while stack:
        current = stack.pop()
        if current is not x and current not in found and current.op in ("get_attr", "call_function"):
            found[current] = None
            stack.extend(current.all_input_nodes)
    return list(found)


def set_tau(graph: GraphModule, tau: float | Mapping[str, float], path: str | None = None) -> list[str]:
    """Set the knob of every layer's selection rule; larger is cheaper, 0 runs all experts.

    For the rule "max" it is the share of the largest score below which an expert is skipped (D2DMoE, section 3.4); see
    `surgeon.kernels.selection` for the others. Takes effect at the next call, in every form of the graph, and needs no
    retraining.

    Args:
        tau: one value in [0, 1], or a value for each path.
        path: which layers: the path of the feed-forward layer or of its experts, or a pattern with `*`. All by default.

    Returns:
        The paths that were set.

    Raises:
        UsageError: tau is outside [0, 1], the graph has no experts, or no layer has that path.
    """
    wanted = tau if isinstance(tau, Mapping) else {path or "*": tau}
    for value in wanted.values():
        if not 0.0 <= value <= 1.0:
            raise UsageError(f"tau is {value}, but it is a share: give a value from 0 to 1.")
    chosen = {site.path: (site, value) for site, value in _matching(graph, wanted)}
    with torch.no_grad():
        for site, value in chosen.values():
            if abs(float(site.tau) - value) > 1e-6:
                _reset_compensation(graph, site)
            site.tau.fill_(value)
    return list(chosen)


def get_tau(graph: GraphModule) -> dict[str, float]:
    """The tau of every layer, by the path of its experts."""
    return {site.path: float(site.tau) for site in find_moes(graph)}


def set_rule(graph: GraphModule, rule: str | Mapping[str, str], path: str | None = None) -> list[str]:
    """Set the rule by which scores and tau select experts, without retraining.

    Args:
        rule: one of `surgeon.kernels.selection.RULES`, or a rule for each path. path: as in `set_tau`.

    Returns:
        The paths that were set.

    Raises:
        UsageError: there is no such rule or no such layer, or the graph has no experts.
    """
    wanted = rule if isinstance(rule, Mapping) else {path or "*": rule}
    for value in wanted.values():
        check_rule(value)
    chosen = {site.path: (site, value) for site, value in _matching(graph, wanted)}
    changed = [(site, value) for site, value in chosen.values() if site.rule != value]
    for site, value in changed:
        _reset_compensation(graph, site)
        for node in site.nodes:
            if site.form == "module":
                graph.get_submodule(site.path).rule = value
            else:
                threshold = node.args[2]
                assert isinstance(threshold, Node)
                threshold.update_arg(2, value)
    if changed:  # a graph that is as it was keeps what `torch.compile` made of it
        graph.recompile()
    return list(chosen)


def get_rule(graph: GraphModule) -> dict[str, str]:
    """The selection rule of every layer, by the path of its experts."""
    return {site.path: site.rule for site in find_moes(graph)}


def compensated(graph: GraphModule) -> list[str]:
    """The layers whose output has the mean of what they skip added (`surgeon.measure.compensation`), by their experts' path."""
    # A mean that no longer holds is set to zero.
    return [path for path, mean in get_knobs(graph).means.items() if bool(mean.any())]


@dataclass(frozen=True)
class Knobs:
    """All that can be set after training, by layer: tau, rule, and the mean of what is skipped where it is added."""

    taus: dict[str, float]
    rules: dict[str, str]
    means: dict[str, Tensor]


def get_knobs(graph: GraphModule) -> Knobs:
    """The knobs as they are now."""
    means = {site.path: getattr(graph.get_submodule(site.path), SKIPPED_MEAN, None) for site in find_moes(graph)}
    kept = {path: mean.clone() for path, mean in means.items() if isinstance(mean, Tensor)}
    return Knobs(get_tau(graph), get_rule(graph), kept)


def set_knobs(graph: GraphModule, knobs: Knobs) -> None:
    """Put all of them back."""
    set_tau(graph, knobs.taus)
    set_rule(graph, knobs.rules)
    with torch.no_grad():
        for path, mean in knobs.means.items():
            getattr(graph.get_submodule(path), SKIPPED_MEAN).copy_(mean)


def _reset_compensation(graph: GraphModule, site: MoESite) -> None:
    """Other experts are skipped from now on, so the mean of what was skipped is no longer added."""
    mean = getattr(graph.get_submodule(site.path), SKIPPED_MEAN, None)
    if mean is not None:
        with torch.no_grad():
            mean.zero_()


def _matching(graph: GraphModule, wanted: Mapping[str, Any]) -> Iterable[tuple[MoESite, Any]]:
    """Every (layer, value) that the patterns name, the later ones last."""
    sites = find_moes(graph)
    if not sites:
        raise UsageError("The graph has no experts to set anything for. Apply moeify first.")
    for pattern, value in wanted.items():
        matching = [site for site in sites if _matches(site.path, pattern)]
        if not matching:
            raise UsageError(f"No layer '{pattern}'. Layers with experts: {', '.join(site.path for site in sites)}.")
        yield from ((site, value) for site in matching)


def _matches(path: str, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in (path, path.rpartition(".")[0]))
