"""`surgeon plot`: one picture of a saved surgery."""

# The annotations are read when commands are made, so they are not postponed.
from pathlib import Path
from typing import Annotated, Literal

import typer

from surgeon.cli.app import Run, command
from surgeon.cli.options import Saved, TrustModules
from surgeon.errors import UsageError
from surgeon.jobs.options import DataOptions


@command(order=79)
def plot(
    run: Run,
    model: Saved,
    kind: Annotated[
        Literal["pareto", "layers", "experts", "routers", "compute", "sparsity", "ablation"],
        typer.Argument(metavar="KIND", help="What to draw.", show_default=False),
    ],
    *,
    tau: Annotated[
        float | None, typer.Option("--tau", min=0.0, max=1.0, help="Tau for all layers.  [default: as stored]")
    ] = None,
    out: Annotated[
        list[Path] | None, typer.Option("--out", "-o", metavar="FILE", help="A .png, .svg or .pdf file.  [required]")
    ] = None,
    data: DataOptions | None = None,
    trust_modules: TrustModules = None,
) -> None:
    """Draw a picture: pareto, layers, experts, routers, compute, sparsity or ablation.

    pareto: quality against cost at several tau. layers: which layers quality depends on. experts: how many experts or
    inputs tokens run. routers: scores against true norms, and what is lost. compute: which tokens of a text or patches
    of an image run much. These need data.

    sparsity: how sparse sparsify made each layer. ablation: the settings that a search tried (surgeon apply
    --budget-minutes). These need none.

    Example: surgeon plot bert-surgery pareto --data reviews.csv -o pareto.svg

    Example: surgeon plot bert-surgery sparsity -o sparsity.png
    """
    from surgeon.dynamic.knobs import set_tau
    from surgeon.jobs.open_model import open_model
    from surgeon.jobs.plot import RECORDED, measured, title
    from surgeon.render.files import check_files, write_result
    from surgeon.render.plot import DRAW, draw_recorded
    from surgeon.render.style import PICTURES
    from surgeon.surgery.record import read_record

    if not out:
        raise UsageError("Give the file to draw to with -o, such as -o picture.png.")
    check_files(out, PICTURES)
    if kind in RECORDED:
        record = read_record(model)
        for file in out:
            write_result(record, file, lambda file: draw_recorded(kind, model.name, record, file))
    else:
        if data is None:
            raise UsageError(f"{kind} is measured on data. Give it with --data.")
        opened = open_model(str(model), data=data, trust_modules=trust_modules or [], stage=run.screen.stage)
        if tau is not None:
            set_tau(opened.graph, tau)
        found, words = measured(kind, opened, run.screen.progress), title(opened)
        for file in out:
            write_result(found, file, lambda file: DRAW[kind](found, file, words))
    for file in out:
        run.screen.show(f"Written to {file}.")
    run.answer({"written": out})
