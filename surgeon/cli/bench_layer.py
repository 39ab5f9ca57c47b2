"""`surgeon bench`: times of a layer or of a surgery beside other ways to compute it."""

# The annotations are read when commands are made, so they are not postponed.
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from surgeon.cli.app import Run, command
from surgeon.cli.options import TrustPickle
from surgeon.jobs.options import BenchOptions

if TYPE_CHECKING:
    from surgeon.jobs.bench_predict import LayerBenchmark, ModelBenchmark, SurgeryBenchmark


@command
def bench(
    run: Run,
    model: Annotated[
        Path | None,
        typer.Argument(metavar="DIR", help="A directory that surgeon saved, to be timed end to end."),
    ] = None,
    *,
    tokens: Annotated[str, typer.Option("--tokens", metavar="N,N,...", help="Tokens in a call.")] = BenchOptions.tokens,
    share: Annotated[
        str, typer.Option("--share", metavar="S,S,...", help="Share of the experts that is selected.")
    ] = BenchOptions.share,
    size: Annotated[
        str, typer.Option("--size", metavar="N,N,...", help="Neurons of an expert; divides --hidden.")
    ] = BenchOptions.size,
    width: Annotated[int, typer.Option("--width", help="Width of inputs and outputs.")] = BenchOptions.width,
    hidden: Annotated[
        int | None, typer.Option("--hidden", help="Width of the hidden layer.  [default: 4 times --width]")
    ] = BenchOptions.hidden,
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="D,D,...", help="float32, bfloat16, float16.")
    ] = BenchOptions.dtype,
    gated: Annotated[bool, typer.Option("--gated", help="A gated layer, of three matrices.")] = BenchOptions.gated,
    activation: Annotated[str, typer.Option("--activation", help="Its activation function.")] = BenchOptions.activation,
    mask: Annotated[
        str,
        typer.Option(
            "--mask",
            metavar="M,M,...",
            help="uniform: all experts equally likely; skewed: some popular; clustered: neighbouring tokens choose "
            "alike.",
        ),
    ] = BenchOptions.mask,
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods",
            metavar="M,M,...",
            help="dense, compiled, masked, loop, grouped_mm, published, torch, ours, ours_dense.  [default: all]",
        ),
    ] = BenchOptions.methods,
    threads: Annotated[int, typer.Option("--threads", help="Threads to use on a CPU.")] = BenchOptions.threads,
    device: Annotated[
        str | None, typer.Option("--device", help="cpu or cuda.  [default: cuda if there is one]")
    ] = BenchOptions.device,
    seconds: Annotated[
        float, typer.Option("--seconds", help="Time for each method and layer; at least five calls are timed.")
    ] = BenchOptions.seconds,
    batch: Annotated[
        int, typer.Option("--batch", help="With DIR: samples in a call, the example inputs repeated.")
    ] = BenchOptions.batch,
    length: Annotated[
        int | None,
        typer.Option(
            "--length",
            help="With DIR: tokens in a sample, the example inputs' repeated.  [default: as in the example inputs]",
        ),
    ] = BenchOptions.length,
    tau: Annotated[
        str | None, typer.Option("--tau", metavar="T,T,...", help="With DIR: values of tau beside the stored ones.")
    ] = BenchOptions.tau,
    dense: Annotated[
        str | None, typer.Option("--dense", metavar="MODEL", help="With DIR: the model before the surgery.")
    ] = BenchOptions.dense,
    predicted: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="DEVICE",
            help="Run nothing, and predict times on a GPU from bytes and FLOPs: h100, h200, a100; cuda, the "
            "GPU of this machine; or list.",
        ),
    ] = None,
    out: Annotated[
        list[Path] | None,
        typer.Option("--out", "-o", metavar="FILE", help="Also write the numbers (.json) or a plot (.png)."),
    ] = None,
    trust_pickle: TrustPickle = False,
) -> None:
    """Time a layer or a surgery beside other ways to compute it.

    Without DIR: one feed-forward layer with random weights by every method, with its error from float64, and against
    what this machine can do at best. With DIR: a saved surgery end to end. With --model: what a GPU should take.

    Example: surgeon bench --tokens 1,2048 --size 128 --share 0.1,0.2 -o bench.png

    Example: surgeon bench bert-surgery --dense path/to/bert --tau 0.1,0.2

    Example: surgeon bench --model h100 --tokens 8192

    JSON: {machine: {device, processor, instruction_set, threads, torch, kernels, gpu, clock, gemm, bandwidth},
    width, hidden, gated, activation, cells: [{dtype, tokens, size, mask, share, executed, methods: {name:
    {milliseconds, error, why}}, gain, kernel_gain, ceiling, limit, limited_by, of_limit}]}; with DIR {model, batch,
    length, machine, times: {dense, compiled, why, settings: [{tau, executed, ours, compiled, torch, gain}]},
    notes}; with --model {device, width, hidden, gated, points: [{dtype, tokens, size, share, dense, dense_bound,
    ours, ours_bound, gain, way}], advice: [{dtype, tokens, best, break_even}], assumptions}; with --model list
    {devices}. Times are milliseconds.
    """
    from surgeon.errors import UsageError
    from surgeon.jobs.sweep import check_files

    options = BenchOptions(
        tokens, share, size, width, hidden, dtype, gated, activation, mask, methods, threads, device, seconds, batch,
        length, tau, dense,
    )  # fmt: skip
    check_files(out or [])
    if predicted is not None and model is not None:
        raise UsageError("Give DIR or --model, not both: one is measured, the other is not.")
    if predicted == "list":
        _list_devices(run, options, out)
    elif predicted is not None:
        _finish(run, _predict(predicted, options), out)
    elif model is not None:
        _finish(run, _surgery(run, model, options, trust_pickle=trust_pickle), out)
    else:
        _finish(run, _layer(run, options), out)


def _list_devices(run: Run, options: BenchOptions, out: list[Path] | None) -> None:
    from surgeon.errors import UsageError
    from surgeon.jobs.bench_predict import check_mode
    from surgeon.kernels.gpu_model.devices import DEVICES
    from surgeon.render.bench_layer import devices_view

    check_mode(options, "model")
    if out:
        raise UsageError("--model list writes no file: the devices are on the screen, and with --output json as JSON.")
    run.screen.show(devices_view(list(DEVICES.values())))
    run.screen.result({"devices": list(DEVICES.values())})


def _predict(name: str, options: BenchOptions) -> "ModelBenchmark":
    from surgeon.jobs.bench_predict import bench_model

    return bench_model(name, options)


def _surgery(run: Run, model: Path, options: BenchOptions, *, trust_pickle: bool) -> "SurgeryBenchmark":
    from surgeon.jobs.bench_predict import bench_surgery, check_surgery
    from surgeon.jobs.open_model import open_model

    check_surgery(options)
    opened = open_model(str(model), stage=run.screen.stage)
    dense = None
    if options.dense is not None:
        dense = open_model(options.dense, task=opened.task, trust_pickle=trust_pickle, stage=run.screen.stage)
    return bench_surgery(opened, options, dense=dense, progress=run.screen.progress)


def _layer(run: Run, options: BenchOptions) -> "LayerBenchmark":
    from surgeon.jobs.bench_predict import bench_layer

    return bench_layer(options, stage=run.screen.stage, progress=run.screen.progress)


def _finish(run: Run, found: "LayerBenchmark | SurgeryBenchmark | ModelBenchmark", files: list[Path] | None) -> None:
    from surgeon.render.bench_layer import benchmark_view
    from surgeon.render.bench_plot import write_benchmark

    run.screen.show(benchmark_view(found))
    for file in files or []:
        write_benchmark(found, file)
        run.screen.say(f"Written to {file}.")
    run.screen.result(found)
