"""`surgeon schema`: the JSON Schema of a command's answer."""

# The annotations are read when commands are made, so they are not postponed.
from typing import Annotated

import typer

from surgeon.cli import completion
from surgeon.cli.app import Run, command
from surgeon.errors import UsageError
from surgeon.json_values import schemas


@command(order=120)
def schema(
    run: Run,
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[COMMAND]",
            help="A command, such as sweep or bench layer; or error.",
            show_default=False,
            autocompletion=completion.schemas,
        ),
    ] = None,
) -> None:
    """Print the JSON Schema of what a command writes with --output json, or list the files of all schemas.

    Each answer has the name of its schema in the field schema. Its number changes when a field is removed or gets
    another meaning; fields are added without that. An error is described by the schema error.

    Example: surgeon schema bench layer
    """
    from surgeon.text.layout import grid

    known, name = schemas(), " ".join(names or ())
    if name and name not in known:
        raise UsageError(f"There is no schema '{name}'. There are: {', '.join(known)}.")
    if name:
        run.screen.write(known[name].read_text(encoding="utf-8").rstrip())
        return
    table = grid("left", "left", header=("command", "file"))
    for command_name, file in known.items():
        table.add_row(command_name, str(file))
    run.screen.show(table)
    run.answer({"schemas": known})
