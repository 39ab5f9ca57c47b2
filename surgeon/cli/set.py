"""`surgeon set`: set tau, selection rule and compensation of a saved surgery."""

# The annotations are read when commands are made, so they are not postponed.
from typing import Annotated

import typer

from surgeon.cli import completion
from surgeon.cli.app import Run, command
from surgeon.cli.options import Out, Saved, TrustModules
from surgeon.jobs.options import DataOptions


@command(order=90)
def set_(
    run: Run,
    model: Saved,
    *,
    tau: Annotated[
        str | None,
        typer.Option(
            "--tau",
            metavar="T",
            help="How much to skip, from 0 (nothing) to 1: one value for all layers, or PATTERN:T,PATTERN:T.",
        ),
    ] = None,
    rule: Annotated[
        str | None,
        typer.Option(
            "--rule",
            metavar="R",
            help="Selection rule: max, cumulative, energy or top_k; or PATTERN:R,PATTERN:R.",
            autocompletion=completion.one_of(completion.RULES),
        ),
    ] = None,
    compensate: Annotated[
        bool, typer.Option("--compensate", help="In all layers, add the mean output of the skipped experts on --data.")
    ] = False,
    samples: Annotated[int, typer.Option("--samples", help="Samples of the data that --compensate reads.")] = 512,
    out: Out = None,
    data: DataOptions | None = None,
    trust_modules: TrustModules = None,
) -> None:
    """Set tau and the selection rule of the layers, and store them. Without options, show what is stored.

    A pattern is the path of a layer, in which * matches anything. The first pattern that matches a layer counts. Layers
    that no pattern matches keep their values. Linear layers that skip inputs have no rule.

    Example: surgeon set bert-surgery --tau "*.layer.0:0.05,*:0.2" --rule max
    """
    from surgeon.jobs import set as setting
    from surgeon.jobs.open_model import open_model
    from surgeon.render.set import set_view

    wanted = setting.Wanted(setting.parse_tau(tau), setting.parse_rule(rule), compensate)
    setting.check_wanted(model, wanted, has_data=data is not None, out=out)
    opened = open_model(str(model), data=data, trust_modules=trust_modules or (), stage=run.screen.stage)
    found = setting.set_wanted(opened, wanted, samples=samples, out=out)
    run.screen.show(set_view(found))
    run.answer(found)
