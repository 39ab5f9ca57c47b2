"""Spend a budget where it hurts least: a tau for each layer, by measured damage per cost saved.

Start from the one tau for all layers that meets the budget. Then give each layer a bit more and a bit less than it has,
measure what that does to the output, and move cost from the layers that miss it least to those that need it most;
again, as long as the output gets nearer to what it is with every expert running.

Damage is the mean divergence KL(every expert ‖ selected experts) between the model's answers, in nats. For a language
model, whose answers are as wide as its vocabulary, the mean is over evenly spaced tokens, as many as `_KEPT` allows.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule

from surgeon.batch import Batch
from surgeon.cost import ExpertMeter, LayerRun, measure
from surgeon.errors import UsageError
from surgeon.fit import real_tokens
from surgeon.inputs import as_args_kwargs
from surgeon.losses import logits_of
from surgeon.moe import find_moes, set_tau
from surgeon.report import Progress
from surgeon.sweep import knobs_restored, run_batches, time_settings

Metric = Literal["flops", "ms"]

# One tau for all layers: where damage and cost are measured first.
_PATH = (0.0, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9, 1.0)
# Shares of the experts a layer is tried with, relative to what it has, at first and in later rounds.
_TRIALS, _FINER = (0.6, 0.8, 1.25, 1.6), (0.8, 1.25)
_ROUNDS = 3
# Numbers kept of the answers with every expert running: a quarter of a GiB. GPT-2's for 512 texts would take 13 GiB.
_KEPT = 2**26


@dataclass(frozen=True)
class Tuned:
    """A tau for each layer and what it costs.

    cost, uniform_cost: of the chosen values and of the best single tau, over the dense model's. damage,
    uniform_damage: of the output, in nats. uniform: that single tau. shares: of the experts that run, by layer.
    rounds: how often cost was moved.
    """

    taus: dict[str, float]
    shares: dict[str, float]
    cost: float
    damage: float
    uniform: float
    uniform_cost: float
    uniform_damage: float
    rounds: int


def tune(
    graph: GraphModule,
    batches: Iterable[Any],
    budget: float,
    *,
    inputs: object,
    dense: float | None = None,
    metric: Metric = "flops",
    progress: Callable[[Progress], None] | None = None,
) -> Tuned:
    """Find a tau for each layer so that the model costs at most `budget`, and set them.

    Args:
        budget: share of the dense model's cost, everything included.
        batches, inputs, dense, metric, progress: as in `Tuner`, which is for several budgets.

    Raises:
        UsageError: the graph has no experts, or no tau is cheap enough; the message says what is.
    """
    return Tuner(graph, batches, inputs=inputs, dense=dense, metric=metric, progress=progress).tune(budget)


@dataclass(frozen=True)
class _Trial:
    """What one choice of tau gave. shares: of the experts that ran, by layer."""

    taus: dict[str, float]
    shares: dict[str, float]
    damage: float
    cost: float


class Tuner:
    """Finds a tau for each layer for one budget after another, over the same measurements.

    One tau for all layers is measured when it is made.
    """

    def __init__(
        self,
        graph: GraphModule,
        batches: Iterable[Any],
        *,
        inputs: object,
        dense: float | None = None,
        metric: Metric = "flops",
        progress: Callable[[Progress], None] | None = None,
    ) -> None:
        """Measure the graph at one tau for all layers.

        Args:
            batches: what damage and executed shares are measured on; a few hundred samples, in any form that
                `Batch.from_any` takes. Labels are not used.
                Executed shares count all tokens that are not padding; damage is the mean over every n-th of each batch
                where the answers to all would be more than 2²⁶ numbers, so that about so many are kept.
            inputs: example inputs on which multiply-adds are counted.
            dense: the dense model's cost: its multiply-adds on the example inputs, or for "ms" its milliseconds on the
                first batch; by default that of this graph with every expert running.
            metric: "flops" counts multiply-adds, "ms" measures time on this machine, of calls on the first batch.

        Raises:
            UsageError: the graph has no experts.
        """
        if not find_moes(graph):
            raise UsageError("The graph has no experts, so tau changes nothing. Apply moeify first.")
        self.graph, self.metric, self.progress = graph, metric, progress
        self.batches = [Batch.from_any(item) for item in batches]
        self.paths = [site.path for site in find_moes(graph)]
        self.done, self.total = 0, 0
        with knobs_restored(graph):
            self._prepare(inputs, dense)

    def tune(self, budget: float) -> Tuned:
        """Find the values for a budget, a share of the dense model's cost, and set them.

        Raises:
            UsageError: no tau is cheap enough; the message says what is.
        """
        if not budget > 0.0:
            raise UsageError(f"The budget is {budget}, but must be a positive share of the dense model's cost.")
        self._expect(6 + len(self.paths) * (len(_TRIALS) + (_ROUNDS - 1) * len(_FINER)) + 2 * _ROUNDS)
        with knobs_restored(self.graph):
            tuned = self._search(budget)
        set_tau(self.graph, tuned.taus)
        return tuned

    def _expect(self, trials: int) -> None:
        self.done, self.total = 0, trials

    def _prepare(self, inputs: object, dense: float | None) -> None:
        graph, metric, batches = self.graph, self.metric, self.batches
        self._expect(len(_PATH))
        set_tau(graph, 0.0)
        args, kwargs = as_args_kwargs(inputs)
        cost, layers = measure(graph, args, kwargs)
        with torch.no_grad():
            numbers = sum(_logits(graph(*b.args, **b.kwargs), b).numel() for b in batches)
            self.every = max(1, math.ceil(numbers / _KEPT))
            self.expected = [self._log_probabilities(graph(*b.args, **b.kwargs), b) for b in batches]
        self.full = {path: float(layer.multiply_adds) for path, layer in layers.items()}
        self.fixed = cost.multiply_adds - sum(self.full.values())
        self.dense = float(cost.multiply_adds) if dense is None or metric == "ms" else dense
        if metric == "ms":
            self._measure_time(dense)
        self.path = [self._try(dict.fromkeys(self.paths, tau)) for tau in _PATH]
        measured = list(zip(self.path, _PATH, strict=True))
        self.curves = {name: _monotone((trial.shares[name], tau) for trial, tau in measured) for name in self.paths}

    def _search(self, budget: float) -> Tuned:
        path = self.path
        if path[-1].cost > budget:
            raise UsageError(
                f"A budget of {budget:.0%} cannot be met: with hardly any experts (tau {_PATH[-1]:g}) the model still "
                f"costs {path[-1].cost:.1%} of the dense one. The rest is not converted."
            )
        uniform = self._uniform(path, budget)
        best, rounds = uniform, 0
        for number in range(_ROUNDS):
            moved = self._move(best, budget, _FINER if number else _TRIALS)
            if moved is None:
                break
            best, rounds = moved, rounds + 1
        return Tuned(
            best.taus, best.shares, best.cost, best.damage, next(iter(uniform.taus.values())), uniform.cost,
            uniform.damage, rounds,
        )  # fmt: skip

    def _uniform(self, path: Sequence[_Trial], budget: float) -> _Trial:
        """The smallest single tau that meets the budget, by bisection."""
        high = next(index for index, trial in enumerate(path) if trial.cost <= budget)
        found = path[high]
        low_tau, high_tau = _PATH[max(0, high - 1)], _PATH[high]
        for _ in range(6 if high else 0):
            middle = 0.5 * (low_tau + high_tau)
            trial = self._try(dict.fromkeys(self.paths, middle))
            if trial.cost <= budget:
                found, high_tau = trial, middle
            else:
                low_tau = middle
        return found

    def _move(self, base: _Trial, budget: float, factors: Sequence[float]) -> _Trial | None:
        """Move cost between layers; None if no move brings the output nearer."""
        options: dict[str, list[tuple[float, float, float]]] = {}
        for path in self.paths:
            have = base.shares[path]
            options[path] = [(self._cost_of(path, have), 0.0, have)]
            for factor in factors:
                share = min(1.0, have * factor)
                trial = self._try(base.taus | {path: self._tau(path, share)})
                options[path].append(
                    (self._cost_of(path, trial.shares[path]), trial.damage - base.damage, trial.shares[path])
                )
        limit = budget * self.dense - self.fixed
        for strength in (1.0, 0.5):
            shares = _allocate(options, limit)
            wanted = {p: base.shares[p] + strength * (shares[p] - base.shares[p]) for p in self.paths}
            trial = self._within({p: self._tau(p, share) for p, share in wanted.items()}, budget)
            if trial.damage < base.damage * 0.995 and trial.cost <= budget:
                return trial
        return None

    def _within(self, taus: dict[str, float], budget: float) -> _Trial:
        """The choice itself, or scaled until it meets the budget: the layers run on each other's approximations."""
        trial = self._try(taus)
        for _ in range(4):
            if trial.cost <= budget:
                break
            over = (trial.cost * self.dense - self.fixed) / max(1e-9, budget * self.dense - self.fixed)
            trial = self._try({p: self._tau(p, trial.shares[p] / over * 0.995) for p in self.paths})
        return trial

    def _try(self, taus: dict[str, float]) -> _Trial:
        set_tau(self.graph, taus)
        meter, damage, count = ExpertMeter(self.graph), 0.0, 0
        for (batch, outputs), expected in zip(run_batches(meter, self.batches), self.expected, strict=True):
            found = self._log_probabilities(outputs, batch)
            damage += float(F.kl_div(found, expected, log_target=True, reduction="sum"))
            count += len(expected)
        shares = {path: layer.share for path, layer in meter.layers.items()}
        self.done += 1
        if self.progress is not None:
            self.progress(Progress("tuning", min(self.done, self.total), self.total, {"damage": damage / count}))
        cost = self.fixed + sum(self._cost_of(path, share) for path, share in shares.items())
        return _Trial(taus, shares, damage / count, cost / self.dense)

    def _log_probabilities(self, outputs: object, batch: Batch) -> Tensor:
        """[N, C] of the samples, or of every so many-th token."""
        return _logits(outputs, batch)[:: self.every].float().log_softmax(-1)

    def _cost_of(self, path: str, share: float) -> float:
        """What a layer costs at this share of its experts, in the units of the metric."""
        if self.metric == "flops":
            return self.full[path] * share
        grid, times = self.times[path]
        return float(np.interp(share, grid, times))

    def _tau(self, path: str, share: float) -> float:
        """The tau at which this layer runs this share of its experts."""
        shares, taus = self.curves[path]
        return float(np.clip(np.interp(share, shares, taus), 0.0, 1.0))

    def _measure_time(self, dense: float | None) -> None:
        """Time each layer at several settings on the first batch; the rest of the model is what remains."""
        batch = self.batches[0]
        found: dict[str, list[tuple[float, float]]] = {path: [] for path in self.paths}
        totals = []
        for tau in _PATH[::2]:
            set_tau(self.graph, tau)
            runs: list[dict[str, LayerRun]] = []
            for _ in range(4):
                meter = ExpertMeter(self.graph)
                list(run_batches(meter, [batch]))
                runs.append(meter.layers)
            totals.extend(time_settings(self.graph, batch, [lambda: None], 3))
            for path in self.paths:
                milliseconds = 1000 * statistics.median(run[path].seconds for run in runs[1:])
                found[path].append((runs[0][path].share, milliseconds))
        self.times = {path: _monotone(values) for path, values in found.items()}
        self.full = {path: float(times[-1]) for path, (_, times) in self.times.items()}
        self.fixed = max(0.0, totals[0] - sum(self.full.values()))
        self.dense = totals[0] if dense is None else dense


def _allocate(options: Mapping[str, Sequence[tuple[float, float, float]]], limit: float) -> dict[str, float]:
    """The share of each layer that minimises total damage with total cost within `limit`.

    options: (cost, damage, share) of the choices of each layer. By a price on cost, found by bisection; then every
    layer takes what is best at that price.
    """

    def best(price: float) -> dict[str, tuple[float, float, float]]:
        return {path: min(choices, key=lambda one: one[1] + price * one[0]) for path, choices in options.items()}

    low, high = 0.0, 1.0
    while sum(choice[0] for choice in best(high).values()) > limit and high < 1e12:
        high *= 4.0
    if sum(choice[0] for choice in best(low).values()) <= limit:
        high = low
    # Costs may be small numbers or billions: the price is searched by ratios.
    low = high * 1e-15
    for _ in range(100):
        middle = (low * high) ** 0.5
        if sum(choice[0] for choice in best(middle).values()) > limit:
            low = middle
        else:
            high = middle
    return {path: choice[2] for path, choice in best(high).items()}


def _monotone(points: Iterable[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Points (x, y) as arrays with x strictly rising, for interpolation."""
    ordered: dict[float, float] = {}
    for x, y in sorted(points):
        ordered.setdefault(x, y)
    return np.array(list(ordered)), np.array(list(ordered.values()))


def _logits(outputs: object, batch: Batch) -> Tensor:
    """[N, C] of the samples, or of the tokens that are not padding."""
    logits = logits_of(outputs)
    return real_tokens(batch, logits) if logits.dim() > 2 else logits
