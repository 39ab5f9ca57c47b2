"""What fitting and evaluation read: batches, and the data they come from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from surgeon.errors import DataError


@dataclass(frozen=True)
class Batch:
    """One call of the model, `model(*batch.args, **batch.kwargs)`, and what it should have answered.

    args, kwargs: the model's inputs, tensors with the batch in dimension 0.
    labels: the right answers in the form the task's loss expects (see `surgeon.data.losses`), or None.
    """

    args: tuple[Tensor, ...] = ()
    kwargs: Mapping[str, Tensor] = field(default_factory=dict)
    labels: Tensor | None = None

    @classmethod
    def from_any(cls, item: Any) -> Batch:
        """Make a batch of what a loader gives.

        Args:
            item: a batch; a dict of keyword inputs, with the labels under "labels" if there are any; a tensor; or a
                pair (inputs, labels) whose inputs are a tensor, a tuple of tensors or a dict.

        Raises:
            DataError: anything else; the message says what was found.
        """
        match item:
            case Batch():
                return item
            case Mapping():
                kwargs = dict(item)
                return cls._checked((), kwargs, kwargs.pop("labels", None))
            case Tensor():
                return cls((item,))
            case [inputs]:
                return cls.from_any(inputs)
            case [Mapping() as inputs, labels]:
                return cls._checked((), dict(inputs), labels)
            case [Tensor() as inputs, labels]:
                return cls._checked((inputs,), {}, labels)
            case [tuple() | list() as inputs, labels]:
                return cls._checked(tuple(inputs), {}, labels)
        found = type(item).__name__
        if isinstance(item, tuple | list):
            found = f"{found} of {', '.join(type(part).__name__ for part in item[:4]) or 'nothing'}"
        raise DataError(
            f"A batch is a {found}. Expected a dict of tensors, a tensor, or a pair (inputs, labels) whose inputs are "
            "a tensor, a tuple of tensors or a dict."
        )

    @classmethod
    def _checked(cls, args: tuple[Any, ...], kwargs: dict[str, Any], labels: Any) -> Batch:
        named = {f"input {index}": value for index, value in enumerate(args)} | {repr(k): v for k, v in kwargs.items()}
        if not named:
            raise DataError("A batch holds no input.")
        for name, value in (named | ({} if labels is None else {"labels": labels})).items():
            if not isinstance(value, Tensor):
                raise DataError(f"A batch's {name} is a {type(value).__name__}, not a tensor.")
        return cls(args, kwargs, labels)

    @property
    def size(self) -> int:
        """Samples in the batch: the first dimension of the first input."""
        return len(next(iter((*self.args, *self.kwargs.values()))))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Batch:
        """The batch on a device, its floating inputs cast to `dtype` if one is given. Labels keep their type."""

        def move(value: Tensor) -> Tensor:
            return value.to(device=device, dtype=dtype if value.is_floating_point() else None)

        labels = None if self.labels is None else self.labels.to(device=device)
        return Batch(tuple(map(move, self.args)), {name: move(v) for name, v in self.kwargs.items()}, labels)


def first_batches(items: Iterable[Any], samples: int) -> list[Batch]:
    """The first batches, until there are so many samples."""
    found: list[Batch] = []
    for item in items:
        found.append(Batch.from_any(item))
        if sum(batch.size for batch in found) >= samples:
            break
    return found


class Batches:
    """Something that can be read again and again, each time as `Batch` objects."""

    def __init__(self, source: Iterable[Any]) -> None:
        """Wrap `source`.

        Raises:
            DataError: `source` can be read once only, or is not made of batches.
        """
        if isinstance(source, Iterator):
            raise DataError(
                f"The data is a {type(source).__name__}, which can be read once; fitting reads it several times. Give "
                "a list, a DataLoader, or an object whose __iter__ starts anew."
            )
        if isinstance(source, torch.utils.data.Dataset) or _is_hf_dataset(source):
            raise DataError(
                f"The data is a {type(source).__name__} of single samples. Wrap it: DataLoader(data, batch_size=...)."
            )
        if isinstance(source, Mapping | Tensor | str | bytes) or not isinstance(source, Iterable):
            raise DataError(f"The data is a {type(source).__name__}, not a list of batches, a DataLoader or the like.")
        self.source = source

    def __iter__(self) -> Iterator[Batch]:
        empty = True
        for item in self.source:
            empty = False
            yield Batch.from_any(item)
        if empty:
            raise DataError("The data gave no batch: it is empty, or can be read only once.")

    def __len__(self) -> int:
        """Number of batches. Raises TypeError where the source does not know it."""
        if not isinstance(self.source, Sized):
            raise TypeError(f"{type(self.source).__name__} has no length")
        return len(self.source)


def _is_hf_dataset(obj: object) -> bool:
    return type(obj).__module__.startswith("datasets.")
