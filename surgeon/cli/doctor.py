"""`surgeon doctor`: check that everything works on this machine."""

# The annotations are read when commands are made, so they are not postponed.
from typing import Annotated

import typer

from surgeon.cli.app import Run, command


@command(order=110)
def doctor(
    run: Run,
    build: Annotated[
        bool, typer.Option("--build", help="Build the native CPU kernels now, not at the first call.")
    ] = False,
) -> None:
    """Check that everything works on this machine.

    It checks versions, devices, native kernels and disk space, and runs a tiny surgery from tracing to loading.

    Example: surgeon doctor --build
    """
    from surgeon.jobs.doctor import examine
    from surgeon.render.doctor import doctor_view

    with run.screen.stage("building" if build else "examining"):
        checks = examine(build=build)
    run.screen.show(doctor_view(checks))
    run.answer({"checks": checks})
    if any(check.state == "failed" for check in checks):
        raise typer.Exit(1)
