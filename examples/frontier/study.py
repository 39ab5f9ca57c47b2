"""What the three studies have in common: train, rewrite in several ways, measure each, and keep what was measured.

Every stage writes its result into the work directory when it is done; a study that is started again goes on after the
last one. Training inside a stage goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn
from variants import Study, Variant

import surgeon
from surgeon.data.batch import Batch
from surgeon.data.data import Data
from surgeon.data.imitation import divergence
from surgeon.data.losses import evaluate
from surgeon.jobs.demo import train
from surgeon.measure.sweep import Point, sweep
from surgeon.measure.tuning import Tuner
from surgeon.passes.report import PassReport, dense_layers
from surgeon.render.screen import Screen
from surgeon.surgery.pipeline import Pipeline
from surgeon.surgery.record import record_of


@dataclass
class Run:
    """One seed of a study in its work directory."""

    study: Study
    seed: int
    work: Path
    screen: Screen = field(default_factory=Screen)

    def result(self, name: str, definition: Any, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What a stage gave: read if it was done before, else made and written.

        definition: what it depends on; a stage that was done by another one is not taken for it.
        """
        path = self.work / f"{_file(name)}.json"
        defined = json.loads(json.dumps(definition))
        if path.is_file():
            found: dict[str, Any] = json.loads(path.read_text())
            if found.pop("definition") != defined:
                raise SystemExit(
                    f"{path} was made by another definition of {name}: delete it, and what follows from it."
                )
            return found
        started = time.monotonic()
        value = make()
        value["seconds"] = round(time.monotonic() - started, 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps(value | {"definition": defined}, indent=1))
        fresh.rename(path)
        print(f"{self.study.name}, seed {self.seed}: {name} done in {value['seconds']:.0f} s", flush=True)
        return value

    def data(self) -> Data:
        """The data as if nothing had been read of it, so that no stage depends on which ones ran before it."""
        return self.study.data(self.seed)

    # --- the dense model ---------------------------------------------------------------------------------------------

    def dense(self, name: str = "dense") -> dict[str, Any]:
        """Train the dense model, or go on with it ("longer"), and measure its quality."""
        plans = {"dense": [self.study.dense], "longer": [self.study.dense, self.study.longer]}[name]

        def make() -> dict[str, Any]:
            torch.manual_seed(self.seed)
            model = self.study.model(self.seed) if name == "dense" else self.dense_model()
            data, workdir = self._taught(self.data()), self._workdir(name)
            train(model, data, **plans[-1], seed=self.seed, workdir=workdir, progress=self.screen.progress)
            torch.save(model.state_dict(), self.work / f"{name}.pt")
            shutil.rmtree(workdir)
            return asdict(evaluate(model, data.eval, self.study.task))

        return self.result(name, plans, make)

    def dense_model(self) -> nn.Module:
        """The trained dense model."""
        self.dense()
        model = self.study.model(self.seed)
        model.load_state_dict(torch.load(self.work / "dense.pt", weights_only=True))
        return model.eval()

    @cached_property
    def _teacher(self) -> nn.Module | None:
        return None if self.study.teacher is None else self.study.teacher(self.seed)

    def _taught(self, data: Data) -> Data:
        """Data whose loss is half the task's and half the divergence from the teacher's answers, if there is one."""
        teacher, task = self._teacher, data.loss
        if teacher is None:
            return data
        assert task is not None

        def loss(outputs: Any, batch: Batch) -> Tensor:
            with torch.no_grad():
                wanted = teacher(*batch.args, **batch.kwargs)
            return 0.5 * task(outputs, batch) + 0.5 * divergence(wanted, outputs, batch, data.task)

        return replace(data, loss=loss)

    # --- the variants ------------------------------------------------------------------------------------------------

    def rewritten(self, name: str) -> dict[str, Any]:
        """Run a variant's passes; returns what they fitted. The graph is kept in the directory of that name."""

        def make() -> dict[str, Any]:
            variant, data, workdir = self.study.variants[name], self.data(), self._workdir(name)
            start = self.dense_model() if variant.starts_from is None else self.graph(variant.starts_from)
            surgery = Pipeline(variant.passes).run(
                start, inputs=self.study.inputs(data), data=data, seed=self.seed, workdir=workdir, resume=True,
                progress=self.screen.progress, teacher=self._teacher,
            )  # fmt: skip
            print(surgery.diff().text("stat"), flush=True)
            surgery.save(self.work / _file(name), overwrite=True)
            shutil.rmtree(workdir)
            return {"fits": [_fit(report) for report in _reports(self.graph(name, made=True))]}

        return self.result(name, self._definition(name), make)

    def graph(self, name: str, made: bool = False) -> surgeon.TracedGraph:
        """A variant's graph, which is made if it was not yet."""
        if not made:
            self.rewritten(name)
        return surgeon.load(self.work / _file(name))

    def variant(self, name: str) -> dict[str, Any]:
        """Every point of a variant's curves, each curve and each budget a stage of its own."""
        variant, made, part = self.study.variants[name], name, self.study.part
        if not variant.passes:
            assert variant.starts_from is not None
            made = variant.starts_from
        result: dict[str, Any] = self.rewritten(made) | {"curves": {}}
        if not variant.taus and not variant.budgets:  # something that others start from
            return result
        looked = _Looked(self, variant, self.graph(made))
        definition = {
            "of": self._definition(made), "rules": variant.rules, "compensated": variant.compensated,
            **({"refit": variant.refit.options() or True} if variant.refit else {}),
        }  # fmt: skip
        taus = definition | {"taus": list(variant.taus)}
        if variant.taus:
            result["curves"]["uniform"] = self.result(f"{name}{part}-uniform", taus, partial(looked.curve, "own"))[
                "points"
            ]
        if variant.oracle:
            result["curves"]["oracle"] = self.result(f"{name}{part}-oracle", taus, partial(looked.curve, "oracle"))[
                "points"
            ]
        if variant.budgets:
            result["curves"]["tuned"] = [
                point
                for budget in variant.budgets
                for point in self.result(
                    f"{name}{part}-tuned-{budget:g}",
                    definition | {"budget": budget},
                    lambda budget=budget: looked.tuned(budget),
                )["points"]
            ]
        for curve, points in result["curves"].items() if variant.divergence else ():
            stage = f"{name}{part}-divergence" if curve == "tuned" else f"{name}{part}-{curve}-divergence"
            found = self.result(stage, definition | {"points": points}, partial(looked.diverges, points))
            for point, value in zip(points, found["divergence"], strict=True):
                point["divergence"] = value
        return result

    def _definition(self, name: str) -> dict[str, Any]:
        variant = self.study.variants[name]
        start = variant.starts_from
        return {
            "passes": [[one.name, one.options()] for one in variant.passes],
            "starts_from": self.study.dense if start is None else self._definition(start),
        }

    def _workdir(self, name: str) -> Path:
        workdir = self.work / f"{_file(name)}.work"
        workdir.mkdir(parents=True, exist_ok=True)
        return workdir


@dataclass
class _Looked:
    """A variant's graph, looked at in one way after another."""

    run: Run
    variant: Variant
    graph: surgeon.TracedGraph

    def curve(self, router: str) -> dict[str, Any]:
        """One tau for all layers."""
        if not self.variant.compensated and not self.variant.refit:
            return {"points": [row(point) for point in self._sweep(self.variant.taus, routers=[router])]}
        points = []
        for tau in self.variant.taus:
            surgeon.set_tau(self.graph, tau)
            if self.variant.compensated:
                surgeon.compensate(self.graph, self._calibration)
            measured = self._sweep([None], graph=self._refitted(), routers=[router])
            points += [replace(point, tau=tau) for point in measured]
        return {"points": [row(point) for point in points]}

    def tuned(self, budget: float) -> dict[str, Any]:
        """A tau for each layer; no point if the budget is too small."""
        try:
            found = self._tuner.tune(budget)
        except surgeon.SurgeonError as error:
            return {"points": [], "refused": str(error)}
        (point,) = self._sweep([None], graph=self._refitted())
        return {"points": [row(point) | {"budget": budget, "taus": found.taus, "rounds": found.rounds}]}

    def diverges(self, points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The KL divergence from the dense model on the held-out data, for each of the points."""
        dense, found = self.run.dense_model(), []
        for point in points:
            surgeon.set_tau(self.graph, point.get("taus", point["tau"]))
            (measured,) = self._sweep([None], graph=self._refitted(), dense=dense)
            (value,) = [one.value for one in measured.agreement if one.name == "KL divergence"]
            found.append(value)
        return {"divergence": found}

    def _refitted(self) -> surgeon.TracedGraph:
        """The graph with the weights of linear layers fitted to what its taus leave, if the variant wants that."""
        if not self.variant.refit:
            return self.graph
        data = self.run.data()
        return Pipeline([self.variant.refit]).run(self.graph, inputs=self._shared["inputs"], data=data).graph.eval()

    def _sweep(
        self, taus: Sequence[float | None], graph: surgeon.TracedGraph | None = None, **options: Any
    ) -> list[Point]:
        return sweep(
            graph or self.graph, self._data.eval, self.run.study.task, taus, rules=self.variant.rules, **self._shared,
            dense_multiply_adds=self._dense, dense_layers=dense_layers(self._reports), **options,
        )  # fmt: skip

    @cached_property
    def _data(self) -> Data:
        return self.run.data()

    @cached_property
    def _shared(self) -> dict[str, Any]:
        return {"inputs": self.run.study.inputs(self._data), "progress": self.run.screen.progress}

    @cached_property
    def _reports(self) -> list[PassReport]:
        return list(_reports(self.graph))

    @cached_property
    def _dense(self) -> int:
        before = self._reports[0].before
        assert before is not None
        return before.multiply_adds

    @cached_property
    def _calibration(self) -> list[Batch]:
        batches = islice(self._data.train, self.run.study.calibration_batches)
        return [Batch.from_any(item) for item in batches]

    @cached_property
    def _tuner(self) -> Tuner:
        return Tuner(self.graph, self._calibration, dense=self._dense, **self._shared)


def _file(name: str) -> str:
    """A name as that of a file."""
    return re.sub(r"[^\w.-]+", "_", name)


def row(point: Point) -> dict[str, Any]:
    """A point for the result file."""
    return {
        "tau": point.tau, "rule": point.rule, "quality": point.quality.value, "executed": round(point.executed, 5),
        "layers": round(point.layers, 5), "relative": None if point.relative is None else round(point.relative, 5),
    }  # fmt: skip


def _reports(graph: surgeon.TracedGraph) -> tuple[PassReport, ...]:
    record = record_of(graph)
    assert record is not None
    return record.passes


def _fit(report: PassReport) -> dict[str, Any]:
    fit = report.fit
    return {
        "pass": report.name, "options": report.options, "steps": 0 if fit is None else fit.steps,
        "seconds": 0 if fit is None else fit.seconds,
        "active": {} if fit is None else {
            path: [round(1.0 - part.below_100th, 4) for part in pair] for path, pair in fit.sparsity.items()
        },
    }  # fmt: skip


def run(study: Study, work: Path, seeds: Sequence[int], only: Sequence[str] | None = None) -> dict[str, Any]:
    """Run a study for some seeds; returns everything measured, as the result file has it."""
    results: dict[str, Any] = {"study": study.name, "task": study.task, "keep": study.keep, "seeds": {}}
    for seed in seeds:
        one = Run(study, seed, work / study.name / str(seed))
        found = {"dense": one.dense()}
        if only is None or "longer" in only:
            found["longer"] = one.dense("longer")
        for name in study.variants:
            if only is None or name in only:
                found[name] = one.variant(name)
        one.screen.close()
        results["seeds"][str(seed)] = found
    return results


def main(study: Study) -> None:
    """The command line of a study."""
    parser = argparse.ArgumentParser(description=f"The {study.name} study: quality against cost.")
    parser.add_argument("work", type=Path, help="where models and results are kept; a started study goes on there")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", choices=["longer", *study.variants], help="some of the variants")
    args = parser.parse_args()
    results = run(study, args.work, args.seeds, args.only)
    path = args.work / f"{study.name}.json"
    path.write_text(json.dumps(results, indent=1))
    print(f"written to {path}")
