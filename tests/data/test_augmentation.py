"""Label smoothing, mixup and CutMix: what becomes of images, labels and the loss, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from surgeon.data.augmentation import Augmentation
from surgeon.data.batch import Batch
from surgeon.data.data import Data
from surgeon.errors import UsageError
from surgeon.passes import Recover, Sparsify, SwapActivation
from surgeon.surgery.pipeline import Pipeline
from tests.small_models import hugging_face

CLASSES = 3
# Each image is its class in all its pixels, so that what came from where can be read off.
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 1, 2])
IMAGES = LABELS.float()[:, None, None, None].expand(-1, 2, 8, 8).contiguous()
LOGITS = torch.randn(8, CLASSES, generator=torch.Generator().manual_seed(0))


def drawn(augmentation: Augmentation, seed: int, batch: Batch | None = None) -> tuple[Batch, float]:
    torch.manual_seed(seed)
    mixed, loss = augmentation.draw(Batch((IMAGES,), {}, LABELS) if batch is None else batch)
    return mixed, float(loss(LOGITS))


def cross_entropy(wanted: Tensor) -> float:
    return float(-(wanted * LOGITS.log_softmax(-1)).sum(-1).mean())


def shares(images: Tensor, other: Tensor) -> Tensor:
    """How much of each image is not its own class but that of its partner; nan where both are the same."""
    own, theirs = LABELS.float(), LABELS[other].float()
    return (images.mean((1, 2, 3)) - own) / (theirs - own)


def test_label_smoothing_is_that_of_torch_and_leaves_images_alone() -> None:
    mixed, loss = drawn(Augmentation(label_smoothing=0.1), 0)
    assert mixed.args[0] is IMAGES
    assert loss == pytest.approx(float(F.cross_entropy(LOGITS, LABELS, label_smoothing=0.1)), rel=1e-6)


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
@pytest.mark.parametrize("seed", range(5))
def test_labels_are_shared_as_the_pixels_are(name: str, seed: int) -> None:
    mixed, loss = drawn(Augmentation(**{name: 1.0}), seed)
    torch.manual_seed(seed)
    torch.randint(1, ())  # which of the augmentations
    other = torch.randperm(8)
    second = shares(mixed.args[0], other)
    second = second[second.isfinite()]
    assert len(second) > 1
    assert torch.allclose(second, second[0].expand_as(second), atol=1e-5)
    share = float(second[0])
    assert 0.0 < share < 1.0
    wanted = (1 - share) * F.one_hot(LABELS, CLASSES) + share * F.one_hot(LABELS[other], CLASSES)
    assert loss == pytest.approx(cross_entropy(wanted), rel=1e-4)
    whole = set(mixed.args[0].unique().tolist()) <= {0.0, 1.0, 2.0}
    assert whole == (name == "cutmix")
    assert torch.equal(IMAGES.unique(), torch.tensor([0.0, 1.0, 2.0]))  # the data is not written into


def test_with_both_each_batch_draws_one() -> None:
    both = Augmentation(mixup=0.8, cutmix=1.0)
    cut = [set(drawn(both, seed)[0].args[0].unique().tolist()) <= {0.0, 1.0, 2.0} for seed in range(40)]
    assert 8 < sum(cut) < 32


def test_named_inputs_keep_their_name_and_unknown_labels_do_not_count() -> None:
    labels = LABELS.clone()
    labels[0] = -100
    mixed, loss = drawn(Augmentation(label_smoothing=0.1), 0, Batch((), {"pixel_values": IMAGES}, labels))
    assert set(mixed.kwargs) == {"pixel_values"}
    assert loss == pytest.approx(float(F.cross_entropy(LOGITS[1:], LABELS[1:], label_smoothing=0.1)), rel=1e-6)


@pytest.mark.parametrize(("data", "task", "words"), [
    (Data([(IMAGES, LABELS)], task="imitate"), None, "are for image classification, but the task is imitate"),
    (Data([(IMAGES, LABELS)]), "causal-lm", "are for image classification, but the task is causal-lm"),
    (Data([(IMAGES, LABELS)], loss=lambda outputs, batch: outputs.sum()), None, "the data has a loss of its own"),
    (Data([(IMAGES[:, 0], LABELS)]), None, r"but the batch has float32 \[8, 8, 8\] and labels"),
    (Data([IMAGES]), None, r"but the batch has float32 \[8, 2, 8, 8\] and no labels"),
    (Data([((IMAGES, IMAGES), LABELS)]), None, "Expected one float input"),
])  # fmt: skip
def test_other_data_is_refused(data: Data, task: str | None, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Augmentation(mixup=0.8, cutmix=1.0).check(data, task, "sparsify")
    Augmentation().check(data, task, "sparsify")


@pytest.mark.parametrize("kind", [SwapActivation, Sparsify])
def test_passes_train_with_it_reproducibly(traces: Any, kind: Any) -> None:
    _, inputs = hugging_face("vit")
    data = Data([(inputs, torch.tensor([0, 1, 2]))] * 2, task="image-classification")
    results = []
    for options in ({}, {"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1}) * 2:
        one = kind(steps=3, lr=1e-3, **options)
        results.append(Pipeline([one]).run(traces("vit"), inputs=inputs, data=data).reports[0].fit.losses)
    assert results[0] == results[2] != results[1] == results[3]


def test_only_in_training() -> None:
    with pytest.raises(UsageError, match="swap-activation: mixup only has an effect in training, but epochs is 0"):
        SwapActivation(mixup=0.8)
    with pytest.raises(UsageError, match=r"recover: label_smoothing is 1\.0, but must be at least 0 and below 1"):
        Recover(label_smoothing=1.0)
