"""Open the saved surgery that a command was given, and the dense model to compare it with."""

from pathlib import Path
from typing import TYPE_CHECKING

from surgeon.cli.app import Run
from surgeon.jobs.options import DataOptions

if TYPE_CHECKING:
    from surgeon.jobs.open_model import Opened


def open_saved(
    run: Run,
    model: Path,
    data: DataOptions | None,
    dense: str | None,
    *,
    trust_pickle: bool,
    trust_modules: list[str],
) -> "tuple[Opened, Opened | None]":
    """Open the surgery with its data, and the dense model with a head for the same task.

    data, dense: None if they were not given; without `dense` the second result is None.
    """
    from surgeon.jobs.open_model import open_model

    opened = open_model(str(model), data=data, trust_modules=trust_modules, stage=run.screen.stage)
    if dense is None:
        return opened, None
    task = (data.task if data is not None else None) or opened.task
    return opened, open_model(dense, task=task, trust_pickle=trust_pickle, stage=run.screen.stage)
