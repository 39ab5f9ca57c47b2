"""Fine-tune a graph for its task with additional losses, such as sparse activations or distillation from a teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from surgeon.data.augmentation import Augmentation
from surgeon.data.batch import Batch
from surgeon.data.data import Data
from surgeon.data.imitation import divergence, made_for
from surgeon.errors import UsageError
from surgeon.graph.capture import Capture
from surgeon.graph.ownership import own_parameters
from surgeon.graph.traced import TracedGraph
from surgeon.tracing.trace import class_task
from surgeon.training.checkpoint import Stateful
from surgeon.training.distillation import Teacher, imitates, layer_inputs
from surgeon.training.loop import FitReport, RunSettings, TrainingPlan, fit, loss_of

# Maps the batch, the watched values and the completed share of training to an extra loss and values to show.
Penalise = Callable[[Batch, dict[str, Tensor], float], tuple[Tensor, dict[str, float]]]
_PLAIN = Augmentation()


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
    augmentation: Augmentation = _PLAIN,
    own_rates: Mapping[str, float] | None = None,
    stateful: Sequence[Stateful] = (),
) -> FitReport:
    """Train all parameters of the graph, after giving it its own copies. The graph's mode does not change.

    Args:
        key, label: name and display name of the fit, as in `surgeon.training.loop.fit`.
        watched: names of nodes whose values are passed to `penalise`.
        distill: weight of the divergence from the teacher: `settings.teacher`, or without one the model before the
            first pass, `settings.original`. The task loss gets the weight 1 - distill. Where the task is to imitate
            there is no task loss, and distill is 1.
        distill_layers: weight of the distance of the layers' inputs from those in the model before the first pass,
            whatever the teacher. It is added to the rest.
        augmentation: of labelled images. The teacher sees the same images.
        own_rates: learning rates, by parameter name, for parameters that do not use the plan's rate.

    Raises:
        UsageError: every parameter is frozen, the task is unknown, there is no model to distill from, or augmentation
            for another task than image classification.
        PassError: the loss is not finite.
    """
    label = key if label is None else label
    own_parameters(graph)
    parameters = [parameter for parameter in graph.parameters() if parameter.requires_grad]
    if not parameters:
        raise UsageError(
            f"{label}: every parameter of the model is frozen. Set requires_grad to True for those to train."
        )
    augmentation.check(data, class_task(graph), label)
    if imitates(graph, data):
        distill = 1.0
    original, teacher = settings.original, None
    layers: tuple[str, ...] = ()
    if distill or distill_layers:
        if original is None:
            raise UsageError(f"{label}: there is no model before the passes to distill from. Run it in a Pipeline.")
        layers = layer_inputs(original, graph) if distill_layers else ()
        teacher = Teacher(original, layers, settings.teacher if distill else None)
    tapped = Capture(graph, dict.fromkeys((*watched, *layers)), keep_output=True)
    tapped.graph.train()
    task = loss_of(graph, data) if distill < 1.0 else None
    outputs_of = made_for(data.task, class_task(graph))

    def loss(batch: Batch, done: float) -> tuple[Tensor, dict[str, float]]:
        augmented = None
        if augmentation:
            batch, augmented = augmentation.draw(batch)
        outputs, values = tapped(*batch.args, **batch.kwargs)
        total, shown = torch.zeros(()), {}
        if task is not None:
            value = task(outputs, batch) if augmented is None else augmented(outputs)
            shown["task loss"] = value.item()
            total = (1.0 - distill) * value
        if teacher is not None:
            expected, wanted = teacher(batch)
            if distill:
                value = divergence(expected, outputs, batch, outputs_of)
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
