"""Check an exported program before torch reads it: it must be what `torch.export.save` writes, and nothing else.

torch takes much of a `.pt2` archive at its word. It unpickles records, loads libraries, evaluates the texts of sizes,
imports the modules of classes, looks operators up by name, and writes names into source code that it runs. So this is a
list of what is allowed. Records are those that torch writes, each once. Pickled records name nothing but tensors and
registered classes. The values of the program have the types of torch's schema, and every text in it has a form: see
`surgeon.models.program_names` and `surgeon.models.program_sizes`. A text without a form here is refused.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import re
import types
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
from torch._export.serde import schema
from torch._export.serde.union import _Union

from surgeon.errors import LoadError
from surgeon.models.archive import Archive, open_archive
from surgeon.models.pickles import TRUST, unsafe_globals
from surgeon.models.program_names import (
    UnregisteredError,
    check_identifier,
    check_keyword_argument,
    check_module_stack,
    check_operator,
    check_path,
    check_plain,
    check_source_functions,
    check_tree,
)
from surgeon.models.program_sizes import NotAllowedError, check_expression, check_guard, short

_MODEL, INPUTS = "models/model.json", "data/sample_inputs/model.pt"
_CONFIGS = {
    "data/weights/": "data/weights/model_weights_config.json",
    "data/constants/": "data/constants/model_constants_config.json",
}
_UNTIL_2_8 = {"data/weights/model.pt", "data/constants/model.pt"}  # torch wrote all weights in one record
_NEEDED = {"archive_format", "archive_version", _MODEL, INPUTS}
_RECORDS = {*_NEEDED, *_CONFIGS.values(), *_UNTIL_2_8, "byteorder", ".data/version", ".data/serialization_id"}
_NUMBERED = re.compile(r"data/weights/weight_[0-9]+|data/constants/tensor_[0-9]+|extra/[\w\-./ ]+", re.ASCII)
_PICKLED_PARTS = re.compile(
    r"data\.pkl|byteorder|version|\.format_version|\.storage_alignment|\.data/serialization_id|data/[0-9]+", re.ASCII
)
_LARGEST = 2**64


@contextmanager
def checked_program(
    path: Path, *, trusted: bool, checksums: bool = True
) -> Iterator[tuple[Archive, schema.ExportedProgram | None]]:
    """Check an archive, and open it. The program is None if it is not checked.

    Args:
        trusted: only look for damage. The archive may hold anything. checksums: False leaves out those of the weights.

    Raises:
        LoadError: the archive is damaged or truncated, is not a `torch.export` archive, or holds something that torch
            does not write or that would run code. The message says what.
    """
    with open_archive(path, path.name, checksums=checksums) as archive:
        _check_format(archive, path.name)
        if trusted:
            yield archive, None
            return
        try:
            _check_records(archive, path.name)
            program = _checked_graphs(_parsed(archive, _MODEL))
        except UnregisteredError as error:
            raise LoadError(
                f"{path.name} cannot be loaded: {error.what}", python=error.python, command=error.command
            ) from error
        except NotAllowedError as error:
            raise LoadError(f"{path.name} is not what torch.export.save writes: {error}.") from error
        except RecursionError as error:
            raise LoadError(f"{path.name} is not what torch.export.save writes: it is nested too deeply.") from error
        yield archive, program


def _check_format(archive: Archive, name: str) -> None:
    missing = _NEEDED - set(archive.records)
    if "archive_format" in missing:
        raise LoadError(
            f"{name} is not a torch.export archive in the format of torch {torch.__version__}. "
            "Export the model again with torch.export.save."
        )


def _check_records(archive: Archive, name: str) -> None:
    """Check the names of all records, and the content of those that hold pickles."""
    for record in archive.records:
        if record.startswith(("data/aotinductor/", "data/executorch/", "data/mtia")):
            raise LoadError(
                f"{name} holds compiled code ({short(record)}). Give the exported program that it was compiled from."
            )
        if record.startswith(("data/constants/opaque_obj_", "data/constants/custom_obj_")):
            raise LoadError(f"{name} holds pickled code ({short(record)}), which loading would run.", **TRUST)
        if record not in _RECORDS and not _NUMBERED.fullmatch(record):
            raise NotAllowedError(f"torch.export writes no record {short(record)}")
    for record in sorted(_NEEDED - set(archive.records)):
        raise NotAllowedError(f"it has no record {record}")
    if archive.read("archive_format") != b"pt2":
        raise NotAllowedError("its format is not pt2")
    pickled = {INPUTS} | (_UNTIL_2_8 & set(archive.records))
    for folder, config in _CONFIGS.items():
        if config in archive.records:
            content = _parsed(archive, config)
            _checked(schema.PayloadConfig, content, config)
            entries = content["config"].values()
            pickled |= {folder + entry["path_name"] for entry in entries if entry["use_pickle"]}
    for record in sorted(pickled):
        if content := archive.read(record):
            _check_pickled(content, record, name)


def _check_pickled(content: bytes, record: str, name: str) -> None:
    """Unpickle a record the way torch does first. If that fails, torch would unpickle it in a way that runs code."""
    label = f"{name} ({record})"
    with open_archive(content, label) as archive:
        for part in archive.records:
            if not _PICKLED_PARTS.fullmatch(part):
                raise NotAllowedError(f"torch.save writes no record {short(part)} in {record}")
    unsafe = unsafe_globals(io.BytesIO(content))
    if unsafe is None or unsafe:
        detail = f" It names {', '.join(unsafe[:3])}." if unsafe else ""
        raise LoadError(f"{name} holds pickled code ({record}), which loading would run.{detail}", **TRUST)
    try:
        torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        raise NotAllowedError(f"{record} cannot be read without running code") from error


# --- the program ------------------------------------------------------------------------------------------------------


def _parsed(archive: Archive, record: str) -> Any:
    try:
        return json.loads(archive.read(record))
    except (ValueError, RecursionError) as error:
        raise NotAllowedError(f"{record} is not valid JSON") from error


def _checked_graphs(program: Any) -> schema.ExportedProgram:
    made: schema.ExportedProgram = _checked(schema.ExportedProgram, program, _MODEL)
    for argument in program["graph_module"]["graph"]["inputs"]:
        check_plain(argument.get("as_string", ""))  # torch compares it with what it is called with, in source code
    return made


def _free(text: str) -> None:
    """Any text: torch keeps it as a value."""


def _word(text: str) -> None:
    if not re.fullmatch("[A-Za-z]+", text):
        raise NotAllowedError(f"it has {short(text)} where a single word stands")


def _payload(text: str) -> None:
    if not re.fullmatch("(weight|tensor)_[0-9]+", text):
        raise NotAllowedError(f"it has weights in {short(text)}, which is no record of weights")


def _no_object(text: str) -> None:
    raise NotAllowedError(f"it has an object of the class {short(text)}, which cannot be read without running code")


def _metadata(key: str, text: str) -> None:
    if key == "source_fn_stack":
        check_source_functions(text)
    elif key == "nn_module_stack":
        check_module_stack(text)


Check = Callable[[str], None]
# The form of every text in the schema, by class and field. For a dict: of its keys.
TEXTS: dict[type, dict[str, Check]] = {
    schema.Argument: {"as_string": _free, "as_strings": _free, "as_operator": check_operator,
                      "as_string_to_argument": check_identifier},
    schema.ConstantValue: {"as_string": check_plain},
    schema.SymExpr: {"expr_str": check_expression},
    schema.Device: {"type": _word},
    schema.TensorArgument: {"name": check_identifier},
    schema.TokenArgument: {"name": check_identifier},
    schema.SymIntArgument: {"as_name": check_identifier},
    schema.SymFloatArgument: {"as_name": check_identifier},
    schema.SymBoolArgument: {"as_name": check_identifier},
    schema.GraphArgument: {"name": check_identifier},
    schema.CustomObjArgument: {"name": check_identifier, "class_fqn": _no_object},
    schema.NamedArgument: {"name": check_keyword_argument},
    schema.Node: {"target": check_operator, "name": check_identifier, "metadata": _free},
    schema.Graph: {"tensor_values": check_identifier, "sym_int_values": check_identifier,
                   "sym_bool_values": check_identifier, "sym_float_values": check_identifier,
                   "custom_obj_values": check_identifier},
    schema.InputToConstantInputSpec: {"name": check_identifier},
    schema.InputToParameterSpec: {"parameter_name": check_path},
    schema.InputToBufferSpec: {"buffer_name": check_path},
    schema.InputToTensorConstantSpec: {"tensor_constant_name": check_path},
    schema.InputToCustomObjSpec: {"custom_obj_name": check_path},
    schema.BufferMutationSpec: {"buffer_name": check_path},
    schema.ParameterMutationSpec: {"parameter_name": check_path},
    schema.GradientToParameterSpec: {"parameter_name": check_path},
    schema.GradientToUserInputSpec: {"user_input_name": check_identifier},
    schema.UserInputMutationSpec: {"user_input_name": check_identifier},
    schema.ModuleCallSignature: {"in_spec": lambda text: check_tree(text, arguments=True),
                                 "out_spec": lambda text: check_tree(text, arguments=False),
                                 "forward_arg_names": check_identifier},
    schema.ModuleCallEntry: {"fqn": check_path},
    schema.NamedTupleDef: {"field_names": check_identifier},
    schema.GraphModule: {"metadata": _free, "treespec_namedtuple_fields": _free},
    schema.ExportedProgram: {"opset_version": _word, "range_constraints": check_expression, "verifiers": _word,
                             "torch_version": _free, "guards_code": check_guard},
    schema.PayloadMeta: {"path_name": _payload},
    schema.PayloadConfig: {"config": check_path},
}  # fmt: skip


def _checked(kind: Any, value: Any, where: str, text: Check | None = None) -> Any:
    """Check a value of JSON against a type of the schema, and convert it as torch does. text: the form of its texts."""
    if isinstance(kind, str):
        kind = getattr(schema, kind)
    arguments, origin = typing.get_args(kind), typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _checked(next(part for part in arguments if part is not types.NoneType), value, where, text)
    if origin is list:
        return [_checked(arguments[0], part, where, text) for part in _of(list, value, where)]
    if origin is dict:
        made = {}
        for key, part in _of(dict, value, where).items():
            _check_text(text, key, where)
            if arguments[1] is str:
                _metadata(key, _of(str, part, where))
                made[key] = part
            else:
                made[key] = _checked(arguments[1], part, where, text)
        return made
    if dataclasses.is_dataclass(kind):
        return _made(kind, _of(dict, value, where), where)
    if isinstance(kind, type) and issubclass(kind, IntEnum):
        if type(value) is not int or value not in list(kind):
            raise NotAllowedError(f"{where} is {short(str(value))}, which is no {kind.__name__}")
    elif kind is str:
        _check_text(text, _of(str, value, where), where)
    elif kind is float:
        if value not in ("Infinity", "-Infinity", "NaN"):
            _of((int, float), value, where)
        return float(value)
    elif abs(_of(kind, value, where)) >= _LARGEST:
        raise NotAllowedError(f"{where} is too large a number")
    return value


def _made(kind: Any, value: dict[str, Any], where: str) -> Any:
    """Make a dataclass of checked fields. A union has exactly one; torch ignores those that it does not know."""
    hints, union = _hints(kind), issubclass(kind, _Union)
    if union and (len(value) != 1 or next(iter(value)) not in hints):
        raise NotAllowedError(f"{where} is not one of the kinds of {kind.__name__}")
    for name in () if union else _required(kind):
        if name not in value:
            raise NotAllowedError(f"{kind.__name__}.{name} is missing in {where}")
    forms = TEXTS.get(kind, {})
    fields = {
        name: _checked(hint, value[name], f"{kind.__name__}.{name}", forms.get(name))
        for name, hint in hints.items()
        if name in value
    }
    return kind.create(**fields) if union else kind(**fields)


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind, vars(schema))


@functools.cache
def _required(kind: Any) -> tuple[str, ...]:
    """The names of the fields of a dataclass that have no default."""
    missing = dataclasses.MISSING
    return tuple(
        field.name
        for field in dataclasses.fields(kind)
        if field.default is missing and field.default_factory is missing
    )


def _check_text(text: Check | None, value: str, where: str) -> None:
    if text is None:
        raise NotAllowedError(f"{where} has the text {short(value)}, whose form this version of surgeon does not know")
    text(value)


def _of(kind: Any, value: Any, where: str) -> Any:
    """The value if it has this type. A truth value is no number."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise NotAllowedError(f"{where} has a value of the wrong type ({type(value).__name__})")
    return value
