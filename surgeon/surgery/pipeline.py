"""Run passes one after the other over a model: check their order, trace, apply, verify, take snapshots."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.fx import GraphModule

from surgeon.data.classes import check_same_classes
from surgeon.data.data import Data
from surgeon.data.example_rows import example_rows
from surgeon.display.choose import shows_progress
from surgeon.errors import UsageError
from surgeon.exits.halting import find_halts
from surgeon.exits.site import find_exits
from surgeon.graph.given import check_model, is_aten_graph
from surgeon.graph.snapshot import snapshot
from surgeon.graph.traced import fork
from surgeon.inputs.skipping import find_skipping
from surgeon.models.example_inputs import example_inputs
from surgeon.models.source import check_finite
from surgeon.moe.site import find_moes
from surgeon.passes import FineTunedPass, Pass
from surgeon.passes.contract import SiteKind
from surgeon.passes.report import PassDiff
from surgeon.processes import connect, is_main
from surgeon.progress import ShowProgress, Tell, renamed
from surgeon.surgery.order import misplaced
from surgeon.surgery.origin import Origin
from surgeon.surgery.recipe import InputFile, name_of
from surgeon.surgery.record import earlier_passes
from surgeon.surgery.surgery import Surgery
from surgeon.tracing.trace import adopt, trace
from surgeon.training.distillation import check_teacher, imitates
from surgeon.training.loop import RunSettings
from surgeon.training.trackers import check_tracker

Verify = Literal["off", "fast", "full"]


class Pipeline:
    """Passes to run in order over a model or a graph.

    >>> surgery = Pipeline([Moeify(experts=4), Lower()]).run(model, inputs=inputs)  # doctest: +SKIP
    """

    def __init__(self, passes: Sequence[Pass[Any]]) -> None:
        """Keep the passes in their order.

        Raises:
            UsageError: something among them is no pass.
        """
        if isinstance(passes, Pass | str) or not isinstance(passes, Iterable):
            raise UsageError(f"Pipeline takes a list of passes, such as [Moeify(experts=8)], but got {passes!r}.")
        self.passes = list(passes)
        for one in self.passes:
            if not isinstance(one, Pass):
                what = f"{one.__name__}()" if isinstance(one, type) else "a pass, such as surgeon.passes.Moeify()"
                raise UsageError(f"Pipeline takes passes, but got {one!r}. Write {what}.")

    @shows_progress
    def run(
        self,
        model: nn.Module,
        *,
        inputs: Any = None,
        data: Any = None,
        seed: int = 0,
        verify: Verify = "fast",
        progress: ShowProgress = None,
        on_pass: Callable[[PassDiff], None] | None = None,
        workdir: str | Path | None = None,
        resume: bool = False,
        dry_run: bool = False,
        origin: Origin | None = None,
        consume: bool = False,
        report_to: str | None = None,
        teacher: nn.Module | None = None,
        teacher_origin: Origin | None = None,
    ) -> Surgery:
        """Rewrite `model` (or a graph of ATen ops), which is itself left as it was, unless it is to be consumed.

        Args:
            inputs: example inputs. By default they are two rows of the data, or without data they are made, for Hugging
                Face models.
            data: training data (see `surgeon.Data.of`); without it nothing is trained, and the reports say so.
            seed: random seed.
            verify: compare outputs before and after each pass: on the example inputs ("fast"), also on others ("full"),
                or not at all ("off").
            progress: True shows the progress, a function is called with each `Progress`. on_pass: called after each
                pass.
            workdir, resume: directory for checkpoints, and whether to continue from them.
            dry_run: rewrite without training.
            report_to: a tracker of accelerate, such as "tensorboard" or "wandb", that gets the losses of every step.
            teacher: another model that takes the same inputs and answers in the same form, such as a larger one. Passes
                with `distill` above 0, or the task "imitate", learn from its outputs in place of those of the model
                before the passes. It is run in evaluation mode and not changed. teacher_origin: where it came from, for
                the record.
            consume: free the weights of each layer as soon as it is rewritten, if nothing is trained. The given model
                loses these weights too, so it cannot be used afterwards. Memory then holds the weights once, not twice.

        Raises:
            UsageError: an argument of another kind, passes in an order that cannot work, a pass that needs data,
                options that fit no site, a teacher that nothing learns from or whose answers do not match the model's.
            LoadError: the model has weights that are not finite.
            TraceError: the model cannot be traced faithfully.
            PassError, VerificationError: a pass failed; the message names it, and no later pass ran.
        """
        check_model(model)
        if teacher is not None:
            check_model(teacher)
        if verify not in get_args(Verify):
            raise UsageError(f"verify is {verify!r}, but must be one of {', '.join(get_args(Verify))}.")
        if not isinstance(seed, int):
            raise UsageError(f"seed is {seed!r}, but must be a whole number.")
        given = None if data is None else Data.of(data)
        there = kinds_of(model)
        if report_to is not None:
            check_tracker(report_to)
        self.check(there=there, has_data=given is not None or dry_run)
        if isinstance(model, GraphModule) and is_aten_graph(model):
            graph = adopt(model)
        else:
            if inputs is None:
                config = getattr(model, "config", None)
                inputs = example_inputs(model, config=config) if given is None else example_rows(given)
            check_finite(model)
            graph = trace(model, inputs, progress=progress)
        connect(next((parameter.device for parameter in graph.parameters()), torch.device("cpu")))
        if not is_main():
            progress = on_pass = None
        tell = progress if callable(progress) else None
        if origin is None:
            origin = Origin.of(model)
        surgery = Surgery(graph, [], inputs, [snapshot(graph)], seed, given.description if given else None, origin)
        surgery.fingerprint = given.fingerprint if given else None
        surgery.earlier = earlier_passes(graph)
        if teacher is not None:
            teacher_origin = teacher_origin or Origin.of(teacher)
            if given is None and not dry_run:
                raise UsageError("A teacher is there to be learned from in training. Give data too.")
            self._check_learns(imitating=given is not None and imitates(graph, given))
            check_same_classes(origin.config, teacher_origin.config)
            check_teacher(teacher, graph, inputs, None if given is None else given.task)
            surgery.teacher = InputFile(teacher_origin.path, teacher_origin.kind, teacher_origin.sha256)
        consume = consume and (given is None or dry_run)  # training compares with the model before
        # A model that was consumed is none that anything can be put back into.
        surgery.model = None if consume or isinstance(model, GraphModule) else weakref.ref(model)
        original = None if consume else fork(graph).eval()
        for number, pass_ in enumerate(self.passes):
            work = adopt(surgery.graph)
            place = None if workdir is None else Path(workdir) / f"{number:02d}-{pass_.name}"
            own = _part_of(pass_.name, tell)
            step = RunSettings(seed, verify, own, place, resume, dry_run, original, consume, report_to, teacher)
            report = pass_.run(work, inputs=inputs, data=given, settings=step)
            surgery.graph = work
            name = name_of(pass_)
            surgery.reports.append(report if name == report.name else replace(report, source=name))
            surgery.snapshots.append(snapshot(work))
            if on_pass is not None:
                on_pass(surgery.diff().passes[-1])
        return surgery

    def _check_learns(self, *, imitating: bool) -> None:
        """Refuse a teacher from which no pass would learn."""
        if not any(isinstance(pass_, FineTunedPass) and pass_.distils(imitating) for pass_ in self.passes):
            raise UsageError(
                "No pass learns from a teacher. swap-activation, sparsify and recover do if they train and distill is "
                "above 0, or if the task is imitate."
            )

    def check(self, *, there: Collection[SiteKind], has_data: bool) -> None:
        """Check order and requirements, before anything runs.

        Args:
            there: the kinds of sites that passes make which the model has already (`kinds_of`).

        Raises:
            UsageError: the passes cannot run in this order, or data is missing; the message says what to do.
        """
        if not self.passes:
            raise UsageError("No passes to run. `surgeon passes` lists them.")
        for _, what in misplaced([type(pass_) for pass_ in self.passes], there):
            raise UsageError(what)
        for pass_ in self.passes:
            if pass_.why_data and not has_data:
                raise UsageError(
                    f"{pass_.name} needs data: {pass_.why_data}.",
                    python="Give data=, or dry_run=True to see what would change.",
                    command="Give --data, or --dry-run to see what would change.",
                )


def _part_of(name: str, tell: Tell | None) -> Tell | None:
    """Let every report of a pass have its name."""
    return renamed(tell, lambda what: what if what.startswith(name) else f"{name}: {what}")


def kinds_of(model: nn.Module) -> set[SiteKind]:
    """Return the kinds of sites that passes make, as far as a graph or a model with converted layers has them."""
    found: set[SiteKind] = {"moe"} if find_moes(model) else set()
    return found | ({"dynamic"} if find_skipping(model) or find_exits(model) or find_halts(model) else set())
