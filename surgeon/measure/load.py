"""How many experts each token runs, and how many neurons are active: their distributions over tokens, layer by layer.

These are the figures of D2DMoE on the distribution of executed experts and on activation sparsity.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from surgeon.data.batch import read_batches
from surgeon.data.losses import evaluating
from surgeon.display.choose import shows_progress
from surgeon.dynamic.site import DynamicSite, no_dynamic
from surgeon.errors import DataError
from surgeon.exits.site import ExitSite
from surgeon.json_values import Plain
from surgeon.kernels.activations import ACTIVATIONS, active_share
from surgeon.kernels.experts import Experts
from surgeon.measure.meter import ExpertMeter
from surgeon.measure.sweep import run_batches
from surgeon.moe.site import MoESite
from surgeon.progress import Progress, ShowProgress


@dataclass(frozen=True)
class Spread:
    """A number of each token, over all tokens: mean, standard deviation, smallest, quartiles and largest."""

    mean: float
    deviation: float
    smallest: int
    quartiles: tuple[int, int, int]
    largest: int

    @classmethod
    def of(cls, counts: Tensor) -> Spread:
        """From the number of tokens that have 0, 1, 2, ...: int64 [K], not all zero."""
        tokens = counts.double().numpy()
        values = np.arange(len(tokens))
        mean = float((tokens * values).sum() / tokens.sum())
        deviation = float(np.sqrt((tokens * (values - mean) ** 2).sum() / tokens.sum()))
        below = np.cumsum(tokens) / tokens.sum()
        lower, middle, upper = (int(np.searchsorted(below, part)) for part in (0.25, 0.5, 0.75))
        present = np.flatnonzero(tokens)
        return cls(mean, deviation, int(present[0]), (lower, middle, upper), int(present[-1]))


@dataclass(frozen=True)
class LayerLoad(Plain):
    """What the tokens use of one layer.

    unit: what it skips: "experts", "inputs" or "neurons".
    experts, neurons: how many it has, without filling. executed: how many experts a token runs. histogram: the number
        of tokens that run 0, 1, ..., all experts. A layer that skips inputs or
        neurons has one expert for each of them.
    active: how many neurons of a token have an activation above a hundredth of the token's largest, as
        `surgeon.training.penalty.Sparsity` counts them, whether or not their expert runs.
    neurons, active: None for a layer that skips inputs or neurons, which has no experts.
    """

    path: str
    unit: str
    tokens: int
    experts: int
    executed: Spread
    histogram: tuple[int, ...]
    neurons: int | None = None
    active: Spread | None = None


@shows_progress
def measure_load(model: nn.Module, batches: Iterable[Any], *, progress: ShowProgress = None) -> list[LayerLoad]:
    """Measure what every token runs and activates in each layer that skips, at the model's tau. Padding is left out.

    Args:
        model: a graph, or a model with converted layers. batches: in any form that `Batch.from_any` takes.

    Raises:
        UsageError: the model has no layers that skip. DataError: the batches hold no tokens.
    """
    meter = ExpertMeter(model)
    taken = {path: _Taken(site) for path, site in meter.sites.items() if not isinstance(site, ExitSite)}
    if not taken:
        raise no_dynamic("The model", "no token has a load")
    meter.on_tokens = lambda site, x, ran: taken[site.path].add(x, ran)
    given = read_batches(batches)
    with evaluating(model):
        for number, _ in enumerate(run_batches(meter, given), 1):
            if callable(progress):
                progress(Progress("load", number, len(given)))
    if not all(int(one.ran.sum()) for one in taken.values()):
        raise DataError("The data holds no tokens: its batches have no rows, or nothing but padding.")
    return [one.load(path) for path, one in taken.items()]


class _Taken:
    """Counts tokens by the experts or inputs they ran and by the neurons they activated."""

    def __init__(self, site: DynamicSite) -> None:
        assert not isinstance(site, ExitSite)
        self.unit, self.experts = site.unit, len(site.costs)
        self.ran = torch.zeros(self.experts + 1, dtype=torch.int64)
        self.neurons = _Neurons(site) if isinstance(site, MoESite) else None

    def add(self, x: Tensor, ran: Tensor) -> None:
        """Count tokens [N, d_in] with the experts that they run, bool [N, E]."""
        self.ran += torch.bincount(ran.sum(-1).cpu(), minlength=len(self.ran))
        if self.neurons is not None:
            self.neurons.add(x)

    def load(self, path: str) -> LayerLoad:
        histogram = tuple(self.ran.tolist())
        made = LayerLoad(path, self.unit, sum(histogram), self.experts, Spread.of(self.ran), histogram)
        if self.neurons is None:
            return made
        return replace(made, neurons=self.neurons.count, active=Spread.of(self.neurons.active))


class _Neurons:
    """Counts tokens by the neurons of an expert layer that they activated."""

    def __init__(self, site: MoESite) -> None:
        self._weights: Experts = site.weights.flat()
        self._activation = ACTIVATIONS[site.activation]
        self._hidden = site.experts * site.size
        self.count = self._hidden - site.filling
        self.active = torch.zeros(self._hidden + 1, dtype=torch.int64)

    def add(self, x: Tensor) -> None:
        """Count tokens [N, d_in]."""
        w1, b1, gate, b_gate, _ = self._weights
        # The activated values, which a gated layer then multiplies.
        weight, bias = (w1, b1) if gate is None else (gate, b_gate)
        a = self._activation.fn(torch.nn.functional.linear(x.to(weight.dtype), weight, bias)).float()
        active = (active_share(a) * self._hidden).round().long().cpu()  # filling is never active
        self.active += torch.bincount(active, minlength=len(self.active))
