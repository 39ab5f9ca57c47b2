"""`surgeon bench predict`: predict how long a GPU takes for a layer."""

# The annotations are read when commands are made, so they are not postponed.
from pathlib import Path
from typing import Annotated

import typer

from surgeon.cli import completion
from surgeon.cli.answering import answer
from surgeon.cli.app import Run, command
from surgeon.cli.bench import bench
from surgeon.cli.options import Dtype, Files, Gated, Hidden, Share, Size, Tokens, Width
from surgeon.errors import UsageError
from surgeon.jobs.options import LayerOptions


@command(order=30, under=bench)
def predict(
    run: Run,
    device: Annotated[
        str,
        typer.Argument(
            metavar="DEVICE",
            help="h100, h200 or a100; cuda for the GPU of this machine; list for the known figures of each device.",
            autocompletion=completion.one_of(completion.GPUS),
            show_default=False,
        ),
    ],
    *,
    tokens: Tokens = LayerOptions.tokens,
    share: Share = LayerOptions.share,
    size: Size = LayerOptions.size,
    width: Width = LayerOptions.width,
    hidden: Hidden = LayerOptions.hidden,
    dtype: Dtype = LayerOptions.dtype,
    gated: Gated = LayerOptions.gated,
    out: Files = None,
) -> None:
    """Predict a layer's times on a GPU from bytes and FLOPs.

    Nothing is run. The answer says which expert size is fastest, and up to which selected share the experts beat the
    dense layer.

    Example: surgeon bench predict h100 --tokens 8192

    Example: surgeon bench predict list
    """
    from surgeon.jobs.bench_predict import bench_predict
    from surgeon.render.bench_predict import prediction_plot, prediction_view
    from surgeon.render.files import check_files

    layers = LayerOptions(tokens, share, size, width, hidden, dtype, gated)
    if device == "list":
        _list_devices(run, layers, out)
        return
    check_files(out)
    found = bench_predict(device, layers)
    answer(run, found, prediction_view(found), out, lambda file: prediction_plot(found).draw(file))


def _list_devices(run: Run, layers: LayerOptions, out: list[Path] | None) -> None:
    from surgeon.kernels.gpu_model.devices import DEVICES
    from surgeon.render.bench_predict import devices_view

    if out or layers != LayerOptions():
        raise UsageError(
            "predict list takes no layer options and writes no file. Run surgeon bench predict list, with "
            "--output json for JSON."
        )
    run.screen.show(devices_view(list(DEVICES.values())))
    run.answer({"devices": list(DEVICES.values())})
