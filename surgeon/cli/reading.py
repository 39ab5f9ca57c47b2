"""Turn typed options into the arguments of the jobs."""

from __future__ import annotations

import functools
import inspect as signatures
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon.cli.options import DATA_OPTIONS
from surgeon.errors import UsageError
from surgeon.jobs.options import DataOptions

if TYPE_CHECKING:
    from surgeon.passes import Pass


def with_data_options(function: Callable[..., None]) -> Callable[..., None]:
    """Replace a command's parameter of type `DataOptions` by the options that say how to read data.

    A parameter `DataOptions | None` is None without --data, and the other data options are then refused. An option that
    the command has itself, such as `task`, keeps its place and sets both.
    """
    own = signatures.signature(function).parameters
    asked = next((item for item in own.values() if item.annotation in (DataOptions, DataOptions | None)), None)
    if asked is None:
        return function

    @functools.wraps(function)
    def take(run: Any, **options: Any) -> None:
        # An option that is None was not given and keeps its default.
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
    """Refuse options that say how to read data where no data is given.

    Raises:
        UsageError: such an option was given, and the command does not have it itself.
    """
    for field in fields(DataOptions):
        if field.name != "spec" and field.name not in own and options[field.name] != field.default:
            raise UsageError(f"--{field.name.replace('_', '-')} says how to read data. Give --data too.")


def _data_parameters(asked: signatures.Parameter, own: Container[str]) -> list[signatures.Parameter]:
    """The fields of `DataOptions` as parameters of a command, except those that the command has itself."""
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
    """Refuse the name of a pass in place of a model, unless a file has that name.

    Raises:
        UsageError: `model` is a pass; the message names the command that shows it.
    """
    from surgeon.passes.catalogue import all_about

    if model in all_about() and not Path(model).exists():
        raise UsageError(f"'{model}' is a pass, not a model. To see its options, run surgeon passes {model}.")


def parse_settings(settings: Iterable[str]) -> dict[str, dict[str, str]]:
    """`["moeify.experts=16"]` → `{"moeify": {"experts": "16"}}`.

    Raises:
        UsageError: a setting does not have the form pass.option=value.
    """
    result: dict[str, dict[str, str]] = {}
    for setting in settings:
        left, equals, value = setting.partition("=")
        name, dot, key = left.rpartition(".")
        if not equals or not dot or not name or not key:
            raise UsageError(f"--set {setting}: write pass.option=value, for example --set moeify.experts=16.")
        result.setdefault(name.strip(), {})[key.strip().replace("-", "_")] = value.strip()
    return result


def build(names: str | None, settings: list[str] | None) -> list[Pass[Any]]:
    """Build the passes of `--passes` with the options of `--set`.

    Raises:
        UsageError: no pass is named, or a pass does not exist; see `surgeon.surgery.recipe.build`.
    """
    from surgeon.surgery import recipe

    wanted = [name.strip() for name in (names or "").split(",") if name.strip()]
    if not wanted:
        raise UsageError("Say which passes to run: --passes sparsify,moeify. surgeon passes lists them.")
    return recipe.build(wanted, parse_settings(settings or []))
