"""Passes that train: the options of the training loop, and of fine-tuning, with their checks."""

from __future__ import annotations

import dataclasses
from abc import ABC
from dataclasses import dataclass
from typing import ClassVar

from surgeon.errors import UsageError
from surgeon.passes.base import Pass
from surgeon.passes.contract import Seen, Site
from surgeon.passes.options import option
from surgeon.training.loop import Precision, Schedule, TrainingPlan

# Options that mean something only where something is trained, all of them fields of `TrainingPlan`.
_OF_THE_PLAN = frozenset({"lr", "beta2", "weight_decay", "schedule", "warmup", "clip", "accumulate", "precision"})


@dataclass(frozen=True, kw_only=True)
class TrainedPass(Pass[Site, Seen], ABC):
    """A pass that fits something, with the options of the training loop.

    A subclass may say:
        optional: whether epochs may be 0, which trains nothing.
        for_training: its own options that mean something only where something is trained.
    """

    trains: ClassVar[bool] = True
    optional: ClassVar[bool] = False
    for_training: ClassVar[frozenset[str]] = frozenset()

    epochs: float = option(3.0, "How often training goes through the data.", least=0)
    steps: int | None = option(None, "Optimiser steps, instead of epochs.", least=1)
    lr: float = option(1e-3, "Learning rate of AdamW.", above=0)
    beta2: float = option(0.999, "AdamW's decay of the mean of squared gradients (beta1 is 0.9).", least=0, below=1)
    weight_decay: float = option(0.0, "Weight decay of AdamW.", least=0)
    schedule: Schedule = option("linear", "Learning rate over time: constant, linear or cosine (to zero).")
    warmup: float = option(
        0.0, "Share of the training in which the learning rate first rises linearly from 0.", least=0, below=1
    )
    clip: float | None = option(1.0, "Largest gradient norm.", above=0)
    accumulate: int = option(1, "Batches for one optimiser step, with the mean of their gradients.", least=1)
    precision: Precision = option(
        "float32", "float32, or bfloat16: mixed precision in training; the weights keep their type."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.optional and not self.optimises:
            raise UsageError(f"{self.name}: epochs is 0, but must be above 0.")
        if not self.optimises:
            for field in dataclasses.fields(self):
                if field.name in self.for_training | _OF_THE_PLAN and getattr(self, field.name) != field.default:
                    raise UsageError(f"{self.name}: {field.name} is for training, and epochs is 0.")

    @property
    def optimises(self) -> bool:
        """Whether this run would train something if it had data."""
        return self.epochs != 0 or self.steps is not None

    def plan(self) -> TrainingPlan:
        """The options as a plan for `surgeon.training.loop`."""
        return TrainingPlan(self.epochs, self.steps, **{name: getattr(self, name) for name in _OF_THE_PLAN})


@dataclass(frozen=True, kw_only=True)
class FineTunedPass(TrainedPass[Site, Seen], ABC):
    """A pass that fine-tunes the whole model (`surgeon.training.finetuning`)."""

    for_training: ClassVar[frozenset[str]] = frozenset({"distill", "distill_layers"})

    lr: float = option(2e-5, "Learning rate of AdamW for all parameters.", above=0)
    distill: float = option(
        0.0,
        "Share of the loss that is divergence from the model before the first pass of this run (a saved surgery, if it "
        "goes on from one), in place of the task's loss.",
        least=0,
        most=1,
    )
    distill_layers: float = option(
        0.0,
        "Weight, beside that, of how far the inputs of all layers are from those in that model: their squared error "
        "relative to their square.",
        least=0,
    )
