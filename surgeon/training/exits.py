"""Train the heads of early exits on what the frozen model computes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgeon.collective import everywhere
from surgeon.data.batch import Batch, gathered_from
from surgeon.data.data import Data
from surgeon.errors import DataError
from surgeon.exits.heads import FEATURES, HeadPlan, answer, nodes_at
from surgeon.graph.capture import Capture
from surgeon.graph.traced import TracedGraph
from surgeon.progress import Progress
from surgeon.training.loop import FitReport, RunSettings, TrainingPlan, fit

log = logging.getLogger("surgeon")

# The most numbers to hold of what heads read: 1 GiB.
_HELD = 2**28


def train_heads(
    graph: TracedGraph,
    heads: Mapping[str, nn.Module],
    final: str,
    data: Data,
    plan: TrainingPlan,
    settings: RunSettings,
    *,
    form: HeadPlan,
    distill: float,
) -> FitReport:
    """Train all heads, and change nothing else. The model runs over the data once, in evaluation mode.

    What heads read is held in memory, at most 1 GiB of it; if the data has more samples, the log says so.

    The loss is the mean over the heads, and with an ensemble also over what the exits answer. No gradient goes from one
    head to another.

    Args:
        graph: the graph with the exits. heads: the parameters of every head by its path, in order.
        final: name of the node with the model's own answer, [B, C].
        distill: the share of the loss that is the divergence from the model's own answer, KL(model ‖ head) in nats.
            The labels have the rest, by cross entropy.

    Raises:
        DataError: labels are needed and there are none.
        PassError: the loss is not finite.
    """
    names = [node.name for node in nodes_at(graph, FEATURES)]
    held = _collected(graph, [*names, final], data, settings, labels=distill < 1.0)

    def error(logits: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        found = logits.float().log_softmax(-1)
        loss = distill * F.kl_div(found, teacher, log_target=True, reduction="none").sum(-1)
        if labels is not None:
            loss = loss + (1.0 - distill) * F.nll_loss(found, labels, reduction="none")
        return loss

    def loss(batch: Batch, done: float) -> tuple[Tensor, dict[str, float]]:
        *features, teacher = batch.args
        own: list[Tensor] = []
        errors = []
        for (_, head), x in zip(heads.items(), features, strict=True):
            logits, answered = answer(_run, head.get_parameter, x.to(_dtype(head)), own, form, Tensor.detach)
            own.append(logits)
            answers = [logits] if answered is logits else [logits, answered]
            errors += [error(one, teacher.log_softmax(-1), batch.labels) for one in answers]
        totals = torch.stack(errors).mean(0)
        value = everywhere(totals.sum()) / everywhere(totals.new_tensor(len(totals))).clamp(min=1)
        return value, {"head loss": value.item()}

    parameters = [parameter for head in heads.values() for parameter in head.parameters()]
    return fit(parameters, loss, Data(held), plan, settings, "early-exit", label="early-exit heads")


def _run(target: Any, *args: Any) -> Tensor:
    value: Tensor = target(*args)
    return value


def _dtype(head: nn.Module) -> torch.dtype:
    return next(head.parameters()).dtype


class _Shuffled:
    """Batches of what the heads read, in another order every time that they are read."""

    def __init__(self, parts: Sequence[Tensor], labels: Tensor | None, batches: int, seed: int) -> None:
        self._parts, self._labels, self._batches, self._seed, self._read = parts, labels, batches, seed, 0
        self.samples = len(parts[0])

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(self._seed + self._read)
        self._read += 1
        for rows in torch.randperm(self.samples, generator=generator).tensor_split(self._batches):
            labels = None if self._labels is None else self._labels[rows]
            yield Batch(tuple(part[rows] for part in self._parts), labels=labels)


@torch.no_grad()
def _collected(
    graph: TracedGraph, names: Sequence[str], data: Data, settings: RunSettings, *, labels: bool
) -> _Shuffled:
    """What the heads read and the model's own answers, on all data or as much as can be held."""
    inner = Capture(graph, names).eval()
    device = next(graph.parameters()).device
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    known: list[Tensor] = []
    batches = numbers = 0
    for item in data.train:
        if numbers >= _HELD:
            log.warning(
                "early-exit: the heads are trained on the first %d batches, which is as much as is held.", batches
            )
            break
        batch = item.part().to(device)
        _, values = inner(*batch.args, **batch.kwargs)
        if labels:
            if item.labels is None or item.labels.dim() != 1 or item.labels.is_floating_point():
                raise DataError(
                    "early-exit: the heads are to learn from labels, but a batch has no class for each sample. Give "
                    "labels, or distill=1, which needs none."
                )
            known.append(item.labels.to(device))
        for name in names:
            found[name].append(gathered_from(item, values[name].float()))
            numbers += found[name][-1].numel()
        batches += 1
        if settings.progress is not None:
            settings.progress(Progress("calibration", batches, batches))
    parts = [torch.cat(found[name]) for name in names]
    return _Shuffled(parts, torch.cat(known) if labels else None, batches, settings.seed)
