"""The sizes of inputs at which a graph computes what its model computes.

Python code that depends on a size (`if x.shape[1] > 16`) runs once, while a graph is traced. Its result is frozen in
the graph, which is wrong at sizes where the model would take another path. So a graph carries the sizes it holds for:

    int(ids[batch, tokens]), bool(mask[batch, tokens]) or ones(bool), x[batch, tokens, 64], flag == True, 1 <= batch,
    4 <= tokens <= 512, tokens % 4 == 0, untraced(labels=[None])

See `surgeon.graph.size_check` for the check of a call against them, and `surgeon.graph.missing` for inputs that are
left out.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from types import CodeType
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

Constant = bool | int | float | str | None
Fill = Literal["", "ones", "zeros", "positions", "None", "missing", "needed"]
Kind = Literal["float", "int", "bool", "complex"]

_OPERATORS = (
    *(ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod, ast.Pow, ast.USub, ast.And, ast.Or, ast.Not),
    *(ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE),
)
_LONGEST = 2000
_FUNCTIONS = {"__builtins__": {"min": min, "max": max}}


@dataclass(frozen=True)
class Axis:
    """A size that may change from call to call: from `least` to `most` (None: no limit), in multiples of `multiple`."""

    least: int = 1
    most: int | None = None
    multiple: int = 1

    def __contains__(self, size: int) -> bool:
        return self.least <= size <= (math.inf if self.most is None else self.most) and size % self.multiple == 0

    def __str__(self) -> str:
        """The sizes in words, such as "4 to 512, multiples of 4"."""
        text = f"{self.least} or more" if self.most is None else f"{self.least} to {self.most}"
        return text + (f", multiples of {self.multiple}" if self.multiple > 1 else "")


@dataclass(frozen=True)
class Input:
    """An input of a graph.

    shape: of a tensor: numbers, names of axes, and expressions in names of axes; None for any other input.
    kind: of a tensor's numbers. "float" takes every floating-point type, "int" integers and booleans, "bool" booleans;
        "complex" is not checked.
    constant: the value that any other input had when the graph was traced, frozen in the graph. It is checked if
        `checked`; objects of other kinds than numbers and texts are not.
    fill: what stands for an input that is left out of a call. Of a tensor: "ones", "zeros" or "positions" (0, 1, 2, ...
        along the last dimension) of `dtype`. Of any other input, the constant: "None" if the call may also give None,
        "missing" if it may only leave it out. "needed": the model can do without the input, but the graph cannot. "":
        the model needs it too.
    """

    name: str
    shape: tuple[int | str, ...] | None = None
    constant: Constant = None
    checked: bool = False
    kind: Kind = "float"
    fill: Fill = ""
    dtype: torch.dtype | None = None

    def __str__(self) -> str:
        if self.shape is not None:
            text = f"{self.name}[{', '.join(map(str, self.shape)) or '()'}]"
            text = text if self.kind == "float" else f"{self.kind}({text})"
        else:
            text = f"{self.name} == {constant_text(self.constant)}" if self.checked else self.name
        if not self.fill:
            return text
        return f"{text} or {self.fill}" + ("" if self.dtype is None else f"({str(self.dtype).removeprefix('torch.')})")

    @property
    def optional(self) -> bool:
        """Whether a call may leave it out."""
        return self.fill not in ("", "needed")


@dataclass(frozen=True)
class Sizes:
    """The sizes a graph holds for.

    inputs: in the order of the graph's placeholders. axes: by name. rules: further conditions on axes, in Python.
    traced: the size of each axis in the example inputs.
    untraced: arguments of the model that the graph has no input for, each with the values that change nothing. The
        first of these is the model's default.
    """

    inputs: tuple[Input, ...] = ()
    axes: Mapping[str, Axis] = field(default_factory=dict)
    rules: tuple[str, ...] = ()
    traced: Mapping[str, int] = field(default_factory=dict)
    untraced: Mapping[str, tuple[Constant, ...]] = field(default_factory=dict)

    def __str__(self) -> str:
        """One line that `parse` reads. It is the tuple of Python expressions shown at the top of this file."""
        ranges = []
        for name, axis in self.axes.items():
            ranges.append(f"{axis.least} <= {name}" + ("" if axis.most is None else f" <= {axis.most}"))
            ranges += [f"{name} % {axis.multiple} == 0"] if axis.multiple > 1 else []
        traced = [f"traced({', '.join(f'{name}={size}' for name, size in self.traced.items())})"] if self.traced else []
        accepted = [f"{name}=[{', '.join(map(constant_text, values))}]" for name, values in self.untraced.items()]
        untraced = [f"untraced({', '.join(accepted)})"] if accepted else []
        return ", ".join([*map(str, self.inputs), *ranges, *self.rules, *traced, *untraced])

    @classmethod
    def parse(cls, text: str) -> Sizes:
        """Read what `str` wrote. Nothing of the text is run.

        Raises:
            ValueError: the text does not have this form.
        """
        return _parse(text)

    def without_check(self, name: str) -> Sizes:
        """The same sizes, with any value accepted for the input `name`, which is no tensor."""
        inputs = (Input(name, fill=given.fill) if given.name == name else given for given in self.inputs)
        return replace(self, inputs=tuple(inputs))

    def axes_in_words(self) -> str:
        """Every axis with its sizes, such as "batch: 1 or more; tokens: 2 to 512"."""
        return "; ".join([*(f"{name}: {axis}" for name, axis in self.axes.items()), *self.rules])

    def violation(self, values: Sequence[Any]) -> str | None:
        """Return what is wrong with the inputs of a call, in words; None if nothing is."""
        found: dict[str, tuple[int, str]] = {}
        later: list[tuple[str, int, str]] = []
        for given, value in zip(self.inputs, values, strict=True):
            if given.shape is None:
                if given.checked and not same_constant(value, given.constant):
                    return f"{given.name} is {value!r}, but the graph was traced with {given.constant!r}"
                continue
            if value is None and given.fill == "needed":
                return f"{given.name} is missing, and nothing that could stand for it gives what the model gives then"
            if not isinstance(value, Tensor):
                return f"{given.name} is {_article(value)}, but the graph was traced with a tensor"
            if not is_kind(value.dtype, given.kind):
                return f"{given.name} is of dtype {value.dtype}, but the graph was traced with {given.kind}"
            shape = list(value.shape)
            if len(shape) != len(given.shape):
                return f"{given.name} has {len(shape)} dimensions {shape}, but the graph was traced with {given}"
            for dim, (size, wanted) in enumerate(zip(shape, given.shape, strict=True)):
                where = f"dimension {dim} of {given.name} {shape}"
                if isinstance(wanted, int):
                    if size != wanted:
                        return f"{where} is {size}, but the graph only takes {wanted}"
                elif wanted not in self.axes:
                    later.append((wanted, size, where))
                elif found.setdefault(wanted, (size, where))[0] != size:
                    return f"{where} is {size}, but {wanted} is {found[wanted][0]} in {found[wanted][1]}"
        for name, (size, where) in found.items():
            if size not in self.axes[name]:
                return f"{where} is {size}, but the graph takes {name}: {self.axes[name]}"
        sizes = {name: size for name, (size, _) in found.items()}
        for expression, size, where in later:
            if (wanted := evaluate(expression, sizes)) != size:
                return f"{where} is {size}, but {expression} is {wanted}"
        broken = next((rule for rule in self.rules if not evaluate(rule, sizes)), None)
        return None if broken is None else f"the sizes {sizes} break the condition {broken}"

    def allow(self, sizes: Mapping[str, int]) -> bool:
        """Whether these sizes of all axes are within ranges and rules."""
        return all(size in self.axes[name] for name, size in sizes.items()) and all(
            evaluate(rule, sizes) for rule in self.rules
        )


def kind_of(dtype: torch.dtype) -> Kind:
    """Return the kind of a tensor's numbers."""
    if dtype.is_complex:
        return "complex"
    return "float" if dtype.is_floating_point else "bool" if dtype is torch.bool else "int"


def is_kind(dtype: torch.dtype, kind: Kind) -> bool:
    """Whether a graph that was traced with one kind of numbers takes a tensor of a dtype."""
    return kind in ("complex", kind_of(dtype)) or (kind == "int" and dtype is torch.bool)


@cache
def _code(expression: str) -> CodeType:
    return compile(expression, "<sizes>", "eval")


def evaluate(expression: str, sizes: Mapping[str, int]) -> int:
    """Compute an expression in names of axes. `check_expression` must have accepted it."""
    try:
        return int(eval(_code(expression), _FUNCTIONS, dict(sizes)))
    except ZeroDivisionError:
        return 0


def names_in(expression: str) -> set[str]:
    """Return the axes that an expression is about."""
    return {node.id for node in ast.walk(_tree(expression)) if isinstance(node, ast.Name)} - {"min", "max"}


def substitute(expression: str, replacements: Mapping[str, str]) -> str:
    """Return an expression with axes replaced by other expressions."""

    class Replace(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.expr:
            return _tree(replacements[node.id]) if node.id in replacements else node

    return ast.unparse(Replace().visit(_tree(expression)))


def check_expression(text: str, names: Iterable[str]) -> None:
    """Refuse an expression that is anything but arithmetic and comparisons of whole numbers and `names`.

    Raises:
        ValueError: it is.
    """
    if len(text) > _LONGEST:
        raise ValueError(f"'{text[:40]}…' is too long")
    _check_tree(_tree(text), set(names), text)


def same_constant(value: Any, constant: Constant) -> bool:
    """Whether a value is the one that is frozen in the graph. 1 and 1.0 count as the same, but not 1 and True."""
    if value is constant:
        return True
    if isinstance(value, Tensor) or constant is None or isinstance(value, bool) != isinstance(constant, bool):
        return False
    return bool(value == constant) or (value != value and constant != constant)  # NaN is NaN


def constant_text(constant: Constant) -> str:
    """A constant in Python: as `repr`, but infinity as a number that is too large, and NaN as their difference."""
    if isinstance(constant, float) and not math.isfinite(constant):
        return "1e999 - 1e999" if math.isnan(constant) else f"{'-' if constant < 0 else ''}1e999"
    return repr(constant)


def _article(value: object) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"


# --- reading ----------------------------------------------------------------------------------------------------------


def _tree(text: str) -> ast.expr:
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"'{text[:40]}' is no expression") from error


def _check_tree(tree: ast.expr, names: set[str], text: str) -> None:
    for node in ast.walk(tree):
        allowed = (
            isinstance(node, (ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Load, *_OPERATORS))
            or (isinstance(node, ast.Name) and (node.id in names or node.id in ("min", "max")))
            or (isinstance(node, ast.Constant) and isinstance(node.value, int) and -(2**63) < node.value < 2**63)
            or (isinstance(node, ast.Call) and ast.unparse(node.func) in ("min", "max") and not node.keywords)
        )
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):  # a small power, which cannot grow large
            allowed = isinstance(node.right, ast.Constant) and node.right.value in (2, 3)
        if not allowed:
            raise ValueError(f"'{ast.unparse(node)}' is not allowed in '{text[:40]}'")


def _parse(text: str) -> Sizes:
    tree = _tree(f"({text},)") if text else ast.Tuple([])
    if not isinstance(tree, ast.Tuple):
        raise ValueError(f"'{text[:40]}' is not a list of sizes")
    inputs: list[Input] = []
    conditions: list[ast.expr] = []
    traced: dict[str, int] = {}
    untraced: dict[str, tuple[Constant, ...]] = {}
    for whole in tree.elts:
        part, fill = whole, _NO_FILL
        if isinstance(whole, ast.BoolOp) and isinstance(whole.op, ast.Or) and not conditions:
            part, fill = whole.values[0], _fill(whole.values[1])
        match part:
            case ast.Subscript(value=ast.Name(id=name), slice=shape):
                inputs.append(Input(name, tuple(map(_size, _items(shape))), fill=fill[0], dtype=fill[1]))
            case ast.Call(
                func=ast.Name(id=kind), args=[ast.Subscript(value=ast.Name(id=name), slice=shape)], keywords=[]
            ) if kind in get_args(Kind):
                inputs.append(Input(name, tuple(map(_size, _items(shape))), None, False, cast("Kind", kind), *fill))
            case ast.Name(id=name):
                inputs.append(Input(name, fill=fill[0]))
            case ast.Call(func=ast.Name(id="traced"), args=[], keywords=keywords):
                traced = {str(word.arg): _whole(word.value) for word in keywords}
            case ast.Call(func=ast.Name(id="untraced"), args=[], keywords=keywords):
                untraced = {str(word.arg): _constants(word.value) for word in keywords}
            case ast.Compare(left=ast.Name(id=name), ops=[ast.Eq()], comparators=[value]) if not conditions:
                constant = math.nan if ast.unparse(value) == "1e309 - 1e309" else ast.literal_eval(value)
                inputs.append(Input(name, None, constant, True, fill=fill[0]))
            case _:
                conditions.append(part)
    axes, rules = _ranges(conditions)
    for given in inputs:
        for size in given.shape or ():
            if isinstance(size, str):
                check_expression(size, axes)
        if given.checked and not isinstance(given.constant, Constant):
            raise ValueError(f"{given.name} is no constant")
    used = {size for given in inputs for size in given.shape or ()}
    if missing := [name for name in axes if name not in used]:
        raise ValueError(f"no input has the axis '{missing[0]}'")
    for rule in rules:
        check_expression(rule, axes)
    if "self" in untraced:
        raise ValueError("self is no argument")
    return Sizes(tuple(inputs), axes, tuple(rules), traced, untraced)


_NO_FILL: tuple[Fill, torch.dtype | None] = ("", None)


def _fill(node: ast.expr) -> tuple[Fill, torch.dtype | None]:
    match node:
        case ast.Call(func=ast.Name(id=name), args=[ast.Name(id=dtype)], keywords=[]) if name in (
            *("ones", "zeros", "positions"),
        ) and isinstance(getattr(torch, dtype, None), torch.dtype):
            return cast("Fill", name), getattr(torch, dtype)
        case ast.Constant(value=None):
            return "None", None
        case ast.Name(id=name) if name in ("missing", "needed"):
            return cast("Fill", name), None
    raise ValueError(f"'{ast.unparse(node)}' cannot stand for an input")


def _constants(node: ast.expr) -> tuple[Constant, ...]:
    values = ast.literal_eval(node)
    if not isinstance(values, list) or not values or not all(isinstance(value, Constant) for value in values):
        raise ValueError(f"'{ast.unparse(node)}' is no list of constants")
    return tuple(values)


def _ranges(conditions: Iterable[ast.expr]) -> tuple[dict[str, Axis], list[str]]:
    """Split conditions into the ranges of axes, which come first for each of them, and other rules."""
    axes: dict[str, Axis] = {}
    rules = []
    for part in conditions:
        match part:
            case ast.Compare(left=least, ops=[ast.LtE()], comparators=[ast.Name(id=name)]) if name not in axes:
                axes[name] = Axis(_whole(least))
            case ast.Compare(left=least, ops=[ast.LtE(), ast.LtE()], comparators=[ast.Name(id=name), most]) if (
                name not in axes
            ):
                axes[name] = Axis(_whole(least), _whole(most))
            case ast.Compare(
                left=ast.BinOp(left=ast.Name(id=name), op=ast.Mod(), right=ast.Constant(value=int(multiple))),
                ops=[ast.Eq()],
                comparators=[ast.Constant(value=0)],
            ) if name in axes and axes[name].multiple == 1 and multiple > 1:
                axes[name] = Axis(axes[name].least, axes[name].most, multiple)
            case _:
                rules.append(ast.unparse(part))
    return axes, rules


def _items(node: ast.expr) -> list[ast.expr]:
    return node.elts if isinstance(node, ast.Tuple) else [node]


def _size(node: ast.expr) -> int | str:
    return _whole(node) if isinstance(node, ast.Constant) else ast.unparse(node)


def _whole(node: ast.expr) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    raise ValueError(f"'{ast.unparse(node)}' is not a whole number")
