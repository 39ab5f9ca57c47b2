"""Compensate for skipped experts: add their mean output, one vector per layer.

y = Σ selected f_e(x) + b2 + E[Σ skipped f_e(x)], where the mean is over tokens of real data at the present tau. This
costs one vector addition per call and layer. It is removed when tau changes, because other experts are skipped then.
"""

from __future__ import annotations

from collections.abc import Iterable, Sized
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from surgeon.data.batch import Batch, check_batches
from surgeon.display.choose import shows_progress
from surgeon.dynamic.site import DynamicSite
from surgeon.errors import DataError, UsageError
from surgeon.graph.edit import emit, get_attr
from surgeon.graph.traced import TracedGraph, aten
from surgeon.kernels.activations import ACTIVATIONS
from surgeon.kernels.experts import hidden, keep_selected
from surgeon.kernels.int8_arguments import Int8Call
from surgeon.kernels.panels import Int8Experts
from surgeon.measure.meter import ExpertMeter
from surgeon.measure.sweep import knobs_restored, run_batches
from surgeon.moe.module import SKIPPED_MEAN
from surgeon.moe.site import MoESite, find_moes
from surgeon.progress import Progress, ShowProgress


@shows_progress
def compensate(model: nn.Module, batches: Iterable[Any], *, progress: ShowProgress = None) -> list[str]:
    """Add to every layer the mean output of the experts that it skips at its present tau. Padding is not counted.

    Args:
        model: a graph with lowered experts, or a grafted model. It gets one buffer for each layer.
        batches: a few hundred samples, in any form that `Batch.from_any` takes.
        progress: True shows it, a function is called with each `Progress`.

    Returns:
        The paths of the layers.

    Raises:
        UsageError: the model has no experts, or those of the graph are not lowered.
        DataError: there are no batches.
    """
    sites = find_moes(model)
    if not sites:
        raise UsageError("The model has no experts, so there are none to compensate for. Apply moeify first.")
    if any(site.form == "module" for site in sites):
        raise UsageError("Compensation needs lowered experts. Apply lower first.")
    check_batches(batches)
    total, rest = len(batches) if isinstance(batches, Sized) else 0, iter(batches)
    first = next(rest, None)
    if first is None:
        raise DataError("There is no data to compute the mean of what is skipped: no batches were given.")
    for site in sites:
        _buffer(model, site).zero_()
    sums: dict[str, Tensor] = {}
    with knobs_restored(model):
        meter = ExpertMeter(model)

        def add(site: DynamicSite, x: Tensor, ran: Tensor) -> None:
            if not isinstance(site, MoESite):
                return
            h = hidden(x, site.weights.flat(), ACTIVATIONS[site.activation])
            skipped = keep_selected(h, ~ran).float().sum(0)
            sums[site.path] = sums.get(site.path, torch.zeros_like(skipped)) + skipped

        meter.on_tokens = add
        for number, _ in enumerate(run_batches(meter, map(Batch.from_any, chain([first], rest))), 1):
            if callable(progress):
                progress(Progress("compensation", number, total))
    with torch.no_grad():
        for site in sites:
            mean = sums[site.path] / max(1, meter.layers[site.path].tokens)
            _buffer(model, site).copy_(mean @ site.weights.flat().w2.float())
    return [site.path for site in sites]


def _buffer(model: nn.Module, site: MoESite) -> Tensor:
    """Return the layer's vector [d_out], after adding it to the model if needed."""
    module = model.get_submodule(site.path)
    if hasattr(module, SKIPPED_MEAN):
        return getattr(module, SKIPPED_MEAN)  # type: ignore[no-any-return]
    like = site.stored.y_scale if isinstance(site.stored, Int8Experts) else site.stored.w2
    module.register_buffer(SKIPPED_MEAN, like.new_zeros(site.d_out))
    if isinstance(model, TracedGraph):
        _add_mean(model, site)
    return getattr(module, SKIPPED_MEAN)  # type: ignore[no-any-return]


def _add_mean(graph: TracedGraph, site: MoESite) -> None:
    """Add the vector to the output bias of the layer's nodes."""
    place = Int8Call._fields.index("b2") if site.form == "int8" else 8
    for node in site.nodes:
        b2 = node.args[place]
        with graph.graph.inserting_before(node):
            mean = get_attr(graph, f"{site.path}.{SKIPPED_MEAN}")
            value = emit(graph, aten.add.Tensor, b2, mean, path=site.path) if isinstance(b2, Node) else mean
        node.update_arg(place, value)
    graph.recompile()
