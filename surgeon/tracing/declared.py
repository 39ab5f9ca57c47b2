"""Read from an exported graph at which sizes torch.export knows it to hold: ranges, equal sizes, other conditions."""

from __future__ import annotations

import ast
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from surgeon.graph.calls import input_paths
from surgeon.graph.sizes import Axis, Input, Sizes, check_expression, evaluate, kind_of, names_in, substitute

_ROLES = ("batch", "tokens")
_FAR = 130  # conditions are tried at all sizes up to this one, and on this many combinations of several sizes
_COMBINATIONS = 8000


def declared_sizes(graph: GraphModule, guards: Sequence[str] = ()) -> Sizes:
    """Return the sizes that the export of a graph found it to hold for.

    Export takes one path through the Python code of a model. Whatever it had to know about a size for that is a
    condition of the graph. A condition that cannot be written down fixes the sizes it is about.

    Args:
        guards: the conditions of a program that was loaded from a file, in torch's own notation, such as
            "L['x'].size()[1] <= 16". A graph that was just exported has them in its symbols.
    """
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    values = {node.name: node.meta.get("val") for node in placeholders}
    names = _axis_names(values)
    environment = _environment(values)
    conditions = [] if environment is None else _conditions(environment, names)
    if guards:
        paths = [f"L{pytree.keystr(path)}" for path in input_paths(graph)]  # as torch writes them: L['batch']['x']
        conditions += [_of_guard(guard, paths, values, names) for guard in guards]
    fixed = {name for text, about in conditions if text is None for name in about}
    inputs = tuple(_input(name, value, names, fixed) for name, value in values.items())
    used = {size for given in inputs for size in given.shape or ()}
    names = {symbol: name for symbol, name in names.items() if name in used}
    axes = {name: _range(environment, symbol) for symbol, name in names.items()}
    traced = {name: _hint(environment, symbol) for symbol, name in names.items()}
    sizes = Sizes(inputs, axes, (), {name: size for name, size in traced.items() if size is not None})
    return _with_rules(
        sizes, [(text, about) for text, about in conditions if text is not None and about <= axes.keys()]
    )


def _axis_names(values: Mapping[str, Any]) -> dict[Any, str]:
    """Name every symbol that is itself the size of an input: "batch" and "tokens", or more of these by their input."""
    names: dict[Any, str] = {}
    for name, value in values.items():
        for dim, size in enumerate(value.shape if isinstance(value, Tensor) else ()):
            if isinstance(size, torch.SymInt) and (symbol := size.node.expr).is_Symbol and symbol not in names:
                role = _ROLES[dim] if dim < len(_ROLES) else f"dim{dim}"
                names[symbol] = role if role not in names.values() else f"{name}_{role}"
    return names


def _environment(values: Mapping[str, Any]) -> Any | None:
    sizes: Iterator[Any] = (size for value in values.values() if isinstance(value, Tensor) for size in value.shape)
    return next((size.node.shape_env for size in sizes if isinstance(size, torch.SymInt)), None)


def _input(name: str, value: Any, names: Mapping[Any, str], fixed: set[str]) -> Input:
    if isinstance(value, Tensor):
        shape = tuple(_size(size, names, fixed) for size in value.shape)
        return Input(name, shape, kind=kind_of(value.dtype))
    plain = value is None or type(value) in (bool, int, float, str)
    return Input(name, None, value, True) if plain else Input(name)


def _size(size: Any, names: Mapping[Any, str], fixed: set[str]) -> int | str:
    if isinstance(size, int) or not size.node.expr.free_symbols:
        return int(size)
    text = _text(size.node.expr, names)
    if text is None or any(name in fixed for name in _names_in(size.node.expr, names)):
        return int(size.node.hint)
    return text


def _names_in(expression: Any, names: Mapping[Any, str]) -> list[str]:
    return [names[symbol] for symbol in expression.free_symbols if symbol in names]


def _text(expression: Any, names: Mapping[Any, str]) -> str | None:
    """The expression in Python; None if it is about other things than the named sizes, or is more than arithmetic."""
    if not expression.free_symbols <= names.keys():
        return None
    symbols = {str(symbol): names[symbol] for symbol in expression.free_symbols}
    # It brings sympy along, which takes a third of the time of torch itself.
    from torch.utils._sympy.printers import PythonPrinter

    text = str(PythonPrinter().doprint(expression))
    try:
        check_expression(text, symbols)
    except ValueError:
        return None
    return substitute(text, symbols)


Condition = tuple[str | None, set[str]]
"""A condition in Python, None if it cannot be written down, and the axes it is about."""


def _conditions(environment: Any, names: Mapping[Any, str]) -> list[Condition]:
    """What the export had to know. Sizes that it found equal are one symbol."""
    found = (environment.replace(guard.expr) for guard in environment.guards)
    return [
        (_text(expression, names), {names[symbol] for symbol in expression.free_symbols if symbol in names})
        for expression in found
        if expression.free_symbols & names.keys()
    ]


def _of_guard(guard: str, paths: Sequence[str], values: Mapping[str, Any], names: Mapping[Any, str]) -> Condition:
    """A condition of a program from a file, with sizes of inputs replaced by numbers and names of axes."""
    about: set[str] = set()
    shapes = dict(zip(paths, values.values(), strict=True))

    class Replace(ast.NodeTransformer):
        def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
            match node:
                case ast.Subscript(
                    value=ast.Call(func=ast.Attribute(value=place, attr="size"), args=[]), slice=ast.Constant(value=dim)
                ):
                    size = shapes[ast.unparse(place)].shape[dim]
                    text = str(size) if isinstance(size, int) else _text(size.node.expr, names)
                    about.update([] if isinstance(size, int) else _names_in(size.node.expr, names))
                    return ast.parse(f"({text})", mode="eval").body
            return node

    try:
        text = ast.unparse(Replace().visit(ast.parse(guard.strip(), mode="eval").body))
        check_expression(text, names.values())
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, SyntaxError, RecursionError):
        return None, about or set(names.values())
    return text, about


def _range(environment: Any, symbol: Any) -> Axis:
    """The range of a size. Export reasons as if sizes were at least 2, but its programs also take 1."""
    found = environment.var_to_range.get(symbol)
    if found is None:
        return Axis()
    least, most = found.lower, found.upper
    return Axis(
        int(least) if least.is_Integer and least > 2 else 1,
        int(most) if most.is_Integer and most < 2**31 else None,
    )


def _hint(environment: Any, symbol: Any) -> int | None:
    value = environment.backed_var_to_val.get(symbol)
    return None if value is None else int(value)


def _with_rules(sizes: Sizes, conditions: Iterable[tuple[str, set[str]]]) -> Sizes:
    """Add the conditions that say more than the ranges do."""
    axes, rules = dict(sizes.axes), []
    for text, about in conditions:
        if len(about) == 1:
            (name,) = about
            multiple = _multiple(text, name, axes[name])
            if multiple is not None:
                axes[name] = replace(axes[name], multiple=math.lcm(axes[name].multiple, multiple))
                continue
        if not always(text, axes):
            rules.append(text)
    return replace(sizes, axes=axes, rules=tuple(dict.fromkeys(rules)))


def _multiple(rule: str, name: str, axis: Axis) -> int | None:
    """The number whose multiples are the sizes that satisfy the rule; None if they are not such a set."""
    tried = range(max(1, axis.least), 1 + min(4 * _FAR, axis.most or 4 * _FAR))
    allowed = [size for size in tried if evaluate(rule, {name: size})]
    step = allowed[1] - allowed[0] if len(allowed) > 1 else 0
    return step if step > 1 and allowed == [size for size in tried if size % step == 0] else None


def always(rule: str, axes: Mapping[str, Axis]) -> bool:
    """Whether a condition holds at all sizes within the ranges, as far as `telling_sizes` can tell."""
    return not any(True for _ in breaking(rule, axes))


def breaking(rule: str, axes: Mapping[str, Axis]) -> Iterator[dict[str, int]]:
    """Yield combinations of sizes within the ranges that break a condition, small ones first."""
    about = sorted(names_in(rule))
    each = int(_COMBINATIONS ** (1 / max(1, len(about))))
    tried = [telling_sizes(rule, axes[name])[:each] for name in about]
    for sizes in itertools.product(*tried):
        found = dict(zip(about, sizes, strict=True))
        if not evaluate(rule, found):
            yield found


def telling_sizes(rule: str, axis: Axis) -> list[int]:
    """Return sizes at which a condition may change from true to false, the most telling first.

    A condition changes where a size meets one of the numbers in it, or a multiple, part or root of it: those, the small
    sizes, and the ends of the range, each with its neighbours.
    """
    numbers = {int(number) for number in re.findall(r"\d+", rule)} - {0, 1}
    around = [
        *(part for number in numbers for part in (number, 2 * number, 3 * number, math.isqrt(number))),
        *(part for number in numbers for k in range(2, 20) for part in (number // k, k * number)),
    ]
    ends = [axis.least, *([] if axis.most is None else [axis.most]), 2**10, 2**15, 2**20, 2**31]
    first = [size + by for size in (*around[: 4 * len(numbers)], *ends) for by in (0, -1, 1)]
    step = axis.multiple
    small = range(axis.least, _FAR * step)
    rest = [size + by for size in around for by in (0, -1, 1)]
    near = [size // step * step for size in first + rest] if step > 1 else []
    ordered = dict.fromkeys([*range(0, 12 * step, step), *first, *near, *small, *rest])
    return [size for size in ordered if size in axis]
