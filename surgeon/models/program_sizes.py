"""The grammar of sizes in an exported program: expressions and conditions that torch evaluates when it reads them.

Texts are parsed here, and never evaluated. They must have the form that torch itself writes.
"""

from __future__ import annotations

import ast
import functools
import math
import re


class NotAllowedError(ValueError):
    """A text of a program is not of the form that torch writes. The message says what it is, without a full stop."""


_LONGEST = 10_000  # of an expression; longer ones could exhaust the parser
_SYMBOL = re.compile("(s|u|zf|zuf)[0-9]{1,6}")  # torch counts up to the number
_ASSUMPTIONS = {"integer", "positive", "nonnegative", "negative", "nonzero", "real", "finite"}
# What torch prints for sizes: its own functions, those of SymPy, and comparisons in words.
_FUNCTIONS = {
    *("Add", "Mul", "Max", "Min", "Abs", "And", "Or", "Not", "floor", "ceiling"),
    *("Equality", "Unequality", "StrictLessThan", "StrictGreaterThan", "LessThan", "GreaterThan"),
    *("FloorDiv", "ModularIndexing", "Where", "PythonMod", "Mod", "CleanDiv", "CeilDiv", "CeilToInt", "FloorToInt"),
    *("FloatTrueDiv", "IntTrueDiv", "IsNonOverlappingAndDenseIndicator", "TruncToFloat", "TruncToInt", "RoundToInt"),
    *("RoundDecimal", "ToFloat", "Identity"),
}
_POWERS = {"Pow", "PowByNatural", "FloatPow", "LShift", "RShift"}
_LARGEST_POWER = 64  # of powers in powers together: a larger one could fill the memory
_NUMBER = re.compile(r"-?[0-9]{1,40}(\.[0-9]{0,40})?([eE][+-]?[0-9]{1,3})?")
_ARITHMETIC = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod)
_COMPARISONS = (ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Eq, ast.NotEq)

_GUARD = re.compile(r"[\w '\[\]().,+\-*/%<>=!]*", re.ASCII)
_GUARD_FUNCTIONS = {
    *("max", "min", "abs", "float", "int", "bool", "round"),
    *("math.floor", "math.ceil", "math.trunc", "math.sqrt", "math.isnan", "math.pow"),
    *("torch.sym_float", "torch.sym_int", "torch.sym_max", "torch.sym_min", "torch.sym_ite", "torch.sym_sqrt"),
}
_GUARD_METHODS = {"size", "stride", "storage_offset"}


def short(text: str) -> str:
    """A text as messages show it."""
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


# --- expressions ------------------------------------------------------------------------------------------------------


@functools.lru_cache(4096)  # thousands of tensors have few sizes
def check_expression(text: str) -> None:
    """A size as torch prints it, for example `Mul(Integer(2), Symbol('s77', integer=True))` or `2*s77`."""
    try:
        _check_size(_parsed(text), _LARGEST_POWER)
    except (NotAllowedError, RecursionError):
        raise NotAllowedError(f"it has the size {short(text)}, which is not arithmetic of sizes") from None


def _parsed(text: str) -> ast.expr:
    if len(text) > _LONGEST or "\n" in text or not text.isascii():
        raise NotAllowedError("too long or not in one line")
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, MemoryError) as error:
        raise NotAllowedError("not an expression") from error


def _check_size(node: ast.expr, powers: int) -> None:
    """powers: how large the powers in this node may be, multiplied with each other."""
    match node:
        case ast.Constant(value=int() | float() as value):
            _check_number(value)
        case ast.Name(id=name) if name in ("true", "false") or _SYMBOL.fullmatch(name):
            pass
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=operand):
            _check_size(operand, powers)
        case ast.BinOp(left=base, op=ast.Pow(), right=exponent):
            _check_power(base, exponent, powers)
        case ast.BinOp(left=left, op=op, right=right) if isinstance(op, _ARITHMETIC):
            _check_size(left, powers)
            _check_size(right, powers)
        case ast.Compare(left=left, ops=ops, comparators=others) if all(isinstance(op, _COMPARISONS) for op in ops):
            for part in (left, *others):
                _check_size(part, powers)
        case ast.Call(func=ast.Name(id="Symbol"), args=[ast.Constant(value=str(name))], keywords=assumptions):
            _require(bool(_SYMBOL.fullmatch(name)))
            _require(all(one.arg in _ASSUMPTIONS and _is_bool(one.value) for one in assumptions))
        case ast.Call(func=ast.Name(id=name), args=[base, exponent], keywords=[]) if name in _POWERS:
            _check_power(base, exponent, powers)
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS:
            for argument in arguments:
                _check_size(argument, powers)
        case _:
            _number(node)


def _check_power(base: ast.expr, exponent: ast.expr, powers: int) -> None:
    left = powers // max(1, math.ceil(abs(_number(exponent))))
    _require(left >= 1)
    _check_size(base, left)


def _number(node: ast.expr) -> float:
    """The value of a number in words or digits."""
    match node:
        case ast.Constant(value=int() | float() as value):
            return _check_number(value)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_number(operand)
        case ast.Call(func=ast.Name(id="Integer"), args=[value], keywords=[]):
            return _number(value)
        case ast.Call(func=ast.Name(id="Rational"), args=[above, below], keywords=[]):
            _require(_number(below) != 0)
            return _number(above) / _number(below)
        case ast.Call(
            func=ast.Name(id="Float"),
            args=[ast.Constant(value=str(digits))],
            keywords=[] | [ast.keyword(arg="precision", value=ast.Constant(value=53))],
        ) if _NUMBER.fullmatch(digits):
            return float(digits)
    raise NotAllowedError("not a number")


def _check_number(value: float) -> float:
    _require(not isinstance(value, bool))
    _require(abs(value) < 2**64 and math.isfinite(value))
    return float(value)


def _is_bool(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, bool)


def _require(holds: bool) -> None:
    if not holds:
        raise NotAllowedError("not of the form that torch writes")


# --- guards -----------------------------------------------------------------------------------------------------------


def check_guard(text: str) -> None:
    """A condition on the inputs' sizes, for example `L['x'].size()[0] >= 2`."""
    try:
        _require(bool(_GUARD.fullmatch(text)))
        _check_condition(_parsed(text))
    except (NotAllowedError, RecursionError):
        raise NotAllowedError(f"it has the guard {short(text)}, which is not a condition on sizes") from None


def _check_condition(node: ast.expr) -> None:
    match node:
        case ast.Constant(value=None | bool() | int() | float()):
            if isinstance(node.value, int | float) and not isinstance(node.value, bool):
                _check_number(node.value)
        case ast.Constant(value=str()) | ast.Name(id="L" | "inf"):
            pass
        case ast.Attribute(value=ast.Name(id="math"), attr="inf"):
            pass
        case ast.BoolOp(values=parts):
            for part in parts:
                _check_condition(part)
        case ast.UnaryOp(op=ast.USub() | ast.Not(), operand=operand):
            _check_condition(operand)
        case ast.BinOp(left=base, op=ast.Pow(), right=exponent):
            _require(abs(_number(exponent)) <= _LARGEST_POWER)
            _check_condition(base)
        case ast.BinOp(left=left, op=op, right=right) if isinstance(op, _ARITHMETIC):
            _check_condition(left)
            _check_condition(right)
        case ast.Compare(left=left, ops=ops, comparators=others) if all(
            isinstance(op, (*_COMPARISONS, ast.Is, ast.IsNot)) for op in ops
        ):
            for part in (left, *others):
                _check_condition(part)
        case ast.Subscript(value=value, slice=ast.Constant(value=str() | int())):
            _check_condition(value)
        case ast.Attribute(value=ast.Subscript() | ast.Attribute() as value, attr=field) if field[0] != "_":
            _check_condition(value)  # the field of a registered dataclass, which torch replaces by the flat input
        case ast.Call(func=ast.Attribute(value=value, attr=method), args=[], keywords=[]) if method in _GUARD_METHODS:
            _check_condition(value)
        case ast.Call(func=function, args=arguments, keywords=[]):
            _require(ast.unparse(function) in _GUARD_FUNCTIONS)
            for argument in arguments:
                _check_condition(argument)
        case _:
            raise NotAllowedError("not a condition")
