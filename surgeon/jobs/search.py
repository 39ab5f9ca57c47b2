"""Find the settings of passes within a time: successive halving on a part of the training data.

The settings of a stage differ in one thing each from what the stage before found best. All are trained for a few steps,
the better half for twice as many, and so on. The best one of the last stage then has what is left of the time. Settings
are compared on a validation part of the training data, by the loss at a fixed cost. The held-out data take no part.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from surgeon.data.batch import Batch
from surgeon.data.data import Data
from surgeon.data.example_rows import read_ahead
from surgeon.data.imitation import divergence, made_for
from surgeon.data.losses import evaluating
from surgeon.dynamic.knobs import set_tau
from surgeon.errors import DivergedError, LoadError, UsageError
from surgeon.graph.agreement import call_reproducibly
from surgeon.graph.traced import TracedGraph
from surgeon.jobs.open_model import Opened
from surgeon.jobs.search_settings import Setting, fine_tuned, with_options
from surgeon.jobs.workdir import STATE
from surgeon.measure.meter import ExpertMeter
from surgeon.measure.sweep import knobs_restored, layers_share, run_batches
from surgeon.passes import Pass
from surgeon.passes.trained import TrainedPass
from surgeon.progress import Tell, renamed
from surgeon.surgery.pipeline import Pipeline
from surgeon.surgery.record import parse, read_json
from surgeon.surgery.trials import Options, Search, Trial, merged
from surgeon.tracing.trace import class_task
from surgeon.training.distillation import imitates
from surgeon.training.loop import FitReport, loss_of

# The cost at which settings are compared, and the taus between which it is interpolated.
_SHARE, _TAUS = 0.2, (0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
# The part of the time for the search, the part of the rest that is planned with, and the fewest steps of a trial.
_FOR_SEARCH, _SAFE, _FEWEST = 0.5, 0.85, 32
# One batch of so many is for validation. The most that is read ahead: batches, and bytes of them.
_EVERY, _MOST_BATCHES, _MOST_BYTES = 5, 400, 1 << 28
# Trials leave these out: no setting concerns them, and the cost at which settings are compared is that of the experts.
_LEFT_OUT = ("sparsify-inputs", "sparsify-neurons", "lower")
# How long passes of a trial train, by the steps of the first one that fine-tunes; the others train as long as that one.
_RELATIVE = {"moeify": 2.0, "recover": 1 / 3, "mlpify": 1 / 3}


@dataclass(frozen=True)
class _Speed:
    """Seconds, as measured here. rates: of a training step, by pass. fixed: of a run beside its training steps.

    judging: of the judgement of a trial. forward: of the dense model on one batch.
    """

    rates: Mapping[str, float]
    fixed: float
    judging: float
    forward: float


class Searcher:
    """Runs trials, and keeps them in a file to go on from."""

    def __init__(
        self,
        graph: TracedGraph,
        inputs: Any,
        data: Data,
        passes: Sequence[Pass[Any]],
        minutes: float,
        seed: int,
        place: Path,
        *,
        started: float,
        teacher: Opened | None = None,
        progress: Tell | None = None,
    ) -> None:
        """Read the data ahead.

        Args:
            graph: the model, which is not changed.
            inputs: example inputs.
            passes: they have one that fine-tunes.
            minutes: for the search and the full run. No trial is longer than the full run.
            place: the directory of the file.
            started: the time of `time.monotonic` from which the minutes count.
            teacher: the model that passes learn from, if it is another one.

        Raises:
            UsageError: there is too little data, or its length is unknown.
        """
        self._graph, self._inputs, self._data = graph, inputs, data
        self._seed, self._progress = seed, progress
        self._teacher = teacher
        self._passes = [one for one in passes if one.name not in _LEFT_OUT]
        self._first = fine_tuned(self._passes)[0].name
        self._minutes, self._started, self._file = minutes, started, place / STATE
        batches = read_ahead(data, _MOST_BATCHES, _MOST_BYTES)
        self._validation = batches[_EVERY - 1 :: _EVERY]
        self._train = [batch for place, batch in enumerate(batches) if place % _EVERY != _EVERY - 1]
        if not self._validation:
            raise UsageError(
                f"--budget-minutes keeps one batch of {_EVERY} for validation, but the training data has "
                f"{len(batches)}. Give more data or a smaller --batch-size."
            )

        self._own = Data(self._train, None, data.task, data.description, data.fingerprint, data.loss)

    def run(self, stages: Sequence[Sequence[Setting]]) -> Search:
        """Search, or go on with a search that was interrupted.

        stages: of each the settings to try; the first changes nothing.

        Raises:
            UsageError: the time is too short; the message says how long it would have to be. Or no setting gets cheap.
            LoadError: the file of an interrupted search is damaged.
        """
        state = read_json(self._file) if self._file.is_file() else {"steps": None, "trials": [], "search": None}
        try:
            if state["search"] is not None:
                return parse(Search, state["search"], self._file)
            trials = [parse(Trial, trial, self._file) for trial in state["trials"]]
            steps: int | None = state["steps"]
        except (KeyError, TypeError) as error:
            raise LoadError(f"{self._file} is damaged: {error}. Start again with --overwrite.") from error
        dense_loss = self._loss(self._graph, self._validation)
        speed = self._speed()
        if steps is None:
            steps = self._steps([len(stage) for stage in stages], speed)
        known = {_key(trial.options, trial.steps): trial for trial in trials}

        def tried(name: str, options: Options, length: int) -> Trial:
            key = _key(options, length)
            if key not in known:
                known[key] = self._trial(name, options, length)
                trials.append(known[key])
                self._write({"steps": steps, "trials": [asdict(trial) for trial in trials], "search": None})
            return known[key]

        best: Setting = stages[0][0]
        for stage in stages:
            left, rung = [_on_top(best, setting) for setting in stage], steps
            while len(left) > 1:
                found = [tried(name, options, rung) for name, options in left]
                if all(trial.loss is None for trial in found):
                    raise UsageError(
                        f"--budget-minutes compares settings at {_SHARE:.0%} of the layers' cost, and none gets there. "
                        "Set smaller experts (moeify.expert_size) or a narrower router (moeify.router_width)."
                    )
                left = [(trial.name, trial.options) for trial in _ranked(found)[: len(left) // 2]]
                rung = max(steps, min(2 * rung, self._length(self._first)))
            (best,) = left
        name, options = best
        full = merged(options, self._full_run(speed))
        search = Search(
            self._minutes, _SHARE, _samples(self._train), _samples(self._validation), dense_loss, tuple(trials), name,
            full,
        )  # fmt: skip
        self._write({"steps": steps, "trials": [asdict(trial) for trial in trials], "search": asdict(search)})
        return search

    # --- time ---------------------------------------------------------------------------------------------------------

    def _left(self) -> float:
        return 60 * self._minutes - (time.monotonic() - self._started)

    def _speed(self) -> _Speed:
        """Run a trial as short as can be, for its speed alone."""
        began = time.monotonic()
        graph, fits = self._trained({}, _FEWEST, "timing")
        trained = time.monotonic()
        self._loss_at_share(graph)
        judged = time.monotonic()
        self._loss(self._graph, self._validation)
        forward = (time.monotonic() - judged) / len(self._validation)
        rates = {name: fit.seconds / fit.steps for name, fit in fits.items() if fit.steps}
        return _Speed(rates, trained - began - sum(fit.seconds for fit in fits.values()), judged - trained, forward)

    def _steps(self, settings: Sequence[int], speed: _Speed) -> int:
        """Return the steps of the first trials: a power of two, so that small differences in speed do not matter.

        settings: how many each stage has.

        Raises:
            UsageError: not even the shortest trials fit.
        """
        runs = weights = 0
        for left in settings:
            factor = 1
            if left > 1 and runs:  # the best of the stage before was tried
                runs, weights = runs - 1, weights - 1
            while left > 1:
                runs, weights, left, factor = runs + left, weights + left * factor, left // 2, 2 * factor
        if not runs:
            return _FEWEST
        each = sum(rate * self._relative(name) for name, rate in speed.rates.items())
        fixed = runs * (speed.fixed + speed.judging)
        affordable = (_FOR_SEARCH * self._left() - fixed) / (weights * each)
        if affordable < _FEWEST:
            spent = 60 * self._minutes - self._left()
            # With a reserve of a fifth, in tenths of a minute.
            needed = (fixed + weights * _FEWEST * each) / _FOR_SEARCH + spent
            count = 1 + sum(settings) - len(settings)
            raise UsageError(
                f"--budget-minutes {self._minutes:g} is too short to try {count} settings on this machine. Give at "
                f"least {math.ceil(1.2 * needed / 6) / 10}, or leave it out to run the passes as they are."
            )
        most = min(affordable, max(_FEWEST, self._length(self._first)))
        return int(_FEWEST * 2 ** int(math.log2(most / _FEWEST)))

    def _full_run(self, speed: _Speed) -> Options:
        """Return the steps of the passes, if the recipe's own do not fit in the time that is left."""
        try:  # the result and the dense model are still to be measured, which takes up to four calls a batch
            held = 0 if self._data.eval is None else len(self._data.eval)  # type: ignore[arg-type]
        except TypeError:
            held = 0
        whole = {name: self._length(name) for name in speed.rates}
        needed = sum(whole[name] * rate for name, rate in speed.rates.items())
        share = (_SAFE * self._left() - speed.fixed - 4 * held * speed.forward) / needed
        return {} if share >= 1.0 else {name: {"steps": max(1, int(share * steps))} for name, steps in whole.items()}

    def _relative(self, name: str) -> float:
        return 1.0 if name == self._first else _RELATIVE.get(name, 1.0)

    def _length(self, name: str) -> int:
        one = next(one for one in self._passes if one.name == name)
        assert isinstance(one, TrainedPass)
        return one.plan().total_steps(self._data)

    # --- trials -------------------------------------------------------------------------------------------------------

    def _trial(self, name: str, options: Options, steps: int) -> Trial:
        began = time.monotonic()
        why = "too costly"
        try:
            graph, _ = self._trained(options, steps, f"trial, {name}")
            loss = self._loss_at_share(graph)
        except DivergedError:
            loss = math.nan
        if loss is not None and not math.isfinite(loss):
            loss, why = None, "diverged"
        return Trial(name, options, steps, loss, round(time.monotonic() - began, 2), why if loss is None else "")

    def _trained(self, options: Options, steps: int, label: str) -> tuple[TracedGraph, dict[str, FitReport]]:
        trained = {one.name for one in self._passes if isinstance(one, TrainedPass) and one.optimises}
        lengths: Options = {name: {"steps": max(1, round(self._relative(name) * steps))} for name in trained}
        surgery = Pipeline(with_options(self._passes, merged(lengths, options))).run(
            self._graph, inputs=self._inputs, data=self._own, seed=self._seed, verify="off",
            progress=renamed(self._progress, lambda what: f"{label}: {what}"),
            teacher=None if self._teacher is None else self._teacher.graph,
            teacher_origin=None if self._teacher is None else self._teacher.origin,
        )  # fmt: skip
        return surgery.graph, {report.name: report.fit for report in surgery.reports if report.fit is not None}

    def _loss_at_share(self, graph: TracedGraph) -> float | None:
        """Interpolate the loss at the cost at which settings are compared; None if the layers do not get that cheap."""
        points = []
        with knobs_restored(graph):
            for tau in _TAUS:
                set_tau(graph, tau)
                meter = ExpertMeter(graph)
                loss = self._loss(graph, self._validation, meter)
                points.append((layers_share(meter.layers), loss))
                if points[-1][0] <= _SHARE:
                    break
        return at_share(points, _SHARE)

    def _loss(self, graph: TracedGraph, batches: Sequence[Batch], meter: ExpertMeter | None = None) -> float:
        """Return the mean loss over samples: that of the task, or the divergence from the model to imitate."""
        task = None if imitates(self._graph, self._own) else loss_of(self._graph, self._own)
        outputs_of = made_for(self._own.task, class_task(self._graph))
        imitated = self._graph if self._teacher is None else self._teacher.graph
        total = 0.0
        with evaluating(graph):
            for batch, outputs in run_batches(meter or ExpertMeter(graph), batches):
                if task is not None:
                    value = task(outputs, batch)
                else:
                    expected = call_reproducibly(imitated, batch.args, dict(batch.kwargs))
                    value = divergence(expected, outputs, batch, outputs_of)
                total += float(value) * batch.size
        return total / _samples(batches)

    def _write(self, state: dict[str, Any]) -> None:
        fresh = self._file.with_suffix(".new")
        fresh.write_text(json.dumps(state, indent=1), encoding="utf-8")
        fresh.rename(self._file)


def at_share(points: Sequence[tuple[float, float]], share: float) -> float | None:
    """Interpolate the loss at a share of the cost, between points (share, loss) that get cheaper.

    Returns:
        The first loss if even the first point is cheaper. None if no point is as cheap.
    """
    before: tuple[float, float] | None = None
    for cost, loss in points:
        if cost <= share:
            if before is None or before[0] == cost:
                return loss
            part = (before[0] - share) / (before[0] - cost)
            return before[1] + part * (loss - before[1])
        before = cost, loss
    return None


def _on_top(best: Setting, setting: Setting) -> Setting:
    """Change the best setting of the stage before by another one."""
    name, options = setting
    if not options:
        return best
    return (f"{best[0]}, {name}" if best[1] else name), merged(best[1], options)


def _key(options: Options, steps: int) -> str:
    return json.dumps([options, steps], sort_keys=True)


def _ranked(trials: Sequence[Trial]) -> list[Trial]:
    """The better ones first; of equal ones the earlier."""
    return sorted(trials, key=lambda trial: float("inf") if trial.loss is None else trial.loss)


def _samples(batches: Sequence[Batch]) -> int:
    return sum(batch.size for batch in batches)
