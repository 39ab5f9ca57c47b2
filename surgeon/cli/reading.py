"""From what was typed to what the jobs take."""

from __future__ import annotations

import functools
import inspect as signatures
from collections.abc import Callable, Container, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon.cli.options import DATA_OPTIONS
from surgeon.errors import UsageError
from surgeon.jobs.options import DataOptions

if TYPE_CHECKING:
    from surgeon.passes import Pass


def with_data_options(function: Callable[..., None]) -> Callable[..., None]:
    """Let a command take the options that say how to read data in place of its parameter of type `DataOptions`.

    A parameter `DataOptions | None` is None without --data; the other options are refused then. An option that the
    command also has itself, such as `task`, stands where the command has it and is handed to both.
    """
    own = signatures.signature(function).parameters
    asked = next((one for one in own.values() if one.annotation in (DataOptions, DataOptions | None)), None)
    if asked is None:
        return function

    @functools.wraps(function)
    def take(run: Any, **options: Any) -> None:
        # What is None was not given, and has its default.
        given = {field.name: options[field.name] for field in fields(DataOptions) if options[field.name] is not None}
        if "spec" not in given:
            _check_unused(options, own)
        kept = {name: value for name, value in options.items() if name in own}
        function(run, **kept, **{asked.name: DataOptions(**given) if "spec" in given else None})

    run, *others = own.values()
    mixed = []
    for parameter in others:
        mixed += _data_parameters(parameter, own) if parameter is asked else [parameter]
    keywords = (parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in mixed)
    take.__signature__ = signatures.Signature([run, *keywords])  # type: ignore[attr-defined]
    return take


def _check_unused(options: Mapping[str, Any], own: Container[str]) -> None:
    """Without data, refuse the options that say how to read it.

    Raises:
        UsageError: one was given that the command does not have itself.
    """
    for field in fields(DataOptions):
        if field.name != "spec" and field.name not in own and options[field.name] != field.default:
            raise UsageError(f"--{field.name.replace('_', '-')} says how to read data, and there is none: give --data.")


def _data_parameters(asked: signatures.Parameter, own: Container[str]) -> list[signatures.Parameter]:
    """The fields of `DataOptions` as parameters of a command, without those that it has itself."""
    return [
        asked.replace(
            name=field.name,
            annotation=DATA_OPTIONS[field.name],
            default=asked.default if field.name == "spec" else field.default,
        )
        for field in fields(DataOptions)
        if field.name not in own
    ]


def check_no_pass(model: str) -> None:
    """Refuse a pass where a model is wanted, unless a file has its name.

    Raises:
        UsageError: with the command that shows a pass.
    """
    from surgeon.passes.registry import all_passes

    if model in all_passes() and not Path(model).exists():
        raise UsageError(
            f"'{model}' is a pass, and MODEL is missing. To see the options of a pass, run surgeon passes {model}."
        )


def build(names: str | None, settings: list[str] | None) -> list[Pass[Any]]:
    """The passes of `--passes` with the options of `--set`.

    Raises:
        UsageError: none, or one that does not exist; see `surgeon.surgery.recipe.build`.
    """
    from surgeon.surgery import recipe

    wanted = [name.strip() for name in (names or "").split(",") if name.strip()]
    if not wanted:
        raise UsageError("Say which passes to run: --passes sparsify,moeify. surgeon passes lists them.")
    return recipe.build(wanted, recipe.parse_settings(settings or []))
