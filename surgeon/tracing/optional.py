"""Find out what a model means by an input that is left out, so that its graph can do without it too.

A graph that was traced with a mask always needs one. What the model does without a mask is usually what it does with a
mask of ones. That is tried, at several sizes, and noted in the graph's sizes (`Input.fill`).
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor, nn

from surgeon.graph.agreement import call_reproducibly, relative_error, tolerance_for
from surgeon.graph.calls import argument_names, input_places, unflatten_inputs
from surgeon.graph.missing import can_fill, fill_missing
from surgeon.graph.sizes import Constant, Fill, Input, Sizes, same_constant
from surgeon.graph.traced import TracedGraph
from surgeon.tracing.narrowing import resized
from surgeon.tracing.setup import copied, run_alone
from surgeon.tracing.telling import Steps

_STAND_INS: tuple[Fill, ...] = ("ones", "zeros", "positions")
# Flags of Hugging Face models, with the value at which they compute what a graph computes. Many models take them as
# further keywords, which their signatures do not show.
_FLAGS: dict[str, bool] = {
    "return_dict": True,
    "use_cache": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_router_logits": False,
}


def with_optional_inputs(
    graph: TracedGraph, sizes: Sizes, model: nn.Module, leaves: Sequence[Any], reference: Any, steps: Steps
) -> tuple[Sizes, list[str]]:
    """Return `sizes` with what stands for missing inputs and with the arguments that were not traced.

    Args:
        graph: the model's graph, which does not check its calls yet, in evaluation mode.
        leaves: the flat example inputs. reference: the model's output on them. steps: told of every comparison.

    Returns:
        The sizes, and notes on inputs that the graph needs and the model does not, in sentences.
    """
    found = _Finder(graph, model, leaves, inspect.signature(model.forward).parameters, sizes, steps)
    found.find()
    notes = [
        f"The graph needs {given.name}, although the model does not: nothing that was tried in its place gives what "
        "the model gives without it."
        for given in found.sizes.inputs
        if given.fill == "needed" and given.shape is not None
    ]
    return replace(found.sizes, untraced=_untraced(graph, model, leaves, reference)), notes


@dataclass
class _Finder:
    """Compares the graph, with other values in the place of inputs, with the model without these inputs."""

    graph: TracedGraph
    model: nn.Module
    leaves: Sequence[Any]
    parameters: Mapping[str, inspect.Parameter]
    sizes: Sizes
    steps: Steps

    def find(self) -> None:
        places = input_places(self.graph)
        optional = {
            places[name]: parameter.default
            for name, parameter in self.parameters.items()
            if name in places and parameter.default is not inspect.Parameter.empty
        }
        # Sizes have to follow from what the model needs. Many signatures have a default for that too, and fail with it.
        for place, default in optional.items():
            does_without = default is not None or self._without(self.leaves, (place,)) is not None
            self._set(place, "needed" if does_without else "")
        for place, default in optional.items():
            given = self.sizes.inputs[place]
            if not given.fill:
                continue
            if given.shape is not None:
                self._set(place, self._stand_in(place) if default is None else "needed")
            elif given.checked and default is not None:
                self._set(place, "missing" if same_constant(default, given.constant) else "needed")
            elif given.constant is None or self._agrees({place: "None"}) is not None:
                self._set(place, "None")
        found = [place for place in optional if self.sizes.inputs[place].optional]
        for size in (2, len(found)):
            for together in itertools.combinations(found, size) if size > 1 else ():
                fills = {place: self.sizes.inputs[place].fill for place in together}
                if all(fills.values()) and "needed" not in fills.values() and self._agrees(fills) is None:
                    self._set(together[-1], "needed")

    def _set(self, place: int, fill: Fill) -> None:
        inputs = list(self.sizes.inputs)
        leaf = self.leaves[place]
        dtype = leaf.dtype if isinstance(leaf, Tensor) and fill in _STAND_INS else None
        inputs[place] = replace(inputs[place], fill=fill, dtype=dtype)
        self.sizes = replace(self.sizes, inputs=tuple(inputs))

    def _stand_in(self, place: int) -> Fill:
        """The value that comes nearest to the model without the input; "needed" if none is near enough."""
        if not can_fill(self.sizes, self.sizes.inputs[place].name):
            return "needed"
        errors = {fill: error for fill in _STAND_INS if (error := self._agrees({place: fill})) is not None}
        return min(errors, key=errors.__getitem__) if errors else "needed"

    def _agrees(self, fills: Mapping[int, Fill]) -> float | None:
        """The largest error with some inputs left out; None if that is too much, or if the model cannot do without."""
        self.steps.step()
        before = self.sizes
        for place, fill in fills.items():
            self._set(place, fill)
        try:
            return max(self._error(leaves, fills) for leaves in self._examples())
        except Exception:  # such as an id that the graph has no embedding for
            return None
        finally:
            self.sizes = before

    def _without(self, leaves: Sequence[Any], missing: Iterable[int]) -> Any | None:
        """The model's output without some inputs; None if it fails."""
        try:
            return run_alone(self.model, *unflatten_inputs(self.graph, _without(leaves, missing)))
        except Exception:
            return None

    def _error(self, leaves: Sequence[Any], missing: Iterable[int]) -> float:
        """The error with inputs left out.

        Raises:
            ArithmeticError: it is too large.
        """
        if (expected := self._without(leaves, missing)) is None:
            return 0.0  # the model does not take these
        filled = fill_missing(str(self.sizes), *_without(leaves, missing))
        args, kwargs = copied(unflatten_inputs(self.graph, filled))
        error = relative_error(call_reproducibly(self.graph, args, kwargs), expected)
        if not error <= tolerance_for(expected, self.model):
            raise ArithmeticError(f"relative error {error:.1e}")
        return error

    def _examples(self) -> Iterator[Sequence[Any]]:
        """Inputs to compare on: the example's, others of another size, and rows of ids that end in padding.

        Some models make a mask from the padding if there is none.
        """
        yield self.leaves
        other = {
            name: next((n for n in (size + axis.multiple, size - axis.multiple) if n > 0 and n in axis), size)
            for name, axis in self.sizes.axes.items()
            if (size := self.sizes.traced[name])
        }
        if other and self.sizes.allow(other):
            yield resized(self.sizes, self.leaves, other)
        padding = getattr(getattr(self.model, "config", None), "pad_token_id", None)
        if isinstance(padding, int) and padding >= 0:
            padded = [_padded(given, leaf, padding) for given, leaf in zip(self.sizes.inputs, self.leaves, strict=True)]
            if any(a is not b for a, b in zip(padded, self.leaves, strict=True)):
                yield padded


def _without(leaves: Sequence[Any], missing: Iterable[int]) -> list[Any]:
    return [None if place in missing else leaf for place, leaf in enumerate(leaves)]


def _padded(given: Input, leaf: Any, padding: int) -> Any:
    if given.fill or not isinstance(leaf, Tensor) or leaf.dtype not in (torch.int64, torch.int32) or leaf.dim() != 2:
        return leaf
    leaf = leaf.clone()
    leaf[-1:, -1:] = padding
    return leaf


def _untraced(
    graph: TracedGraph, model: nn.Module, leaves: Sequence[Any], reference: Any
) -> dict[str, tuple[Constant, ...]]:
    """The model's arguments that the graph has no input for, with the values at which it computes the same."""
    traced = argument_names(graph)
    parameters = inspect.signature(model.forward).parameters
    found: dict[str, tuple[Constant, ...]] = {
        name: (parameter.default,)
        for name, parameter in parameters.items()
        if name not in traced and type(parameter.default) in get_args(Constant) and _is_finite(parameter.default)
    }
    further = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    if not hasattr(model, "config"):
        return found
    flags = [name for name in _FLAGS if name in found or (further and name not in {*parameters, *traced})]

    def same(**flags: Constant) -> bool:
        args, kwargs = unflatten_inputs(graph, leaves)
        try:
            output = run_alone(model, args, {**kwargs, **flags})
        except Exception:
            return False
        return relative_error(output, reference) <= tolerance_for(reference, model)

    together = same(**{name: _FLAGS[name] for name in flags})
    for name in flags:
        if together or same(**{name: _FLAGS[name]}):
            found[name] = tuple(dict.fromkeys((*found.get(name, (None,)), _FLAGS[name])))
    return found


def _is_finite(value: Constant) -> bool:
    return not isinstance(value, float) or value - value == 0
