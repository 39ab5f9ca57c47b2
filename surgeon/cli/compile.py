"""`surgeon compile`: compile a saved surgery into a package that runs without surgeon."""

# The annotations are read when commands are made, so they are not postponed.
from pathlib import Path
from typing import Annotated

import typer

from surgeon.cli.app import Run, command
from surgeon.cli.options import Saved, TrustModules


@command(order=95)
def compile_(
    run: Run,
    model: Saved,
    *,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", help="Directory for the result.  [default: DIR-compiled]"),
    ] = None,
    leave_out: Annotated[
        str | None,
        typer.Option(
            "--leave-out",
            metavar="NAME,NAME",
            help="Optional inputs that the compiled model does without, such as attention_mask.",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a compiled model.")] = False,
    trust_modules: TrustModules = None,
) -> None:
    """Compile a saved surgery for processes without surgeon, in Python or C++.

    AOTInductor compiles it for processors like this one, and needs a C++ compiler. Beside the package lies the library
    with surgeon's operators. The package is compared with the surgery, and refuses inputs of other sizes and dtypes.

    Example: surgeon compile bert-surgery -o bert-compiled
    """
    from surgeon.jobs import compile as job
    from surgeon.jobs.open_model import open_model
    from surgeon.render.compile import compile_view

    directory = job.check_target(model, out, overwrite=overwrite)
    opened = open_model(str(model), trust_modules=trust_modules or (), stage=run.screen.stage)
    names = [name.strip() for name in (leave_out or "").split(",") if name.strip()]
    with run.screen.stage("compiling"):
        found = job.compile_saved(opened, directory, leave_out=names, overwrite=overwrite)
    run.screen.show(compile_view(found))
    run.answer(found)
