"""Fit the routers of expert layers on the inputs that the layers get: in closed form, or by training."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor

from surgeon.batch import Batch, Data
from surgeon.calibration import collect_calls
from surgeon.fit import Plan, Settings, fit
from surgeon.graph import TracedGraph
from surgeon.moe import MoE
from surgeon.padding import real_tokens
from surgeon.report import FitReport
from surgeon.rewrite import Capture
from surgeon.routing import fit_closed_form

# Tokens that routers are fitted on in closed form.
_TOKENS = 16384

Inputs: TypeAlias = Mapping[MoE, Sequence[str]]
"""Expert layers with the names of the nodes that hold their inputs, one for every call."""


def by_trunk(layers: Iterable[MoE]) -> list[list[MoE]]:
    """The layers, those together whose routers share a trunk."""
    groups: dict[int, list[MoE]] = defaultdict(list)
    for moe in layers:
        groups[id(moe.router.first.weight)].append(moe)
    return list(groups.values())


def fit_from_neurons(graph: TracedGraph, inputs: Inputs, data: Data, settings: Settings) -> None:
    """Fit every router in closed form from its layer's own neurons (`surgeon.routing.fit_closed_form`), to be relative.

    A layer that is executed several times is fitted on the inputs of all its executions.

    Args:
        graph: what the inputs are read from.
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
    graph: TracedGraph, inputs: Inputs, data: Data, plan: Plan, settings: Settings, what: str
) -> FitReport:
    """Train the routers, and nothing else, for their goals.

    Args:
        graph: what the inputs are read from. It is run in evaluation mode, as far as the inputs need.
        what: name of the fit, and of its checkpoint.

    Raises:
        PassError: the loss is not finite.
    """
    inner = Capture(graph, [name for names in inputs.values() for name in names]).eval()

    def loss(batch: Batch, done: float) -> tuple[Tensor, dict[str, float]]:
        with torch.no_grad():
            _, values = inner(*batch.args, **batch.kwargs)
        losses = [
            moe.router.goal.loss(moe.router, real_tokens(batch, values[name]), moe.routed, moe.activation)
            for moe, names in inputs.items()
            for name in names
        ]
        mean = torch.stack(losses).mean()
        return mean, {"router loss": mean.item()}

    routers = list(dict.fromkeys(parameter for moe in inputs for parameter in moe.router.parameters()))
    return fit(routers, loss, data, plan, settings, what)


@contextmanager
def running_at(tau: float, layers: Iterable[MoE]) -> Iterator[None]:
    """Let layers run at a tau for a while; their own is put back."""
    own = {moe: moe.tau.clone() for moe in layers}
    for moe in own:
        moe.tau.fill_(tau)
    try:
        yield
    finally:
        for moe, before in own.items():
            moe.tau.copy_(before)
