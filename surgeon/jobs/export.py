"""Write a saved surgery for transformers or for another engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from surgeon.described import Facts
from surgeon.dynamic.site import find_dynamic
from surgeon.engines.openvino import LINEARS
from surgeon.errors import UsageError
from surgeon.jobs.open_model import open_model
from surgeon.jobs.options import DataOptions
from surgeon.jobs.store import check_parent
from surgeon.progress import Stage
from surgeon.sites.rejection import Rejection
from surgeon.surgery.artifact import load_with_inputs
from surgeon.surgery.engines import (
    FILES,
    EngineModel,
    check_engine_directory,
    export_generator,
    export_onnx,
    export_openvino,
)
from surgeon.surgery.export import base_of, check_exportable, export, origin_of, read_base, rebuilt
from surgeon.surgery.record import earlier_passes, read_record

TARGETS = ("transformers", *FILES)
_SUFFIX = {"transformers": "hf", "openvino": "openvino", "onnx": "onnx"}


@dataclass(frozen=True)
class ConvertedLayer:
    """A layer of a model that was written. what: in words. facts: see `surgeon.described.Described.facts`."""

    what: str
    facts: Facts


@dataclass(frozen=True)
class Exported:
    """A model that was written.

    layers: the converted layers in it, by the path of the module. refused: those that stay dense. kept: the weights
    that came from the original model. bytes: of the weight files.
    """

    model: str
    directory: Path
    model_class: str
    layers: dict[str, ConvertedLayer]
    refused: tuple[Rejection, ...]
    kept: tuple[str, ...]
    bytes: int


@dataclass(frozen=True)
class ExportedForEngine:
    """A model for another engine that was written."""

    model: str
    directory: Path
    made: EngineModel
    notes: tuple[str, ...]


def check_target(
    directory: Path, out: Path | None, to: str, linears: str, *, cache: bool = False, overwrite: bool
) -> Path:
    """Return the directory for the result, checked before anything is loaded.

    out: by default the name of the surgery with `-hf`, `-openvino` or `-onnx`.

    Raises:
        UsageError: there is no such target, the option does not fit it, or `out` is in the surgery. LoadError:
            `directory` is no surgery. SaveError: `out` has other content.
    """
    if to == "aoti":
        raise UsageError(f"For a package of AOTInductor, run surgeon compile {directory}.")
    if to not in TARGETS:
        raise UsageError(f"--to {to}: there are {', '.join(TARGETS)}.")
    if linears not in LINEARS:
        raise UsageError(f"--linears {linears}: there are {', '.join(LINEARS)}.")
    if linears != "float" and to != "openvino":
        raise UsageError(f"--linears {linears} is for --to openvino.")
    if cache and to != "openvino":
        raise UsageError("--cache is for --to openvino.")
    read_record(directory)
    out = Path(f"{directory.resolve().name}-{_SUFFIX[to]}") if out is None else out
    if directory.resolve() in (out.resolve(), *out.resolve().parents):
        raise UsageError(f"{out} is the surgery itself, which is never changed. Give another directory with -o.")
    if to == "transformers":
        check_exportable(out, overwrite=overwrite)
    else:
        check_engine_directory(to, out, overwrite=overwrite)
    check_parent(out)
    return out


def export_surgery(
    directory: Path,
    out: Path,
    *,
    base: Path | None,
    overwrite: bool,
    max_shard_size: str,
    trust_modules: tuple[str, ...] = (),
    stage: Stage,
) -> Exported:
    """Graft a saved surgery into its model, and write the model.

    Args:
        out: the target, as `check_target` gives it. base: a directory with the original model.

    Raises:
        LoadError, UsageError, SaveError, TraceError, VerificationError: as `surgeon.surgery.export.export`.
    """
    record = read_record(directory)
    with stage(f"loading {directory}"):
        graph, inputs = load_with_inputs(directory, trust_modules=trust_modules)
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
        {site.path: ConvertedLayer(site.describe, site.facts) for site in find_dynamic(made)},
        graft.refused,  # type: ignore[union-attr, arg-type]
        graft.kept,  # type: ignore[union-attr, arg-type]
        sum(file.stat().st_size for file in out.glob("*.safetensors")),
    )


def export_for_engine(
    directory: Path,
    out: Path,
    to: str,
    *,
    linears: str = "float",
    cache: bool = False,
    base: Path | None = None,
    data: DataOptions | None = None,
    overwrite: bool = False,
    trust_modules: tuple[str, ...] = (),
    stage: Stage,
) -> ExportedForEngine:
    """Convert a saved surgery for another engine, and write it.

    Args:
        out: the target, as `check_target` gives it. to: the engine. linears, data: see `export_openvino`.
        cache: a language model is to keep its cache; base: a directory with the original model for it.

    Raises:
        LoadError, DataError: as `open_model`. UsageError, SaveError: as `surgeon.surgery.engines.export_openvino`.
        TraceError, VerificationError: as `surgeon.surgery.export.rebuilt`.
    """
    opened = open_model(str(directory), data=data, trust_modules=trust_modules, stage=stage)
    assert opened.record is not None
    notes: tuple[str, ...] = ()
    with stage(f"converting for {to}"):
        if cache:
            given = base_of(opened.record, opened.origin) if base is None else read_base(base, opened.origin)
            reports = [pass_.report for pass_ in earlier_passes(opened.graph)]
            model = rebuilt(given, opened.graph, reports, opened.inputs, opened.origin, share=True)
            made = export_generator(
                model.eval(), out, record=opened.record, origin=opened.origin, linears=linears, overwrite=overwrite
            )
        elif to == "onnx":
            made = export_onnx(
                opened.graph, opened.inputs, out, record=opened.record, origin=opened.origin, overwrite=overwrite
            )
        else:
            made = export_openvino(
                opened.graph, opened.inputs, out, record=opened.record, origin=opened.origin, overwrite=overwrite,
                linears=linears, calibration=None if opened.data is None else opened.data.train,
            )  # fmt: skip
            if linears == "int8" and data is None:
                notes = ("Ranges were measured on the example inputs alone. Give texts or images with --data.",)
    return ExportedForEngine(str(directory), out, made, notes)
