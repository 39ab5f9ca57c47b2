"""Compile a saved surgery into a package that runs without surgeon."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from surgeon.dynamic.knobs import compensated
from surgeon.dynamic.site import find_dynamic
from surgeon.errors import UsageError
from surgeon.graph.sizes import Sizes
from surgeon.inputs.skipping import find_skipping
from surgeon.jobs.open_model import Opened
from surgeon.jobs.takes import Takes
from surgeon.surgery.compiled import LIBRARY, MODEL, check_directory, compile_graph, keeps_operator
from surgeon.surgery.record import read_record


@dataclass(frozen=True)
class CompileResult:
    """A compiled model. library: the file to load before it; None if it needs none. bytes: of the package.

    takes: the sizes. The other fields are those of `surgeon.surgery.compiled.Compiled`.
    """

    model: str
    directory: Path
    library: str | None
    inputs: dict[str, str]
    takes: Takes
    outputs: list[str]
    tau: dict[str, float]
    max_error: float
    seconds: float
    bytes: int
    notes: tuple[str, ...] = ()


def check_target(model: Path, out: Path | None, *, overwrite: bool) -> Path:
    """Return the directory for the result, checked before the surgery is loaded.

    Raises:
        LoadError: `model` is not a saved surgery. UsageError, SaveError: `out` is the surgery itself or has other
            content.
    """
    read_record(model)
    resolved = model.resolve()
    directory = Path(os.path.relpath(resolved.with_name(f"{resolved.name}-compiled"))) if out is None else out
    if resolved in (directory.resolve(), *directory.resolve().parents):
        raise UsageError(f"{directory} is in the surgery itself. Give another directory with -o.")
    check_directory(directory, overwrite=overwrite)
    return directory


def compile_saved(
    opened: Opened, directory: Path, *, leave_out: Sequence[str] = (), overwrite: bool = False
) -> CompileResult:
    """Compile an opened surgery.

    Raises:
        UsageError, SaveError: as `surgeon.surgery.compiled.compile_graph`.
    """
    sites = find_dynamic(opened.graph)
    notes = []
    if not all(site.skips for site in sites):
        notes.append("The surgery is not lowered, so nothing is skipped. Run surgeon apply with --passes lower on it.")
    elif find_skipping(opened.graph) and not keeps_operator(opened.graph):
        notes.append("Linear layers read all inputs and mask some, because the native kernels do not run here.")
    if compensated(opened.graph):
        notes.append(
            "The mean output of skipped experts is added. It only fits the present tau: keep tau, or recompile."
        )
    made = compile_graph(opened.graph, opened.inputs, directory, leave_out=leave_out, overwrite=overwrite)
    return CompileResult(
        opened.spec,
        directory,
        LIBRARY if (directory / LIBRARY).exists() else None,
        made.inputs,
        Takes.of(Sizes.parse(made.takes)),
        made.outputs,
        made.tau,
        made.max_error,
        made.seconds,
        (directory / MODEL).stat().st_size,
        tuple(notes),
    )
