"""Augment labelled images while a model is fine-tuned: label smoothing, mixup and CutMix."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from surgeon.collective import everywhere
from surgeon.data.batch import Batch
from surgeon.data.data import Data
from surgeon.data.losses import is_task_loss, sample_losses
from surgeon.errors import UsageError


@dataclass(frozen=True)
class Augmentation:
    """What is done to images and labels. At 0, the default, each part is off.

    label_smoothing: share of the wanted probability that all classes get equally (arXiv 1512.00567).
    mixup: α of mixup (arXiv 1710.09412). A batch is blended with its own samples in another order, and so are the
        labels. The share of the first image is drawn from Beta(α, α), once for each batch.
    cutmix: α of CutMix (arXiv 1905.04899). In place of blending, a rectangle comes from the other image. Its area is
        the other label's share.

    If mixup and cutmix are both on, each batch draws one of them with equal chances.
    """

    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __bool__(self) -> bool:
        """Whether anything is on."""
        return bool(self._on)

    @property
    def _on(self) -> list[str]:
        return [item.name for item in fields(self) if getattr(self, item.name)]

    def check(self, data: Data, task: str | None, who: str) -> None:
        """Refuse data that is not for image classification.

        task: of the model's class, for data without one. who: the name of the pass, for the message.

        Raises:
            UsageError: another task, a loss of the user's own, or inputs other than one batch of images.
        """
        if not self:
            return
        names, known = " and ".join(self._on), data.task or task
        if known not in (None, "classification", "image-classification"):
            raise UsageError(f"{who}: {names} are for image classification, but the task is {known}. Set them to 0.")
        if data.loss is not None and not is_task_loss(data.loss):
            raise UsageError(
                f"{who}: {names} change the task's loss, but the data has a loss of its own. Set them to 0."
            )
        _image_of(Batch.from_any(next(iter(data.train))), f"{who}: {names}")

    def draw(self, batch: Batch) -> tuple[Batch, Callable[[Any], Tensor]]:
        """Augment one batch, with torch's own random numbers.

        Returns:
            The batch with other images, and its loss: a function of the model's outputs that returns a scalar, float32,
            the mean over the samples of all processes.
        """
        other, share = torch.arange(batch.size), 1.0
        which = self._which()
        if which is not None:
            other, share = torch.randperm(batch.size), _beta(getattr(self, which))
        place = _image_of(batch, "augmentation")
        images = batch.args[place] if isinstance(place, int) else batch.kwargs[place]
        if which == "mixup":
            images = share * images + (1.0 - share) * images[other.to(images.device)]
        elif which == "cutmix":
            rows, columns = _rectangle(images.shape[-2], images.shape[-1], share)
            second, images = images[other.to(images.device)], images.clone()
            images[..., rows, columns] = second[..., rows, columns]
            cut = (rows.stop - rows.start) * (columns.stop - columns.start)
            share = 1.0 - cut / (images.shape[-2] * images.shape[-1])
        args = tuple(images if index == place else value for index, value in enumerate(batch.args))
        kwargs = {name: images if name == place else value for name, value in batch.kwargs.items()}
        mixed = Batch(args, kwargs, batch.labels)
        labels = None if batch.labels is None else batch.labels[other.to(batch.labels.device)]
        pairs = ((share, mixed), (1.0 - share, replace(mixed, labels=labels)))

        def loss(outputs: Any) -> Tensor:
            total, count = torch.zeros(()), torch.zeros(())
            for weight, labelled in pairs:
                if weight:
                    losses, items = sample_losses(
                        outputs, labelled, "classification", label_smoothing=self.label_smoothing
                    )
                    total, count = total + weight * losses.sum(), count + weight * items.sum()
            return everywhere(total) / everywhere(count).clamp(min=1)

        return mixed, loss

    def _which(self) -> str | None:
        on = [name for name in ("mixup", "cutmix") if getattr(self, name)]
        return on[int(torch.randint(len(on), ()))] if on else None


def _image_of(batch: Batch, who: str) -> int | str:
    """The place or name of the one input that holds images, [B, channels, height, width].

    Raises:
        UsageError: there is none, or another input beside it, or the batch has no labels.
    """
    inputs: dict[int | str, Tensor] = {**dict(enumerate(batch.args)), **dict(batch.kwargs.items())}
    place, value = next(iter(inputs.items()))
    if len(inputs) > 1 or value.dim() != 4 or not value.is_floating_point() or batch.labels is None:
        found = ", ".join(f"{str(one.dtype).removeprefix('torch.')} {list(one.shape)}" for one in inputs.values())
        labels = "no labels" if batch.labels is None else "labels"
        raise UsageError(
            f"{who}: for image classification only. Expected one float input [B, channels, height, width] and labels, "
            f"but the batch has {found} and {labels}. Set label_smoothing, mixup and cutmix to 0."
        )
    return place


def _beta(alpha: float) -> float:
    return float(torch.distributions.Beta(alpha, alpha).sample())


def _rectangle(height: int, width: int, kept: float) -> tuple[slice, slice]:
    """Draw a rectangle with the share 1 - kept of the area around a random centre; the image's edges cut it off."""
    side = math.sqrt(1.0 - kept)

    def span(size: int) -> slice:
        middle, length = int(torch.randint(size, ())), round(size * side)
        return slice(max(0, middle - length // 2), min(size, middle - length // 2 + length))

    return span(height), span(width)
