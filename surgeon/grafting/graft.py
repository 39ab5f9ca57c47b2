"""Put the converted layers of a graph back into the model that the graph was made from."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from surgeon.dynamic.knobs import get_knobs, set_knobs, set_tau
from surgeon.dynamic.site import find_dynamic
from surgeon.errors import UsageError, VerificationError, first_line, some
from surgeon.exits.halting import find_halts
from surgeon.exits.site import find_exits
from surgeon.grafting.check import Call, calls_of, difference, outputs
from surgeon.grafting.parts import (
    GRAFT,
    MLP,
    Graft,
    Layer,
    Plan,
    joined,
    layer_of,
    leave_fused_paths,
    plan_of,
    put,
    put_one,
    united,
)
from surgeon.grafting.placement import Modules, Placement, copy_of, placements, shared_weight
from surgeon.grafting.turned import plain_norms, turned_streams, untied
from surgeon.grafting.unsplit import unsplit
from surgeon.grafting.weights import take_weights
from surgeon.graph.calls import as_args_kwargs
from surgeon.graph.traced import TracedGraph
from surgeon.inputs.module import SparseLinear
from surgeon.inputs.neuron_site import find_sparse_neurons
from surgeon.inputs.neurons import SparseNeurons
from surgeon.inputs.rebuild import linear_module
from surgeon.inputs.site import find_sparse_linears
from surgeon.inputs.skipping import find_skipping
from surgeon.moe.int8 import Int8MoE
from surgeon.moe.module import MoE
from surgeon.moe.rebuild import moe_module
from surgeon.moe.site import find_moes
from surgeon.passes.report import PassReport
from surgeon.sites.ffn import FFN
from surgeon.sites.linear_site import LinearSite
from surgeon.sites.rejection import Rejection
from surgeon.sites.search import find_all_linears, find_ffns, find_linear_sites
from surgeon.tracing.trace import sketch

log = logging.getLogger("surgeon")


@dataclass
class _Converted:
    """A layer of the model that the graph computes in another way.

    site: the layer in the model. paths: of the modules in the graph. stays: it is a linear layer again, so that the
    model's own takes its weights. layer: without the parts.
    """

    site: FFN | LinearSite
    paths: tuple[str, ...]
    residual: bool = False
    dropout: float = 0.0
    stays: bool = False
    placement: Placement | None = None
    refusal: Rejection | None = None


def graft(
    model: nn.Module,
    graph: TracedGraph,
    reports: Sequence[PassReport],
    inputs: Any,
    *,
    share: bool = False,
    made_up: bool = False,
) -> nn.Module:
    """Return a copy of `model` in which the layers that passes converted are those of the graph.

    Args:
        model: the model that the graph was made from, or one of the same architecture. It is not changed.
        graph: the rewritten graph. All weights of the copy come from it; those it does not use come from the model.
        reports: of the passes that made the graph.
        inputs: example inputs of the model.
        made_up: the model's own weights mean nothing, so the graph must have all.
        share: let the copy use the graph's own tensors. By default it gets copies of its own.

    Returns:
        A model of the same class, in the same mode, that was compared with the graph. Its attribute `surgeon_graft` is
        a `Graft`. Layers for which the model has no place stay dense, and the log says why.

    Raises:
        UsageError: no layer of the graph can be put into the model, the model does not have the graph's layers, a
            weight of it is not to be had, or the graph has early exits, token halting, or a turned residual stream with
            LayerNorms.
        TraceError: the model cannot be traced.
        VerificationError: the copy would not compute what the graph computes.
    """
    args, kwargs = as_args_kwargs(inputs)
    if isinstance(model, TracedGraph):
        raise UsageError("The model is a graph already. Give the model it was traced from.")
    for what, name in (("early exits", "early-exit"), ("token halting", "halt-tokens")):
        if find_exits(graph) if name == "early-exit" else find_halts(graph):
            raise UsageError(
                f"The graph has {what}, for which a model of another class has no place. Use the graph itself "
                f"(surgeon.load), or graft a surgery without {name}."
            )
    calls = calls_of(graph, args, kwargs)
    sketched = sketch(model, inputs)
    streams = turned_streams(sketched, reports)
    if streams and (apart := untied(model, graph)) is not None:
        model, sketched = apart, sketch(apart, inputs)
    converted = _converted(sketched, reports)
    made = copy_of(model)
    _place(made, model, sketched, converted, calls)
    placed = [layer for layer in converted if layer.placement is not None]
    before: Graft | None = getattr(model, GRAFT, None)
    if not placed and before is None and not streams:
        reasons = [f"{layer.site.path}: {layer.refusal.reason}" for layer in converted if layer.refusal is not None]
        raise UsageError(
            f"No converted layer of the graph can be put into {type(model).__name__}: "
            f"{some(reasons) or 'the passes converted none'}."
        )
    new = _modules(graph, placed)
    modules = new | _earlier(graph, made)
    for path, module in modules.items():
        put_one(made, path, module)
    leave_fused_paths(made)
    dense = {layer.paths[0]: layer.site for layer in converted if layer.placement is None and len(layer.paths) == 1}
    trained = unsplit(graph, made, dense) | plain_norms(sketched, streams)
    kept = take_weights(made, graph, modules, trained, share=share)
    if made_up and kept:
        raise UsageError(
            f"The graph does not use {some(kept)}, so their values are not in the surgery.",
            python="Give the original model as model=.",
            command="Give the directory of the original model with --base.",
        )
    plan = _merged(placed, {path: layer_of(module) for path, module in new.items()})
    if before is not None:
        plan = united(plan_of(made, before.plan), plan)
    refused = tuple(layer.refusal for layer in converted if layer.refusal is not None)
    for rejection in refused:
        log.warning("graft: %s stays dense: %s.", rejection.path, rejection.reason)
    _verify(made, graph, calls, refused)
    setattr(made, GRAFT, Graft(plan, refused, kept))
    return made


# --- what was converted -----------------------------------------------------------------------------------------------


def _converted(sketched: TracedGraph, reports: Sequence[PassReport]) -> list[_Converted]:
    """The layers of the model that passes converted, by what the passes reported.

    Raises:
        UsageError: the model does not have a layer that was converted.
    """
    projections = [change for report in reports if report.name == "mlpify" for change in report.sites]
    options = {
        change.path: dict(report.options) for report in reports if report.name == "mlpify" for change in report.sites
    }
    experts, _ = _followed(reports, ("moeify", "sparsify-neurons"))
    inputs, again = _followed(reports, ("sparsify-inputs",))
    swapped = {change.path for report in reports if report.name == "swap-activation" for change in report.sites}
    sites: dict[str, FFN | LinearSite] = {site.path: site for site in find_ffns(sketched)[0]}
    made = {path for change in projections for path in change.made}
    wanted = [path for path in dict.fromkeys([*experts, *swapped]) if path not in made]
    found = [_Converted(_site(sites, path), experts.get(path, (path,))) for path in wanted]
    if inputs:
        every: dict[str, FFN | LinearSite] = {site.path: site for site in find_all_linears(sketched)[0]}
        inside = tuple(f"{path}." for path in made)
        gone = {linear.path for layer in found if isinstance(layer.site, FFN) for linear in layer.site.linears}
        found += [
            _Converted(_site(every, path), paths, stays=again.issuperset(paths))
            for path, paths in inputs.items()
            if path not in gone and not path.startswith(inside)
        ]
    linears: dict[str, FFN | LinearSite] = {}
    if projections:
        linears = {site.path: site for site in find_linear_sites(sketched)[0]}
    for change in projections:
        paths = tuple(inner for path in change.made for inner in experts.get(path, (path,)))
        given = options[change.path]
        found.append(
            _Converted(
                _site(linears, change.path), paths, given.get("kind") == "residual", float(given.get("dropout", 0.0))
            )
        )
    return found


def _followed(reports: Sequence[PassReport], names: Collection[str]) -> tuple[dict[str, tuple[str, ...]], set[str]]:
    """Return what layers that these passes converted are now, and the paths of what is dense again.

    A layer that is dense again may be converted once more, under the path that it then had.
    """
    found: dict[str, tuple[str, ...]] = {}
    first: dict[str, str] = {}  # of what is dense again: the path in the model
    for report in reports:
        for change in report.sites:
            if report.name in names:
                found[first.get(change.path, change.path)] = change.made
            elif report.name == "densify":
                for path in [path for path, made in found.items() if change.path in made]:
                    found[path] = change.made
                    first |= dict.fromkeys(change.made, path)
    return found, set(first)


def _site(sites: Mapping[str, FFN | LinearSite], path: str) -> FFN | LinearSite:
    if path not in sites:
        raise UsageError(
            f"The graph has a converted layer '{path}', but the model has no such layer. Give the model that the graph "
            "was made from."
        )
    return sites[path]


def _modules(graph: TracedGraph, placed: Iterable[_Converted]) -> dict[str, nn.Module]:
    """Make the module of every layer from the graph, by the place it goes to."""
    moes = {site.path: site for site in find_moes(graph)}
    inputs = {site.path: site for site in find_sparse_linears(graph)}
    neurons = {site.path: site.layer for site in find_sparse_neurons(graph)}
    ffns = {site.path: site for site in find_ffns(graph)[0]}

    def part(path: str) -> nn.Module:
        if path in moes:
            return moe_module(graph, moes[path])
        if path in inputs:
            return linear_module(graph, inputs[path])
        if path in neurons:
            return neurons[path]
        if path not in ffns and any(other.startswith(f"{path}.") for other in inputs):
            raise UsageError(
                f"The layer '{path}' was replaced, and linear layers inside of it skip inputs. A model has no place "
                f"for both. Run sparsify-inputs again with skip={path}.*"
            )
        if path not in ffns:
            raise UsageError(f"The layer '{path}' is in the graph in a form that cannot be put into a model.")
        return MLP.of(ffns[path].weights(graph), ffns[path].activation)

    return {
        layer.placement.at: joined(
            [part(path) for path in layer.paths],
            residual=layer.residual,
            dropout=layer.dropout or layer.placement.dropout,
        )
        for layer in placed
        if layer.placement is not None
    }


def _earlier(graph: TracedGraph, model: nn.Module) -> dict[str, nn.Module]:
    """Make the layers that the model had before from the graph, in which passes and knobs may have changed them."""
    known = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, nn.Module] = {
        site.path: moe_module(graph, site)
        for site in find_moes(graph)
        if isinstance(known.get(site.path), MoE | Int8MoE)
    }
    found |= {
        site.path: linear_module(graph, site)
        for site in find_sparse_linears(graph)
        if isinstance(known.get(site.path), SparseLinear)
    }
    return found | {
        site.path: site.layer for site in find_sparse_neurons(graph) if isinstance(known.get(site.path), SparseNeurons)
    }


# --- the places -------------------------------------------------------------------------------------------------------


def _place(
    made: nn.Module, model: nn.Module, sketched: TracedGraph, converted: Sequence[_Converted], calls: list[Call]
) -> None:
    """Choose a place for every layer, and put a dense layer of the same weights there, which changes no output.

    If the model computes something else with all layers in their places, each is tried by itself.
    """
    modules = Modules(sketched, model)
    ways = [[] if layer.stays else placements(modules, layer.site) for layer in converted]
    for layer, found in zip(converted, ways, strict=True):
        layer.placement = found[0] if found else None
        if not found and not layer.stays:
            layer.refusal = _why_no_place(model, layer.site)
    chosen = [layer for layer in converted if layer.placement is not None]
    if chosen and _differs(made, model, sketched, chosen, calls) is not None:
        for layer, found in zip(converted, ways, strict=True):
            problem: str | None = None
            for way in found:
                layer.placement = way
                problem = _differs(copy_of(model), model, sketched, [layer], calls[:1])
                if problem is None:
                    break
            if problem is not None:
                layer.placement, layer.refusal = None, Rejection("graft-differs", problem, layer.site.path)
        chosen = [layer for layer in converted if layer.placement is not None]
        again = copy_of(model)
        problem = _differs(again, model, sketched, chosen, calls) if chosen else None
        if problem is not None:
            raise VerificationError(f"The layers cannot be put into {type(model).__name__} together: {problem}.")
        vars(made).update(vars(again))


def _why_no_place(model: nn.Module, site: FFN | LinearSite) -> Rejection:
    if isinstance(site, FFN):
        reason = (
            "no module computes just this layer, and its linear layers and its activation are not all modules or "
            "attributes"
        )
        return Rejection("no-place", reason, site.path)
    if holders := shared_weight(model, site):
        reason = f"its weight is that of several modules ({some(holders)}), which need it as it is"
        return Rejection("tied-weight", reason, site.path)
    return Rejection("no-place", "no module computes just this layer", site.path)


def _differs(
    made: nn.Module, model: nn.Module, sketched: TracedGraph, layers: Sequence[_Converted], calls: list[Call]
) -> str | None:
    """Put dense layers into a copy of the model; return how it then differs from the model, None if it does not."""
    try:
        put(made, _merged(layers), {layer.placement.at: _dense(sketched, layer) for layer in layers if layer.placement})
        for training in (False, True):
            if training and sketched.meta["trace"].form == "eval":
                continue
            worst = difference(outputs(made, calls, training=training), outputs(model, calls, training=training), model)
            if worst > 1:
                return f"with it in place the model computes something else {'in training' if training else ''}".strip()
    except Exception as error:  # of the model's own code, which may use what was replaced
        return f"with it in place the model fails: {first_line(error)}"
    return None


def _dense(sketched: TracedGraph, layer: _Converted) -> nn.Module:
    """The layer as the model has it, in one module."""
    if isinstance(layer.site, FFN):
        return MLP.of(layer.site.weights(sketched), layer.site.activation)
    call = layer.site.calls[0]
    weight, bias = call.weight_rows(sketched), call.bias_vector(sketched)
    linear = nn.Linear(call.in_features, call.out_features, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight)
    linear.bias = None if bias is None else nn.Parameter(bias)  # type: ignore[assignment]
    return linear


def _merged(layers: Iterable[_Converted], shapes: Mapping[str, Layer] | None = None) -> Plan:
    places = [layer.placement for layer in layers if layer.placement is not None]

    return united(Plan(shapes or {}), *(Plan({}, place.passed, place.ones, place.functions) for place in places))


# --- what it computes -------------------------------------------------------------------------------------------------


def _verify(made: nn.Module, graph: TracedGraph, calls: list[Call], refused: Sequence[Rejection]) -> None:
    """Compare the grafted model with the graph. If a layer stayed dense, both run all experts.

    Both skip no inputs and no neurons. Of millions some are so near a threshold that rounding decides.
    """
    knobs = [(part, get_knobs(part)) for part in (made, graph) if find_dynamic(part)]
    for part, _ in knobs:
        set_tau(part, {site.path: 0.0 for site in (find_dynamic(part) if refused else find_skipping(part))})
    try:
        for training in (False, True):
            if training and graph.meta["trace"].form == "eval":
                continue
            worst = difference(outputs(made, calls, training=training), outputs(graph, calls, training=training), made)
            if worst > 1:
                stage = "in training" if training else "in evaluation"
                advice = (
                    f"Passes replaced a layer that has to stay dense: {some([layer.path for layer in refused])}. "
                    "Run the passes again, and leave these layers out with the option skip"
                    if refused
                    else "Give the model that the graph was made from"
                )
                raise VerificationError(
                    f"The grafted model differs from the graph {stage}, by {worst:.1e} times the accepted error. "
                    f"{advice}."
                )
    finally:
        for part, saved in knobs:
            set_knobs(part, saved)
