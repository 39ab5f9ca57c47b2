"""What a graph can be called with, for programs and for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from surgeon.graph.sizes import Axis, Constant, Input, Sizes
from surgeon.json_values import NOT_IN_JSON


@dataclass(frozen=True)
class TakenInput:
    """An input of a graph.

    shape: of a tensor: numbers, names of sizes, and expressions in names of sizes; None for any other input.
    numbers: of a tensor: "float", "int", "bool" or "complex"; None for any other input. must_be: what any other input
    has to be; None if that is not checked, or for a tensor. optional: whether a call may leave it out. left_out: what
    then stands for it: "ones", "zeros" or "positions" of the dtype `fill`, or "None" or "missing". words: the same for
    people, such as "mask[batch, tokens] or ones(int64)".
    """

    name: str
    shape: tuple[int | str, ...] | None
    numbers: str | None
    must_be: Constant
    optional: bool
    left_out: str | None
    fill: str | None
    words: str = field(metadata=NOT_IN_JSON)

    @classmethod
    def of(cls, given: Input) -> TakenInput:
        """Describe an input."""
        tensor = given.shape is not None
        return cls(
            given.name,
            given.shape,
            given.kind if tensor else None,
            given.constant if given.checked and not tensor else None,
            given.optional,
            given.fill if given.optional else None,
            None if given.dtype is None else str(given.dtype).removeprefix("torch."),
            str(given),
        )


@dataclass(frozen=True)
class Takes:
    """What a graph can be called with. sizes: the range of each. rules: between sizes.

    untraced: arguments of the model that the graph has no input for.
    """

    inputs: Sequence[TakenInput]
    sizes: Mapping[str, Axis]
    rules: Sequence[str]
    untraced: Sequence[str]

    @classmethod
    def of(cls, sizes: Sizes) -> Takes:
        """Describe the sizes of a graph."""
        return cls(
            [TakenInput.of(given) for given in sizes.inputs],
            dict(sizes.axes),
            list(sizes.rules),
            list(sizes.untraced),
        )

    @property
    def words(self) -> str:
        """Inputs and sizes, such as "int(ids[batch, tokens]); batch 1 or more; tokens 2 to 512"."""
        sizes = [*(f"{name} {size}" for name, size in self.sizes.items()), *self.rules]
        return "; ".join([", ".join(given.words for given in self.inputs), *sizes])
