"""`surgeon compare`: several surgeries and their dense model in one table and one picture."""

# The annotations are read when commands are made, so they are not postponed.
from pathlib import Path
from typing import Annotated

import typer

from surgeon.cli.answering import answer
from surgeon.cli.app import Run, command
from surgeon.cli.opening import open_dense
from surgeon.cli.options import DenseModel, Rules, Taus, TrustModules, TrustPickle
from surgeon.jobs.options import DataOptions


@command(order=75)
def compare(
    run: Run,
    surgeries: Annotated[
        list[str],
        typer.Argument(
            metavar="DIR...",
            help="Directories that surgeon saved. NAME=DIR gives a name other than the directory's. The first is the "
            "one that the others are compared with.",
            show_default=False,
        ),
    ],
    *,
    keep: Annotated[
        float,
        typer.Option(
            "--keep", metavar="K", help="Share of the dense model's quality to keep. A loss may be 1/K times the dense."
        ),
    ] = 0.99,
    tau: Taus = None,
    rule: Rules = None,
    oracle: Annotated[
        bool, typer.Option("--oracle", help="Also select by the true norms of the experts' outputs.")
    ] = False,
    timed: Annotated[
        bool, typer.Option("--time", help="Also time a call at each setting. Settings and surgeries take turns.")
    ] = False,
    dense: DenseModel = None,
    out: Annotated[
        list[Path] | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="Also write numbers (.json, .csv), tables (.md), a picture (.png, .svg, .pdf).",
        ),
    ] = None,
    data: DataOptions,
    trust_pickle: TrustPickle = False,
    trust_modules: TrustModules = None,
) -> None:
    """Compare surgeries of one dense model: what each costs to keep a share of the dense model's quality.

    Every surgery is swept on the same held-out samples. The cost is read off on the line between two settings, with a
    95% interval. The dense model's quality comes from the records of the surgeries, if they were made with this data,
    or from --dense. Ctrl-C shows and writes the surgeries that are done.

    Example: surgeon compare bert-moe bert-relu --data reviews.csv -o compare.png -o compare.md

    Example: surgeon compare old=runs/1 new=runs/2 --data reviews.csv --dense bert-dir --keep 0.98 --time
    """
    from surgeon.jobs import compare as comparing
    from surgeon.jobs.sweep import parse_rules, parse_taus
    from surgeon.measure.compare import check_keep
    from surgeon.render.compare import FILES, compared_view, write_comparison
    from surgeon.render.files import check_files

    taus, rules = parse_taus(tau), parse_rules(rule)
    check_keep(keep)
    check_files(out, FILES)
    places = comparing.named_surgeries(surgeries)
    opened = comparing.open_surgeries(places, data, trust_modules=trust_modules or [], stage=run.screen.stage)
    beside = open_dense(run, dense, next(iter(opened.values())), data, trust_pickle=trust_pickle)
    found = comparing.compare(
        opened, keep=keep, taus=taus, rules=rules, oracle=oracle, timed=timed, dense=beside,
        progress=run.screen.progress,
    )  # fmt: skip
    answer(run, found, compared_view(found), out, lambda file: write_comparison(found, file))
    if found.found.stopped:
        left = ", ".join(found.found.unmeasured)
        run.screen.warn(f"interrupted; {f'{left} not measured' if left else 'no times'}.")
        raise typer.Exit(130)
