"""Bases of passes that train. They add the options of the training loop and of fine-tuning, with their checks."""

from __future__ import annotations

import dataclasses
from abc import ABC
from dataclasses import dataclass
from typing import ClassVar

from surgeon.data.augmentation import Augmentation
from surgeon.errors import UsageError
from surgeon.passes.base import Pass
from surgeon.passes.contract import Seen, Site
from surgeon.passes.options import option
from surgeon.training.loop import Precision, Schedule, TrainingPlan

# Options that only have an effect in training. All of them are fields of `TrainingPlan`.
_OF_THE_PLAN = frozenset({"lr", "beta2", "weight_decay", "schedule", "warmup", "clip", "accumulate", "precision"})


@dataclass(frozen=True, kw_only=True)
class TrainedPass(Pass[Site, Seen], ABC):
    """A pass that trains something, with the options of the training loop.

    A subclass may say:
        optional: whether epochs may be 0, which trains nothing.
        for_training: its own options that only have an effect in training.
    """

    trains: ClassVar[bool] = True
    optional: ClassVar[bool] = False
    for_training: ClassVar[frozenset[str]] = frozenset()

    epochs: float = option(3.0, "Number of training epochs.", least=0)
    steps: int | None = option(None, "Number of optimiser steps, instead of epochs.", least=1)
    lr: float = option(1e-3, "Learning rate of AdamW.", above=0)
    beta2: float = option(
        0.999, "AdamW's decay rate for the mean of squared gradients (beta1 is 0.9).", least=0, below=1
    )
    weight_decay: float = option(0.0, "Weight decay of AdamW.", least=0)
    schedule: Schedule = option("linear", "Learning rate over time: constant, or falling to zero (linear or cosine).")
    warmup: float = option(
        0.0, "Share of the training, at its start, in which the learning rate rises linearly from 0.", least=0, below=1
    )
    clip: float | None = option(1.0, "Largest gradient norm. Larger gradients are scaled down to it.", above=0)
    accumulate: int = option(1, "Number of batches per optimiser step. Their gradients are averaged.", least=1)
    precision: Precision = option(
        "float32", "float32, or bfloat16 for training in mixed precision. The weights keep their dtype."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.optional and not self.optimises:
            raise UsageError(f"{self.name}: epochs is 0, but must be above 0.")
        if not self.optimises:
            for field in dataclasses.fields(self):
                if field.name in self.for_training | _OF_THE_PLAN and getattr(self, field.name) != field.default:
                    raise UsageError(f"{self.name}: {field.name} only has an effect in training, but epochs is 0.")

    @property
    def optimises(self) -> bool:
        """Whether this run would train something if it had data."""
        return self.epochs != 0 or self.steps is not None

    def plan(self) -> TrainingPlan:
        """Return the options as a plan for the training loop."""
        return TrainingPlan(self.epochs, self.steps, **{name: getattr(self, name) for name in _OF_THE_PLAN})


@dataclass(frozen=True, kw_only=True)
class FineTunedPass(TrainedPass[Site, Seen], ABC):
    """A pass that fine-tunes the whole model: its task's loss, distillation, and what a subclass adds."""

    for_training: ClassVar[frozenset[str]] = frozenset(
        {"distill", "distill_layers", "label_smoothing", "mixup", "cutmix"}
    )

    lr: float = option(2e-5, "Learning rate of AdamW for all parameters.", above=0)
    distill: float = option(
        0.0,
        "Share of the loss that is divergence from a teacher; the task loss has the rest. The teacher is the model "
        "before the first pass of this run, unless another one is given. If the run continues a saved "
        "surgery, the model before is the saved one.",
        least=0,
        most=1,
    )
    distill_layers: float = option(
        0.0,
        "Weight of a further loss: the squared error of all layers' inputs against the model before the first pass, "
        "relative to their square.",
        least=0,
    )
    label_smoothing: float = option(
        0.0,
        "For image classification: share of the wanted probability that all classes get equally.",
        least=0,
        below=1,
    )
    mixup: float = option(
        0.0, "For image classification: α of mixup, which blends pairs of images and their labels. 0 is off.", least=0
    )
    cutmix: float = option(
        0.0,
        "For image classification: α of CutMix, which puts a rectangle of another image in. With mixup too, each batch "
        "draws one of them.",
        least=0,
    )

    def distils(self, imitating: bool) -> bool:
        """Whether this run would learn from a teacher's outputs if it had data. imitating: whether the task says so."""
        return self.will_fit and (imitating or self.distill > 0)

    @property
    def augmentation(self) -> Augmentation:
        """What is done to images and labels in training."""
        return Augmentation(self.label_smoothing, self.mixup, self.cutmix)
