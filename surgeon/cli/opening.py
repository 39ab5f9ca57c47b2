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
    return opened, open_dense(run, dense, opened, data, trust_pickle=trust_pickle)


def open_dense(
    run: Run, dense: str | None, surgery: "Opened", data: DataOptions | None, *, trust_pickle: bool
) -> "Opened | None":
    """Open the dense model of a surgery with a head for the same task; None if it was not given.

    A model whose inputs are unknown is traced with those of the surgery.
    """
    from surgeon.jobs.open_model import open_model

    if dense is None:
        return None
    task = (data.task if data is not None else None) or surgery.task
    return open_model(
        dense, task=task, trust_pickle=trust_pickle, fallback_inputs=surgery.inputs, stage=run.screen.stage
    )
