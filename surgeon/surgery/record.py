"""The record of what was done to a model: the content of `surgery.json`.

A record is written once, when a surgery is saved, and read once, when it is loaded. In memory it is a `Record`.
"""

from __future__ import annotations

import functools
import json
import math
import platform
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from pydantic import TypeAdapter, ValidationError
from torch.fx import GraphModule

from surgeon.data.quality import Quality
from surgeon.directories import restore
from surgeon.dynamic.knobs import compensated, get_rule, get_tau
from surgeon.errors import LoadError
from surgeon.graph.sizes import Sizes
from surgeon.inputs.skipping import find_skipping
from surgeon.moe.site import find_moes
from surgeon.passes.report import PassDiff, PassReport
from surgeon.sites.ffn import projections
from surgeon.surgery.origin import Origin
from surgeon.surgery.recipe import InputFile, Recipe, Step
from surgeon.surgery.trials import Search
from surgeon.tracing.trace import TraceInfo
from surgeon.version import __version__

Kind = TypeVar("Kind")
Value = TypeVar("Value")
SCHEMA = 6
_DEEPEST = 50  # nested values in a file
RECORD = "surgery.json"


@dataclass(frozen=True)
class ExpertLayer:
    """One layer with experts. form, filling: as in `surgeon.moe.site.MoESite`. expert_shape: (neurons, d_in)."""

    path: str
    experts: int
    form: str
    expert_shape: tuple[int, int]
    filling: int = 0


@dataclass(frozen=True)
class InputsLayer:
    """One layer that skips inputs or neurons. form: as in `surgeon.inputs.site.Skipping`.

    neurons: the number of those that it can skip; None for a linear layer, which skips inputs.
    """

    path: str
    d_in: int
    d_out: int
    form: str
    neurons: int | None = None


@dataclass(frozen=True)
class MeasuredQuality:
    """Quality of the dense model and of the surgery, and the fingerprint of the data they were measured on.

    before: None if the data has no labels. after: None too if the knobs have since been set to other values.
    agreement: of the surgery with the dense model. scores: the dense model's on each sample
    (`surgeon.data.quality.Scores.packed`), with which later measurements are compared.
    """

    before: Quality | None
    after: Quality | None
    data: str
    agreement: tuple[Quality, ...] = ()
    scores: str = ""


@dataclass(frozen=True)
class Record:
    """The content of `surgery.json`.

    schema: version of the format. versions: of the packages that wrote it. experts: layers with experts, in order.
    projections: paths of the feed-forward layers that replaced linear layers.
    tau, rule: by the path of a layer's experts; tau also by that of what selects inputs. compensated: the layers that
    add the mean output of skipped experts.
    search: for the settings, if there was one.
    output_texts: (place in the flat output, text) of texts that the graph returns. model_sha256: of the program.
    inputs: layers that skip inputs or neurons.
    """

    schema: int
    versions: dict[str, str]
    input: InputFile
    recipe: Recipe
    trace: TraceInfo
    passes: tuple[PassReport, ...]
    projections: tuple[str, ...]
    experts: tuple[ExpertLayer, ...]
    tau: dict[str, float]
    rule: dict[str, str]
    compensated: tuple[str, ...]
    quality: MeasuredQuality | None
    search: Search | None = None
    output_texts: tuple[tuple[int, str], ...] = ()
    model_sha256: str = ""
    inputs: tuple[InputsLayer, ...] = ()


def record_of(graph: GraphModule) -> Record | None:
    """The record of a loaded graph; None for a graph that was not loaded."""
    found = graph.meta.get("surgery")
    assert found is None or isinstance(found, Record)
    return found


def earlier_passes(graph: GraphModule) -> tuple[PassDiff, ...]:
    """What the passes changed before a graph was saved and loaded; () for a graph that was not loaded."""
    return tuple(graph.meta.get("earlier_passes", ()))


def make_record(
    graph: GraphModule,
    reports: Sequence[PassReport],
    *,
    origin: Origin,
    seed: int,
    data: str | None = None,
    fingerprint: str | None = None,
    quality: MeasuredQuality | None = None,
    search: Search | None = None,
    teacher: InputFile | None = None,
) -> Record:
    """Make the record of a graph as it is now.

    If the graph comes from a saved surgery, the input in the record is that of the first surgery.

    Args:
        reports: of every pass, those of the saved surgery first.
        origin: of the model. seed, data, fingerprint: of this run.
        search, teacher: of this run. None keeps the saved surgery's.
        quality: measured now. None keeps the saved surgery's quality, as far as it still holds.
    """
    first = record_of(graph)
    made = Record(
        schema=SCHEMA,
        versions={
            "surgeon": __version__,
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "python": platform.python_version(),
        },
        input=InputFile(origin.path, origin.kind, origin.sha256) if first is None else first.input,
        recipe=Recipe(
            tuple(Step(report.source or report.name, dict(report.options)) for report in reports),
            seed,
            data,
            # A surgery without data of its own keeps the fingerprint of the surgery it starts from.
            fingerprint or (None if first is None else first.recipe.fingerprint),
            teacher or (None if first is None else first.recipe.teacher),
            runs=_runs(len(reports), () if first is None else first.recipe.runs),
        ),
        trace=graph.meta["trace"],
        passes=tuple(reports),
        projections=projections(graph),
        experts=tuple(
            ExpertLayer(site.path, site.experts, site.form, (site.size, site.d_in), site.filling)
            for site in find_moes(graph)
        ),
        tau=get_tau(graph),
        rule=get_rule(graph),
        compensated=tuple(compensated(graph)),
        quality=quality,
        inputs=tuple(
            InputsLayer(site.path, site.d_in, site.d_out, site.form, getattr(site, "neurons", None))
            for site in find_skipping(graph)
        ),
        search=search if search is not None or first is None else first.search,
    )
    return made if first is None else replace(made, quality=_quality(made, first))


def repeatable(record: Record) -> Recipe:
    """Return the recipe of a record, with the model and the knobs that stand elsewhere in it."""
    tau = record.tau if any(record.tau.values()) else {}
    return replace(record.recipe, model=record.input, tau=_for_all(tau), rule=_for_all(record.rule))


def _for_all(values: dict[str, Value]) -> dict[str, Value]:
    """One value for all layers, if they have the same."""
    return {"*": next(iter(values.values()))} if len(set(values.values())) == 1 else dict(values)


def _runs(passes: int, earlier: tuple[int, ...]) -> tuple[int, ...]:
    """How many passes each run had. A run without passes, which only sets knobs, is none."""
    new = passes - sum(earlier)
    return (*earlier, new) if new else earlier


def _quality(now: Record, first: Record) -> MeasuredQuality | None:
    """Quality of a surgery that starts from a saved one.

    On the same data, "before" is from before the first surgery.
    """
    if now.quality is None:
        same = (now.tau, now.rule, now.compensated) == (first.tau, first.rule, first.compensated)
        return first.quality if first.quality is None or same else replace(first.quality, after=None, agreement=())
    if first.quality is not None and first.quality.data == now.quality.data and first.quality.before is not None:
        return replace(now.quality, before=first.quality.before, scores=first.quality.scores, agreement=())
    return now.quality


def write_record(record: Record, directory: Path, name: str = RECORD) -> None:
    """Write a record into a directory."""
    (directory / name).write_text(json.dumps(asdict(record), indent=1), encoding="utf-8")


def read_record(directory: Path, name: str = RECORD) -> Record:
    """Read `surgery.json`, or the record of another name.

    Raises:
        LoadError: it is missing or damaged, or another version of surgeon wrote it in another format.
    """
    restore(directory)
    path = directory / name
    if not path.exists():
        raise LoadError(f"{directory} is not a saved surgery: it has no {name}. surgeon apply makes one.")
    content = read_json(path)
    if not isinstance(content, dict) or "schema" not in content:
        raise LoadError(f"{path} is damaged: it has no schema.")
    schema = content["schema"]
    if schema != SCHEMA:
        newer = isinstance(schema, int) and schema > SCHEMA
        what = "Update surgeon to read it" if newer else "Run the surgery again, or use the version that wrote it"
        raise LoadError(f"{path} has schema {schema!r}, but this version of surgeon reads schema {SCHEMA}. {what}.")
    # Quality alone may be NaN: that of a model whose outputs are.
    if (place := _not_finite({key: value for key, value in content.items() if key != "quality"})) is not None:
        raise LoadError(f"{path} is damaged: {place} is not a finite number.")
    record = parse(Record, content, path)
    try:
        Sizes.parse(record.trace.sizes)
    except ValueError as error:
        raise LoadError(f"{path} is damaged: trace.sizes: {error}.") from error
    return record


def read_json(path: Path) -> Any:
    """Read a JSON file that surgeon wrote.

    Raises:
        LoadError: it cannot be read, is not JSON, is nested too deeply, or has a key twice.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key stands in it twice")
        return found

    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once)
        if _depth(content) > _DEEPEST:
            raise RecursionError
        return content
    except RecursionError as error:
        raise LoadError(f"{path} is damaged: it is nested too deeply.") from error
    except (OSError, ValueError) as error:
        raise LoadError(f"{path} is damaged: {type(error).__name__}: {error}.") from error


def _depth(value: Any) -> int:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, parts), default=0)


def _not_finite(value: Any, place: str = "") -> str | None:
    """Where a number is infinite or not a number."""
    if isinstance(value, float):
        return None if math.isfinite(value) else place.strip(".")
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return next((found for key, part in items if (found := _not_finite(part, f"{place}.{key}")) is not None), None)


def parse(kind: type[Kind], content: object, path: Path) -> Kind:
    """Convert the JSON values of a file that surgeon wrote to a dataclass.

    Raises:
        LoadError: the values do not fit; the message names the file, and the first value that is missing or wrong.
    """
    try:
        return validated(kind, content)
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{path} is damaged: {error}.") from error


@functools.cache
def _reader(kind: Any) -> TypeAdapter[Any]:
    """Making one takes longer than reading with it."""
    return TypeAdapter(kind)


def validated(kind: type[Kind], content: object) -> Kind:
    """Convert JSON values to a dataclass.

    Raises:
        ValueError: the values do not fit; the message names the first value that is missing or has a wrong type.
    """
    try:
        made: Kind = _reader(cast(Hashable, kind)).validate_python(content)
        return made
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{part}." for part in first["loc"]).rstrip(".")
        raise ValueError(f"{where}: {first['msg'].lower()}" if where else first["msg"].lower()) from error
