"""`surgeon apply`: run passes over a model and save the result."""

# The annotations are read when commands are made, so they are not postponed.
import dataclasses
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from surgeon import processes
from surgeon.cli import completion
from surgeon.cli.app import Run, command
from surgeon.cli.options import (
    Arch,
    InputsOption,
    Model,
    PassList,
    SetOption,
    Task,
    TrustModules,
    TrustPickle,
)
from surgeon.cli.reading import build, parse_settings
from surgeon.errors import UsageError
from surgeon.jobs.options import DataOptions


class Verify(StrEnum):
    """How passes are verified."""

    off = "off"
    fast = "fast"
    full = "full"


@command(order=50)
def apply(
    run: Run,
    model: Model,
    passes: PassList = None,
    settings: SetOption = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            metavar="R",
            help="A recipe: a name (listed by surgeon passes), a YAML file, or a saved surgery, to run it again.",
            autocompletion=completion.recipes,
        ),
    ] = None,
    data: DataOptions | None = None,
    task: Task = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            "--teacher",
            metavar="MODEL",
            help="Another model, larger or better, whose outputs passes learn from in place of those of MODEL. It must "
            "have the same inputs, and the same classes or vocabulary.",
        ),
    ] = None,
    inputs: InputsOption = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", help="Directory for the result; by default NAME-surgery."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier result, or drop an interrupted run.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would change; train and save nothing.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    verify: Annotated[
        Verify,
        typer.Option(
            "--verify",
            help="Compare the output before and after each pass: never (off), on the example inputs (fast), or on "
            "further inputs too (full).",
        ),
    ] = Verify.fast,
    tau: Annotated[
        float | None,
        typer.Option(
            "--tau", help="How much to skip, from 0 (nothing) to 1; moeify.rule says by which rule. Needs --data."
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option("--seed", help="Random seed.  [default: that of a saved surgery, else 0]"),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            "--report",
            metavar="FILE",
            help="Also write the report of the result, as surgeon report does, to this .html file. With --data it is "
            "measured on the held-out data.",
        ),
    ] = None,
    report_to: Annotated[
        str | None,
        typer.Option(
            "--report-to",
            metavar="TRACKER",
            help="Report the losses of training to a tracker of accelerate, such as tensorboard or wandb.",
        ),
    ] = None,
    budget_minutes: Annotated[
        float | None,
        typer.Option(
            "--budget-minutes",
            metavar="N",
            help="Find learning rates, sparsity, size of experts and routers in a part of N minutes, on a part of the "
            "training data, and train in the rest. Needs moeify and a pass that fine-tunes.",
        ),
    ] = None,
    trust_pickle: TrustPickle = False,
    trust_modules: TrustModules = None,
    arch: Arch = None,
) -> None:
    """Run passes over a model and save the result.

    The model you give is never changed. With --data, passes fine-tune the model and train what they add. Without it,
    they say what was not trained.

    Training runs in several processes under accelerate launch: see docs/training.md.

    Example: surgeon apply --passes sparsify,moeify,lower --set moeify.experts=48 path/to/bert --data reviews.csv
    """
    from surgeon.jobs import apply as applying
    from surgeon.jobs.applied import answer_of
    from surgeon.jobs.open_model import open_model
    from surgeon.jobs.recipe import differences, read_recipe, recipe_for
    from surgeon.jobs.report import of_applied
    from surgeon.jobs.search_settings import check_search
    from surgeon.render.apply import applied_view
    from surgeon.render.report import check_report, write_report
    from surgeon.render.search import search_view
    from surgeon.text.diff import pass_view

    given, read = parse_settings(settings or []), None
    if recipe is not None:
        if passes is not None:
            raise UsageError("Give --recipe or --passes, not both.")
        built, read = read_recipe(recipe, given)
        seed = read.seed if seed is None else seed
    else:
        built = build(passes, settings)
    seed = applying.default_seed(model) if seed is None else seed
    if data is not None:
        data = dataclasses.replace(data, seed=seed)
    if teacher is not None and data is None and not dry_run:
        raise UsageError("--teacher is there to be learned from in training. Give --data too.")
    if report is not None:
        if dry_run:
            raise UsageError("--report shows a saved result, and --dry-run saves none. Give one of them.")
        check_report(report)
    typed = tuple(run.args)
    check_search(built, budget_minutes, has_data=data is not None, dry_run=dry_run)
    options = applying.ApplyOptions(
        out, overwrite, dry_run, resume, verify.value, seed, tau, data, report_to, typed, budget_minutes, given, read
    )
    applying.check_options(model, built, options)
    opened = open_model(
        model,
        inputs=inputs,
        trust_pickle=trust_pickle,
        trust_modules=trust_modules or (),
        arch=arch,
        task=task,
        data=data,
        stage=run.screen.stage,
    )
    if recipe is not None:
        built, opened = recipe_for(opened, recipe, given) or (built, opened)
    other = [] if read is None else differences(read, opened, has_teacher=teacher is not None)
    for note in (*opened.notes, *other):
        run.screen.say(f"note: {note}")
    beside = None
    if teacher is not None:
        beside = open_model(
            teacher,
            fallback_inputs=opened.inputs,
            trust_pickle=trust_pickle,
            trust_modules=trust_modules or (),
            task=task,
            stage=run.screen.stage,
        )
    applied = applying.apply(
        opened,
        built,
        options,
        stage=run.screen.stage,
        progress=run.screen.progress,
        on_pass=lambda pass_: run.screen.show(pass_view(pass_, "sites", gap=True)),
        on_search=lambda search: run.screen.show(search_view(search)),
        teacher=beside,
    )
    run.screen.show(applied_view(applied))
    if report is not None and processes.is_main():
        write_report(of_applied(applied, opened, run.screen.progress), report)
        run.screen.show(f"The report is in {report}.")
    run.answer(answer_of(applied, opened, report))
