"""Write a saved surgery as a directory that transformers' `from_pretrained` reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from surgeon.errors import UsageError
from surgeon.jobs.open_model import Stage
from surgeon.jobs.store import check_parent
from surgeon.moe.site import find_moes
from surgeon.sites.rejection import Rejection
from surgeon.surgery.artifact import load, load_inputs
from surgeon.surgery.export import check_exportable, export, origin_of, read_base
from surgeon.surgery.record import earlier_passes, read_record


@dataclass(frozen=True)
class Exported:
    """A model that was written. layers: the converted layers in it, by the path of the module. refused: those that stay
    dense. kept: the weights that came from the original model. bytes: of the weight files.
    """

    model: str
    directory: Path
    model_class: str
    layers: dict[str, str]
    refused: tuple[Rejection, ...]
    kept: tuple[str, ...]
    bytes: int


def export_surgery(
    directory: Path,
    out: Path | None,
    *,
    base: Path | None,
    overwrite: bool,
    max_shard_size: str,
    trust_modules: tuple[str, ...] = (),
    stage: Stage,
) -> Exported:
    """Graft a saved surgery into its model, and write the model.

    Args:
        out: the target; by default the name of the surgery with `-hf`. base: a directory with the original model.

    Raises:
        LoadError, UsageError, SaveError, TraceError, VerificationError: as `surgeon.surgery.export.export`.
    """
    out = Path(f"{directory.resolve().name}-hf") if out is None else out
    record = read_record(directory)
    if directory.resolve() in (out.resolve(), *out.resolve().parents):
        raise UsageError(f"{out} is the surgery itself, which is never changed. Give another directory with -o.")
    check_exportable(out, overwrite=overwrite)
    check_parent(out)
    with stage(f"loading {directory}"):
        graph = load(directory, trust_modules=trust_modules)
        inputs = load_inputs(directory)
        origin = origin_of(directory)
        model = None if base is None else read_base(base, origin)
    reports = [pass_.report for pass_ in earlier_passes(graph)]
    with stage(f"writing {out}"):
        made = export(
            model, graph, reports, inputs, out,
            record=record, origin=origin, overwrite=overwrite, max_shard_size=max_shard_size, share=True,
        )  # fmt: skip
    graft = made.surgeon_graft
    return Exported(
        str(directory),
        out,
        type(made).__name__,
        {site.path: site.describe for site in find_moes(made)},
        graft.refused,  # type: ignore[union-attr, arg-type]
        graft.kept,  # type: ignore[union-attr, arg-type]
        sum(file.stat().st_size for file in out.glob("*.safetensors")),
    )
