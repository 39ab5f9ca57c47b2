"""Replace a linear layer by a two-layer MLP of the same cost, so that it can be sparsified and split like an FFN."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from surgeon.batch import Batch, Data
from surgeon.errors import UsageError
from surgeon.fit import Settings, fit, real_tokens
from surgeon.graph import TracedGraph, aten, free_target
from surgeon.kernels.activations import ACTIVATIONS
from surgeon.linear import Linear
from surgeon.passes.base import SiteKind, TrainedPass, option
from surgeon.passes.sparsify import square_hoyer
from surgeon.passes.swap_activation import TARGETS
from surgeon.report import FitReport, SiteChange
from surgeon.rewrite import Capture, emit, emit_dropout, erase_unread, get_attr, replace_value
from surgeon.search import find_linear_sites
from surgeon.sites import PROJECTION_MLP, LinearSite, Rejection


class ReplacementMLP(nn.Module):
    """Linear(d_in, h) → activation → Linear(h, d_out), in place of Linear(d_in, d_out)."""

    def __init__(self, d_in: int, hidden: int, d_out: int, activation: str, like: Tensor, bias: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(d_in, hidden, device=like.device, dtype=like.dtype)
        self.fc2 = nn.Linear(hidden, d_out, bias=bias, device=like.device, dtype=like.dtype)
        self.activation = activation

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """X [..., d_in] → (output [..., d_out], hidden activations [..., h])."""
        hidden = ACTIVATIONS[self.activation].fn(self.fc1(x))
        return self.fc2(hidden), hidden


@dataclass(frozen=True, kw_only=True)
class Mlpify(TrainedPass[LinearSite]):
    """Replace standalone linear layers (attention projections) by MLPs of equal cost that imitate them (D2DMoE, 3.5).

    The replacements are trained on the inputs and outputs of the layers they replace, each for itself.
    """

    name: ClassVar[str] = "mlpify"
    works_on: ClassVar[SiteKind] = "linear"
    makes: ClassVar[SiteKind | None] = "ffn"
    must_precede: ClassVar[frozenset[str]] = frozenset({"moeify", "lower"})
    preserves: ClassVar[bool] = False
    needs_data: ClassVar[bool] = True

    activation: str = option("relu", "Activation of the replacement: relu, relu2, gelu or silu.")
    cost_factor: float = option(1.0, "Cost of the replacement relative to the layer's, which sets its hidden width.")
    dropout: float = option(0.0, "Dropout probability after the activation.")
    alpha: float = option(1e-3, "Weight of the square-Hoyer penalty on the hidden values, growing linearly from 0.")
    epochs: float = option(3.0, "How often imitation goes through the data.")
    lr: float = option(1e-3, "Learning rate of AdamW for the replacements.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation not in TARGETS:
            raise UsageError(f"mlpify: activation is '{self.activation}', but must be one of {', '.join(TARGETS)}.")
        if self.cost_factor <= 0:
            raise UsageError(f"mlpify: cost_factor is {self.cost_factor}, but must be positive.")

    def find(self, graph: GraphModule) -> tuple[Sequence[LinearSite], list[Rejection]]:
        return find_linear_sites(graph)

    def match(self, graph: GraphModule, site: LinearSite) -> str | None:
        width = self.hidden_width(site.d_in, site.d_out)
        return None if width >= 1 else f"a replacement of equal cost for {site.d_in}→{site.d_out} has no neuron"

    def hidden_width(self, d_in: int, d_out: int) -> int:
        """The width at which the replacement costs what the layer does, biases counted: d_in = d_out = 768 → 384."""
        return round(self.cost_factor * (d_in * d_out + d_out) / (d_in + d_out + 1))

    def rewrite(self, graph: TracedGraph, site: LinearSite) -> SiteChange:
        call = site.calls[0]
        weight = call.weight_rows(graph)
        before = weight.numel() + (call.bias_vector(graph).numel() if call.bias is not None else 0)  # type: ignore[union-attr]
        width = self.hidden_width(site.d_in, site.d_out)
        module = ReplacementMLP(site.d_in, width, site.d_out, self.activation, weight, call.bias is not None)
        target = free_target(graph, site.path, PROJECTION_MLP)
        graph.add_submodule(target, module)
        output = ("", "")
        for call in site.calls:
            output = (call.output.name, self._replace(graph, call, target).name)
        return SiteChange(
            site.path,
            site.describe,
            f"MLP {site.d_in}→{width}→{site.d_out} {self.activation}",
            (before, sum(parameter.numel() for parameter in module.parameters())),
            (site.multiply_adds, width * (site.d_in + site.d_out)),
            output,
            made=target,
        )

    def _replace(self, graph: TracedGraph, call: Linear, target: str) -> Node:
        with graph.graph.inserting_before(call.core):

            def step(op: object, *args: object, part: str = "act") -> Node:
                return emit(graph, op, *args, path=f"{target}.{part}")

            def linear(x: Node, part: str, bias: bool) -> Node:
                weight = get_attr(graph, f"{target}.{part}.weight")
                offset = [get_attr(graph, f"{target}.{part}.bias")] if bias else []
                return step(aten.linear.default, x, weight, *offset, part=part)

            value = TARGETS[self.activation](step, linear(call.input, "fc1", True))
            value = emit_dropout(graph, value, self.dropout, path=f"{target}.act")
            value = linear(value, "fc2", call.bias is not None)
        replace_value(call.output, value, call.input, call.nodes)
        erase_unread(graph, call.nodes)
        return value

    def fit(
        self,
        graph: TracedGraph,
        before: TracedGraph,
        changes: Sequence[tuple[LinearSite, SiteChange]],
        data: Data,
        settings: Settings,
    ) -> FitReport | None:
        """Imitate every layer on the inputs it has in the model as it was: mean squared error, plus the penalty."""
        pairs: list[tuple[ReplacementMLP, Linear]] = []
        for site, change in changes:
            replacement = graph.get_submodule(change.made)
            assert isinstance(replacement, ReplacementMLP)
            pairs.extend((replacement, call) for call in site.calls)
        names = {node.name for _, call in pairs for node in (call.input, call.output)}
        teacher = Capture(before, names).eval()

        def loss(batch: Batch, done: float) -> tuple[Tensor, dict[str, float]]:
            with torch.no_grad():
                _, values = teacher(*batch.args, **batch.kwargs)
            errors, hoyers, scales = [], [], []
            for replacement, call in pairs:
                x, y = (real_tokens(batch, values[node.name]) for node in (call.input, call.output))
                imitation, hidden = replacement(x)
                errors.append(F.mse_loss(imitation.float(), y.float()))
                hoyers.append(square_hoyer(hidden).mean())
                scales.append(errors[-1].detach() / y.float().var(correction=0).clamp_min(1e-12))
            error, hoyer = torch.stack(errors).mean(), torch.stack(hoyers).mean()
            relative = float(torch.stack(scales).mean())
            return error + self.alpha * done * hoyer, {
                "imitation loss": error.item(), "unexplained variance": relative, "square Hoyer": hoyer.item()
            }  # fmt: skip

        parameters = [p for module in {id(module): module for module, _ in pairs}.values() for p in module.parameters()]
        return fit(parameters, loss, data, self.plan(), settings, "mlpify")
