"""Look at a model without changing it: its sites and what they cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from surgeon.dynamic.site import DynamicSite, tau_of
from surgeon.exits.halting import find_halts
from surgeon.exits.site import find_exits
from surgeon.graph.agreement import call_reproducibly
from surgeon.graph.calls import as_args_kwargs, named_arguments
from surgeon.graph.capture import Capture
from surgeon.graph.sizes import Sizes
from surgeon.graph.snapshot import NodeRecord, snapshot
from surgeon.graph.traced import TracedGraph
from surgeon.inputs.skipping import find_skipping
from surgeon.jobs.open_model import Opened
from surgeon.jobs.takes import Takes
from surgeon.measure.cost import Cost
from surgeon.measure.meter import measure
from surgeon.moe.site import find_moes
from surgeon.sites.ffn import FFN
from surgeon.sites.linear_site import LinearSite
from surgeon.sites.rejection import Rejection
from surgeon.sites.search import find_ffns, find_linear_sites

LOOKS_FOR = {
    "ffn": "feed-forward layer",
    "linear": "standalone linear layer",
    "any-linear": "linear layer",
    "moe": "expert layer",
    "dynamic": "layer that skips by tau",
    "block": "place between blocks",
    "stream": "residual stream",
}


@dataclass(frozen=True)
class Layer:
    """A site: its shape, and its share of the model's multiply-adds on the example inputs."""

    path: str
    shape: tuple[int, ...]
    share: float


@dataclass(frozen=True)
class FFNLayer(Layer):
    """A feed-forward layer (d_in, hidden, d_out). calls: how often its weights are used in one call."""

    activation: str
    gated: bool
    calls: int


@dataclass(frozen=True)
class DynamicLayer(Layer):
    """A layer that skips by tau. form: as its site shows it. executed: share that ran.

    Its shape is (experts, neurons each), (d_in, d_out) of a linear layer that skips inputs,
    (d_in, neurons, d_out) of a layer that skips neurons, (classes,) of an early exit, whose share is that of what
    follows up to the next one, or (d,) of a place where tokens halt, whose share is that of the block behind it.
    """

    form: str
    tau: float
    executed: float


@dataclass(frozen=True)
class Inspection:
    """What `surgeon inspect` found. refused: candidates that are not feed-forward layers.

    skipping: the layers that skip inputs or neurons. exits: the places where samples leave. halting: where tokens halt.
    takes: what the graph can be called with.
    graph: the nodes of the graph, if asked for.
    """

    model: str
    kind: str
    inputs: dict[str, list[int]]
    takes: Takes
    task: str | None
    cost: Cost
    ffns: list[FFNLayer]
    experts: list[DynamicLayer]
    skipping: list[DynamicLayer]
    exits: list[DynamicLayer]
    halting: list[DynamicLayer]
    linears: list[Layer]
    refused: list[Rejection]
    notes: tuple[str, ...]
    graph: list[NodeRecord] | None = None


def inspect(opened: Opened, *, with_graph: bool = False) -> Inspection:
    """Find the sites of a model and what they cost on the example inputs."""
    graph, (args, kwargs) = opened.graph, as_args_kwargs(opened.inputs)
    cost, layers = measure(graph, args, kwargs)
    ffns, linears, refused = outside_experts(graph)
    parts = [part for ffn in ffns for call in ffn.calls for part in (*call.first, call.down)]
    parts += [part for linear in linears for part in linear.calls]
    _, values = call_reproducibly(Capture(graph, {part.output.name for part in parts}), args, kwargs)
    # A linear layer makes one output of out_features with in_features multiply-adds each.
    work = {part: values[part.output.name].numel() * part.in_features for part in parts}
    whole = max(1, cost.multiply_adds)

    def dynamic(site: DynamicSite, shape: tuple[int, ...]) -> DynamicLayer:
        layer = layers[site.path]
        return DynamicLayer(site.path, shape, layer.multiply_adds / whole, site.shown_form, tau_of(site), layer.share)

    return Inspection(
        opened.spec,
        opened.kind,
        _shapes(graph, opened.inputs),
        Takes.of(Sizes.parse(graph.meta["trace"].sizes)),
        opened.task,
        cost,
        [
            FFNLayer(
                ffn.path,
                (ffn.d_in, ffn.hidden, ffn.d_out),
                sum(work[part] for call in ffn.calls for part in (*call.first, call.down)) / whole,
                ffn.activation,
                ffn.gated,
                len(ffn.calls),
            )
            for ffn in ffns
        ],
        [dynamic(site, (site.experts, site.size)) for site in find_moes(graph)],
        [dynamic(site, site.widths) for site in find_skipping(graph)],
        [dynamic(site, (site.classes,)) for site in find_exits(graph)],
        [dynamic(site, (site.width,)) for site in find_halts(graph)],
        [
            Layer(linear.path, (linear.d_in, linear.d_out), sum(work[part] for part in linear.calls) / whole)
            for linear in linears
        ],
        refused,
        (*opened.notes, *cost.notes),
        list(snapshot(graph).nodes.values()) if with_graph else None,
    )


def outside_experts(graph: TracedGraph) -> tuple[list[FFN], list[LinearSite], list[Rejection]]:
    """Feed-forward layers, standalone linears and refused candidates, without those inside an expert layer."""
    routers = tuple(f"{site.path}." for site in find_moes(graph))
    (ffns, refused), (linears, _) = find_ffns(graph), find_linear_sites(graph)
    return (
        [ffn for ffn in ffns if not ffn.path.startswith(routers)],
        [linear for linear in linears if not linear.path.startswith(routers)],
        [rejection for rejection in refused if not rejection.path.startswith(routers)],
    )


def _shapes(graph: TracedGraph, inputs: Any) -> dict[str, list[int]]:
    """The shape of each example input, by the name of the model's argument."""
    args, kwargs = as_args_kwargs(inputs)
    named = named_arguments(graph, args, kwargs)
    return {name: list(value.shape) for name, value in named.items() if isinstance(value, Tensor)}
