"""Commands take the options that say how to read data, and get them as one object."""

# The annotations are read, as those of commands are, so they are not postponed.
import inspect
from dataclasses import fields
from typing import Any

import pytest

from surgeon.cli.options import DATA_OPTIONS
from surgeon.cli.reading import with_data_options
from surgeon.errors import UsageError
from surgeon.jobs.options import DataOptions

USUAL: dict[str, Any] = {field.name: field.default for field in fields(DataOptions)}
got: list[Any] = []


def needs_data(run: str, model: str, *, data: DataOptions, last: int = 0) -> None:
    got.extend((run, model, data, last))


def may_have_data(run: str, data: DataOptions | None = None, seed: int | None = None) -> None:
    got.extend((run, data, seed))


def needs_none(run: str, model: str) -> None:
    got.extend((run, model))


@pytest.fixture(autouse=True)
def nothing_got() -> None:
    got.clear()


def test_every_field_has_an_option() -> None:
    assert list(DATA_OPTIONS) == list(USUAL)


def test_the_options_stand_where_the_object_does() -> None:
    parameters = inspect.signature(with_data_options(needs_data)).parameters
    assert list(parameters) == ["run", "model", *DATA_OPTIONS, "last"]
    assert parameters["spec"].default is inspect.Parameter.empty
    assert all(parameters[name].default == USUAL[name] for name in DATA_OPTIONS if name != "spec")
    assert with_data_options(needs_none) is needs_none


def test_they_become_one_object() -> None:
    with_data_options(needs_data)("run", model="m", last=1, **USUAL | {"spec": "d.csv", "limit": 3, "text": "body"})
    assert got == ["run", "m", DataOptions("d.csv", text="body", limit=3), 1]


@pytest.mark.parametrize(("spec", "seed", "data"), [
    ("d.csv", 7, DataOptions("d.csv", seed=7)),
    ("d.csv", None, DataOptions("d.csv")),
    (None, 7, None),
])  # fmt: skip
def test_an_option_of_the_command_itself_is_handed_to_both(spec: Any, seed: Any, data: Any) -> None:
    take = with_data_options(may_have_data)
    assert list(inspect.signature(take).parameters) == ["run", *DATA_OPTIONS]  # the last of them is the seed
    take("run", **USUAL | {"spec": spec, "seed": seed})
    assert got == ["run", data, seed]


@pytest.mark.parametrize(("name", "value"), [("text", "body"), ("label", "y"), ("limit", 3), ("batch_size", 4)])
def test_what_says_how_to_read_data_needs_data(name: str, value: Any) -> None:
    flag = f"--{name.replace('_', '-')}"
    with pytest.raises(UsageError, match=f"^{flag} says how to read data. Give --data too"):
        with_data_options(may_have_data)("run", **USUAL | {"spec": None, name: value})
    with_data_options(may_have_data)("run", **USUAL | {"spec": "d.csv", name: value})
    assert got[1] == DataOptions("d.csv", **{name: value})
