"""One architecture of the zoo: how to build it, what to feed it, and which FFNs must and must not be found in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

Inputs = tuple[Any, ...] | dict[str, Any]
"""Positional arguments as a tuple, keyword arguments as a dict."""


@dataclass(frozen=True)
class Trap:
    """A place that looks like an FFN and must not be converted.

    `path` is the module whose linears must stay as they are: no site may lie at it or below it. `why` says in a few
    words what conversion would break, or why the place is no FFN at all.
    """

    path: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model with a known answer.

    `build` returns the model in eval mode; the caller seeds. `inputs(batch)` returns arguments for a batch of that
    size (the caller seeds as well); all batches of one case fit one traced graph unless `fixed_batch` says otherwise.

    `required` names the FFNs that must be found, each by the module that owns it or by the common prefix of its linears
    ("" where they share none). `count` is the number of FFNs in all, `len(required)` by default, None where it is not
    known. `alternatives` lists other numbers that are right as well (of overlapping sites one is chosen). With `exact`
    no other site may be found. `gated` and `activation` describe every site of the case, None where they differ or are
    not known. `untraceable` says why no graph can be taken of the model: an error that says so is right in that case.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    required: tuple[str, ...] = ()
    count: int | None = None
    alternatives: tuple[int, ...] = ()
    exact: bool = True
    gated: bool | None = None
    activation: str | None = None
    traps: tuple[Trap, ...] = ()
    quick: bool = False
    fixed_batch: bool = False
    tolerance: float = 1e-4
    untraceable: str = ""
    note: str = ""

    @property
    def required_count(self) -> int | None:
        """How many FFNs must be found, or None where the case does not say."""
        return len(self.required) if self.count is None and self.required else self.count

    def missing(self, found: Iterable[str]) -> list[str]:
        """Return the required paths that no found path accounts for.

        A found path accounts for a required one when they are equal or one lies below the other, and for no second one.
        """
        left = list(found)
        unmet = []
        for wanted in self.required:
            if wanted in left:
                left.remove(wanted)
            else:
                unmet.append(wanted)
        missing = []
        for wanted in unmet:
            near = next((path for path in left if _nested(path, wanted)), None)
            if near is None:
                missing.append(wanted)
            else:
                left.remove(near)
        return missing

    def sprung(self, found: Iterable[str]) -> list[Trap]:
        """Return the traps that one of the found paths lies in."""
        paths = list(found)
        return [trap for trap in self.traps if any(path == trap.path or _below(path, trap.path) for path in paths)]


def _below(path: str, owner: str) -> bool:
    return not owner or path.startswith(owner + ".")


def _nested(a: str, b: str) -> bool:
    return a == b or _below(a, b) or _below(b, a)


class Registry(Mapping[str, Case]):
    """Cases by name, `family/name`, in the order in which they were added. A name that is taken is an error."""

    def __init__(self, family: str, empty_because: str = "") -> None:
        self.family = family
        self._cases: dict[str, Case] = {}
        self.empty_because = empty_because
        """Why there are no cases, where a library they need cannot be imported."""

    def add(self, case: Case) -> None:
        """Register a case under `family/name`."""
        name = f"{self.family}/{case.name}"
        if name in self._cases:
            raise ValueError(f"two cases are named {name!r}")
        self._cases[name] = replace(case, name=name)

    def __getitem__(self, name: str) -> Case:
        return self._cases[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._cases)

    def __len__(self) -> int:
        return len(self._cases)

    def quick(self) -> list[Case]:
        """Return the small representative subset that every test run can afford."""
        return [case for case in self.values() if case.quick]

    def mark_quick(self, names: Iterable[str]) -> None:
        """Add the named cases to the quick subset."""
        for name in names:
            full = f"{self.family}/{name}"
            self._cases[full] = replace(self._cases[full], quick=True)


def as_call(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Split inputs into positional and keyword arguments."""
    return ((), dict(inputs)) if isinstance(inputs, dict) else (inputs, {})


def tensors(value: Any) -> list[Tensor]:
    """Return the floating-point tensors of a nested output in a fixed order."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        return [leaf for item in value.values() for leaf in tensors(item)]
    if isinstance(value, (tuple, list)):
        return [leaf for item in value for leaf in tensors(item)]
    return []
