"""`surgeon export`: write a saved surgery for transformers, OpenVINO or ONNX."""

# The annotations are read when commands are made, so they are not postponed.
from pathlib import Path
from typing import Annotated

import typer

from surgeon.cli import completion
from surgeon.cli.app import Run, command
from surgeon.cli.options import Saved, TrustModules
from surgeon.jobs.options import DataOptions


@command(order=92)
def export(
    run: Run,
    model: Saved,
    *,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="T",
            help="What the model is for: transformers, openvino or onnx.",
            autocompletion=completion.one_of(completion.TARGETS),
        ),
    ] = "transformers",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="OUT", help="Directory of the model.  [default: DIR-hf, DIR-openvino or DIR-onnx]"
        ),
    ] = None,
    linears: Annotated[
        str,
        typer.Option(
            "--linears",
            metavar="L",
            help="For openvino, the linears that are not in experts: float, int8 (weights and inputs, with ranges "
            "measured on --data), int8-weights or int4-weights.",
            autocompletion=completion.one_of(completion.LINEARS),
        ),
    ] = "float",
    cache: Annotated[
        bool,
        typer.Option("--cache", help="For openvino, a language model that keeps its cache, to generate with."),
    ] = False,
    data: DataOptions | None = None,
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
    """Write a saved surgery for transformers, OpenVINO or ONNX.

    For transformers it is a model that from_pretrained reads. After `import surgeon` it works like any other: generate,
    pipeline, Trainer, adapters, device_map. The directory has a model card and can be pushed to the hub as it is.

    For OpenVINO it is a model that runs without this package and without torch. A library beside it has the operator of
    the experts, whose weights must have 8 bits. For ONNX every expert is computed, so that it is for exchange, not for
    speed. Both are compared with the surgery first. To compile with torch, use surgeon compile.

    Example: surgeon export gpt2-surgery -o gpt2-experts

    Example: surgeon export bert-int8 --to openvino --linears int8 --data reviews.csv
    """
    from surgeon.jobs import export as job
    from surgeon.render.export import engine_view, export_view

    target, trusted = (
        job.check_target(model, out, to, linears, cache=cache, overwrite=overwrite),
        tuple(trust_modules or ()),
    )
    if to == "transformers":
        found = job.export_surgery(
            model,
            target,
            base=base,
            overwrite=overwrite,
            max_shard_size=max_shard_size,
            trust_modules=trusted,
            stage=run.screen.stage,
        )
        run.screen.show(export_view(found))
        run.answer(found)
        return
    made = job.export_for_engine(
        model,
        target,
        to,
        linears=linears,
        cache=cache,
        base=base,
        data=data,
        overwrite=overwrite,
        trust_modules=trusted,
        stage=run.screen.stage,
    )
    run.screen.show(engine_view(made))
    run.answer(made)
