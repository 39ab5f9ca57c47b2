"""Images to classify, from folders and tables."""

from __future__ import annotations

import gc
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from PIL import Image

from surgeon.data.files import load_data
from surgeon.errors import DataError, UsageError

from .tables import write_lines


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for number, name in enumerate(("cat", "dog")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(3):
            color = (255 * number, 85 * index, 0)
            Image.new("RGB", (12, 9), color).save(tmp_path / "images" / name / f"{index}.png")
    return tmp_path / "images"


def vit(**changes: Any) -> Any:
    settings = {"image_size": 8, "num_labels": 2, "architectures": ["ViTForImageClassification"]}
    return hf.ViTConfig(**settings | changes)


def test_image_folder(images: Path) -> None:
    data = load_data(str(images), config=vit(), eval_fraction=0)
    (batch,) = data.train
    pixels = batch.kwargs["pixel_values"]
    assert pixels.shape == (6, 3, 8, 8)
    assert data.task == "image-classification"
    assert torch.equal(pixels[:, 0, 0, 0].long(), batch.labels)  # dogs are red
    assert torch.allclose(pixels[:, 1, 0, 0].sort().values, torch.tensor([0, 0, 1, 1, 2, 2]) / 3)


def test_image_classes_are_the_models(images: Path) -> None:
    config = vit(id2label={0: "dog", 1: "cat"}, label2id={"dog": 0, "cat": 1})
    (batch,) = load_data(str(images), config=config, eval_fraction=0).train
    assert torch.equal(1 - batch.kwargs["pixel_values"][:, 0, 0, 0].long(), batch.labels)


def test_classes_in_a_metadata_file(images: Path) -> None:
    for index in range(3):
        (images / "dog" / f"{index}.png").rename(images / f"dog{index}.png")
    shutil.rmtree(images / "cat")
    shutil.rmtree(images / "dog")
    (images / "metadata.csv").write_text("file_name,label\ndog0.png,None\ndog1.png,NA\ndog2.png,None\n")
    config = vit(id2label={0: "NA", 1: "None"}, label2id={"NA": 0, "None": 1})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # `datasets` leaves the file open
        (batch,) = load_data(str(images), config=config, eval_fraction=0).train
        gc.collect()
    green = (batch.kwargs["pixel_values"][:, 1, 0, 0] * 3).round().long()
    assert batch.labels.tolist() == (green != 1).long().tolist()


def test_images_in_grey_and_of_another_shape(images: Path) -> None:
    (batch,) = load_data(str(images), config=vit(num_channels=1, image_size=[6, 10]), eval_fraction=0).train
    assert batch.kwargs["pixel_values"].shape == (6, 1, 6, 10)


def test_images_through_a_processor(images: Path) -> None:
    processor = hf.ViTImageProcessor(size={"height": 4, "width": 4})
    (batch,) = load_data(str(images), config=vit(), processor=processor, eval_fraction=0).train
    assert batch.kwargs["pixel_values"].shape == (6, 3, 4, 4)
    assert batch.kwargs["pixel_values"].min() == -1


def test_images_that_cannot_be_used(images: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs an image processor, or a config with an image_size"):
        load_data(str(images), task="image-classification")
    path = write_lines(tmp_path / "a.jsonl", [{"image": "cat.png", "label": 0}])
    with pytest.raises(DataError, match=r"row 0: column 'image' contains str values, not images"):
        list(load_data(path, config=vit(), eval_fraction=0).train)
    (images / "cat" / "0.png").write_bytes(b"\x89PNG junk")
    with pytest.raises(DataError, match="the image of row 0 cannot be read"):
        list(load_data(str(images), config=vit(), eval_fraction=0).train)
