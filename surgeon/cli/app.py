"""Options, errors and exit codes that all commands share. Each command has its own module in this package.

To add a command, write a module here with a function marked `@command(order=...)`. It is listed nowhere else.

Commands only read options. `jobs` does the work and `render` shows the results.

Commands import torch and everything that needs it inside their functions, so that `surgeon --help` does not wait.

Exit codes: 0 done; 1 nothing changed or a check failed; 2 wrong usage; 3 the model cannot be loaded or traced; 4 a
pass, its verification or saving failed; 130 interrupted.
"""

# The annotations are read when commands are made, so they are not postponed.
import contextlib
import functools
import inspect
import os
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

from surgeon import processes
from surgeon.cli import completion
from surgeon.cli.options import Debug, Output, OutputMode, Quiet, Verbose
from surgeon.cli.reading import with_data_options
from surgeon.errors import SurgeonError, sentence
from surgeon.tracing.quiet import quiet_imports
from surgeon.version import __version__

if TYPE_CHECKING:
    from surgeon.render.screen import Screen


@dataclass
class Run:
    """One run of the command line: the typed arguments, and the options that all commands share."""

    args: list[str] = field(default_factory=list)
    output: OutputMode | None = None
    verbose: int = 0
    quiet: bool = False
    debug: bool = False
    command: str = ""
    begun: "Screen | None" = None

    def take(self, output: OutputMode | None, verbose: int, quiet: bool, debug: bool) -> None:
        """Merge options given at one place of the command line into those given earlier."""
        self.output = output or self.output
        self.verbose, self.quiet, self.debug = max(verbose, self.verbose), quiet or self.quiet, debug or self.debug

    def labelled(self, value: object) -> Any:
        """An answer in JSON values, with the name of its schema."""
        from surgeon.json_values import schema_name, to_json

        return {"schema": schema_name(self.command), **to_json(value)}

    def answer(self, value: object) -> None:
        """Print the answer for programs, if they asked for it."""
        self.screen.result(self.labelled(value))

    @property
    def to_continue(self) -> str:
        """How to go on with this run after it was interrupted."""
        again = [arg for arg in self.args if arg != "--resume"]
        return f"To continue, run:\n  {shlex.join(['surgeon', *again, '--resume'])}"

    @functools.cached_property
    def screen(self) -> "Screen":
        """The screen that this run writes to."""
        if self.begun is not None and self.output is None and not self.quiet:
            self.begun.verbose = self.verbose
            return self.begun
        from surgeon.render.screen import Screen

        silent = not processes.is_main()
        return Screen(
            self.output.value if self.output else None,
            verbose=self.verbose,
            quiet=self.quiet,
            silent=silent,
            command=shlex.join(self.args),
        )


# The position of a command in the list of its group, by the names of group and command.
_ORDER: dict[tuple[str, str], int] = {}


class _Group(TyperGroup):
    """Lists commands in their order, and turns every error into a few lines on stderr and an exit code."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=lambda name: (_ORDER[self.name or "", name], name))

    def main(self, args: Any = None, *rest: Any, begun: "Screen | None" = None, **extra: Any) -> NoReturn:
        typed = list(sys.argv[1:] if args is None else args)
        run = Run(typed, debug="--debug" in typed, begun=begun)
        extra |= {"standalone_mode": False, "obj": run}
        try:
            code = super().main(typed, *rest, **extra)
        except Exception as error:
            sys.exit(_report(error, run))
        processes.leave()
        sys.exit(code if isinstance(code, int) else 0)


_REPORT = "To report it, add what surgeon doctor says."


def _report(error: Exception, run: Run) -> int:
    """Say what went wrong; returns the exit code."""
    if hasattr(error, "format_message"):  # raised by the option parser, for which typer has no public class
        if run.output is None and any(arg in ("json", "--output=json") for arg in run.args):
            run.output = OutputMode.json
        context = getattr(error, "ctx", None)
        where = context.command_path if context is not None else "surgeon"
        # typer checks values with pydantic, whose words for it are for programmers.
        text = f"{sentence(error.format_message().replace('Value error, ', ''))} See {where} --help."
        run.screen.error(text, kind="UsageError", exit_code=2)
        return 2
    if run.debug:
        traceback.print_exception(error)
    if isinstance(error, SurgeonError):
        run.screen.error(error.in_command, kind=type(error).__name__, exit_code=error.exit_code)
        return error.exit_code
    text = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}".rstrip(": ")
    if not processes.is_main():  # expected errors are those of the main process too
        sys.stderr.write(f"process {processes.rank()}: error: {text}\n")
    hint = "" if run.debug else "\nThis error was not expected. Run again with --debug to see the traceback. " + _REPORT
    run.screen.error(text + hint, kind=type(error).__name__, exit_code=4)
    return 4


app = typer.Typer(
    name="surgeon",
    cls=_Group,
    help="Rewrite a dense PyTorch model into one that runs only the neurons each token needs.\n\n"
    "Start with: surgeon demo",
    epilog="Exit codes: 0 done, 1 nothing changed or a check failed, 2 wrong usage, 3 the model cannot be loaded or "
    "traced, 4 a pass, its verification or saving failed, 130 interrupted.",
    # Plain help takes half the time.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    # A terminal that is wider shows the first sentence of every command whole.
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
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
        typer.echo(f"surgeon {__version__}")
        raise typer.Exit
    _before_a_command(context, output, verbose, quiet, debug)


def _before_a_command(
    context: typer.Context, output: Output = None, verbose: Verbose = 0, quiet: Quiet = False, debug: Debug = False
) -> None:
    """Take the options given before the command's name. Without a command, show the help."""
    context.obj.take(output, verbose, quiet, debug)
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def group(name: str, *, order: int, help: str) -> typer.Typer:
    """Make a group of commands, `surgeon NAME COMMAND`. Without a command it shows its help.

    order: position in the list, as in `command`.
    """
    made = typer.Typer(name=name, cls=_Group, help=help, rich_markup_mode=None, pretty_exceptions_enable=False)
    made.callback(invoke_without_command=True)(_before_a_command)
    app.add_typer(made)
    _ORDER["surgeon", name] = order
    return made


def command(
    *, order: int, under: typer.Typer = app, torch: bool = True
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a command with the function's name.

    The function's first parameter is the run. Every command also gets the shared options, which may be given before or
    after the command's name. A function with a parameter of type `DataOptions`, or `DataOptions | None`, gets the
    options that say how to read data (see `with_data_options`).

    Args:
        order: position in the list, the lowest first. under: the group that the command belongs to.
        torch: it imports torch, which takes seconds, so the screen says so first.
    """

    def add(function: Callable[..., None]) -> Callable[..., None]:
        name = function.__name__.strip("_").replace("_", "-")
        path = name if under is app else f"{under.info.name} {name}"
        function.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\nJSON: surgeon schema {path}"
        under.command(name=name)(_with_shared_options(with_data_options(function), torch))
        _ORDER[str(under.info.name), name] = order
        return function

    return add


def _with_shared_options(function: Callable[..., None], torch: bool) -> Callable[..., None]:
    """Wrap a function that takes a run so that it takes the context and the shared options."""

    @functools.wraps(function)
    def run_command(
        context: typer.Context, output: OutputMode | None, verbose: int, quiet: bool, debug: bool, **options: Any
    ) -> None:
        run: Run = context.obj
        run.command = context.command_path.partition(" ")[2]
        run.take(output, verbose, quiet, debug)
        with warnings.catch_warnings(), contextlib.ExitStack() as silenced:
            if not run.debug:
                warnings.simplefilter("ignore")
                silenced.enter_context(quiet_imports())
            try:
                with run.screen.logging():
                    if torch and "torch" not in sys.modules and run.begun is None:
                        run.screen.waiting("loading PyTorch")
                    function(run, **options)
            except KeyboardInterrupt as interrupt:
                _interrupted(run, getattr(interrupt, "workdir", None))

    own = list(inspect.signature(function).parameters.values())[1:]
    context, *shared = inspect.signature(_before_a_command).parameters.values()
    parameters = [context, *own, *shared]
    run_command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in parameters]
    )
    run_command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run_command


def _interrupted(run: Run, workdir: Path | None) -> NoReturn:
    if workdir is None:
        text = "interrupted; nothing was saved"
    else:
        text = f"interrupted; checkpoints are in {workdir}. {run.to_continue}"
    run.screen.error(text, kind="Interrupted", exit_code=130)
    raise typer.Exit(130)


def main(begun: "Screen | None" = None) -> None:
    """Run the command line. begun: the screen that shows already that torch is being loaded."""
    if processes.count() > 1:
        # torch's own lines come from every process, one about parameters that a loss may leave out in every fit.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if completion.asked_by_bash(os.environ):
        completion.in_bash(lambda: app(prog_name="surgeon", begun=begun))
    else:
        app(prog_name="surgeon", begun=begun)
