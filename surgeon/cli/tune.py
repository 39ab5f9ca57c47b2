"""`surgeon tune`: find a tau for each layer that meets a budget."""

# The annotations are read when commands are made, so they are not postponed.
from enum import StrEnum
from typing import Annotated

import typer

from surgeon.cli.app import Run, command
from surgeon.cli.opening import open_saved
from surgeon.cli.options import DenseModel, Out, Saved, TrustModules, TrustPickle
from surgeon.jobs.options import DataOptions


class Metric(StrEnum):
    """The unit of a budget."""

    flops = "flops"
    ms = "ms"


@command(order=80)
def tune(
    run: Run,
    model: Saved,
    *,
    budget: Annotated[
        float, typer.Option("--budget", metavar="B", help="Highest cost, as a share of the dense model's.")
    ],
    metric: Annotated[
        Metric,
        typer.Option(
            "--metric",
            help="Unit of the budget: multiply-adds (flops), or milliseconds of a call with the first batch on this "
            "machine (ms). ms needs --dense.",
        ),
    ] = Metric.flops,
    compensate: Annotated[
        bool,
        typer.Option(
            "--compensate", help="After the search, also add the mean output of the skipped experts in every layer."
        ),
    ] = False,
    densify: Annotated[
        bool,
        typer.Option(
            "--densify", help="Put layers for which skipping does not pay back into their dense form, without router."
        ),
    ] = False,
    samples: Annotated[int, typer.Option("--samples", help="Samples of the training data that measure damage.")] = 512,
    out: Out = None,
    dense: DenseModel = None,
    data: DataOptions,
    trust_pickle: TrustPickle = False,
    trust_modules: TrustModules = None,
) -> None:
    """Find the tau of each layer that meets a budget and hurts least, and store it.

    Nothing is trained. On some of the training data, surgeon measures how far the output moves when a layer runs
    slightly more or fewer experts. Quality is then measured on the held-out part.

    Example: surgeon tune bert-surgery --budget 0.4 --data reviews.csv
    """
    from surgeon.jobs import tune as job
    from surgeon.jobs.store import check_target
    from surgeon.render.tune import tuned_view

    job.check_tuning(budget, metric.value, has_dense=dense is not None, densify=densify)
    if out is not None:
        check_target(out, str(model), overwrite=False)
    opened, beside = open_saved(run, model, data, dense, trust_pickle=trust_pickle, trust_modules=trust_modules or [])
    found = job.tune(
        opened,
        budget,
        metric=metric.value,
        samples=samples,
        compensated=compensate,
        densify=densify,
        out=out,
        dense=beside,
        progress=run.screen.progress,
    )
    run.screen.show(tuned_view(found))
    run.answer(found)
