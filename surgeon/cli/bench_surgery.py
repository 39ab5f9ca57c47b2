"""`surgeon bench surgery`: time a saved surgery end to end."""

# The annotations are read when commands are made, so they are not postponed.
from typing import Annotated

import typer

from surgeon.cli.answering import answer
from surgeon.cli.app import Run, command
from surgeon.cli.bench import bench
from surgeon.cli.opening import open_saved
from surgeon.cli.options import DenseModel, Device, Files, Saved, Threads, TrustModules, TrustPickle
from surgeon.jobs.options import DataOptions, TimingOptions


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
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="E,E,...",
            help="Compare engines instead: eager, compile, torchao, onnxruntime, openvino. Each runs the dense model, "
            "in float32 and quantised, and the surgery where it can.",
        ),
    ] = None,
    data: DataOptions | None = None,
    out: Files = None,
    trust_pickle: TrustPickle = False,
    trust_modules: TrustModules = None,
) -> None:
    """Time a saved surgery end to end, and compare it with the dense model.

    It is timed with the kernels, eager and compiled, and with the torch backend. This is done at the stored tau and at
    each tau of --tau.

    With --against, both models are timed in other engines too, at the stored tau, and the outputs are compared with
    those of the dense model. Engines that quantise inputs measure their ranges on --data. Ctrl-C ends the timing early.

    Example: surgeon bench surgery bert-surgery --dense path/to/bert --tau 0.1,0.2

    Example: surgeon bench surgery bert-surgery --dense path/to/bert --batch 1 --length 128 -o bench.json

    Example: surgeon bench surgery bert-int8 --dense path/to/bert --against compile,openvino --data reviews.csv
    """
    from surgeon.jobs.bench_surgery import bench_engines, bench_surgery, check_against, check_surgery
    from surgeon.render.bench_surgery import engines_view, surgery_plot, surgery_view
    from surgeon.render.files import check_files

    check_files(out)
    timing = TimingOptions(threads, device, seconds)
    taus = check_surgery(tau, timing, batch=batch, length=length)
    engines = () if against is None else check_against(against, dense, tau, timing, out or ())
    opened, beside = open_saved(run, model, data, dense, trust_pickle=trust_pickle, trust_modules=trust_modules or [])
    if beside is not None and engines:
        compared = bench_engines(
            opened, beside, engines, timing, batch=batch, length=length, progress=run.screen.progress
        )
        answer(run, compared, engines_view(compared), out, lambda _: None)  # only .json
        return
    found = bench_surgery(opened, taus, timing, batch=batch, length=length, dense=beside, progress=run.screen.progress)
    answer(run, found, surgery_view(found), out, lambda file: surgery_plot(found).draw(file))
