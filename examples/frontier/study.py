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
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import nn

import surgeon
from surgeon.batch import Batch, Data
from surgeon.demo import train
from surgeon.losses import evaluate
from surgeon.passes import Pass
from surgeon.pipeline import Pipeline
from surgeon.render.screen import Screen
from surgeon.report import PassReport, dense_layers
from surgeon.sweep import Point, sweep
from surgeon.tuning import Tuner

Passes = Sequence[Pass[Any]]


@dataclass(frozen=True)
class Variant:
    """One way to rewrite the dense model, and how to look at the result.

    passes: what to run; if there are none, another variant's result is looked at in another way. taus: for the curve
    with one tau for all layers; none if there are no experts yet. budgets: shares of the dense model's multiply-adds to
    tune for. oracle: also with the true norms. compensated: the mean of what is skipped is added. starts_from: another
    variant, to go on from its result.
    """

    passes: Passes
    taus: Sequence[float] = ()
    budgets: Sequence[float] = ()
    oracle: bool = False
    compensated: bool = False
    rules: Sequence[str] | None = None
    starts_from: str | None = None


@dataclass(frozen=True)
class Study:
    """A task: the data and the dense model for a seed, how it is trained, and the variants.

    keep: what part of the dense quality counts as kept, 0.99 of an accuracy or 1.01 times a loss. dense: the plan of
    dense training. longer: its plan for the dense model that is trained as much again as the variants are.
    """

    name: str
    task: str
    keep: float
    data: Callable[[int], Data]
    model: Callable[[int], nn.Module]
    inputs: Callable[[Data], Any]
    dense: Mapping[str, Any]
    longer: Mapping[str, Any]
    variants: Mapping[str, Variant]
    calibration_batches: int = 8


@dataclass
class Run:
    """One seed of a study in its work directory."""

    study: Study
    seed: int
    work: Path
    screen: Screen = field(default_factory=Screen)

    def result(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What a stage measured: read if it was done before, else made and written."""
        path = self.work / f"{_file(name)}.json"
        if path.is_file():
            return json.loads(path.read_text())
        started = time.monotonic()
        value = make()
        value["seconds"] = round(time.monotonic() - started, 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps(value, indent=1))
        fresh.rename(path)
        print(f"{self.study.name}, seed {self.seed}: {name} done in {value['seconds']:.0f} s", flush=True)
        return value

    # --- the dense model ---------------------------------------------------------------------------------------------

    def dense_model(self, data: Data) -> nn.Module:
        """The trained dense model."""
        return self._trained("dense", data, self.study.dense, None)

    def _trained(self, name: str, data: Data, plan: Mapping[str, Any], start: nn.Module | None) -> nn.Module:
        torch.manual_seed(self.seed)
        model = self.study.model(self.seed) if start is None else start
        path = self.work / f"{name}.pt"
        if path.is_file():
            model.load_state_dict(torch.load(path, weights_only=True))
            return model.eval()
        train(model, data, **plan, seed=self.seed, progress=self.screen.progress)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path)
        return model.eval()

    def measure_dense(self, name: str, data: Data, start: nn.Module | None, plan: Mapping[str, Any]) -> dict[str, Any]:
        def make() -> dict[str, Any]:
            model = self._trained(name, data, plan, start)
            return asdict(evaluate(model, data.eval, self.study.task))

        return self.result(name, make)

    # --- the variants ------------------------------------------------------------------------------------------------

    def rewritten(self, name: str, dense: Callable[[], nn.Module], data: Data) -> surgeon.TracedGraph:
        """The graph of a variant, made or loaded."""
        directory = self.work / _file(name)
        variant = self.study.variants[name]
        if not variant.passes:
            assert variant.starts_from is not None
            return self.rewritten(variant.starts_from, dense, data)
        if not (directory / "surgery.json").is_file():
            start: nn.Module = dense()
            if variant.starts_from is not None:
                start = self.rewritten(variant.starts_from, dense, data)
            workdir = directory.with_name(f"{directory.name}.work")
            workdir.mkdir(parents=True, exist_ok=True)
            surgery = Pipeline(variant.passes).run(
                start, inputs=self.study.inputs(data), data=data, seed=self.seed, workdir=workdir, resume=True,
                progress=self.screen.progress,
            )  # fmt: skip
            print(surgery.diff().text("stat"), flush=True)
            surgery.save(directory, overwrite=True)
            shutil.rmtree(workdir)
        return surgeon.load(directory)

    def measure_variant(self, name: str, dense: Callable[[], nn.Module], data: Data) -> dict[str, Any]:
        """Every point of a variant's curves, each curve and each budget a stage of its own."""
        variant, task = self.study.variants[name], self.study.task
        loaded: list[Any] = []

        def graph() -> Any:
            if not loaded:
                loaded.append(self.rewritten(name, dense, data))
            return loaded[0]

        def fits() -> dict[str, Any]:
            return {"fits": [_fit(report) for report in graph().meta["surgery"]["passes"]]}

        def common() -> dict[str, Any]:
            return {"inputs": self.study.inputs(data), "progress": self.screen.progress}

        def dense_costs() -> dict[str, Any]:
            reports = [PassReport.from_json(report) for report in graph().meta["surgery"]["passes"]]
            assert reports[0].before is not None
            return {"dense_multiply_adds": reports[0].before.multiply_adds, "dense_layers": dense_layers(reports)}

        def curve(oracle: bool) -> dict[str, Any]:
            shared = common() | dense_costs() | {"rules": variant.rules, "routers": ["oracle" if oracle else "own"]}
            if not variant.compensated:
                points = sweep(graph(), data.eval, task, variant.taus, **shared)
                return {"points": [row(point) for point in points]}
            points = []
            for tau in variant.taus:
                surgeon.set_tau(graph(), tau)
                surgeon.compensate(graph(), calibration())
                points += [replace(point, tau=tau) for point in sweep(graph(), data.eval, task, [None], **shared)]
            return {"points": [row(point) for point in points]}

        @cache
        def calibration() -> list[Batch]:
            return [Batch.from_any(item) for item in islice(data.train, self.study.calibration_batches)]

        tuners: list[Tuner] = []

        def tuned(budget: float) -> dict[str, Any]:
            if not tuners:
                whole = dense_costs()["dense_multiply_adds"]
                tuners.append(Tuner(graph(), calibration(), dense=whole, **common()))
            try:
                found = tuners[0].tune(budget)
            except surgeon.SurgeonError as error:
                return {"points": [], "refused": str(error)}
            (point,) = sweep(graph(), data.eval, task, [None], **common(), **dense_costs())
            return {"points": [row(point) | {"budget": budget, "taus": found.taus, "rounds": found.rounds}]}

        result = self.result(f"{name}-fits", fits)
        result["curves"] = {}
        if not variant.taus:  # something that others start from
            return result
        result["curves"]["uniform"] = self.result(f"{name}-uniform", lambda: curve(False))["points"]
        if variant.budgets:
            result["curves"]["tuned"] = [
                point
                for budget in variant.budgets
                for point in self.result(f"{name}-tuned-{budget:g}", lambda budget=budget: tuned(budget))["points"]
            ]
        if variant.oracle:
            result["curves"]["oracle"] = self.result(f"{name}-oracle", lambda: curve(True))["points"]
        return result


def _file(name: str) -> str:
    """A name as that of a file."""
    return re.sub(r"[^\w.-]+", "_", name)


def row(point: Point) -> dict[str, Any]:
    """A point for the result file."""
    return {
        "tau": point.tau, "rule": point.rule, "quality": point.quality.value, "executed": round(point.executed, 5),
        "layers": round(point.layers, 5), "relative": None if point.relative is None else round(point.relative, 5),
    }  # fmt: skip


def _fit(report: Mapping[str, Any]) -> dict[str, Any]:
    fit = report["fit"]
    return {
        "pass": report["name"], "options": report["options"], "steps": 0 if fit is None else fit["steps"],
        "seconds": 0 if fit is None else fit["seconds"],
        "active": {} if fit is None else {
            path: [round(1.0 - part["below_100th"], 4) for part in pair] for path, pair in fit["sparsity"].items()
        },
    }  # fmt: skip


def run(study: Study, work: Path, seeds: Sequence[int], only: Sequence[str] | None = None) -> dict[str, Any]:
    """Run a study for some seeds; returns everything measured, as the result file has it."""
    results: dict[str, Any] = {"study": study.name, "task": study.task, "keep": study.keep, "seeds": {}}
    for seed in seeds:
        one = Run(study, seed, work / study.name / str(seed))
        data = study.data(seed)
        found = {"dense": one.measure_dense("dense", data, None, study.dense)}

        def dense(one: Run = one, data: Data = data) -> nn.Module:
            return one.dense_model(data)

        if only is None or "longer" in only:
            found["longer"] = one.measure_dense("longer", data, dense(), study.longer)
        for name in study.variants:
            if only is None or name in only:
                found[name] = one.measure_variant(name, dense, data)
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
