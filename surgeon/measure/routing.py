"""How well routers predict: their scores against the true norms, and the energy that is lost by what they skip.

The energy of an expert's output is its squared norm. What is lost is the share of the energy that skipped experts have.
The oracle skips as many experts of each token, but those with the smallest norms. What is lost beyond that is regret.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.data.batch import read_batches
from surgeon.data.losses import evaluating
from surgeon.display.choose import shows_progress
from surgeon.dynamic.site import no_dynamic
from surgeon.errors import DataError
from surgeon.measure.meter import ExpertMeter
from surgeon.measure.sweep import run_batches
from surgeon.moe.router import expert_norms
from surgeon.moe.site import MoESite, find_moes
from surgeon.progress import Progress, ShowProgress

BINS = 24


@dataclass(frozen=True)
class RouterLayer:
    """How well one router predicts, at the present tau.

    tokens, experts: how many; experts that always run are not among them. lost, oracle: the energy that is lost with
    the router and with the oracle, as shares. pairs: counts of expert-token pairs, `pairs[t][p]` of those whose true
    norm is in bin t and whose score is in bin p; both are shares of the token's largest, in `BINS` bins from 0 to 1.
    """

    path: str
    tokens: int
    experts: int
    lost: float
    oracle: float
    pairs: tuple[tuple[int, ...], ...]

    @property
    def regret(self) -> float:
        """The energy that is lost because the router is not the oracle."""
        return self.lost - self.oracle


@shows_progress
def measure_routing(model: nn.Module, batches: Iterable[Any], *, progress: ShowProgress = None) -> list[RouterLayer]:
    """Measure every router on data, at the model's tau. Padding is left out.

    Args:
        model: a graph, or a model with converted layers. batches: in any form that `Batch.from_any` takes.

    Raises:
        UsageError: the model has no experts. DataError: the batches hold no tokens.
    """
    found = {site.path: _Sums(site) for site in find_moes(model)}
    if not found:
        raise no_dynamic("The model", "there are no routers")
    meter = ExpertMeter(model)
    meter.on_scores = lambda site, x, ran, scores: found[site.path].add(x, ran, scores)
    given = read_batches(batches)
    with evaluating(model):
        for number, _ in enumerate(run_batches(meter, given), 1):
            if callable(progress):
                progress(Progress("routers", number, len(given)))
    if not all(one.tokens for one in found.values()):
        raise DataError("The data holds no tokens: its batches have no rows, or nothing but padding.")
    return [one.layer(path) for path, one in found.items()]


class _Sums:
    """Energies of one layer, summed over tokens."""

    def __init__(self, site: MoESite) -> None:
        self.site, self.tokens, self.experts = site, 0, site.experts - site.shared
        self.whole = self.lost = self.oracle = 0.0
        self.pairs = torch.zeros(BINS * BINS, dtype=torch.int64)

    def add(self, x: Tensor, ran: Tensor, scores: Tensor) -> None:
        """Count tokens [N, d_in] with the experts that they run and the scores of all experts, [N, E]."""
        norms = expert_norms(x, self.site.routed, self.site.activation)
        ran, scores = ran[:, self.site.shared :], scores[:, self.site.shared :].float()
        energy = norms.double().square()
        ordered = energy.sort(-1, descending=True).values
        kept = torch.arange(self.experts, device=ran.device) < ran.sum(-1, keepdim=True)
        self.tokens += len(x)
        self.whole += float(energy.sum())
        self.lost += float(energy[~ran].sum())
        self.oracle += float(ordered[~kept].sum())
        places = _bins(norms) * BINS + _bins(scores)
        self.pairs += torch.bincount(places.flatten().cpu(), minlength=BINS * BINS)

    def layer(self, path: str) -> RouterLayer:
        rows = self.pairs.view(BINS, BINS).tolist()
        whole = max(self.whole, 1e-30)
        return RouterLayer(
            path, self.tokens, self.experts, self.lost / whole, self.oracle / whole, tuple(map(tuple, rows))
        )


def _bins(sizes: Tensor) -> Tensor:
    """The bin of each size [N, E] as a share of its row's largest, int64."""
    shares = sizes / sizes.amax(-1, keepdim=True).clamp_min(1e-30)
    return (shares.clamp(0.0, 1.0) * BINS).long().clamp_max(BINS - 1)
