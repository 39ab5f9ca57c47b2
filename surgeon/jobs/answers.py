"""The answer of every command as a type, from which its JSON Schema is made.

`pytest --update-golden` writes the schemas to `surgeon/schemas`, where `surgeon schema` reads them without torch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from types import GenericAlias, UnionType
from typing import Any, get_args

from pydantic import ConfigDict, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from surgeon.data.quality import Quality
from surgeon.jobs.applied import ApplyAnswer
from surgeon.jobs.bench_layer import LayerBenchmark
from surgeon.jobs.bench_linear import LinearBenchmark
from surgeon.jobs.bench_predict import LayerPrediction
from surgeon.jobs.bench_surgery import EngineBenchmark, SurgeryBenchmark
from surgeon.jobs.compare import Compared
from surgeon.jobs.compile import CompileResult
from surgeon.jobs.diff import Comparison
from surgeon.jobs.doctor import Check
from surgeon.jobs.explain import Explanation
from surgeon.jobs.export import Exported, ExportedForEngine
from surgeon.jobs.generate import Generated
from surgeon.jobs.inspect import Inspection
from surgeon.jobs.load import Loaded
from surgeon.jobs.recipe import Checked, Shown, WrittenRecipe
from surgeon.jobs.set import SetResult
from surgeon.jobs.sweep import Swept
from surgeon.jobs.tune import TuningResult
from surgeon.json_values import schema_name
from surgeon.kernels.gpu_model.devices import Device
from surgeon.measure.sweep import Point
from surgeon.passes.about import Option
from surgeon.passes.report import PassDiff, PassReport
from surgeon.surgery.diff import Diff


@dataclass(frozen=True)
class Written:
    """The files that were written."""

    written: tuple[Path, ...]


@dataclass(frozen=True)
class SchemaFiles:
    """The files of all schemas by command. With a command `surgeon schema` prints the schema itself."""

    schemas: dict[str, Path]


@dataclass(frozen=True)
class Examined:
    """What `surgeon doctor` found."""

    checks: tuple[Check, ...]


@dataclass(frozen=True)
class Explained:
    """What passes would do, in their order."""

    passes: tuple[Explanation, ...]


@dataclass(frozen=True)
class Devices:
    """What is known about each GPU."""

    devices: tuple[Device, ...]


@dataclass(frozen=True)
class DemoAnswer:
    """The demo. dense: quality of the dense model. points: at each tau. directory: of the surgery."""

    dense: Quality
    passes: tuple[PassReport, ...]
    points: tuple[Point, ...]
    directory: Path


@dataclass(frozen=True)
class PassSummary:
    """A pass without its options: see `surgeon.passes.about.About`."""

    name: str
    summary: str
    description: str
    works_on: str
    makes: str | None
    must_precede: tuple[str, ...]
    preserves: bool
    needs_data: bool
    trains: bool
    calibrates: bool
    untrained: str
    output: str


@dataclass(frozen=True)
class PassAnswer(PassSummary):
    """A pass with its options. example: what it changes in a small model, if asked for."""

    options: tuple[Option, ...]
    example: PassDiff | None


@dataclass(frozen=True)
class RecipeSummary:
    """A recipe: its passes with their options in order, or by the family of a model the recipe that it stands for."""

    summary: str
    passes: tuple[tuple[str, dict[str, Any]], ...] | None
    by_family: dict[str, str] | None


@dataclass(frozen=True)
class PassList:
    """All passes and recipes. broken: why passes of other packages cannot be used."""

    passes: tuple[PassSummary, ...]
    recipes: dict[str, RecipeSummary]
    broken: dict[str, str]


@dataclass(frozen=True)
class ErrorText:
    """An error: its type, what it says, and the exit code of the command."""

    type: str
    message: str
    exit_code: int


@dataclass(frozen=True)
class Failed:
    """What stands in place of an answer if a command fails."""

    error: ErrorText


ANSWERS: dict[str, Any] = {
    "apply": ApplyAnswer,
    "bench layer": LayerBenchmark,
    "bench linear": LinearBenchmark,
    "bench predict": LayerPrediction | Devices,
    "bench surgery": SurgeryBenchmark | EngineBenchmark,
    "compare": Compared,
    "compile": CompileResult,
    "demo": DemoAnswer,
    "diff": Diff | Comparison,
    "doctor": Examined,
    "error": Failed,
    "explain": Explained,
    "export": Exported | ExportedForEngine,
    "generate": Generated,
    "inspect": Inspection,
    "load": Loaded,
    "passes": PassList | PassAnswer,
    "plot": Written,
    "recipe check": Checked,
    "recipe init": WrittenRecipe,
    "recipe show": Shown,
    "report": Written,
    "schema": SchemaFiles,
    "set": SetResult,
    "sweep": Swept,
    "tune": TuningResult,
}
"""Command → the type of its answer. Where there are several, options of the command decide."""

_UNKNOWN = {"not in JSON": True}


def json_schema(command: str) -> dict[str, Any]:
    """Return the JSON Schema of a command's answer (draft 2020-12).

    Raises:
        TypeError: an answer has a field that has no form in JSON.
    """
    wanted = ANSWERS[command]
    kinds = get_args(wanted) if isinstance(wanted, UnionType) else (wanted,)
    # Inside of a dict every type is described by its name.
    named: Any = GenericAlias(dict, (str, wanted))
    adapter = TypeAdapter(named, config=ConfigDict(arbitrary_types_allowed=True))
    made = adapter.json_schema(schema_generator=_Answers, mode="serialization")
    parts = made["$defs"]
    if _UNKNOWN in _all(made):
        raise TypeError(f"The answer of {command} has a field that has no form in JSON.")
    name = schema_name(command)
    for kind in kinds:
        own = parts[kind.__name__]
        own["properties"] = {"schema": {"const": name}, **own["properties"]}
        own["required"] = ["schema", *own["required"]]
    refs = [{"$ref": f"#/$defs/{kind.__name__}"} for kind in kinds]
    whole = refs[0] if len(refs) == 1 else {"anyOf": refs}
    title = "error of any command" if command == "error" else f"surgeon {command} --output json"
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": name, "title": title}
    return {**head, **whole, "$defs": parts}


def _all(value: Any) -> list[Any]:
    """A JSON value and all that is in it."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [value, *(part for one in inside for part in _all(one))]


class _Answers(GenerateJsonSchema):
    """Makes schemas of what `surgeon.json_values.to_json` writes."""

    def float_schema(self, schema: Any) -> dict[str, Any]:
        """A number that is not finite is null."""
        return {"type": ["number", "null"]}

    def dataclass_schema(self, schema: Any) -> dict[str, Any]:
        """Leave out the fields that are only for Python."""
        made = super().dataclass_schema(schema)
        for field in dataclasses.fields(schema["cls"]):
            if not field.metadata.get("json", True):
                made["properties"].pop(field.name)
                made["required"] = [name for name in made.get("required", ()) if name != field.name]
        for part in made["properties"].values():
            part.pop("title", None)
            part.pop("default", None)
        made["description"] = " ".join((schema["cls"].__doc__ or "").split())
        return made

    def handle_invalid_for_json_schema(self, schema: Any, error_info: str) -> dict[str, Any]:
        """Mark what has no form in JSON: it may only stand in a field that is left out."""
        return dict(_UNKNOWN)
