"""Fit the weights of a checkpoint to a model whose names they do not quite have.

Training saves a model inside other things: under a key of a dict, beside an optimizer and an average of the weights,
and inside modules that wrap it or its parts (`module.`, `_orig_mod.`, `model.`, in any order and depth). None of these
names is known here. A wrapper shows in the tree of names: it is the only child of its parent, and the model has no
child of that name. A part is recognised because its names and shapes are all those of the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from surgeon.errors import some

_DEPTH = 6  # of dicts in a checkpoint, and of prefixes before the model's names


@dataclass(frozen=True)
class Fit:
    """Weights under the names of a model.

    model: the name of the model's class.
    state: the weights by the model's names. Weights that the model does not have keep their own names.
    problems: what does not fit, by kind: names that are missing, unexpected, or of the wrong shape. Empty if all fits.
    notes: where the weights were found and what was removed from their names, one sentence each.
    """

    model: str
    state: dict[str, Tensor]
    problems: dict[str, list[str]]
    notes: tuple[str, ...]

    @property
    def badness(self) -> int:
        """The number of names that do not fit."""
        return sum(map(len, self.problems.values()))


def holds_weights(content: object) -> bool:
    """Whether an object is a dict of tensors, or a dict that contains one."""
    return next(_states(content), None) is not None


def modules_in(content: object, where: tuple[str, ...] = ()) -> Iterator[tuple[str, nn.Module]]:
    """Iterate over the modules in nested dicts, each with its keys, joined by a full stop."""
    if isinstance(content, nn.Module):
        yield ".".join(where), content
    elif isinstance(content, Mapping) and len(where) < _DEPTH:
        for key, value in content.items():
            yield from modules_in(value, (*where, str(key)))


def best_fit(content: object, model: nn.Module) -> Fit:
    """Find the weights in a checkpoint that fit a model best.

    Args:
        content: nested dicts with at least one dict of tensors (see `holds_weights`).
        model: a module, possibly without values.

    Returns:
        The first fit without problems, with a note if others are as good; else the one with the fewest problems.
    """
    fits = []
    for keys, state in _states(content):
        for prefix, part in _parts(state, model):
            fit = _fit(keys, prefix, part, state, model)
            fits.append((".".join(filter(None, (keys, prefix.rstrip(".")))), fit))
    good = [(name, fit) for name, fit in fits if not fit.problems]
    if not good:
        return min((fit for _, fit in fits), key=lambda fit: fit.badness)
    (_, best), *others = good
    if others:
        names = some([repr(name) for name, _ in others])
        note = f"The file holds other weights that fit as well, which were not used: {names}."
        return replace(best, notes=(*best.notes, note))
    return best


def _states(content: object, keys: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Iterate over the dicts of tensors in a checkpoint, the outer ones first, each with the keys that lead to it."""
    if not isinstance(content, Mapping) or depth > _DEPTH:
        return
    state = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if state:
        yield keys, state
    for key, value in content.items():
        if isinstance(key, str):
            yield from _states(value, f"{keys}.{key}" if keys else key, depth + 1)


# --- trees of names ---------------------------------------------------------------------------------------------------

_Tree = dict[str, Any]  # of names: a leaf is the whole name


def _tree(names: Mapping[str, Any]) -> _Tree:
    root: _Tree = {}
    for name in names:
        *parents, last = name.split(".")
        node = root
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                break
        if isinstance(node, dict) and last not in node:
            node[last] = name
        else:  # both "a" and "a.b" are names, as in no module: a key that no part of a name has
            root[f"{name}."] = name
    return root


def _parts(state: Mapping[str, Tensor], model: nn.Module) -> Iterator[tuple[str, _Tree]]:
    """Iterate over the parts of a state dict that may be the model, each with the prefix of its names."""
    own = _tree(model.state_dict())
    level = [("", _tree(state))]
    seen: set[int] = set()
    for depth in range(_DEPTH):
        for prefix, node in level:
            inner = _unwrapped(node, own, {})
            if id(inner) not in seen and (depth == 0 or inner.keys() & own.keys()):
                yield prefix, node
            seen.add(id(inner))
        level = [
            (f"{prefix}{key}.", child)
            for prefix, node in level
            for key, child in node.items()
            if isinstance(child, dict)
        ]


def _unwrapped(node: _Tree, own: _Tree, removed: dict[str, None]) -> _Tree:
    """Step through the wrappers at a place of the tree: only children of a name that the model does not have there."""
    while len(node) == 1:
        ((key, child),) = node.items()
        if key in own or not isinstance(child, dict):
            break
        removed[key] = None
        node = child
    return node


def _align(node: _Tree, own: _Tree, removed: dict[str, None]) -> Iterator[tuple[str, str]]:
    """Iterate over (name in the model, name in the file) of all names in a part of the file.

    A name that the model does not have stands for itself.
    """
    node = _unwrapped(node, own, removed)
    for key, child in node.items():
        place = own.get(key)
        if isinstance(child, dict) and isinstance(place, dict):
            yield from _align(child, place, removed)
        elif isinstance(child, dict):
            yield from ((name, name) for name in _leaves(child))
        else:
            yield (place if isinstance(place, str) else child), child


def _leaves(node: _Tree) -> Iterator[str]:
    for child in node.values():
        yield from _leaves(child) if isinstance(child, dict) else (child,)


# --- fitting ----------------------------------------------------------------------------------------------------------


def _fit(keys: str, prefix: str, part: _Tree, state: Mapping[str, Tensor], model: nn.Module) -> Fit:
    removed = dict.fromkeys(prefix.split(".")[:-1])
    pairs = list(_align(part, _tree(model.state_dict()), removed))
    fitted = {own: state[name] for own, name in pairs}
    notes = []
    if keys:
        notes.append(f"The weights were read from the key '{keys}'.")
    if removed:
        notes.append(f"These parts of the names of the weights were left out: {some(list(map(repr, removed)))}.")
    if rest := sorted(state.keys() - {name for _, name in pairs}):
        notes.append(f"The file also holds {some(rest)}, which the model does not have.")
    return Fit(type(model).__name__, fitted, _problems(fitted, model), tuple(notes))


def _problems(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, list[str]]:
    """Name what does not fit. A name may be missing if it is tied to a name that is present."""
    own = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    loaded = {id(own[name]) for name in own.keys() & state.keys()}
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    found = {
        "missing": [name for name, value in own.items() if name not in state and id(value) not in loaded],
        "unexpected": [n for n in state if n not in own and not any(re.search(p, n) for p in ignored)],
        "of the wrong shape": [
            f"{n} {tuple(state[n].shape)} instead of {tuple(own[n].shape)}"
            for n in state
            if n in own and not is_lazy(own[n]) and state[n].shape != own[n].shape
        ],
    }
    return {what: names for what, names in found.items() if names}
