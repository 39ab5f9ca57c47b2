"""Distribute a budget over the layers: find a tau for each layer from the measured damage per cost saved.

The damage that each layer does alone, while the others run everything, is measured once, at several shares. The search
starts from what distributes the budget best if this damage adds up, or from the single tau that meets the budget if
that does less damage. It then gives each layer slightly more and slightly less, and measures the effect on the output.
Cost is moved from the layers that need it least to those that need it most. This is repeated as long as the output gets
closer to the output with every expert.

Damage is how far the outputs move, as in `surgeon.data.imitation.divergence`: the mean KL(every expert ‖ selected
experts) of logits in nats, and the relative squared error of outputs that are no logits. The outputs of a language
model are as wide as its vocabulary. Their mean is over evenly spaced tokens, as many as `_KEPT` allows.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgeon.data.batch import Batch, read_batches
from surgeon.data.imitation import answer, made_for
from surgeon.display.choose import shows_progress
from surgeon.dynamic.knobs import set_tau
from surgeon.dynamic.site import can_be_dense, find_dynamic, no_dynamic
from surgeon.errors import DataError, UsageError
from surgeon.exits.halting import HaltSite
from surgeon.exits.site import ExitSite
from surgeon.graph.calls import as_args_kwargs
from surgeon.inputs.site import Skipping
from surgeon.json_values import Plain
from surgeon.measure.allocation import Option, allocate, interpolated, monotone
from surgeon.measure.cost import LayerRun
from surgeon.measure.meter import ExpertMeter, measure
from surgeon.measure.sweep import knobs_restored, run_batches, time_settings
from surgeon.progress import Progress, ShowProgress
from surgeon.tracing.trace import class_task

Metric = Literal["flops", "ms"]

# Values of a single tau for all layers, at which damage and cost are measured first.
_UNIFORM_TAUS = (0.0, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9, 1.0)
# Shares of the experts or inputs at which a layer's damage is measured alone.
_ALONE = (0.05, 0.12, 0.25, 0.4, 0.6, 0.8)
# Shares to try for a layer, relative to its present share, and how often.
_TRIALS, _ROUNDS = (0.8, 1.25), 2
# How far to go to what the trials say. Layers interact, so all moves at once may do more harm than each alone.
_STRENGTHS = (1.0, 0.5, 0.25, 0.1)
# In units of the dense model's cost. With every expert a converted model costs slightly more than the dense model.
_LARGEST_BUDGET = 2.0
# Most numbers to keep of the outputs with every expert: 256 MiB. All outputs of GPT-2 for 512 texts would take 13 GiB.
_KEPT = 2**26


@dataclass(frozen=True, repr=False)
class Tuned(Plain):
    """A tau for each layer, and its cost and damage.

    taus: the chosen values, by layer. shares: the share of the experts or inputs that run, by layer.
    cost, damage: the cost relative to the dense model, and the damage to the output: nats, or a relative squared error
        if `unit` says so.
    uniform, uniform_cost, uniform_damage: the best single tau for all layers, and its cost and damage. Linear layers
        that skip inputs beside experts get its cube root.
    rounds: how often cost was moved between layers.
    dense: with `densify`, the layers that run everything and are counted in their dense form. Their tau is 0.
    """

    taus: dict[str, float]
    shares: dict[str, float]
    cost: float
    damage: float
    uniform: float
    uniform_cost: float
    uniform_damage: float
    rounds: int
    unit: str = "nats"
    dense: tuple[str, ...] = ()

    def __repr__(self) -> str:
        layers = f"{len(self.taus)} layer{'s' * (len(self.taus) != 1)}"
        return f"<Tuned: {layers}, cost {self.cost:.1%}, damage {self.damage:.3g} {self.unit}>"


@shows_progress
def tune(
    graph: nn.Module,
    batches: Iterable[Any],
    budget: float,
    *,
    inputs: object,
    dense: float | None = None,
    metric: Metric = "flops",
    task: str | None = None,
    densify: bool = False,
    progress: ShowProgress = None,
) -> Tuned:
    """Find a tau for each layer so that the model costs at most `budget`, and set them.

    The damage of skipping is measured layer by layer, the budget distributed by it, and the result improved by trials.

    Args:
        graph: a graph, or a model with converted layers. Its tau is set, and nothing else is changed.
        batches: a few hundred samples, in any form that `Batch.from_any` takes. Labels are not used, and padding is not
            counted.
        budget: the cost of the whole model, as a share of the dense model's cost.
        inputs: example inputs on which multiply-adds are counted.
        dense: the dense model's cost: its multiply-adds on the example inputs, or for "ms" its milliseconds on the
            first batch. The default is the cost of this graph with everything running.
        metric: "flops" counts multiply-adds, "ms" measures the time of calls on the first batch, on this machine.
        task: what the outputs are, one of `surgeon.models.tasks.TASKS`; by default what the model's class tells.
        densify: count a layer that runs everything as its dense form, without router, and name it in `Tuned.dense`. The
            pass `densify` puts these layers back. It needs the metric "flops".
        progress: called after every trial.

    Raises:
        UsageError: the graph has no layers that skip, `check_budget` refuses the budget, or no tau meets it. The
            message says what can be reached.
        DataError: there are no batches.
    """
    check_budget(budget)
    tuner = Tuner(
        graph, batches, inputs=inputs, dense=dense, metric=metric, task=task, densify=densify, progress=progress
    )
    return tuner.tune(budget)


def check_budget(budget: float) -> None:
    """Refuse a budget that cannot be a share of the dense model's cost.

    Raises:
        UsageError: the budget is not positive, or so large that it must be a percentage or an absolute number.
    """
    if not isinstance(budget, int | float) or not budget > 0.0:
        raise UsageError(f"The budget is {budget!r}, but must be a positive share of the dense model's cost.")
    if budget > _LARGEST_BUDGET:
        raise UsageError(
            f"The budget is {budget:g}, but must be a share of the dense model's cost: 0.4 stands for 40%."
        )


@dataclass(frozen=True)
class _Trial:
    """The result of one choice of taus. shares: the share of the experts or inputs that ran, by layer."""

    taus: dict[str, float]
    shares: dict[str, float]
    damage: float
    cost: float


class Tuner:
    """Finds a tau for each layer, for one or several budgets, with the same measurements.

    The constructor measures the graph at single values of tau for all layers.
    """

    def __init__(
        self,
        graph: nn.Module,
        batches: Iterable[Any],
        *,
        inputs: object,
        dense: float | None = None,
        metric: Metric = "flops",
        task: str | None = None,
        densify: bool = False,
        progress: ShowProgress = None,
    ) -> None:
        """Measure the graph at single values of tau for all layers.

        Args:
            batches: the data for measuring damage and executed shares: a few hundred samples, in any form that
                `Batch.from_any` takes. Labels are not used. Executed shares count all tokens except padding. If all
                outputs together have more than 2²⁶ numbers, damage is the mean over every n-th token of each batch, so
                that about 2²⁶ numbers are kept.
            inputs: example inputs on which multiply-adds are counted.
            dense: the dense model's cost: its multiply-adds on the example inputs, or for "ms" its milliseconds on the
                first batch. The default is the cost of this graph with every expert running.
            metric: "flops" counts multiply-adds, "ms" measures the time of calls on the first batch, on this machine.
            task: what the outputs are (`surgeon.data.imitation.made_for`), by default what the model's class tells.
            densify: count a layer that runs everything as its dense form, without router. `Tuned.dense` names these
                layers, and the pass `densify` puts them back. No layer then skips so little that it costs more than
                its dense form. It needs the metric "flops".
            progress: called after every trial, or None.

        Raises:
            UsageError: the graph has no layers that skip, or times are to be measured of layers that are not dense yet.
            DataError: there are no batches, or they contain only padding.
        """
        sites = find_dynamic(graph)
        if not sites:
            raise no_dynamic("The model", "tau changes nothing")
        if metric == "ms" and any(isinstance(site, ExitSite | HaltSite) for site in sites):
            raise UsageError(
                "With early exits or token halting a layer has no time of its own: it runs for what the places before "
                "it let through. Use the metric flops."
            )
        if densify and metric == "ms":
            raise UsageError("The time of layers that are dense again is not known before. Use the metric flops.")
        self._graph, self._metric, self._progress = graph, metric, progress
        self._densify = {site.path for site in sites if densify and can_be_dense(site)}
        self._task = made_for(task, class_task(graph))
        self._batches = read_batches(batches)
        if not self._batches:
            raise DataError("There is no data to tune on: no batches were given.")
        self._layers = [site.path for site in sites]
        inputs_alone = all(isinstance(site, Skipping) for site in sites)
        self._curved = set() if inputs_alone else {site.path for site in sites if isinstance(site, Skipping)}
        self._alone: dict[str, list[Option]] | None = None
        self._done, self._total = 0, 0
        if callable(progress):
            progress(Progress("tuning", 0, 0))
        with knobs_restored(graph):
            self._prepare(inputs, dense)

    def tune(self, budget: float) -> Tuned:
        """Find and set a tau for each layer, so that the model costs at most `budget` of the dense model's cost.

        Raises:
            UsageError: `check_budget` refuses the budget, or no tau meets it. The message says what can be reached.
        """
        check_budget(budget)
        alone = len(_ALONE) if self._alone is None else 0
        self._expect(12 + len(self._layers) * (alone + _ROUNDS * len(_TRIALS)) + len(_STRENGTHS) * _ROUNDS)
        with knobs_restored(self._graph):
            tuned = self._search(budget)
        set_tau(self._graph, tuned.taus)
        return tuned

    def _expect(self, trials: int) -> None:
        self._done, self._total = 0, trials

    def _prepare(self, inputs: object, dense: float | None) -> None:
        graph, metric, batches = self._graph, self._metric, self._batches
        self._expect(len(_UNIFORM_TAUS))
        set_tau(graph, 0.0)
        args, kwargs = as_args_kwargs(inputs)
        cost, layers = measure(graph, args, kwargs)
        meter = ExpertMeter(graph)
        answers = ((answer(outputs, self._task), batch) for batch, outputs in run_batches(meter, batches))
        numbers = sum(part.rows(batch).numel() for parts, batch in answers for part in parts)
        if not numbers:
            raise DataError("There is no data to tune on: the batches contain only padding.")
        self._every = max(1, math.ceil(numbers / _KEPT))
        self._expected = [self._kept(outputs, batch) for batch, outputs in run_batches(meter, batches)]
        self._full = {path: float(layer.multiply_adds) for path, layer in layers.items()}
        self._routers = {path: float(layer.tokens * (layer.per_token - layer.gate)) for path, layer in layers.items()}
        self._fixed = cost.multiply_adds - sum(self._full.values())
        self._dense = float(cost.multiply_adds) if dense is None or metric == "ms" else dense
        if metric == "ms":
            self._measure_time(dense)
        self._uniform_trials = [self._try(self._alike(tau)) for tau in _UNIFORM_TAUS]
        self._curves = {
            name: monotone((trial.shares[name], trial.taus[name]) for trial in self._uniform_trials)
            for name in self._layers
        }

    def _search(self, budget: float) -> Tuned:
        least = self._uniform_trials[-1]
        if least.cost > budget:
            raise UsageError(
                f"A budget of {budget:.0%} cannot be met. With the least that can run (tau {_UNIFORM_TAUS[-1]:g}) the "
                f"model still costs {least.cost:.1%} of the dense model. Layers that are not converted, routers and at "
                "least one expert per layer always run. Raise the budget."
            )
        tau, uniform = self._uniform(budget)
        best, rounds = uniform, 0
        # If the budget allows every expert, there is nothing to distribute.
        if any(uniform.taus.values()):
            shares = allocate(self._options_alone(), budget * self._dense - self._fixed)
            started = self._within(shares, budget)
            if _better(started, best, budget):
                best, rounds = started, 1
            for _ in range(_ROUNDS):
                moved = self._move(best, budget)
                if moved is None:
                    break
                best, rounds = moved, rounds + 1
        dense = tuple(path for path in self._layers if path in self._densify and best.shares[path] == 1.0)
        taus = best.taus | dict.fromkeys(dense, 0.0)
        return Tuned(
            taus, best.shares, best.cost, best.damage, tau, uniform.cost, uniform.damage, rounds, self._unit, dense
        )

    def _alike(self, tau: float) -> dict[str, float]:
        """Return the tau of every layer for a single one, which is that of experts.

        A linear layer that skips inputs beside experts gets the cube root: at tau 0.1 it skips 46%, and experts most.
        """
        return {path: tau ** (1 / 3) if path in self._curved else tau for path in self._layers}

    def _uniform(self, budget: float) -> tuple[float, _Trial]:
        """Find the smallest single tau that meets the budget, by bisection."""
        high = next(index for index, trial in enumerate(self._uniform_trials) if trial.cost <= budget)
        found = self._uniform_trials[high]
        low_tau, high_tau = _UNIFORM_TAUS[max(0, high - 1)], _UNIFORM_TAUS[high]
        for _ in range(6 if high else 0):
            middle = 0.5 * (low_tau + high_tau)
            trial = self._try(self._alike(middle))
            if trial.cost <= budget:
                found, high_tau = trial, middle
            else:
                low_tau = middle
        return high_tau, found

    def _options_alone(self) -> dict[str, list[Option]]:
        """Return what each layer costs and how much damage it does at every share, while the others run everything."""
        if self._alone is None:
            everything = dict.fromkeys(self._layers, 0.0)
            self._alone = {}
            for path in self._layers:
                found = [(1.0, 0.0)]
                for share in _ALONE:
                    trial = self._try(everything | {path: self._tau(path, share)})
                    found.append((trial.shares[path], max(0.0, trial.damage)))
                self._alone[path] = [
                    (self._cost_of(path, share), damage, share) for share, damage in interpolated(found)
                ]
        return self._alone

    def _move(self, base: _Trial, budget: float) -> _Trial | None:
        """Move cost between layers; None if no move reduces the damage."""
        options: dict[str, list[Option]] = {}
        have = {path: self._share(path, tau) for path, tau in base.taus.items()}
        for path in self._layers:
            options[path] = [(self._cost_of(path, base.shares[path]), 0.0, have[path])]
            for factor in _TRIALS:
                share = min(1.0, have[path] * factor)
                trial = self._try(base.taus | {path: self._tau(path, share)})
                options[path].append((self._cost_of(path, trial.shares[path]), trial.damage - base.damage, share))
        wanted = allocate(options, budget * self._dense - self._fixed)
        for strength in _STRENGTHS:
            trial = self._within({p: have[p] + strength * (wanted[p] - have[p]) for p in self._layers}, budget)
            if _better(trial, base, budget):
                return trial
        return None

    def _within(self, shares: Mapping[str, float], budget: float) -> _Trial:
        """Try these shares, and scale them until the budget is met. It can be missed, because layers interact."""
        scale = 1.0
        trial = self._try({path: self._tau(path, share) for path, share in shares.items()})
        for _ in range(5):
            if trial.cost <= budget:
                break
            over = (trial.cost * self._dense - self._fixed) / max(1e-9, budget * self._dense - self._fixed)
            scale *= 0.995 / over
            # A layer that is to be dense stays so: it would cost more if it skipped a little.
            taus = {
                path: self._tau(path, share if share == 1.0 and path in self._densify else scale * share)
                for path, share in shares.items()
            }
            trial = self._try(taus)
        return trial

    def _try(self, taus: dict[str, float]) -> _Trial:
        set_tau(self._graph, taus)
        meter, sums = ExpertMeter(self._graph), torch.zeros(2, len(self._expected[0]), dtype=torch.float64)
        for (batch, outputs), expected in zip(run_batches(meter, self._batches), self._expected, strict=True):
            for place, (found, want) in enumerate(zip(self._kept(outputs, batch), expected, strict=True)):
                sums[:, place] += torch.tensor(_apart(found, want), dtype=torch.float64)
        damage = float((sums[0] / sums[1]).sum())
        shares = {path: layer.share for path, layer in meter.layers.items()}
        self._done += 1
        if callable(self._progress):
            self._progress(Progress("tuning", min(self._done, self._total), self._total, {"damage": damage}))
        cost = self._fixed + sum(self._cost_of(path, share) for path, share in shares.items())
        return _Trial(taus, shares, damage, cost / self._dense)

    def _kept(self, outputs: object, batch: Batch) -> list[tuple[Tensor, bool]]:
        """Return every `self._every`-th row of each part, and whether it holds log-probabilities."""
        return [
            (rows.log_softmax(-1), True) if part.logits else (rows, False)
            for part in answer(outputs, self._task)
            for rows in (part.rows(batch)[:: self._every],)
        ]

    @property
    def _unit(self) -> str:
        kinds = {"nats" if logits else "relative squared error" for _, logits in self._expected[0]}
        return " + ".join(sorted(kinds))

    def _cost_of(self, path: str, share: float) -> float:
        """Return the cost of a layer at this share of its experts or inputs, in the units of the metric."""
        if self._metric == "flops":
            # A layer that runs everything is to be put back into its dense form, which has no router.
            return self._full[path] * share - (self._routers[path] if share == 1.0 and path in self._densify else 0.0)
        grid, times = self._times[path]
        return float(np.interp(share, grid, times))

    def _tau(self, path: str, share: float) -> float:
        """Return the tau at which this layer runs this share of its experts or inputs, if all have the same tau.

        What the others skip changes a layer's inputs, and so the share that it runs at this tau.
        """
        shares, taus = self._curves[path]
        return float(np.clip(np.interp(share, shares, taus), 0.0, 1.0))

    def _share(self, path: str, tau: float) -> float:
        """Return the share that belongs to this tau: the inverse of `_tau`."""
        shares, taus = self._curves[path]
        return float(np.interp(tau, taus[::-1], shares[::-1]))

    def _measure_time(self, dense: float | None) -> None:
        """Time each layer at several taus on the first batch. The remaining time is that of the rest of the model."""
        batch = self._batches[0]
        found: dict[str, list[tuple[float, float]]] = {path: [] for path in self._layers}
        set_tau(self._graph, 0.0)
        (total,) = time_settings(self._graph, batch, [lambda: None], 3)
        for tau in _UNIFORM_TAUS[::2]:
            set_tau(self._graph, self._alike(tau))
            runs: list[dict[str, LayerRun]] = []
            for _ in range(4):
                meter = ExpertMeter(self._graph)
                list(run_batches(meter, [batch]))
                runs.append(meter.layers)
            for path in self._layers:
                milliseconds = 1000 * statistics.median(run[path].seconds for run in runs[1:])
                found[path].append((runs[0][path].share, milliseconds))
        self._times = {path: monotone(values) for path, values in found.items()}
        self._full = {path: float(times[-1]) for path, (_, times) in self._times.items()}
        self._fixed = max(0.0, total - sum(self._full.values()))
        self._dense = total if dense is None else dense


def _better(trial: _Trial, than: _Trial, budget: float) -> bool:
    return trial.cost <= budget and trial.damage < than.damage * 0.995


def _apart(found: tuple[Tensor, bool], want: tuple[Tensor, bool]) -> tuple[float, float]:
    """Return the sum of what lies between two parts of answers, and what to divide it by."""
    (a, logits), (b, _) = found, want
    if logits:
        return float(F.kl_div(a, b, log_target=True, reduction="sum")), float(len(b))
    return float((a - b).square().sum()), max(float(b.square().sum()), 1e-12)
