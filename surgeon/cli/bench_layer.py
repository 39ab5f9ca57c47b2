"""`surgeon bench layer`: time a layer, computed by every method."""

# The annotations are read when commands are made, so they are not postponed.
from typing import Annotated

import typer

from surgeon.cli import completion
from surgeon.cli.answering import answer
from surgeon.cli.app import Run, command
from surgeon.cli.bench import bench
from surgeon.cli.options import Device, Dtype, Files, Gated, Hidden, Share, Size, Threads, Tokens, Width
from surgeon.jobs.options import LayerOptions, TimingOptions


@command(order=10, under=bench)
def layer(
    run: Run,
    *,
    tokens: Tokens = LayerOptions.tokens,
    share: Share = LayerOptions.share,
    size: Size = LayerOptions.size,
    width: Width = LayerOptions.width,
    hidden: Hidden = LayerOptions.hidden,
    dtype: Dtype = LayerOptions.dtype,
    gated: Gated = LayerOptions.gated,
    activation: Annotated[str, typer.Option("--activation", help="Activation function of the layer.")] = "relu",
    mask: Annotated[
        str,
        typer.Option(
            "--mask",
            metavar="M,M,...",
            help="How tokens select experts. uniform: all experts are equally likely; skewed: some are popular; "
            "clustered: neighbouring tokens select similar experts.",
            autocompletion=completion.list_of(completion.MASKS),
        ),
    ] = "uniform",
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods",
            metavar="M,M,...",
            help="Methods to time: dense, compiled, masked, loop, grouped_mm, published, torch, ours, ours_dense, "
            "ours_int8, ours_int4, ours_fp8.  [default: all but the last two; ours_int8 only with --against]",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="E,E,...",
            help="Other engines to time the dense layer in, with 8-bit weights, if they are installed: openvino, "
            "openvino_weights, onnxruntime, torchao.",
        ),
    ] = None,
    threads: Threads = TimingOptions.threads,
    device: Device = TimingOptions.device,
    seconds: Annotated[
        float, typer.Option("--seconds", help="Seconds for each method and layer; at least five calls are timed.")
    ] = TimingOptions.seconds,
    out: Files = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a stopped run, whose numbers are in the .json file of -o.")
    ] = False,
) -> None:
    """Time a feed-forward layer with random weights, computed by every method.

    The error of each method is measured against float64. The method ours is compared with the limits of this
    machine. A run that is stopped (Ctrl-C, SIGTERM) shows and writes the layers that are done.

    Example: surgeon bench layer --tokens 1,2048 --size 128 --share 0.1,0.2 -o bench.png

    Example: surgeon bench layer --width 2048 --hidden 5632 --gated --activation silu --methods dense,compiled,ours

    Example: surgeon bench layer --size 32 --methods ours_int8 --against openvino,onnxruntime
    """
    from surgeon.jobs.bench_layer import bench_layer, read_stopped
    from surgeon.render.bench_layer import layer_plot, layer_view
    from surgeon.render.files import check_files

    check_files(out)
    found = bench_layer(
        LayerOptions(tokens, share, size, width, hidden, dtype, gated),
        TimingOptions(threads, device, seconds),
        activation=activation,
        mask=mask,
        methods=methods,
        against=against,
        earlier=read_stopped(out) if resume else None,
        stage=run.screen.stage,
        progress=run.screen.progress,
    )
    answer(run, found, layer_view(found), out, lambda file: layer_plot(found).draw(file))
    if found.untimed:
        left = f"interrupted; {found.untimed} of {len(found.cells) + found.untimed} layers were not timed."
        has_numbers = any(file.suffix == ".json" for file in out or ())
        run.screen.warn(f"{left} {run.to_continue}" if has_numbers else left)
        raise typer.Exit(130)
