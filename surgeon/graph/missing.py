"""Inputs that a call of a graph leaves out, and arguments of the model that the graph has no input for.

What is optional in a model is optional in its graph. `surgeon.tracing.optional` finds out what stands for it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.fx import Proxy

from surgeon.errors import UsageError
from surgeon.graph.sizes import Constant, Sizes, constant_text, names_in, same_constant, substitute


def parameters(sizes: Sizes, names: Sequence[str], places: Mapping[str, int]) -> list[inspect.Parameter]:
    """Return the parameters of a graph's `forward`.

    Args:
        names: of its arguments. places: the place in the flat inputs of every argument that is one input.
    """
    found: list[inspect.Parameter] = []
    for name in names:
        given = sizes.inputs[places[name]] if name in places and places[name] < len(sizes.inputs) else None
        default: Any = inspect.Parameter.empty
        if given is not None and given.fill:
            default = given.constant if given.fill == "missing" else None
        elif found and found[-1].default is not inspect.Parameter.empty:
            default = None  # Python takes none without a default after one that has it; the check refuses None
        found.append(inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default))
    taken = {*names}
    return found + [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=values[0])
        for name, values in sizes.untraced.items()
        if name not in taken
    ]


def definition(found: Sequence[inspect.Parameter]) -> str:
    """Return parameters as they stand in the definition of a function."""
    words = []
    for parameter in found:
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and "*" not in words:
            words.append("*")
        given = parameter.default is not inspect.Parameter.empty
        words.append(parameter.name + (f"={constant_text(parameter.default)}" if given else ""))
    return ", ".join(words)


def changes_something(name: str, accepted: Sequence[Constant]) -> str:
    """Return the Python expression for an argument that is none of the accepted values. `surgeon_same` is in scope."""
    tests = [
        f"{name} is {value!r}" if value is None or isinstance(value, bool) else f"surgeon_same({name}, {value!r})"
        for value in accepted
    ]
    return f"not ({' or '.join(tests)})"


def refuse_untraced(sizes: str, **given: Any) -> None:
    """Refuse arguments of the model that the graph has no input for, unless they change nothing.

    Raises:
        UsageError: the message names the argument, and says how to have it traced.
    """
    if any(isinstance(value, Proxy) for value in given.values()):
        return  # a symbolic trace gives a proxy for everything
    if is_dynamo_compiling():  # it calls this only to refuse, and cannot follow how the full text is made
        raise UsageError("An argument was given that the graph was traced without and has no input for. " + _TRACE_IT)
    accepted = Sizes.parse(sizes).untraced
    for name, value in given.items():
        if not any(same_constant(value, constant) for constant in accepted[name]):
            what = "a tensor" if isinstance(value, Tensor) else repr(value) if len(repr(value)) < 40 else "given"
            raise UsageError(
                f"{name} is {what}, but the graph was traced without it and has no input for it. Leave it out"
                f" ({' or '.join(constant_text(constant) for constant in accepted[name])} is as good). {_TRACE_IT}"
            )


_TRACE_IT = (
    "To have an input traced, trace the model with it among the example inputs, or in the first batch of the data."
)


def fill_missing(sizes: str, *inputs: Any) -> tuple[Any, ...]:
    """Return the flat inputs of a call, with what stands for those that are None.

    Args:
        sizes: see `Sizes`. inputs: the flat inputs. Those that are needed and wrong stay, for the check to refuse.
    """
    return (_FILLS.get(sizes) or prepare_filling(sizes))(*inputs)


_FILLS: dict[str, Callable[..., tuple[Any, ...]]] = {}


def prepare_filling(sizes: str) -> Callable[..., tuple[Any, ...]]:
    """Compile the filling for `sizes`, once.

    Raises:
        ValueError: `sizes` cannot be read.
    """
    if sizes not in _FILLS:
        _FILLS[sizes] = _compiled(Sizes.parse(sizes))
    return _FILLS[sizes]


def _compiled(sizes: Sizes) -> Callable[..., tuple[Any, ...]]:
    arguments = [f"i{index}" for index in range(len(sizes.inputs))]
    places: dict[str, str] = {}
    for argument, given in zip(arguments, sizes.inputs, strict=True):
        for dim, size in enumerate(given.shape or ()) if not given.optional else ():
            if size in sizes.axes:
                places.setdefault(str(size), f"{argument}.shape[{dim}]")
    tensors = [a for a, i in zip(arguments, sizes.inputs, strict=True) if i.shape is not None and not i.optional]
    like = next(iter(tensors), "None")
    lines = []
    for argument, given in zip(arguments, sizes.inputs, strict=True):
        if given.shape is None and given.fill == "None":
            lines += [f"if {argument} is None:", f"    {argument} = {constant_text(given.constant)}"]
        elif given.shape is not None and given.optional:
            shape = ", ".join(substitute(str(size), places) for size in given.shape)
            lines += [f"if {argument} is None:", f"    {argument} = {given.fill}(({shape},), {given.dtype}, {like})"]
    source = f"""
def fill({", ".join(arguments)}):
    try:
        pass
{chr(10).join("        " + line for line in lines)}
    except (AttributeError, IndexError):  # no tensor, or one of other dimensions
        pass
    return ({"".join(f"{argument}, " for argument in arguments)})
"""
    namespace: dict[str, Any] = {"torch": torch, "ones": _ones, "zeros": _zeros, "positions": _positions}
    exec(source, namespace)
    fill: Callable[..., tuple[Any, ...]] = namespace["fill"]
    return fill


def can_fill(sizes: Sizes, name: str) -> bool:
    """Whether the shape of an input follows from the inputs that no call leaves out."""
    others = [given for given in sizes.inputs if given.name != name and not given.optional]
    known = {size for given in others for size in given.shape or ()}
    shape = next(given.shape for given in sizes.inputs if given.name == name)
    return bool(shape) and all(isinstance(size, int) or names_in(size) <= known for size in shape or ())


def _ones(shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
    return torch.ones(shape, dtype=dtype, device=like.device)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=like.device)


def _positions(shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
    return torch.arange(shape[-1], dtype=dtype, device=like.device).expand(shape).contiguous()
