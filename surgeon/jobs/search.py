"""Find the settings of the recommended recipe within a time: successive halving on a part of the training data.

Settings differ from the recipe in one thing each. All are trained for a few steps, the better half (of six, three) for
twice as many, and the best one then has what is left of the time. They are compared on a validation part of the
training data, by the loss at a fixed cost. The held-out data take no part.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
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
from surgeon.jobs.search_settings import with_options
from surgeon.jobs.workdir import STATE
from surgeon.measure.meter import ExpertMeter
from surgeon.measure.sweep import knobs_restored, layers_share, run_batches
from surgeon.passes import Pass
from surgeon.passes.trained import TrainedPass
from surgeon.progress import Progress
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
# How long the passes of a trial train, and those of the recipe, by sparsify's steps.
_RELATIVE = {"sparsify": 1.0, "moeify": 2.0, "recover": 1 / 3}


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
    """Runs trials of an opened model, and keeps them in a file to go on from."""

    def __init__(
        self,
        opened: Opened,
        passes: Sequence[Pass[Any]],
        minutes: float,
        seed: int,
        place: Path,
        *,
        started: float,
        teacher: Opened | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> None:
        """Read the data ahead.

        started: the time of `time.monotonic` from which the minutes count. place: the directory of the file.
        teacher: the model that passes learn from, if it is another one.

        Raises:
            UsageError: there is too little data, or its length is unknown.
        """
        assert opened.data is not None
        self._opened, self._data, self._seed, self._progress = opened, opened.data, seed, progress
        self._teacher = teacher
        self._passes = [one for one in passes if one.name != "lower"]
        self._minutes, self._started, self._file = minutes, started, place / STATE
        batches = read_ahead(opened.data, _MOST_BATCHES, _MOST_BYTES)
        self._validation = batches[_EVERY - 1 :: _EVERY]
        self._train = [batch for place, batch in enumerate(batches) if place % _EVERY != _EVERY - 1]
        if not self._validation:
            raise UsageError(
                f"--budget-minutes keeps one batch of {_EVERY} for validation, but the training data has "
                f"{len(batches)}. Give more data or a smaller --batch-size."
            )

        given = opened.data
        self._own = Data(self._train, None, given.task, given.description, given.fingerprint, given.loss)

    def run(self, settings: Sequence[tuple[str, Options]]) -> Search:
        """Search, or go on with a search that was interrupted.

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
        dense_loss = self._loss(self._opened.graph, self._validation)
        speed = self._speed(settings[0][1])
        if steps is None:
            steps = self._steps(len(settings), speed)
        rung, left = steps, list(settings)
        position = 0
        while len(left) > 1:
            found = []
            for name, options in left:
                if position == len(trials):
                    trials.append(self._trial(name, options, rung))
                    self._write({"steps": steps, "trials": [asdict(trial) for trial in trials], "search": None})
                found.append(trials[position])
                position += 1
            if all(trial.loss is None for trial in found):
                raise UsageError(
                    f"--budget-minutes compares settings at {_SHARE:.0%} of the layers' cost, and none gets there. "
                    "Set smaller experts (moeify.expert_size) or a narrower router (moeify.router_width)."
                )
            best = _ranked(found)[: len(left) // 2]
            left, rung = [(trial.name, trial.options) for trial in best], 2 * rung
        name, options = left[0]
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

    def _speed(self, options: Options) -> _Speed:
        """Run a trial as short as can be, for its speed alone."""
        began = time.monotonic()
        graph, fits = self._trained(options, _FEWEST, "timing")
        trained = time.monotonic()
        self._loss_at_share(graph)
        judged = time.monotonic()
        self._loss(self._opened.graph, self._validation)
        forward = (time.monotonic() - judged) / len(self._validation)
        rates = {name: fit.seconds / fit.steps for name, fit in fits.items() if fit.steps}
        return _Speed(rates, trained - began - sum(fit.seconds for fit in fits.values()), judged - trained, forward)

    def _steps(self, settings: int, speed: _Speed) -> int:
        """Return the steps of the first trials: a power of two, so that small differences in speed do not matter.

        Raises:
            UsageError: not even the shortest trials fit.
        """
        runs, weights, left, factor = 0, 0, settings, 1
        while left > 1:
            runs, weights, left, factor = runs + left, weights + left * factor, left // 2, 2 * factor
        if not runs:
            return _FEWEST
        each = sum(speed.rates[name] * relative for name, relative in _RELATIVE.items() if name in speed.rates)
        fixed = runs * (speed.fixed + speed.judging)
        affordable = (_FOR_SEARCH * self._left() - fixed) / (weights * each)
        if affordable < _FEWEST:
            spent = 60 * self._minutes - self._left()
            # With a reserve of a fifth, in tenths of a minute.
            needed = (fixed + weights * _FEWEST * each) / _FOR_SEARCH + spent
            raise UsageError(
                f"--budget-minutes {self._minutes:g} is too short to try {settings} settings on this machine. Give at "
                f"least {math.ceil(1.2 * needed / 6) / 10}, or leave it out to run the recipe as it is."
            )
        most = min(affordable, max(_FEWEST, self._length("sparsify") // 4))
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
        lengths: Options = {name: {"steps": max(1, round(relative * steps))} for name, relative in _RELATIVE.items()}
        trained = {one.name for one in self._passes if isinstance(one, TrainedPass) and one.optimises}
        lengths = {name: own for name, own in lengths.items() if name in trained}

        def progress(now: Progress) -> None:
            if self._progress is not None:
                self._progress(replace(now, what=f"{label}: {now.what}"))

        surgery = Pipeline(with_options(self._passes, merged(lengths, options))).run(
            self._opened.graph, inputs=self._opened.inputs, data=self._own, seed=self._seed, verify="off",
            progress=progress, teacher=None if self._teacher is None else self._teacher.graph,
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
        task = None if imitates(self._opened.graph, self._own) else loss_of(self._opened.graph, self._own)
        outputs_of = made_for(self._own.task, class_task(self._opened.graph))
        imitated, total = (self._teacher or self._opened).graph, 0.0
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


def _ranked(trials: Sequence[Trial]) -> list[Trial]:
    """The better ones first; of equal ones the earlier."""
    return sorted(trials, key=lambda trial: float("inf") if trial.loss is None else trial.loss)


def _samples(batches: Sequence[Batch]) -> int:
    return sum(batch.size for batch in batches)
