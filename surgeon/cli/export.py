"""`surgeon export`: write a saved surgery as a model of transformers."""

# The annotations are read when commands are made, so they are not postponed.
from pathlib import Path
from typing import Annotated

import typer

from surgeon.cli.app import Run, command
from surgeon.cli.options import Saved, TrustModules


@command(order=92)
def export(
    run: Run,
    model: Saved,
    *,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="OUT", help="Directory of the model.  [default: DIR-hf]")
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            "--base",
            metavar="B",
            help="The directory of the original model, for weights that the surgery does not use. By default it is "
            "looked for where it was.",
        ),
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option("--max-shard-size", metavar="SIZE", help="Size of the largest weight file.")
    ] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model that was exported before.")] = False,
    trust_modules: TrustModules = None,
) -> None:
    """Write a saved surgery as a model that from_pretrained of transformers reads.

    After `import surgeon` the model works like any other: generate, pipeline, Trainer, adapters, device_map. The
    directory has a model card and can be pushed to the hub as it is.

    Example: surgeon export gpt2-surgery -o gpt2-experts

    JSON: {model, directory, model_class, layers: {path: experts}, refused, kept, bytes}
    """
    from surgeon.jobs.export import export_surgery
    from surgeon.render.export import export_view

    found = export_surgery(
        model,
        out,
        base=base,
        overwrite=overwrite,
        max_shard_size=max_shard_size,
        trust_modules=tuple(trust_modules or ()),
        stage=run.screen.stage,
    )
    run.screen.show(export_view(found))
    run.screen.result(found)
