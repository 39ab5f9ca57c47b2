"""How data is to be read. Without torch, so that the command line can ask for it before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DataOptions:
    """How to read data: the arguments of `surgeon.data.files.load_data` that the command line has.

    seed: None stands for a saved surgery's own, so that the same part is held out again, and for 0 otherwise.
    """

    spec: str
    text: str | None = None
    label: str | None = None
    task: str | None = None
    batch_size: int = 16
    max_length: int = 128
    limit: int | None = None
    eval_fraction: float = 0.1
    seed: int | None = None
