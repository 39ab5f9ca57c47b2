"""Compare two models side by side: what they cost, their sites, and what they compute."""

from __future__ import annotations

from dataclasses import dataclass, field

from surgeon.described import Facts
from surgeon.errors import first_line
from surgeon.graph.agreement import call_reproducibly, relative_error
from surgeon.graph.calls import as_args_kwargs
from surgeon.graph.snapshot import GraphDiff, compare_unrelated, snapshot
from surgeon.inputs.skipping import find_skipping
from surgeon.jobs.inspect import outside_experts
from surgeon.jobs.open_model import Opened
from surgeon.measure.cost import Cost
from surgeon.measure.meter import measure
from surgeon.moe.int8 import parameter_sizes
from surgeon.moe.site import find_moes


@dataclass(frozen=True)
class SiteSide:
    """A site in one of two models. what: in words. facts: see `surgeon.described.Described.facts`.

    multiply_adds: for one token, without skipping.
    """

    what: str
    parameters: int
    multiply_adds: int
    executed: float | None = None
    facts: Facts = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Comparison:
    """Two models side by side.

    names, costs: of both models, each on its own example inputs. sites: by path, None where a model has no such site.
    difference: largest difference of the outputs on the first model's example inputs, relative to the largest output.
    It is None if they could not be compared, and `note` says why. nodes: differences of the graphs, if asked for.
    """

    names: tuple[str, str]
    costs: tuple[Cost, Cost]
    sites: dict[str, tuple[SiteSide | None, SiteSide | None]]
    difference: float | None = None
    note: str = ""
    nodes: GraphDiff | None = field(default=None)


def compare_models(first: Opened, second: Opened, *, with_nodes: bool = False) -> Comparison:
    """Compare two models: cost, sites by path, and what they compute."""
    args, kwargs = as_args_kwargs(first.inputs)
    costs = measure(first.graph, args, kwargs)[0], measure(second.graph, *as_args_kwargs(second.inputs))[0]
    difference, note = None, ""
    try:
        difference = relative_error(
            call_reproducibly(second.graph, args, kwargs), call_reproducibly(first.graph, args, kwargs)
        )
    except Exception as error:  # a graph may raise anything for inputs that are not its own
        note = f"The outputs cannot be compared on the first model's example inputs: {first_line(error)}."
    sides = _sides(first), _sides(second)
    return Comparison(
        (first.spec, second.spec),
        costs,
        {path: (sides[0].get(path), sides[1].get(path)) for path in dict.fromkeys((*sides[0], *sides[1]))},
        difference,
        note,
        compare_unrelated(snapshot(first.graph), snapshot(second.graph)) if with_nodes else None,
    )


def _sides(opened: Opened) -> dict[str, SiteSide]:
    graph = opened.graph
    found = {
        ffn.path: SiteSide(ffn.describe, ffn.parameters(graph), ffn.multiply_adds, facts=ffn.facts)
        for ffn in outside_experts(graph)[0]
    }
    _, layers = measure(graph, *as_args_kwargs(opened.inputs))
    for site in find_moes(graph):
        experts = graph.get_submodule(site.path)
        sizes = parameter_sizes(experts) if site.form == "int8" else {}
        count = sum(sizes.values()) or sum(parameter.numel() for parameter in experts.parameters())
        side = SiteSide(site.describe, count, site.multiply_adds, layers[site.path].share, site.facts)
        found[site.path.rpartition(".")[0]] = side
    for skipping in find_skipping(graph):
        parameters, multiply_adds = skipping.parameters, skipping.multiply_adds
        side = SiteSide(skipping.describe, parameters, multiply_adds, layers[skipping.path].share, skipping.facts)
        found[skipping.path.rpartition(".")[0]] = side
    return found
