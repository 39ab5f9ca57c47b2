"""The command line. It only reads options: other modules do the work and `render` shows the results.

torch and everything that needs it are imported inside the commands, so that `surgeon --help` does not wait for them.

Exit codes: 0 done; 1 a gate was not met (nothing changed, a check failed); 2 usage; 3 the model cannot be loaded or
traced; 4 a pass, its verification or saving failed; 130 interrupted.
"""

# The annotations are read when commands are made, so they are not postponed.
import functools
import inspect as signatures
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from surgeon.cli.options import (
    Arch,
    BatchSize,
    Data,
    Debug,
    Held,
    Inputs,
    LabelColumn,
    Limit,
    MaxLength,
    Model,
    NeededData,
    Output,
    OutputMode,
    PassList,
    Quiet,
    Saved,
    Seed,
    Settings,
    Task,
    TextColumn,
    TrustPickle,
    Verbose,
    Verify,
)
from surgeon.errors import SurgeonError, UsageError

if TYPE_CHECKING:
    from surgeon.passes import Pass
    from surgeon.render.screen import Screen


@dataclass
class Run:
    """One run of the command line: what was typed, and the options that every command has."""

    args: list[str] = field(default_factory=list)
    output: OutputMode | None = None
    verbose: int = 0
    quiet: bool = False
    debug: bool = False

    @functools.cached_property
    def screen(self) -> "Screen":
        """Where this run writes."""
        from surgeon.render.screen import Screen

        return Screen(self.output.value if self.output else None, verbose=self.verbose, quiet=self.quiet)


class _Group(TyperGroup):
    """Turns every error into a few lines on stderr and an exit code."""

    def main(self, args: Any = None, *rest: Any, **extra: Any) -> NoReturn:
        typed = list(sys.argv[1:] if args is None else args)
        run = Run(typed, debug="--debug" in typed)
        extra |= {"standalone_mode": False, "obj": run}
        try:
            code = super().main(typed, *rest, **extra)
        except Exception as error:
            sys.exit(_report(error, run))
        sys.exit(code if isinstance(code, int) else 0)


def _report(error: Exception, run: Run) -> int:
    """Say what went wrong; returns the exit code."""
    if hasattr(error, "format_message"):  # raised by the option parser, for which typer has no public class
        if run.output is None and any(arg in ("json", "--output=json") for arg in run.args):
            run.output = OutputMode.json
        context = getattr(error, "ctx", None)
        where = context.command_path if context is not None else "surgeon"
        text = f"{error.format_message().rstrip('.')}. See {where} --help."
        run.screen.error(text, kind="UsageError", exit_code=2)
        return 2
    if run.debug:
        traceback.print_exception(error)
    if isinstance(error, SurgeonError):
        run.screen.error(str(error), kind=type(error).__name__, exit_code=error.exit_code)
        return error.exit_code
    text = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}".rstrip(": ")
    hint = "" if run.debug else "\nThis is not an expected error. Run with --debug for the traceback."
    run.screen.error(text + hint, kind=type(error).__name__, exit_code=4)
    return 4


app = typer.Typer(
    name="surgeon",
    cls=_Group,
    help="Rewrite a dense PyTorch model into one that runs only the neurons each token needs.\n\n"
    "Start with: surgeon demo",
    epilog="Exit codes: 0 done, 1 nothing changed or a check failed, 2 usage, 3 cannot load or trace, 4 a pass or its "
    "verification failed, 130 interrupted.",
    # Plain help takes half the time.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _surgeon(
    context: typer.Context,
    output: Output = None,
    verbose: Verbose = 0,
    quiet: Quiet = False,
    debug: Debug = False,
    version: Annotated[bool, typer.Option("--version", help="Show the version.", is_eager=True)] = False,
) -> None:
    if version:
        from importlib.metadata import version as version_of

        typer.echo(f"surgeon {version_of('surgeon')}")
        raise typer.Exit
    run: Run = context.obj
    run.output, run.verbose, run.quiet, run.debug = output, verbose, quiet, debug
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Make a function a command. It takes the run first, and every command gets the options that all have.

    They count wherever they stand: before the command's name or after it.
    """

    @functools.wraps(function)
    def run_command(
        context: typer.Context, output: OutputMode | None, verbose: int, quiet: bool, debug: bool, **options: Any
    ) -> None:
        run: Run = context.obj
        run.output = output or run.output
        run.verbose, run.quiet, run.debug = max(verbose, run.verbose), quiet or run.quiet, debug or run.debug
        with warnings.catch_warnings():
            if not run.debug:
                warnings.simplefilter("ignore")
            try:
                with run.screen.logging():
                    function(run, **options)
            except KeyboardInterrupt as interrupt:
                _interrupted(run, getattr(interrupt, "workdir", None))

    own = list(signatures.signature(function).parameters.values())[1:]
    shared = list(signatures.signature(_surgeon).parameters.values())[:5]
    parameters = [shared[0], *own, *shared[1:]]
    run_command.__signature__ = signatures.Signature(  # type: ignore[attr-defined]
        [parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in parameters]
    )
    run_command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app.command(name=function.__name__.strip("_").replace("_", "-"))(run_command)
    return function


def _interrupted(run: Run, workdir: Path | None) -> NoReturn:
    if workdir is None:
        text = "interrupted; nothing was saved"
    else:
        again = [arg for arg in run.args if arg != "--resume"]
        command_line = shlex.join(["surgeon", *again, "--resume"])
        text = f"interrupted; checkpoints are in {workdir}. Go on with:\n  {command_line}"
    run.screen.error(text, kind="Interrupted", exit_code=130)
    raise typer.Exit(130)


# --- the commands -----------------------------------------------------------------------------------------------------


def _data_options(data: str | None, **options: Any) -> Any:
    from surgeon.jobs.opening import DataOptions

    return None if data is None else DataOptions(data, **options)


def _build(names: str | None, settings: list[str] | None) -> "list[Pass[Any]]":
    from surgeon.recipe import build, parse_settings

    wanted = [name.strip() for name in (names or "").split(",") if name.strip()]
    if not wanted:
        raise UsageError("Say which passes to run: --passes sparsify,moeify. surgeon passes lists them.")
    return build(wanted, parse_settings(settings or []))


@command
def demo(
    run: Run,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where the result goes.")] = Path("surgeon-demo"),
    seed: Seed = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Hardly any training, to see that everything runs.")] = False,
) -> None:
    """Show the whole story on a small model.

    A vision transformer is trained on digits, sparsified, split into experts, lowered, and measured: two minutes.

    Example: surgeon demo

    JSON: {dense, passes, points, directory}
    """
    from surgeon import demo as story
    from surgeon.jobs.applying import check_target
    from surgeon.render.diff_view import pass_view
    from surgeon.render.views import demo_view, quality_line

    check_target(directory, overwrite=True)
    made = story.run(
        directory,
        seed=seed,
        quick=quick,
        progress=run.screen.progress,
        on_dense=lambda quality: run.screen.show(quality_line("dense model", quality)),
        on_pass=lambda one: run.screen.show(pass_view(one, "sites", gap=True)),
    )
    run.screen.show(demo_view(made))
    run.screen.result(
        {
            "dense": made.dense,
            "passes": made.surgery.reports,
            "points": made.points,
            "directory": made.directory,
        }
    )


@command
def inspect(
    run: Run,
    model: Model,
    graph: Annotated[bool, typer.Option("--graph", help="Also print the graph, by module path.")] = False,
    inputs: Inputs = None,
    trust_pickle: TrustPickle = False,
    arch: Arch = None,
    task: Task = None,
) -> None:
    """Show a model's layers and what they cost.

    Feed-forward, expert and standalone linear layers, each with its share of the multiply-adds.

    Example: surgeon inspect path/to/bert

    JSON: {model, kind, inputs, task, cost, ffns, experts, linears, refused, notes, graph}
    """
    from surgeon.jobs.inspection import inspect as look
    from surgeon.jobs.opening import open_model
    from surgeon.render.views import inspection_view

    opened = open_model(model, inputs=inputs, trust_pickle=trust_pickle, arch=arch, task=task, stage=run.screen.stage)
    with run.screen.stage("measuring"):
        found = look(opened, with_graph=graph)
    run.screen.show(inspection_view(found))
    run.screen.result(found)


@command
def passes(
    run: Run,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One pass, with its options.")] = None,
) -> None:
    """List the passes, or show one of them.

    Of one pass: its options, what it needs and promises, and an example.

    Example: surgeon passes moeify

    JSON: {passes: [{name, summary, works_on, makes, must_precede, preserves, needs_data, trains}]}; of one pass also
    {options: [{name, type, default, help}], example}
    """
    from surgeon.jobs.pass_help import describe, example_of, options_of
    from surgeon.passes import PASSES
    from surgeon.recipe import find_pass
    from surgeon.render.views import pass_help_view, passes_view

    if name is None:
        run.screen.show(passes_view(PASSES.values()))
        run.screen.result({"passes": [describe(kind) for kind in PASSES.values()]})
        return
    kind = find_pass(name)
    with run.screen.stage(f"running {name} on a small model"):
        example = example_of(kind)
    options = options_of(kind)
    run.screen.show(pass_help_view(kind, options, example))
    run.screen.result({**describe(kind), "options": options, "example": example})


@command
def explain(
    run: Run,
    model: Model,
    passes: PassList = None,
    at: Annotated[str | None, typer.Option("--at", metavar="PATH", help="Only here, patterns with * allowed.")] = None,
    settings: Settings = None,
    inputs: Inputs = None,
    trust_pickle: TrustPickle = False,
    arch: Arch = None,
    task: Task = None,
) -> None:
    """Say why a pass changes a site, or does not.

    For each candidate: that it would be changed, or the first condition that failed and the value seen.
    Each pass is asked about the graph that the passes before it would leave. Nothing is trained or saved.

    Example: surgeon explain path/to/bert --passes moeify --at "*.layer.0"

    JSON: {passes: [{name, looks_for, matched: [[path, site]], rejected: [[path, reason]]}]}
    """
    from surgeon.jobs.inspection import explain as ask
    from surgeon.jobs.opening import open_model
    from surgeon.render.views import explanation_view

    built = _build(passes, settings)
    opened = open_model(model, inputs=inputs, trust_pickle=trust_pickle, arch=arch, task=task, stage=run.screen.stage)
    with run.screen.stage("asking the passes"):
        found = ask(opened, built, at)
    run.screen.show(explanation_view(found))
    run.screen.result({"passes": found})


@command
def apply(
    run: Run,
    model: Model,
    passes: PassList = None,
    settings: Settings = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            "--recipe", metavar="FILE", help="Run what a surgery.json recorded: its passes, options and seed."
        ),
    ] = None,
    data: Data = None,
    text: TextColumn = None,
    label: LabelColumn = None,
    task: Task = None,
    batch_size: BatchSize = 16,
    max_length: MaxLength = 128,
    limit: Limit = None,
    eval_fraction: Held = 0.1,
    inputs: Inputs = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", help="Where the result goes; by default NAME-surgery, here."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a surgery that was saved there.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would change; train and save nothing.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    verify: Annotated[
        Verify, typer.Option("--verify", help="Compare outputs across passes: not, on the example inputs, or on more.")
    ] = Verify.fast,
    tau: Annotated[
        float | None,
        typer.Option("--tau", help="Skip experts whose score is below this share of the largest: 0 skips none."),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of every random choice.  [default: 0]")] = None,
    trust_pickle: TrustPickle = False,
    arch: Arch = None,
) -> None:
    """Run passes over a model and save the result.

    The model itself is never changed. With data, passes fine-tune and train what they put in; without, they say what
    was not trained.

    Example: surgeon apply --passes sparsify,moeify,lower --set moeify.experts=48 path/to/bert --data reviews.csv

    JSON: {model, directory, dry_run, passes, before, after, quality, notes, next, seconds}
    """
    from surgeon.jobs import applying
    from surgeon.jobs.opening import open_model
    from surgeon.render.diff_view import pass_view
    from surgeon.render.views import applied_view

    if recipe is not None:
        if passes is not None or settings:
            raise UsageError("Give --recipe, or --passes with --set, not both.")
        built, recorded_seed = applying.read_recipe(recipe)
        seed = recorded_seed if seed is None else seed
    else:
        built = _build(passes, settings)
    seed = seed or 0
    wanted = _data_options(
        data, text=text, label=label, task=task, batch_size=batch_size, max_length=max_length, limit=limit,
        eval_fraction=eval_fraction, seed=seed,
    )  # fmt: skip
    typed = tuple(run.args)
    options = applying.ApplyOptions(out, overwrite, dry_run, resume, verify.value, seed, tau, wanted, typed)
    applying.check_options(model, built, options)
    opened = open_model(
        model, inputs=inputs, trust_pickle=trust_pickle, arch=arch, task=task, data=wanted, stage=run.screen.stage
    )
    for note in opened.notes:
        run.screen.say(f"note: {note}")
    applied = applying.apply(
        opened,
        built,
        options,
        stage=run.screen.stage,
        progress=run.screen.progress,
        on_pass=lambda one: run.screen.show(pass_view(one, "sites", gap=True)),
    )
    run.screen.show(applied_view(applied))
    run.screen.result(applying.applied_json(applied, opened))


@command
def diff(
    run: Run,
    first: Annotated[str, typer.Argument(metavar="A", help="A saved surgery, or any model to compare with B.")],
    second: Annotated[str | None, typer.Argument(metavar="[B]", help="Another model.", show_default=False)] = None,
    stat: Annotated[bool, typer.Option("--stat", help="Totals only.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Every site, node and parameter.")] = False,
    inputs: Inputs = None,
    trust_pickle: TrustPickle = False,
    arch: Arch = None,
) -> None:
    """Show what passes changed, or compare two models.

    One saved surgery: what each of its passes changed. Two models, saved or not: their sites side by side.

    Example: surgeon diff bert-surgery

    Example: surgeon diff path/to/bert bert-surgery --full

    JSON: {passes: [{report, graph}]} of one; {names, costs, sites, difference, note, nodes} of two
    """
    from surgeon.artifact import load_diff
    from surgeon.jobs.comparison import compare_models
    from surgeon.jobs.opening import open_model
    from surgeon.render.diff_view import diff_view
    from surgeon.render.views import comparison_view

    if stat and full:
        raise UsageError("Give --stat or --full, not both.")
    detail: Any = "stat" if stat else "full" if full else "sites"
    if second is None:
        recorded = load_diff(first)
        run.screen.show(diff_view(recorded.passes, detail))
        run.screen.result(recorded)
        return
    opened = [
        open_model(spec, inputs=inputs, trust_pickle=trust_pickle, arch=arch, stage=run.screen.stage)
        for spec in (first, second)
    ]
    with run.screen.stage("comparing"):
        found = compare_models(*opened, with_nodes=full)
    run.screen.show(comparison_view(found, detail))
    run.screen.result(found)


@command
def sweep(
    run: Run,
    model: Saved,
    data: NeededData,
    tau: Annotated[
        str | None, typer.Option("--tau", metavar="T,T,...", help="Values of tau; 0, every expert, comes first.")
    ] = None,
    text: TextColumn = None,
    label: LabelColumn = None,
    task: Task = None,
    batch_size: BatchSize = 16,
    max_length: MaxLength = 128,
    limit: Limit = None,
    eval_fraction: Held = 0.1,
    seed: Seed = 0,
) -> None:
    """Measure quality and cost at several tau.

    Quality is measured on the held-out part of the data, the same that apply holds out; with --eval-fraction 0 on all.

    Example: surgeon sweep bert-surgery --data reviews.csv --tau 0,0.05,0.1,0.2

    JSON: {model, data, task, dense_multiply_adds, points: [{tau, quality, executed, multiply_adds, relative}]}
    """
    from surgeon.jobs import comparison
    from surgeon.jobs.opening import open_model
    from surgeon.render.views import sweep_view

    taus = comparison.parse_taus(tau)
    wanted = _data_options(
        data, text=text, label=label, task=task, batch_size=batch_size, max_length=max_length, limit=limit,
        eval_fraction=eval_fraction, seed=seed,
    )  # fmt: skip
    opened = open_model(str(model), data=wanted, stage=run.screen.stage)
    swept = comparison.sweep(opened, taus, progress=run.screen.progress)
    run.screen.show(sweep_view(swept.points))
    run.screen.result(swept)


@command
def doctor(run: Run) -> None:
    """Check that everything works on this machine.

    Versions, devices, disk space, and a tiny surgery from tracing to loading.

    Example: surgeon doctor

    JSON: {checks: [{name, state, found, advice}]}
    """
    from surgeon.jobs.doctor import examine
    from surgeon.render.views import doctor_view

    with run.screen.stage("examining"):
        checks = examine()
    run.screen.show(doctor_view(checks))
    run.screen.result({"checks": checks})
    if any(check.state == "failed" for check in checks):
        raise typer.Exit(1)


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show an arrow gets a question mark instead of an error.
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    app(prog_name="surgeon")
