"""Commands that weigh quality against cost: sweep, tune, set."""

# The annotations are read when commands are made, so they are not postponed.
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from surgeon.cli.app import Run, command
from surgeon.cli.options import Saved, TrustPickle
from surgeon.jobs.data_options import DataOptions

if TYPE_CHECKING:
    from surgeon.jobs.open_model import Opened


class Metric(StrEnum):
    """What a budget counts."""

    flops = "flops"
    ms = "ms"


DenseModel = Annotated[
    str | None,
    typer.Option(
        "--dense",
        metavar="MODEL",
        help="The model before the surgery, to measure beside it; tune --metric ms wants it.",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", metavar="DIR", help="Where the result goes; by default it replaces DIR."),
]


@command
def sweep(
    run: Run,
    model: Saved,
    *,
    tau: Annotated[
        str | None,
        typer.Option(
            "--tau",
            metavar="T,T,...",
            help="Values of tau; 0, every expert, comes first. By default up to 0.5, with top_k up to 0.95.",
        ),
    ] = None,
    rule: Annotated[
        str | None,
        typer.Option(
            "--rule", metavar="R,R,...", help="Selection rules: max, cumulative, energy, top_k. By default the saved."
        ),
    ] = None,
    oracle: Annotated[
        bool, typer.Option(help="Also select by the true norms of the experts' outputs, the best a router could do.")
    ] = True,
    timed: Annotated[bool, typer.Option("--time", help="Also time a call at each setting.")] = False,
    dense: DenseModel = None,
    out: Annotated[
        list[Path] | None,
        typer.Option("--out", "-o", metavar="FILE", help="Also write the table (.json) or a plot (.png)."),
    ] = None,
    data: DataOptions,
    trust_pickle: TrustPickle = False,
) -> None:
    """Measure quality and cost at several tau.

    Quality is measured on the held-out part of the data, the same that apply holds out; with --eval-fraction 0 on all.

    Example: surgeon sweep bert-surgery --data reviews.csv --tau 0,0.05,0.1,0.2 -o sweep.png

    JSON: {model, data, task, dense: {multiply_adds, quality, milliseconds}, points: [{tau, quality, executed, layers,
    multiply_adds, relative, rule, router, milliseconds, shares}], notes}
    """
    from surgeon.jobs import sweep as measuring
    from surgeon.render.files import write_swept
    from surgeon.render.sweep import sweep_view
    from surgeon.text.layout import sentences

    taus, rules = measuring.parse_taus(tau), measuring.parse_rules(rule)
    measuring.check_files(out or [])
    opened, beside = _open(run, model, data, dense, trust_pickle=trust_pickle)
    swept = measuring.sweep(
        opened, taus, rules=rules, oracle=oracle, timed=timed, dense=beside, progress=run.screen.progress
    )
    run.screen.show(sweep_view(swept.points, swept.dense))
    if swept.notes:
        run.screen.show(sentences(swept.notes, indent=0))
    for file in out or []:
        write_swept(swept, file)
        run.screen.say(f"Written to {file}.")
    run.screen.result(swept)


@command
def tune(
    run: Run,
    model: Saved,
    *,
    budget: Annotated[
        float, typer.Option("--budget", metavar="B", help="Cost to stay within: a share of the dense model's.")
    ],
    metric: Annotated[
        Metric,
        typer.Option(
            "--metric", help="What is counted: multiply-adds, or milliseconds of a call on the first batch, here."
        ),
    ] = Metric.flops,
    compensate: Annotated[
        bool,
        typer.Option(
            "--compensate", help="Also add the mean output of the skipped experts, for every layer, after the search."
        ),
    ] = False,
    samples: Annotated[int, typer.Option("--samples", help="Samples of the training data to measure damage on.")] = 512,
    out: Out = None,
    dense: DenseModel = None,
    data: DataOptions,
    trust_pickle: TrustPickle = False,
) -> None:
    """Find a tau for each layer that meets a budget and hurts least, and store it.

    Nothing is trained. What every layer's experts are worth is measured on some of the training data, by how far the
    output moves when the layer gets a bit more or less; quality is then measured on the held-out part.

    Example: surgeon tune bert-surgery --budget 0.4 --data reviews.csv

    JSON: {model, directory, budget, metric, tuned: {taus, shares, cost, damage, uniform, uniform_cost, uniform_damage,
    rounds}, quality: [before, after], notes}
    """
    from surgeon.jobs import sweep as measuring
    from surgeon.jobs.store import check_target
    from surgeon.render.sweep import tuned_view

    measuring.check_tuning(budget, metric.value, has_dense=dense is not None)
    if out is not None:
        check_target(out, str(model), overwrite=False)
    opened, beside = _open(run, model, data, dense, trust_pickle=trust_pickle)
    found = measuring.tune(
        opened,
        budget,
        metric=metric.value,
        samples=samples,
        compensated=compensate,
        out=out,
        dense=beside,
        progress=run.screen.progress,
    )
    run.screen.show(tuned_view(found))
    run.screen.result(found)


@command
def set_(
    run: Run,
    model: Saved,
    *,
    tau: Annotated[
        str | None,
        typer.Option("--tau", metavar="T", help="From 0, every expert, to 1: for all layers, or PATTERN:T,PATTERN:T."),
    ] = None,
    rule: Annotated[
        str | None,
        typer.Option("--rule", metavar="R", help="max, cumulative, energy or top_k; or PATTERN:R,PATTERN:R."),
    ] = None,
    compensate: Annotated[
        bool, typer.Option("--compensate", help="Add the mean output of the skipped experts of --data, in all layers.")
    ] = False,
    samples: Annotated[int, typer.Option("--samples", help="Samples of the data that --compensate reads.")] = 512,
    out: Out = None,
    data: DataOptions | None = None,
) -> None:
    """Set tau and selection rule of the layers, and store them; without options, show what is stored.

    A pattern is the path of a layer, with * allowed; of several that fit, the first counts. Layers that none fits keep
    what they have.

    Example: surgeon set bert-surgery --tau "*.layer.0:0.05,*:0.2" --rule max

    JSON: {model, directory, layers: {path: {before: {tau, rule, compensated}, after}}, notes}
    """
    from surgeon.jobs import set as setting
    from surgeon.jobs.open_model import open_model
    from surgeon.render.sweep import setting_view

    wanted = setting.Wanted(setting.parse_tau(tau), setting.parse_rule(rule), compensate)
    setting.check_setting(model, wanted, has_data=data is not None, out=out)
    opened = open_model(str(model), data=data, stage=run.screen.stage)
    found = setting.apply_setting(opened, wanted, samples=samples, out=out)
    run.screen.show(setting_view(found))
    run.screen.result(found)


def _open(
    run: Run, model: Path, data: DataOptions, dense: str | None, *, trust_pickle: bool
) -> "tuple[Opened, Opened | None]":
    """The surgery with its data, and the dense model if it was given, with a head for the same task."""
    from surgeon.jobs.open_model import open_model

    opened = open_model(str(model), data=data, stage=run.screen.stage)
    if dense is None:
        return opened, None
    task = data.task or opened.task
    return opened, open_model(dense, task=task, trust_pickle=trust_pickle, stage=run.screen.stage)
