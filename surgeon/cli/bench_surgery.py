"""`surgeon bench surgery`: time a saved surgery end to end."""

# The annotations are read when commands are made, so they are not postponed.
from typing import Annotated

import typer

from surgeon.cli.answering import answer
from surgeon.cli.app import Run, command
from surgeon.cli.bench import bench
from surgeon.cli.opening import open_saved
from surgeon.cli.options import DenseModel, Device, Files, Saved, Threads, TrustModules, TrustPickle
from surgeon.jobs.options import TimingOptions


@command(order=20, under=bench)
def surgery(
    run: Run,
    model: Saved,
    *,
    dense: DenseModel = None,
    tau: Annotated[
        str | None, typer.Option("--tau", metavar="T,T,...", help="Values of tau to time besides the stored ones.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", help="Samples in a call; the example inputs are repeated.")] = 8,
    length: Annotated[
        int | None,
        typer.Option(
            "--length", help="Tokens in a sample; the tokens are repeated.  [default: as in the example inputs]"
        ),
    ] = None,
    threads: Threads = TimingOptions.threads,
    device: Device = TimingOptions.device,
    seconds: Annotated[
        float, typer.Option("--seconds", help="Seconds for each model and tau; at least five calls are timed.")
    ] = TimingOptions.seconds,
    out: Files = None,
    trust_pickle: TrustPickle = False,
    trust_modules: TrustModules = None,
) -> None:
    """Time a saved surgery end to end, and compare it with the dense model.

    It is timed with the kernels, eager and compiled, and with the torch backend. This is done at the stored tau and at
    each tau of --tau.

    Example: surgeon bench surgery bert-surgery --dense path/to/bert --tau 0.1,0.2

    Example: surgeon bench surgery bert-surgery --dense path/to/bert --batch 1 --length 128 -o bench.json

    JSON: {model, batch, length, machine: {device, processor, instruction_set, threads, torch, kernels, gpu, clock,
    gemm, bandwidth}, times: {dense, compiled, why, settings: [{tau, executed, ours, compiled, torch, gain}]}, notes}.
    Times are milliseconds.
    """
    from surgeon.jobs.bench_surgery import bench_surgery, check_surgery
    from surgeon.render.bench_surgery import surgery_plot, surgery_view
    from surgeon.render.files import check_files

    check_files(out)
    timing = TimingOptions(threads, device, seconds)
    taus = check_surgery(tau, timing, batch=batch, length=length)
    opened, beside = open_saved(run, model, None, dense, trust_pickle=trust_pickle, trust_modules=trust_modules or [])
    found = bench_surgery(opened, taus, timing, batch=batch, length=length, dense=beside, progress=run.screen.progress)
    answer(run, found, surgery_view(found), out, lambda file: surgery_plot(found).draw(file))
