"""Try a traced graph at other sizes than the example's, against its model, and narrow its sizes to those that agree.

What torch.export knows of sizes is not enough: a model that reads a size as a Python number (a table, a custom op)
leaves no condition behind, and sizes of 0 and 1 are never looked at.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from surgeon.graph.sizes import Axis, Sizes, evaluate, names_in, substitute
from surgeon.tracing.declared import always, breaking

_FEW, _MANY = 4, 2000  # combinations of sizes
_MULTIPLES = (2, 3, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Outcome:
    """What graph and model did at some sizes.

    same: both ran and agree. problem: how the graph is wrong where the model runs, None if the model itself fails.
    """

    same: bool
    problem: str | None = None


Try = Callable[[Sequence[Any]], Outcome]
"""Call graph and model with flat inputs."""


@dataclass
class _Search:
    """Tries sizes, each once. sizes: what is known so far. faults: what was wrong with the graph, in sentences."""

    sizes: Sizes
    leaves: Sequence[Any]
    run: Try
    faults: list[str] = field(default_factory=list)
    _seen: dict[tuple[tuple[str, int], ...], Outcome] = field(default_factory=dict)
    _example: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._example = dict(self.sizes.traced)  # also of axes that are fixed or unified later

    def at(self, **changed: int) -> Outcome:
        """The outcome with some axes changed from the example's sizes."""
        sizes = {**self.sizes.traced, **changed}
        key = tuple(sorted(sizes.items()))
        if key not in self._seen:
            self._seen[key] = self.run(resized(self.sizes, self.leaves, sizes))
        return self._seen[key]

    def narrow(self) -> None:
        for group in self._groups():
            self._narrow(group)
        self._drop_rules()
        self._try_together()

    def _groups(self) -> list[tuple[str, ...]]:
        """Axes to change together: those that the model only takes together, such as two batch sizes."""
        roles: dict[tuple[str, int], list[str]] = {}
        for name in self.sizes.axes:
            roles.setdefault((name.rpartition("_")[2], self.sizes.traced[name]), []).append(name)
        groups: list[tuple[str, ...]] = []
        for first, *others in roles.values():
            names = (first, *others)
            if not others or all(self._free_alone(name) for name in names):
                groups += [(name,) for name in names]
            elif any(self.at(**dict.fromkeys(names, size)).same for size in self._candidates(names)):
                self.sizes = unified(self.sizes, first, others)
                groups.append((first,))
            else:
                groups += [(name,) for name in names]
        return groups

    def _free_alone(self, name: str) -> bool:
        candidates = [size for size in self._candidates((name,)) if size > 0]
        return bool(candidates) and all(self.at(**{name: size}).same for size in candidates)

    def _wanted(self, name: str) -> list[int]:
        """Sizes to try: none, one, two, another parity, and one well beyond, as far as the range allows them."""
        axis, example = self.sizes.axes[name], self.sizes.traced[name]
        step = axis.multiple
        wanted = [0, step, 2 * step, example + step, 4 * example + step]
        if axis.most is not None and axis.most < 4 * example + step:
            wanted.append(axis.most // step * step)
        within = {size for size in wanted if size in axis or (size == 0 and axis.least == 1)}
        return sorted(within - {example})

    def _candidates(self, names: tuple[str, ...]) -> list[int]:
        """The sizes to try at which no condition between several axes is broken."""
        rules = [rule for rule in self.sizes.rules if "!=" not in rule]
        return [
            size
            for size in self._wanted(names[0])
            if all(evaluate(rule, {**self.sizes.traced, **dict.fromkeys(names, size)}) for rule in rules)
        ]

    def _narrow(self, names: tuple[str, ...]) -> None:
        """Find the range around the example's size in which graph and model agree."""
        axis, example = self.sizes.axes[names[0]], self.sizes.traced[names[0]]

        def ok(size: int) -> bool:
            return size == example or self.at(**dict.fromkeys(names, size)).same

        tried = self._candidates(names)
        if all(ok(size) for size in tried if size > 0):
            found = replace(axis, least=0) if 0 in tried and ok(0) else axis
        else:
            step = self._step(axis, example, ok)
            if step is None:
                self._fix(names, {size: self.at(**dict.fromkeys(names, size)) for size in tried})
                return
            if step != axis.multiple:
                axis = Axis(max(axis.least, step), axis.most, step)
                self.sizes = self._with(names, axis)
                tried = self._candidates(names)
            good = [size for size in (*tried, example) if ok(size)]
            bad = [size for size in tried if not ok(size)]
            least, most = axis.least, axis.most
            if below := [size for size in bad if 0 < size < example]:
                least = _boundary(max(below), min(size for size in good if size > max(below)), step, ok)
            if above := [size for size in bad if size > example]:
                most = _boundary(min(above), max(size for size in good if size < min(above)), step, ok)
            found = Axis(least, most, step)
            self._blame(names, found, example)
        self.sizes = self._with(names, found)

    def _with(self, names: tuple[str, ...], axis: Axis) -> Sizes:
        return replace(self.sizes, axes={**self.sizes.axes, **dict.fromkeys(names, axis)})

    def _step(self, axis: Axis, example: int, ok: Callable[[int], bool]) -> int | None:
        """The smallest number whose multiples around the example's size agree; None if there is none."""
        for step in (axis.multiple, *(m for m in _MULTIPLES if m > axis.multiple and m % axis.multiple == 0)):
            if example % step:
                continue
            near = [size for size in (example - step, example + step) if size > 0 and size in axis]
            # A range that ends at the example's size has one neighbour that agrees.
            if any(ok(size) for size in near) and (step == axis.multiple or all(ok(size) for size in near)):
                return step
        return None

    def _fix(self, names: tuple[str, ...], known: Mapping[int, Outcome]) -> None:
        """Fix axes at the example's sizes."""
        fixed = {name: self.sizes.traced[name] for name in names}
        wrong = next(((size, o.problem) for size, o in known.items() if o.problem and size > 0), None)
        if wrong is not None:
            self.faults.append(
                f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} fixed at the example's size of "
                f"{fixed[names[0]]}: at {wrong[0]} {wrong[1]}."
            )
        self.sizes = fix(self.sizes, fixed)

    def _blame(self, names: tuple[str, ...], found: Axis, example: int) -> None:
        """Say why a range is narrower than the model's own."""
        for key, outcome in self._seen.items():
            size = dict(key).get(names[0], example)
            changed = {name for name, value in key if value != self._example[name]}
            if outcome.problem and changed == set(names) and size > 0 and size not in found:
                self.faults.append(f"{' and '.join(names)} can be {found} only: at {size} {outcome.problem}.")
                return

    def _drop_rules(self) -> None:
        """Drop conditions if graph and model agree where they are broken: at few sizes, or where two sizes are equal.

        Export notes that two sizes differ when it only chose between two ways to the same result.
        """
        for rule in self.sizes.rules:
            broken = list(itertools.islice(breaking(rule, self.sizes.axes), _MANY))
            near = sorted(filter(self._is_near, broken), key=lambda sizes: math.prod(sizes.values()))
            if "!=" in rule and len(names_in(rule)) > 1:
                last = len(near) - 1
                tried = [near[index * last // _FEW] for index in range(_FEW + 1)] if near else []
            else:
                tried = near if len(near) == len(broken) <= _FEW else []
            if tried and all(self.at(**sizes).same for sizes in tried):
                others = tuple(other for other in self.sizes.rules if other != rule)
                self.sizes = replace(self.sizes, rules=others)

    def _is_near(self, sizes: Mapping[str, int]) -> bool:
        """Whether sizes are small enough to be tried."""
        return all(size <= 64 + 16 * self.sizes.traced[name] for name, size in sizes.items())

    def _try_together(self) -> None:
        """Change all axes at once: a little, and each to its least with the others far beyond the example.

        If that goes wrong, the least is left out, or only the first axis stays free.
        """
        self._try_at({name: self._another(name) for name in self.sizes.axes})
        for name in list(self.sizes.axes):
            if name not in self.sizes.axes or len(self.sizes.axes) < 2:
                continue
            axis = self.sizes.axes[name]
            least = max(axis.least, axis.multiple)
            sizes = {other: self._far(other) for other in self.sizes.axes} | {name: least}
            if not self.sizes.allow(sizes) or least == self.sizes.traced[name]:
                continue
            outcome = self.at(**sizes)
            if outcome.problem is not None and least + axis.multiple in axis:
                narrower = replace(axis, least=least + axis.multiple)
                self.faults.append(f"{name} can be {narrower} only: at {sizes} {outcome.problem}.")
                self.sizes = self._with((name,), narrower)
        self._try_at({name: self._far(name) for name in self.sizes.axes})

    def _try_at(self, sizes: Mapping[str, int]) -> None:
        if len(sizes) < 2 or not self.sizes.allow(sizes):
            return
        outcome = self.at(**sizes)
        if outcome.problem is not None:
            first, *others = self.sizes.axes
            self.faults.append(f"Only {first} may change: at {sizes} {outcome.problem}.")
            self.sizes = fix(self.sizes, {name: self.sizes.traced[name] for name in others})

    def _far(self, name: str) -> int:
        """The largest size that was tried and agrees."""
        return max([self.sizes.traced[name], *(size for size in self._wanted(name) if size in self.sizes.axes[name])])

    def _another(self, name: str) -> int:
        axis, example = self.sizes.axes[name], self.sizes.traced[name]
        return next((size for size in (example + axis.multiple, example - axis.multiple) if size in axis), example)


def narrowed(sizes: Sizes, leaves: Sequence[Any], run: Try) -> tuple[Sizes, list[str]]:
    """Narrow `sizes` to those at which graph and model agree, and widen them to 0 and without `!=` where they do.

    Along every axis at least these sizes are tried, as far as the export allows them: none, one, two, the next one (of
    another parity), and one well beyond. Between sizes that agree and sizes that do not, the boundary is searched.

    Args:
        leaves: the flat inputs of the example. run: calls graph and model and compares them.

    Returns:
        The sizes, and what was wrong with the graph elsewhere, in sentences. A size that the model does not take
        itself is no fault of the graph.
    """
    search = _Search(sizes, leaves, run)
    search.narrow()
    return search.sizes, search.faults


def fix(sizes: Sizes, fixed: Mapping[str, int]) -> Sizes:
    """Return `sizes` with some axes as fixed numbers."""
    return _replaced(sizes, {name: str(size) for name, size in fixed.items()})


def unified(sizes: Sizes, first: str, others: Iterable[str]) -> Sizes:
    """Return `sizes` with several axes as one."""
    return _replaced(sizes, dict.fromkeys(others, first))


def _replaced(sizes: Sizes, replacements: Mapping[str, str]) -> Sizes:
    def shape(size: int | str) -> int | str:
        text = substitute(str(size), replacements)
        return text if names_in(text) else evaluate(text, {})

    axes = {name: axis for name, axis in sizes.axes.items() if name not in replacements}
    rules = dict.fromkeys(substitute(rule, replacements) for rule in sizes.rules)
    return Sizes(
        tuple(
            given if given.shape is None else replace(given, shape=tuple(map(shape, given.shape)))
            for given in sizes.inputs
        ),
        axes,
        tuple(rule for rule in rules if names_in(rule) and not always(rule, axes)),
        {name: size for name, size in sizes.traced.items() if name not in replacements},
    )


def resized(sizes: Sizes, leaves: Sequence[Any], wanted: Mapping[str, int]) -> list[Any]:
    """Return the flat inputs at other sizes of the axes. Rows are left out, or repeated from the start."""
    result = []
    for given, leaf in zip(sizes.inputs, leaves, strict=True):
        if isinstance(leaf, Tensor) and given.shape is not None:
            for dim, size in enumerate(given.shape):
                length = size if isinstance(size, int) else evaluate(size, wanted)
                if length != leaf.shape[dim]:
                    leaf = leaf.index_select(dim, torch.arange(length, device=leaf.device) % leaf.shape[dim])
        result.append(leaf)
    return result


def sizes_of(sizes: Sizes, leaves: Sequence[Any]) -> dict[str, int]:
    """Return the size of every axis in flat inputs."""
    found: dict[str, int] = {}
    for given, leaf in zip(sizes.inputs, leaves, strict=True):
        for dim, size in enumerate(given.shape or ()):
            if size in sizes.axes:
                found.setdefault(str(size), leaf.shape[dim])
    return found


def _boundary(bad: int, good: int, step: int, ok: Callable[[int], bool]) -> int:
    """Return the last size that is ok on the way from `good` to `bad`, by halving the way."""
    while abs(bad - good) > step:
        middle = good + (bad - good) // 2 // step * step if bad > good else good - (good - bad) // 2 // step * step
        if ok(middle):
            good = middle
        else:
            bad = middle
    return good


def free_dims(sizes: Sizes) -> Iterable[tuple[str, tuple[int, ...]]]:
    """Yield (name, dimensions that may change) of every input tensor."""
    for given in sizes.inputs:
        if given.shape is not None:
            yield given.name, tuple(dim for dim, size in enumerate(given.shape) if isinstance(size, str))
