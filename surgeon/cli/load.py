"""`surgeon load`: how many experts and neurons tokens use, layer by layer, and which tokens use many."""

# The annotations are read when commands are made, so they are not postponed.
from pathlib import Path
from typing import Annotated

import typer

from surgeon.cli.answering import answer
from surgeon.cli.app import Run, command
from surgeon.cli.options import Files, Saved, TrustModules
from surgeon.errors import UsageError
from surgeon.jobs.options import DataOptions


@command(order=78)
def load(
    run: Run,
    model: Saved,
    *,
    tau: Annotated[
        float | None, typer.Option("--tau", min=0.0, max=1.0, help="Tau for all layers.  [default: as stored]")
    ] = None,
    map_text: Annotated[
        str | None, typer.Option("--map-text", metavar="TEXT", help="Show what each token of this text runs.")
    ] = None,
    map_image: Annotated[
        Path | None,
        typer.Option(
            "--map-image",
            metavar="FILE",
            exists=True,
            help="Show what each patch of this image runs, in the plot of -o.",
        ),
    ] = None,
    out: Files = None,
    data: DataOptions | None = None,
    trust_modules: TrustModules = None,
) -> None:
    """Show how many experts or inputs tokens run and how many neurons they activate, in each layer.

    With --data these are distributions over the tokens of the held-out data, without padding. A neuron is active if
    its activation is above a hundredth of the token's largest. With --map-text and --map-image it is the share of the
    work that can be skipped, over all layers, that each token of one text or each patch of one image runs.

    Example: surgeon load bert-surgery --data reviews.csv --tau 0.1 -o load.png

    Example: surgeon load bert-surgery --tau 0.1 --map-text "a film that is never dull"
    """
    from surgeon.jobs.load import load as measure
    from surgeon.jobs.open_model import open_model
    from surgeon.render.files import check_files
    from surgeon.render.load import draw_load, loaded_view

    if map_text is not None and map_image is not None:
        raise UsageError("Give --map-text or --map-image, not both.")
    if data is None and map_text is None and map_image is None:
        raise UsageError("There is nothing to run. Give data with --data, or a sample with --map-text or --map-image.")
    check_files(out)
    if map_image is not None and not any(file.suffix == ".png" for file in out or ()):
        raise UsageError("--map-image is drawn. Give a .png file with -o.")
    opened = open_model(str(model), data=data, trust_modules=trust_modules or [], stage=run.screen.stage)
    found = measure(opened, tau=tau, text=map_text, image=map_image, progress=run.screen.progress)
    answer(run, found, loaded_view(found), out, lambda file: draw_load(found, file))
