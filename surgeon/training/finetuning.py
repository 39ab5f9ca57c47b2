"""Fine-tune a graph for its task while something else is wanted of it too: sparse activations, a teacher's answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from surgeon.data.batch import Batch
from surgeon.data.data import Data
from surgeon.errors import UsageError
from surgeon.graph.capture import Capture
from surgeon.graph.ownership import own_parameters
from surgeon.graph.traced import TracedGraph
from surgeon.training.distillation import Teacher, divergence, layer_inputs
from surgeon.training.loop import FitReport, RunSettings, Stateful, TrainingPlan, fit, loss_of

# From the watched values and the share of the training that is done: what to add to the loss, and what to show.
Penalise = Callable[[Batch, dict[str, Tensor], float], tuple[Tensor, dict[str, float]]]


def finetune(
    graph: TracedGraph,
    data: Data,
    plan: TrainingPlan,
    settings: RunSettings,
    key: str,
    *,
    label: str | None = None,
    watched: Sequence[str] = (),
    penalise: Penalise | None = None,
    distill: float = 0.0,
    distill_layers: float = 0.0,
    own_rates: Mapping[str, float] | None = None,
    stateful: Sequence[Stateful] = (),
) -> FitReport:
    """Train all parameters of the graph, which gets copies of its own; returns with the graph's mode as it was.

    Args:
        key, label: of the fit, as in `surgeon.training.loop.fit`.
        watched: names of nodes whose values `penalise` gets.
        distill: weight of the divergence from the model before the first pass, `settings.original`; the task's loss has
            the rest.
        distill_layers: weight, beside these, of how far the layers' inputs are from those in that model.
        own_rates: learning rates of those parameters, by name, that get another one than the plan's.

    Raises:
        UsageError: every parameter is frozen, the task is unknown, or there is no model to distill from.
        PassError: the loss is not finite.
    """
    label = key if label is None else label
    own_parameters(graph)
    parameters = [parameter for parameter in graph.parameters() if parameter.requires_grad]
    if not parameters:
        raise UsageError(f"{label}: every parameter of the model is frozen (requires_grad is False).")
    original, teacher = settings.original, None
    layers: tuple[str, ...] = ()
    if distill or distill_layers:
        if original is None:
            raise UsageError(f"{label}: there is no model before the passes to distill from. Run it in a Pipeline.")
        layers = layer_inputs(original, graph) if distill_layers else ()
        teacher = Teacher(original, layers)
    tapped = Capture(graph, dict.fromkeys((*watched, *layers)), keep_output=True)
    tapped.graph.train()
    task = loss_of(graph, data) if distill < 1.0 else None

    def loss(batch: Batch, done: float) -> tuple[Tensor, dict[str, float]]:
        outputs, values = tapped(*batch.args, **batch.kwargs)
        total, shown = torch.zeros(()), {}
        if task is not None:
            value = task(outputs, batch)
            shown["task loss"] = value.item()
            total = (1.0 - distill) * value
        if teacher is not None:
            expected, wanted = teacher(batch)
            if distill:
                value = divergence(expected, outputs, batch)
                shown["divergence"] = value.item()
                total = total + distill * value
            if distill_layers:
                value = teacher.layer_error(batch, wanted, values)
                shown["layer error"] = value.item()
                total = total + distill_layers * value
        if penalise is not None:
            extra, more = penalise(batch, values, done)
            total, shown = total + extra, shown | more
        return total, shown

    rates = {graph.get_parameter(name): rate for name, rate in (own_rates or {}).items()}
    return fit(parameters, loss, data, plan, settings, key, label=label, own_rates=rates, stateful=stateful)
