"""Quality against cost at several values of tau."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule

from surgeon.batch import Batch
from surgeon.cost import ExpertMeter, measure
from surgeon.errors import UsageError
from surgeon.fit import token_mask
from surgeon.inputs import as_args_kwargs
from surgeon.losses import Quality, quality
from surgeon.moe import find_moes, get_tau, set_tau
from surgeon.report import Progress

USUAL_TAUS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)


@dataclass(frozen=True)
class Point:
    """One setting: quality on the data, and cost.

    executed: share of expert-token pairs that ran, padding not counted. multiply_adds: of one call on the example
    inputs at that share, everything included. relative: those over the dense model's, None if that is unknown.
    """

    tau: float
    quality: Quality
    executed: float
    multiply_adds: int
    relative: float | None


def sweep(
    graph: GraphModule,
    batches: Iterable[Batch],
    task: str,
    taus: Sequence[float] = USUAL_TAUS,
    *,
    inputs: Any,
    dense_multiply_adds: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> list[Point]:
    """Measure quality and cost at each tau, on all batches; the graph's own tau is restored afterwards.

    Args:
        inputs: example inputs on which multiply-adds are counted. dense_multiply_adds: the dense model's on the same.

    Raises:
        UsageError: the graph has no experts, or a tau is outside [0, 1].
        DataError: labels are missing.
    """
    if not find_moes(graph):
        raise UsageError("The graph has no experts, so tau changes nothing. Apply moeify first.")
    batches = list(batches)
    before, training = get_tau(graph), graph.training
    graph.eval()
    args, kwargs = as_args_kwargs(inputs)
    cost, example = measure(graph, args, kwargs)
    points = []
    try:
        for number, tau in enumerate(taus):
            set_tau(graph, tau)
            meter, marks = ExpertMeter(graph), quality(task)
            with torch.no_grad():
                for index, batch in enumerate(batches):
                    meter.token_mask = lambda lead, batch=batch: token_mask(batch, lead)
                    marks.add(meter.call(batch.args, batch.kwargs), batch)
                    if progress is not None:
                        done = number * len(batches) + index + 1
                        progress(Progress("sweep", done, len(taus) * len(batches), {"tau": tau}))
            pairs = sum(layer.multiply_adds for layer in meter.layers.values())
            ran = sum(layer.ran * layer.per_pair for layer in meter.layers.values())
            skipped = sum((1.0 - meter.layers[path].share) * layer.multiply_adds for path, layer in example.items())
            total = int(cost.multiply_adds - skipped)
            relative = None if not dense_multiply_adds else total / dense_multiply_adds
            points.append(Point(tau, marks.result(), ran / pairs if pairs else 1.0, total, relative))
    finally:
        set_tau(graph, before)
        graph.train(training)
    return points
