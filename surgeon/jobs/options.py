"""Options of the jobs. This module does not import torch, so that the command line can read options quickly."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerOptions:
    """The feed-forward layers of a benchmark, as typed: lists separated by commas.

    hidden: None for 4 · width.
    """

    tokens: str = "1,8,2048"
    share: str = "0.05,0.1,0.2,0.5,1"
    size: str = "128,24,6"
    width: int = 768
    hidden: int | None = None
    dtype: str = "float32,bfloat16"
    gated: bool = False


@dataclass(frozen=True)
class LinearOptions:
    """The linear layers of a benchmark, as typed: lists separated by commas."""

    tokens: str = "1"
    share: str = "0.25,0.5,1"
    d_in: str = "768"
    d_out: str = "768"
    dtype: str = "float32,bfloat16"


@dataclass(frozen=True)
class TimingOptions:
    """Where and how long a benchmark measures. device: None for a GPU if available. seconds: per timed call."""

    threads: int = 1
    device: str | None = None
    seconds: float = 0.3


@dataclass(frozen=True)
class DataOptions:
    """How to read data: the arguments of `surgeon.data.files.load_data` that the command line has.

    seed: None means the seed of the saved surgery, so that the same part is held out again, or else 0.
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
