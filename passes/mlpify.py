"""Replace a linear layer by a two-layer MLP of the same cost, so that it can be sparsified and split like an FFN."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from surgeon.collective import mean, variance
from surgeon.data.batch import Batch
from surgeon.data.padding import real_tokens
from surgeon.described import Facts, was_and_is
from surgeon.graph.capture import Capture
from surgeon.graph.edit import emit, emit_dropout, erase_unread, get_attr, replace_value
from surgeon.graph.traced import TracedGraph, aten, free_target
from surgeon.kernels.activations import ACTIVATIONS, active_share
from surgeon.passes.activation_ops import TARGETS
from surgeon.passes.contract import FitContext, SiteKind
from surgeon.passes.options import option
from surgeon.passes.report import SiteChange
from surgeon.passes.trained import TrainedPass
from surgeon.sites.ffn import mark_projection
from surgeon.sites.linear import Linear
from surgeon.sites.linear_site import LinearSite
from surgeon.sites.qkv import fused_parts
from surgeon.sites.rejection import Rejection
from surgeon.sites.soundness import not_finite
from surgeon.training.loop import FitReport, fit
from surgeon.training.penalty import (
    PENALTIES,
    PENALTY_NAMES,
    AlphaSchedule,
    Penalty,
    alpha_at,
    penalised_values,
)

Kind = Literal["plain", "residual"]
Start = Literal["svd", "random"]
Error = Literal["relative", "mse"]
# Names of the MLPs that replace a layer as a whole, in two parts and in three.
_NAMES = {
    1: ["projection_mlp"],
    2: [f"projection_mlp_{part}" for part in "01"],
    3: [f"projection_mlp_{part}" for part in "qkv"],
}
_MOST_PARTS = max(_NAMES)
_ERROR_NAMES: dict[Error, str] = {"relative": "unexplained variance", "mse": "mean squared error"}
# Wider hidden layers have a multiple of this many neurons.
_MULTIPLE = 8
# A single neuron passes on values of one sign only.
_FEWEST = 2
# How many batches the initial weights are computed from.
_START_BATCHES = 16
# E|z|³ / E z⁴ of a standard normal z: the factor that brings z·|z| nearest to z.
_SQUARE_TO_LINEAR = 0.532


class ReplacementMLP(nn.Module):
    """A Linear(d_in, h) → activation → Linear(h, d_out) that replaces Linear(d_in, d_out) or some of its outputs."""

    def __init__(
        self,
        imitates: str,
        part: range,
        d_in: int,
        hidden: int,
        activation: str,
        like: Tensor,
        *,
        bias: bool,
        residual: bool = False,
    ) -> None:
        """Replace the outputs `part` of the layer whose weight is called `imitates`.

        bias: whether the second linear has a bias; the first always has one. residual: whether the input is added to
        the output.
        """
        super().__init__()
        self.fc1 = nn.Linear(d_in, hidden, device=like.device, dtype=like.dtype)
        self.fc2 = nn.Linear(hidden, len(part), bias=bias, device=like.device, dtype=like.dtype)
        self.imitates, self.part = imitates, part
        self.activation, self.residual = activation, residual

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map x [..., d_in] to the output [..., d_out] and the pre-activations [..., h]."""
        z = self.fc1(x)
        output = self.fc2(ACTIVATIONS[self.activation].fn(z))
        return x + output if self.residual else output, z

    @torch.no_grad()
    def start_from(self, rows: Tensor, bias: Tensor | None, mean: Tensor, second_moment: Tensor) -> None:
        """Start from the best linear map through h/2 directions: two neurons ±z for each, as act(z) − act(−z) = z.

        The directions are the principal components of the layer's outputs on the data. They are the truncated SVD of
        its weight times the square root of the inputs' covariance. The identity does not hold for relu2: there the
        start is as close as z·|z| is to z.

        Args:
            rows, bias: the layer's weight [d_out, d_in], minus the identity if residual, and its bias [d_out].
            mean, second_moment: of the layer's outputs, [d_out] and [d_out, d_out].
        """
        centre = torch.zeros_like(mean) if self.fc2.bias is None else mean
        offset = -centre if bias is None else bias - centre
        covariance, prior = second_moment - centre.outer(centre), rows @ rows.t()
        # Where the data says nothing, a little of the weight's own spectrum decides.
        share = 1e-3 * covariance.trace() / prior.trace().clamp_min(1e-30) + 1e-12
        values, vectors = torch.linalg.eigh(covariance + share * prior)
        count = min(self.fc1.out_features // 2, *rows.shape)
        directions = vectors[:, vectors.shape[1] - count :]
        into, shift = directions.t() @ rows, directions.t() @ offset
        # The weights of both linears get the same size.
        size = into.norm(dim=1)
        scale = size.clamp_min(1e-6 * float(size.max()) + 1e-30).sqrt()
        first, shift, out = into / scale[:, None], shift / scale, directions * scale
        if self.activation == "relu2":
            spread = values[len(values) - count :].clamp_min(1e-12 * float(values[-1]) + 1e-30).sqrt() / scale
            out = out * _SQUARE_TO_LINEAR / spread
        self.fc1.weight[: 2 * count] = torch.cat([first, -first]).to(self.fc1.weight)
        self.fc1.bias[: 2 * count] = torch.cat([shift, -shift]).to(self.fc1.bias)
        self.fc2.weight.zero_()
        self.fc2.weight[:, : 2 * count] = torch.cat([out, -out], 1).to(self.fc2.weight)
        if self.fc2.bias is not None:
            self.fc2.bias.copy_(centre)


@dataclass(frozen=True, kw_only=True)
class Mlpify(TrainedPass[LinearSite]):
    """Replace standalone linear layers (attention projections) by MLPs of equal cost that imitate them (D2DMoE, 3.5).

    The pass replaces every linear layer outside feed-forward layers, except the head. Use `skip` to keep others, such
    as a pooler. If one layer computes queries, keys and values, each of them gets its own MLP.

    An MLP's hidden width is cost_factor times (d_in·d_out + d_out) / (d_in + d_out + 1). Widths of 16 or more are
    rounded to a multiple of 8. The first linear always has a bias.

    Each replacement is trained separately, on the inputs and outputs of the layer that it replaces. This training uses
    no dropout: dropout only acts in the graph's training mode.
    """

    name: ClassVar[str] = "mlpify"
    works_on: ClassVar[SiteKind] = "linear"
    makes: ClassVar[SiteKind | None] = "ffn"
    must_precede: ClassVar[frozenset[str]] = frozenset(
        {"sparsify", "moeify", "early-exit", "sparsify-inputs", "sparsify-neurons", "lower"}
    )
    preserves: ClassVar[bool] = False
    needs_data: ClassVar[bool] = True

    kind: Kind = option("plain", "plain, or residual: add the input to the output. Both must be equally wide.")
    activation: str = option("relu", "Activation of the replacement.", choices=TARGETS)
    cost_factor: float = option(
        1.0, "Cost of the replacement relative to that of the layer. It sets the hidden width.", above=0
    )
    split_fused: bool = option(True, "If one layer computes queries, keys and values, give each of them its own MLP.")
    dropout: float = option(
        0.0, "Dropout probability after the activation and after the second linear.", least=0, below=1
    )
    init: Start = option("svd", "Initial weights: the best linear map of that width on the data (svd), or random.")
    error: Error = option(
        "relative",
        "Error that training minimises. relative: mean squared error divided by the variance of the layer's outputs, "
        "so that all layers count equally. mse: mean squared error (as published).",
    )
    penalty: Penalty = option(
        "hoyer", "Sparsity penalty on the hidden values, added to the error: hoyer or l1, as in sparsify."
    )
    alpha: float = option(1e-3, "Weight of the penalty.", least=0)
    alpha_schedule: AlphaSchedule = option(
        "linear", "How the weight changes over time: constant, linear or linear_warmup, as in sparsify."
    )
    displacement: float = option(
        -10.0, "D: for activations that are never exactly zero, pre-activations below D count as zero."
    )
    epochs: float = option(3.0, "Number of training epochs.", least=0)
    lr: float = option(1e-3, "Learning rate of AdamW for the replacements.", above=0)

    def match(self, graph: GraphModule, site: LinearSite) -> Rejection | None:
        refused = not_finite(graph, site.calls[:1])
        if refused is not None:
            return refused
        for part in self._parts(site):
            if self.kind == "residual" and site.d_in != len(part):
                what = f"a residual needs an output as wide as the input, but this is {site.d_in}→{len(part)}"
                return Rejection("residual-width", what)
            width = self.hidden_width(site.d_in, len(part))
            if width < _FEWEST:
                found = "only one neuron" if width else "no neurons"
                what = f"a replacement of equal cost for {site.d_in}→{len(part)} would have {found}"
                return Rejection("too-narrow", what)
        return None

    def hidden_width(self, d_in: int, d_out: int) -> int:
        """Return the hidden width for the wanted cost, biases included: 384 for d_in = d_out = 768 and cost_factor 1.

        Widths of 16 or more are rounded to a multiple of 8, so that the replacement can be split into experts.
        """
        width = self.cost_factor * (d_in * d_out + d_out) / (d_in + d_out + 1)
        return round(width) if width < 2 * _MULTIPLE else _MULTIPLE * round(width / _MULTIPLE)

    def _parts(self, site: LinearSite) -> list[range]:
        """The ranges of outputs that get their own MLP: one range of all outputs, or the parts of a fused layer."""
        # A layer that is not wider than its input is one projection, even if its outputs are split into rotated halves.
        if self.split_fused and site.d_out > site.d_in:
            first, *others = (fused_parts(call.output) for call in site.calls)
            if isinstance(first, list) and len(first) <= _MOST_PARTS and all(other == first for other in others):
                return first
        return [range(site.d_out)]

    def rewrite(self, graph: TracedGraph, site: LinearSite, seen: None) -> SiteChange:
        call, parts = site.calls[0], self._parts(site)
        weight, bias = call.weight_rows(graph), call.bias_vector(graph)
        modules: dict[str, ReplacementMLP] = {}
        for name, part in zip(_NAMES[len(parts)], parts, strict=True):
            target, width = free_target(graph, site.path, name), self.hidden_width(site.d_in, len(part))
            modules[target] = ReplacementMLP(
                str(call.weight.target), part, site.d_in, width, self.activation, weight,
                bias=bias is not None, residual=self.kind == "residual",
            ).train(graph.training)  # fmt: skip
            graph.add_submodule(target, modules[target])
            mark_projection(graph, target)
        output = ("", "")
        for call in site.calls:
            output = (call.output.name, self._replace(graph, call, modules).name)
        before = weight.numel() + (0 if bias is None else bias.numel())
        after = sum(parameter.numel() for module in modules.values() for parameter in module.parameters())
        cost = sum(module.fc1.out_features * (site.d_in + len(module.part)) for module in modules.values())
        return SiteChange(
            site.path,
            site.describe,
            _describe(list(modules.values())),
            (before, after),
            (site.multiply_adds, cost),
            output,
            made=tuple(modules),
            facts=was_and_is(site.facts, self._facts(site, list(modules.values()))),
        )

    def _facts(self, site: LinearSite, made: Sequence[ReplacementMLP]) -> Facts:
        """What is there now. hidden: of all MLPs together."""
        widths = {"d_in": site.d_in, "hidden": sum(one.fc1.out_features for one in made), "d_out": site.d_out}
        residual = self.kind == "residual"
        return {"kind": "mlps", **widths, "mlps": len(made), "activation": self.activation, "residual": residual}

    def _replace(self, graph: TracedGraph, call: Linear, modules: dict[str, ReplacementMLP]) -> Node:
        with graph.graph.inserting_before(call.core):
            values = [self._mlp(graph, call.input, target, module) for target, module in modules.items()]
            value = values[0]
            if len(values) > 1:
                value = emit(graph, aten.cat.default, values, -1, path=next(iter(modules)).rpartition(".")[0])
        replace_value(call.output, value, call.input, call.nodes)
        erase_unread(graph, call.nodes)
        return value

    def _mlp(self, graph: TracedGraph, x: Node, target: str, module: ReplacementMLP) -> Node:
        def step(op: object, *args: object, part: str = "act") -> Node:
            return emit(graph, op, *args, path=f"{target}.{part}")

        def linear(x: Node, part: str) -> Node:
            names = [name for name, _ in module.get_submodule(part).named_parameters()]
            return step(
                aten.linear.default, x, *(get_attr(graph, f"{target}.{part}.{name}") for name in names), part=part
            )

        value = TARGETS[self.activation](step, linear(x, "fc1"))
        value = emit_dropout(graph, value, self.dropout, path=f"{target}.act")
        # What follows stands outside the two linears, so that the MLP is a feed-forward layer like any other.
        value = emit_dropout(graph, linear(value, "fc2"), self.dropout, path=target)
        return emit(graph, aten.add.Tensor, x, value, path=target) if module.residual else value

    def fit(self, context: FitContext[LinearSite]) -> FitReport | None:
        """Train the replacements to imitate their layers on the inputs of the original model: error plus penalty.

        The paper takes the plain mean squared error. Dividing it by the variance of the layer's outputs gives all
        layers equal weight. Otherwise the other layers and the penalty drown those with small outputs (usually o).
        """
        before, data = context.before, context.data
        pairs = list(_pairs(context.graph, [site for site, _ in context.changes]))
        teacher = Capture(before, {node.name for _, call in pairs for node in (call.input, call.output)}).eval()

        @torch.no_grad()
        def values(batch: Batch) -> dict[str, Tensor]:
            _, found = teacher(*batch.args, **batch.kwargs)
            return {name: real_tokens(batch, value) for name, value in found.items()}

        if self.init == "svd":
            device = pairs[0][0].fc1.weight.device
            batches = itertools.islice(data.train, _START_BATCHES)
            _start(before, pairs, (values(batch.to(device)) for batch in batches))

        measure = PENALTIES[self.penalty]

        def loss(batch: Batch, done: float) -> tuple[Tensor, dict[str, float]]:
            found = values(batch)
            errors, sizes, shares = [], [], []
            for replacement, call in pairs:
                y = _target(found, replacement, call)
                imitation, z = replacement(found[call.input.name])
                error = mean((imitation.float() - y).square())
                if self.error == "relative":
                    spread = variance(y)
                    error = error / torch.where(spread > 0, spread, 1.0)
                errors.append(error)
                sizes.append(mean(measure(penalised_values(z, replacement.activation, self.displacement))))
                with torch.no_grad():
                    shares.append(mean(active_share(ACTIVATIONS[replacement.activation].fn(z))))
            error, size = torch.stack(errors).mean(), torch.stack(sizes).mean()
            return error + alpha_at(self.alpha_schedule, self.alpha, done) * size, {
                _ERROR_NAMES[self.error]: error.item(),
                PENALTY_NAMES[self.penalty]: size.item(),
                "active": float(torch.stack(shares).mean()),
            }

        parameters = [p for module in {id(module): module for module, _ in pairs}.values() for p in module.parameters()]
        return fit(parameters, loss, data, self.plan(), context.settings, "mlpify")

    def finish(
        self, graph: TracedGraph, sites: Sequence[LinearSite], changes: Sequence[SiteChange], fit: FitReport | None
    ) -> tuple[str, ...]:
        notes = []
        if changes and self.dropout and graph.meta["trace"].form == "eval":
            notes.append("No dropout was added: the graph was traced in evaluation form, which has no training mode.")
        nodes = {node.name: node for node in graph.graph.nodes}
        whole: dict[str, list[str]] = defaultdict(list)
        for site, change in zip(sites, changes, strict=True):
            reason = self._why_whole(site, nodes[change.output[1]])
            if reason is not None:
                whole[reason].append(site.path)
        for reason, paths in whole.items():
            where = f"{paths[0]} and {len(paths) - 1} more" if len(paths) > 1 else paths[0]
            notes.append(f"{where}: one MLP replaces the whole layer, because {reason}.")
        return tuple(notes)

    def _why_whole(self, site: LinearSite, output: Node) -> str | None:
        """Why one MLP replaced a layer whose outputs are split into parts. `output`: the node that now gives them."""
        if not self.split_fused or site.d_out <= site.d_in or output.target is aten.cat.default:
            return None
        found = fused_parts(output)
        if not isinstance(found, list):
            return found
        if len(found) > _MOST_PARTS:
            return f"the outputs are split into {len(found)} parts"
        return "its calls split the outputs in different ways"


def _describe(modules: Sequence[ReplacementMLP]) -> str:
    """`MLP 384→192→384 relu`, or `3 MLPs ...`, with one shape if all have the same."""
    shapes = [f"{m.fc1.in_features}→{m.fc1.out_features}→{m.fc2.out_features}" for m in modules]
    what = "MLP" if len(modules) == 1 else f"{len(modules)} MLPs"
    shown = shapes[0] if len(set(shapes)) == 1 else ", ".join(shapes)
    return f"{what} {shown} {modules[0].activation}{' + input' if modules[0].residual else ''}"


def _pairs(graph: TracedGraph, sites: Sequence[LinearSite]) -> Iterator[tuple[ReplacementMLP, Linear]]:
    """Pair every replacement with every call of the layer that it replaces."""
    modules = [module for module in graph.modules() if isinstance(module, ReplacementMLP)]
    for site in sites:
        for module in modules:
            if module.imitates == str(site.calls[0].weight.target):
                yield from ((module, call) for call in site.calls)


def _target(values: Mapping[str, Tensor], module: ReplacementMLP, call: Linear) -> Tensor:
    """The outputs that the replacement should learn, [N, d_out] float32."""
    return values[call.output.name][:, module.part.start : module.part.stop].float()


def _start(
    graph: TracedGraph, pairs: Sequence[tuple[ReplacementMLP, Linear]], batches: Iterable[Mapping[str, Tensor]]
) -> None:
    """Set the initial weights of every replacement from its layer's outputs on the batches."""
    tokens: dict[ReplacementMLP, int] = defaultdict(int)
    sums: dict[ReplacementMLP, Tensor] = {}
    squares: dict[ReplacementMLP, Tensor] = {}
    for values in batches:
        for module, call in pairs:
            y = _target(values, module, call)
            if module.residual:
                y = y - values[call.input.name].float()
            tokens[module] += len(y)
            sums[module] = sums.get(module, 0.0) + y.sum(0)
            squares[module] = squares.get(module, 0.0) + y.t() @ y
    for module, call in dict(pairs).items():
        rows, bias = call.weight_rows(graph).float(), call.bias_vector(graph)
        rows = rows[module.part.start : module.part.stop]
        if module.residual:
            rows = rows - torch.eye(len(rows), device=rows.device)
        part = None if bias is None else bias.float()[module.part.start : module.part.stop]
        module.start_from(rows, part, sums[module] / tokens[module], squares[module] / tokens[module])
