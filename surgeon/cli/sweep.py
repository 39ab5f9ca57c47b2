"""`surgeon sweep`: measure quality against cost at several settings."""

# The annotations are read when commands are made, so they are not postponed.
from typing import Annotated

import typer

from surgeon.cli.answering import answer
from surgeon.cli.app import Run, command
from surgeon.cli.opening import open_saved
from surgeon.cli.options import DenseModel, Files, Rules, Saved, Taus, TrustModules, TrustPickle
from surgeon.jobs.options import DataOptions


@command(order=70)
def sweep(
    run: Run,
    model: Saved,
    *,
    tau: Taus = None,
    rule: Rules = None,
    oracle: Annotated[
        bool, typer.Option(help="Also select by the true norms of the experts' outputs, the best a router could do.")
    ] = True,
    each_layer: Annotated[
        bool,
        typer.Option(
            "--each-layer",
            help="Let one layer after another have each tau, while the others run everything: shows which layers "
            "quality depends on. Without the oracle.",
        ),
    ] = False,
    timed: Annotated[bool, typer.Option("--time", help="Also time a call at each setting.")] = False,
    dense: DenseModel = None,
    out: Files = None,
    data: DataOptions,
    trust_pickle: TrustPickle = False,
    trust_modules: TrustModules = None,
) -> None:
    """Measure quality and cost at several values of tau.

    Quality is measured on the held-out part of the data, which is the part that apply holds out. With --eval-fraction 0
    it is measured on all of the data.

    Example: surgeon sweep bert-surgery --data reviews.csv --tau 0,0.05,0.1,0.2 -o sweep.png
    """
    from surgeon.jobs import sweep as measuring
    from surgeon.render.files import check_files
    from surgeon.render.sweep import draw_sweep, swept_view

    taus, rules = measuring.parse_taus(tau), measuring.parse_rules(rule)
    check_files(out)
    opened, beside = open_saved(run, model, data, dense, trust_pickle=trust_pickle, trust_modules=trust_modules or [])
    swept = measuring.sweep(
        opened, taus, rules=rules, oracle=oracle, each_layer=each_layer, timed=timed, dense=beside,
        progress=run.screen.progress,
    )  # fmt: skip
    answer(run, swept, swept_view(swept), out, lambda file: draw_sweep(swept, file))
