"""The check of a call's inputs against the sizes of its graph.

It costs about a microsecond for each call, and `torch.compile` and `torch.export` read through it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.compiler import is_compiling
from torch.fx import Proxy
from torch.fx.node import has_side_effect

from surgeon.errors import SizeError
from surgeon.graph.sizes import Sizes, constant_text, same_constant, substitute


def check_sizes(sizes: str, *inputs: Any) -> Any:
    """Refuse inputs of a call at whose sizes the graph does not hold.

    Args:
        sizes: see `Sizes`. inputs: the flat inputs of the call.

    Raises:
        SizeError: the message names the input, the dimension, and the sizes that the graph takes.
    """
    if isinstance(inputs[0], Proxy):  # a graph that is traced symbolically, by pickle for one, keeps the check
        return inputs[0].tracer.create_proxy("call_function", check_sizes, (sizes, *inputs), {})
    (_CHECKS.get(sizes) or prepare_check(sizes))(*inputs)
    return None


has_side_effect(check_sizes)

_KIND = {"float": ".is_floating_point", "int": ".is_floating_point is False", "bool": " is boolean"}
_CHECKS: dict[str, Callable[..., None]] = {}


def prepare_check(sizes: str) -> Callable[..., None]:
    """Compile the check for `sizes`, once.

    Raises:
        ValueError: `sizes` cannot be read.
    """
    if sizes not in _CHECKS:
        _CHECKS[sizes] = _compiled(Sizes.parse(sizes))
    return _CHECKS[sizes]


def _compiled(sizes: Sizes) -> Callable[..., None]:
    """A function of the flat inputs that evaluates one condition, and explains it only if it is false."""
    arguments = [f"i{index}" for index in range(len(sizes.inputs))]
    shapes: dict[tuple[int | str, ...], str] = {}
    lines, terms, places, derived = [], [], {}, []
    for argument, given in zip(arguments, sizes.inputs, strict=True):
        if given.shape is None:
            if given.checked:
                terms.append(f"same({argument}, {constant_text(given.constant)})")
            continue
        lines.append(f"        {argument}s = {argument}.shape")
        if given.kind != "complex":
            terms.append(f"{argument}.dtype{_KIND[given.kind]}")
        if given.shape in shapes:
            terms.append(f"{argument}s == {shapes[given.shape]}")
            continue
        shapes[given.shape] = f"{argument}s"
        terms.append(f"len({argument}s) == {len(given.shape)}")
        for dim, wanted in enumerate(given.shape):
            place = f"{argument}s[{dim}]"
            if isinstance(wanted, str) and wanted in sizes.axes and wanted not in places:
                places[wanted] = place
            elif isinstance(wanted, str) and wanted not in sizes.axes:
                derived.append(f"{place} == {{{wanted}}}")
            else:
                terms.append(f"{place} == {places.get(str(wanted), wanted)}")
    for name, axis in sizes.axes.items():
        most = "" if axis.most is None else f" <= {axis.most}"
        if axis.least > 0 or most:
            terms.append(f"{axis.least} <= {places[name]}{most}")
        if axis.multiple > 1:
            terms.append(f"{places[name]} % {axis.multiple} == 0")
    for term in derived:
        place, _, expression = term.partition(" == ")
        terms.append(f"{place} == ({substitute(expression[1:-1], places)})")
    terms += [f"({substitute(rule, places)})" for rule in sizes.rules]
    source = f"""
def check({", ".join(arguments)}):
    try:
        pass
{chr(10).join(lines)}
    except AttributeError:  # not a tensor
        refuse(sizes, ({"".join(f"{argument}, " for argument in arguments)}))
    if not ({" and ".join(terms) or "True"}):
        if is_compiling():
            raise SizeError(in_short)
        refuse(sizes, ({"".join(f"{argument}, " for argument in arguments)}))
"""
    namespace: dict[str, Any] = {
        "refuse": _refuse,
        "sizes": sizes,
        "same": same_constant,
        "boolean": torch.bool,
        "is_compiling": is_compiling,
        "SizeError": SizeError,
        "in_short": f"Wrong sizes. {_wanted(sizes)}",  # a compiler cannot follow how the full text is made
    }
    exec(source, namespace)
    check: Callable[..., None] = namespace["check"]
    return check


def _refuse(sizes: Sizes, inputs: Sequence[Any]) -> None:
    raise SizeError(f"Wrong sizes: {sizes.violation(inputs)}. {_wanted(sizes)}")


def _wanted(sizes: Sizes) -> str:
    traced = ", ".join(f"{name} {size}" for name, size in sizes.traced.items())
    return (
        f"The graph takes {', '.join(map(str, sizes.inputs))}"
        + (f" with {words}" if (words := sizes.axes_in_words()) else "")
        + (f". It was traced with {traced}" if traced else "")
        + ". Elsewhere the model may compute something else than the graph. Bring the inputs to these sizes (pad, "
        "truncate or split them), or trace the model with example inputs of the sizes you need."
    )
