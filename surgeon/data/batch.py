"""Batches for fitting and evaluation, and the data they come from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from surgeon import processes
from surgeon.collective import gathered
from surgeon.errors import DataError


@dataclass(frozen=True)
class Batch:
    """The inputs of one call of the model, `model(*batch.args, **batch.kwargs)`, and their labels.

    args, kwargs: the model's inputs, tensors with the batch in dimension 0.
    labels: int64, or None. Classes are [B], tags and tokens [B, T] with -100 where nothing is predicted, answers
        [B, 2] (first and last token).
    """

    args: tuple[Tensor, ...] = ()
    kwargs: Mapping[str, Tensor] = field(default_factory=dict)
    labels: Tensor | None = None

    @classmethod
    def from_any(cls, item: Any) -> Batch:
        """Make a batch from an item of a loader.

        Args:
            item: a batch, a tensor, a dict of keyword inputs, or a pair (inputs, labels) whose inputs are a tensor, a
                tuple of tensors or a dict. The labels of a dict are under "labels" or "label", or are the positions of
                an answer under "start_positions" and "end_positions".

        Raises:
            DataError: the item is anything else. The message says what was found.
        """
        match item:
            case Batch():
                return item
            case Mapping():
                kwargs = dict(item)
                return cls._checked((), kwargs, _taken_labels(kwargs))
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
            raise DataError("A batch contains no input. Give at least one tensor besides the labels.")
        for name, value in (named | ({} if labels is None else {"labels": labels})).items():
            if not isinstance(value, Tensor):
                raise DataError(f"A batch's {name} is a {type(value).__name__}, not a tensor.")
        return cls(args, kwargs, labels)

    @property
    def size(self) -> int:
        """Number of samples in the batch: the first dimension of the first input."""
        return len(next(iter((*self.args, *self.kwargs.values()))))

    def part(self) -> Batch:
        """Return the samples that this process computes: an equal part, or all if there are fewer than processes.

        Inputs that have another first dimension than the first one are the same for all samples.
        """
        samples, parts = self.size, processes.count()
        if parts == 1 or samples < parts:
            return self

        def cut(value: Tensor) -> Tensor:
            split = value.dim() and len(value) == samples
            return value.tensor_split(parts)[processes.rank()] if split else value

        labels = None if self.labels is None else cut(self.labels)
        return Batch(tuple(map(cut, self.args)), {name: cut(value) for name, value in self.kwargs.items()}, labels)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Batch:
        """Move the batch to a device, and cast floating inputs to `dtype` if given. Labels keep their dtype."""

        def move(value: Tensor) -> Tensor:
            return value.to(device=device, dtype=dtype if value.is_floating_point() else None)

        labels = None if self.labels is None else self.labels.to(device=device)
        return Batch(tuple(map(move, self.args)), {name: move(v) for name, v in self.kwargs.items()}, labels)


def gathered_from(batch: Batch, values: Tensor) -> Tensor:
    """Return what all processes computed from their parts of a batch, [n, ...], in the order of the batch."""
    return values if batch.size < processes.count() else gathered(values)


def _taken_labels(kwargs: dict[str, Any]) -> Any:
    """Take the labels out of keyword inputs. The positions of an answer become int64 [B, 2]."""
    if "start_positions" in kwargs and "end_positions" in kwargs:
        ends = [kwargs.pop("start_positions"), kwargs.pop("end_positions")]
        return torch.stack(ends, -1) if all(isinstance(end, Tensor) for end in ends) else ends
    return kwargs.pop("labels") if "labels" in kwargs else kwargs.pop("label", None)


def read_batches(items: Iterable[Any]) -> list[Batch]:
    """Return all batches, of items in any form that `Batch.from_any` takes.

    Raises:
        DataError: it is no list of batches, or an item is no batch.
    """
    check_batches(items)
    return [Batch.from_any(item) for item in items]


def check_batches(items: Any) -> None:
    """Refuse what batches cannot be read from.

    Raises:
        DataError: it is something else than an iterable of batches.
    """
    if isinstance(items, Mapping | Tensor | str | bytes) or not isinstance(items, Iterable):
        raise DataError(f"The data is a {type(items).__name__}, not a list of batches or a DataLoader.")


def first_batches(items: Iterable[Any], samples: int) -> list[Batch]:
    """Return the first batches, as many as it takes to reach this number of samples."""
    found: list[Batch] = []
    for item in items:
        found.append(Batch.from_any(item))
        if sum(batch.size for batch in found) >= samples:
            break
    return found


class Batches:
    """Data that can be read repeatedly, each time as `Batch` objects."""

    def __init__(self, source: Iterable[Any]) -> None:
        """Wrap `source`.

        Raises:
            DataError: `source` can be read only once, or does not consist of batches.
        """
        if isinstance(source, Iterator):
            raise DataError(
                f"The data is a {type(source).__name__}, which can be read only once, but fitting reads it several "
                "times. Give a list, a DataLoader, or an object whose __iter__ starts again from the beginning."
            )
        if isinstance(source, torch.utils.data.Dataset) or _is_hf_dataset(source):
            raise DataError(
                f"The data is a {type(source).__name__} of single samples. Wrap it: DataLoader(data, batch_size=...)."
            )
        check_batches(source)
        self.source = source

    def __iter__(self) -> Iterator[Batch]:
        empty = True
        for item in self.source:
            empty = False
            yield Batch.from_any(item)
        if empty:
            raise DataError("The data gave no batch. It is empty, or it can be read only once.")

    def __len__(self) -> int:
        """Return the number of batches. Raises TypeError if the source has no length."""
        if not isinstance(self.source, Sized):
            raise TypeError(f"{type(self.source).__name__} has no length")
        return len(self.source)


def _is_hf_dataset(obj: object) -> bool:
    return type(obj).__module__.startswith("datasets.")
