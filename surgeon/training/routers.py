"""Fit the routers of expert layers on the inputs of these layers, in closed form or by training."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor

from surgeon.data.batch import Batch, gathered_from
from surgeon.data.data import Data
from surgeon.data.padding import real_tokens
from surgeon.graph.capture import Capture
from surgeon.graph.traced import TracedGraph
from surgeon.moe.closed_form import fit_closed_form
from surgeon.moe.module import MoE
from surgeon.processes import count, rank
from surgeon.training.loop import FitReport, Precision, RunSettings, TrainingPlan, computing_in, fit
from surgeon.training.observe import collect_calls

# The number of tokens for closed-form fits and for each part of the data held in training, and the most floats held.
_TOKENS, _MOST_HELD = 16384, 1 << 27

Inputs: TypeAlias = Mapping[MoE, Sequence[str]]
"""Expert layers, each with the names of the nodes that are its inputs, one name for every call."""


def by_trunk(layers: Iterable[MoE]) -> list[list[MoE]]:
    """Group the layers whose routers share a trunk."""
    groups: dict[int, list[MoE]] = defaultdict(list)
    for moe in layers:
        groups[id(moe.router.first.weight)].append(moe)
    return list(groups.values())


def fit_from_neurons(graph: TracedGraph, inputs: Inputs, data: Data, settings: RunSettings) -> None:
    """Fit every router from its layer's own neurons, for the objective "relative" (`surgeon.moe.closed_form`).

    A layer that is executed several times is fitted on the inputs of all its executions.

    Args:
        graph: the graph that the inputs are read from.
    """
    groups = by_trunk(inputs)
    names = {place: [name for moe in group for name in inputs[moe]] for place, group in enumerate(groups)}
    values = collect_calls(graph, names, data, tokens=_TOKENS, progress=settings.progress)
    with torch.no_grad():
        for place, group in enumerate(groups):
            fit_closed_form(
                [moe.router for moe in group],
                values[place],
                [(moe.routed, moe.activation) for moe in group],
                "relative",
                group[0].router.goal.labels,
            )


def train_routers(
    graph: TracedGraph,
    inputs: Inputs,
    data: Data,
    plan: TrainingPlan,
    settings: RunSettings,
    key: str,
    *,
    label: str | None = None,
    exposed: bool = False,
) -> FitReport:
    """Train the routers for their goals, and change nothing else.

    The model runs over the data once, however many epochs the routers are trained. The inputs of their layers are held
    in memory for a few thousand tokens at a time, which takes about 512 MB and a batch.

    Args:
        graph: the graph that the inputs are read from. It is run in evaluation mode, as far as the inputs need.
        exposed: whether the routers act in `graph`. Then the inputs of their layers change, and none are held.
        key, label: name and display name of the fit, as in `surgeon.training.loop.fit`.

    Raises:
        PassError: the loss is not finite.
    """
    layers = list(inputs)

    def loss(batch: Batch, done: float) -> tuple[Tensor, dict[str, float]]:
        pairs = zip(batch.args[::2], batch.args[1::2], strict=True)
        losses = [moe.router.goal.error(moe.router, x, wanted) for moe, (x, wanted) in zip(layers, pairs, strict=True)]
        mean = torch.stack(losses).mean()
        return mean, {"router loss": mean.item()}

    routers = list(dict.fromkeys(parameter for moe in layers for parameter in moe.router.parameters()))
    times = 1 if exposed else int(plan.epochs)
    if plan.steps is not None:  # use all the data, if there are enough steps
        length = len(data.train) if isinstance(data.train, Sized) else plan.steps
        times = min(times, plan.steps * plan.accumulate // max(1, length))
    held = _Held(graph, inputs, data, times, 0 if exposed else _TOKENS, settings.seed, plan.precision)
    return fit(routers, loss, Data(held), plan, settings, key, label=label, in_parts=True)


class _Held:
    """Batches of the layers' inputs and the targets of their routers: (inputs, targets) of each layer in turn.

    A part of the data with at least `tokens` tokens, if there are enough, is held at a time. It is read `times` times
    before the next part, each time in a different order. The length is that of the data, read once. Every process holds
    the whole part, runs the model on its share of it, and gives its share of every batch.
    """

    def __init__(
        self,
        graph: TracedGraph,
        inputs: Inputs,
        data: Data,
        times: int,
        tokens: int,
        seed: int,
        precision: Precision,
    ) -> None:
        self._inner = Capture(graph, [name for names in inputs.values() for name in names]).eval()
        self._inputs, self._data, self._times, self._tokens, self._seed = inputs, data, max(1, times), tokens, seed
        self._precision: Precision = precision

    def __len__(self) -> int:
        return len(self._data.train)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(self._seed)
        for batches, values in self._parts():
            for _ in range(self._times):
                orders = [torch.randperm(len(x), generator=generator).tensor_split(batches) for x, _ in values]
                for rows in zip(*orders, strict=True):
                    own = [i.tensor_split(count())[rank()] for i in rows]
                    yield Batch(tuple(value[i] for pair, i in zip(values, own, strict=True) for value in pair))
            del values  # before the next part is read

    def _parts(self) -> Iterator[tuple[int, list[tuple[Tensor, Tensor]]]]:
        """Yield the data in parts: the number of batches, and for each layer its inputs and the router's targets."""
        device = next(iter(self._inputs)).tau.device
        batches = iter(self._data.train)
        while True:
            found: dict[MoE, tuple[list[Tensor], list[Tensor]]] = {moe: ([], []) for moe in self._inputs}
            read = held = 0
            for item in batches:
                batch = item.part().to(device)
                with torch.no_grad(), computing_in(self._precision, device):
                    _, values = self._inner(*batch.args, **batch.kwargs)
                    for moe, names in self._inputs.items():
                        for name in names:
                            x = real_tokens(batch, values[name])
                            wanted = moe.router.goal.wanted(x, moe.routed, moe.activation)
                            x, wanted = gathered_from(item, x), gathered_from(item, wanted)
                            found[moe][0].append(x)
                            found[moe][1].append(wanted)
                            held += x.numel() + wanted.numel()
                read += 1
                if max(sum(map(len, x)) for x, _ in found.values()) >= self._tokens or held >= _MOST_HELD:
                    break
            if not read:
                return
            yield read, [(torch.cat(x), torch.cat(wanted)) for x, wanted in map(found.pop, self._inputs)]


@contextmanager
def running_at(tau: float, layers: Iterable[MoE]) -> Iterator[None]:
    """Run the layers at a given tau inside the context, and restore their own tau afterwards."""
    own = {moe: moe.tau.clone() for moe in layers}
    for moe in own:
        moe.tau.fill_(tau)
    try:
        yield
    finally:
        for moe, before in own.items():
            moe.tau.copy_(before)
