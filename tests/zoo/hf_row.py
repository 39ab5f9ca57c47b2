"""One row of the tables of transformers models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .case import Inputs, Trap

DROP: Any = object()
"""As a value of `Row.config`: leave this size to the config's own default."""


@dataclass(frozen=True)
class Row:
    """A transformers model class and what is known of it.

    `name` defaults to the class's; `config` is what differs from the sizes in `huggingface.TINY`. `inputs` is a name in
    `huggingface.INPUTS` or a function of the batch size. `make` takes the config and returns the model, where that is
    not the class itself. The other fields are those of `Case`.
    """

    model: str
    count: int | None = None
    activation: str | None = None
    gated: bool | None = False
    inputs: str | Callable[[int], Inputs] = "text"
    config: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    required: tuple[str, ...] = ()
    traps: tuple[Trap, ...] = ()
    quick: bool = False
    note: str = ""
    make: Callable[[Any], Any] | None = None
    tolerance: float = 1e-4
    fixed_batch: bool = False
    alternatives: tuple[int, ...] = ()
    untraceable: str = ""
