"""`surgeon bench linear`: time linear layers that read only the inputs that matter."""

# The annotations are read when commands are made, so they are not postponed.
from typing import Annotated

import typer

from surgeon.cli.app import Run, command
from surgeon.cli.bench import bench
from surgeon.cli.options import Device, Threads, Tokens
from surgeon.jobs.options import LinearOptions, TimingOptions


@command(order=15, under=bench)
def linear(
    run: Run,
    *,
    tokens: Tokens = LinearOptions.tokens,
    share: Annotated[
        str, typer.Option("--share", metavar="S,S,...", help="Shares of its inputs that a token keeps.")
    ] = LinearOptions.share,
    d_in: Annotated[
        str, typer.Option("--d-in", metavar="N,N,...", help="Numbers of inputs of a layer.")
    ] = LinearOptions.d_in,
    d_out: Annotated[
        str, typer.Option("--d-out", metavar="N,N,...", help="Numbers of outputs of a layer.")
    ] = LinearOptions.d_out,
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype", metavar="D,D,...", help="Data types: float32, bfloat16, float16, or int8 for weights alone."
        ),
    ] = LinearOptions.dtype,
    threads: Threads = TimingOptions.threads,
    device: Device = TimingOptions.device,
    seconds: Annotated[
        float, typer.Option("--seconds", help="Seconds for each way and layer; at least five calls are timed.")
    ] = TimingOptions.seconds,
) -> None:
    """Time linear layers that read the weights of some inputs only, with random weights.

    Each layer is compared with the dense one, eager and compiled, once with weights in the caches and once with weights
    that are not.

    Example: surgeon bench linear --share 0.25,0.5 --dtype float32,bfloat16,int8

    Example: surgeon bench linear --d-in 2048 --d-out 2048,5632 --tokens 1,2,4 --output json
    """
    from surgeon.jobs.bench_linear import bench_linear
    from surgeon.render.bench_linear import linear_view

    found = bench_linear(
        LinearOptions(tokens, share, d_in, d_out, dtype),
        TimingOptions(threads, device, seconds),
        stage=run.screen.stage,
        progress=run.screen.progress,
    )
    run.screen.show(linear_view(found))
    run.answer(found)
