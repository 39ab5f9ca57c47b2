"""Decode images and sounds when a batch needs them, and run the model's processor on them."""

from __future__ import annotations

import inspect
import io
from collections.abc import Sequence
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surgeon.data.columns import IMAGE, SOUND, ReadOptions, find_column
from surgeon.errors import DataError, UsageError
from surgeon.models.hugging_face import blaming

CELL, ROW = "cell", "row"
"""The columns of rows that are decoded later: what they hold, and their number, to name them in errors."""


class ImageReader:
    """Makes pixels of the rows of an image column."""

    def __init__(self, options: ReadOptions, splits: Sequence[Any]) -> None:
        """Find the column. Raises UsageError if neither a processor nor the config says how large images are."""
        self.options = options
        self.column = find_column(splits, options.text, IMAGE, options.spec, "image")
        self.mode = "L" if getattr(options.config, "num_channels", 3) == 1 else "RGB"
        size = getattr(options.config, "image_size", None)
        if options.processor is None and size is None:
            raise UsageError("image-classification needs an image processor, or a config with an image_size.")
        self.size = (size, size) if isinstance(size, int) or size is None else tuple(size)

    def rows(self, rows: Any) -> Any:
        """Return the rows with their images not yet decoded, as the columns `CELL` and `ROW`."""
        import datasets

        return _undecoded(rows, self.column, datasets.Image)

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Make pixels, float32 `[B, C, H, W]`.

        Raises:
            DataError: a cell is no image, or is damaged. The message names the row.
        """
        images = [self._image(sample[CELL], sample[ROW]) for sample in samples]
        if self.options.processor is not None:
            with blaming("processor"):
                return dict(_part(self.options.processor, "image_processor")(images=images, return_tensors="pt"))
        return {"pixel_values": torch.stack([self._pixels(image) for image in images])}

    def _image(self, cell: Any, row: int) -> Any:
        import datasets

        if not isinstance(cell, dict):
            raise DataError(
                f"{self.options.spec}, row {row}: column '{self.column}' contains {type(cell).__name__} values, "
                "not images."
            )
        try:
            return datasets.Image().decode_example(cell).convert(self.mode)
        except Exception as error:  # PIL raises many types
            raise DataError(f"{self.options.spec}: the image of row {row} cannot be read: {error}") from error

    def _pixels(self, image: Any) -> Tensor:
        height, width = self.size
        pixels = torch.from_numpy(np.array(image.resize((width, height)))).float() / 255
        return pixels.unsqueeze(0) if self.mode == "L" else pixels.permute(2, 0, 1)


class SoundReader:
    """Makes the model's inputs of the rows of a sound column: files, their bytes, or the numbers themselves."""

    def __init__(self, options: ReadOptions, splits: Sequence[Any]) -> None:
        """Find the column.

        Raises:
            UsageError: the model has no feature extractor.
        """
        if options.processor is None:
            raise UsageError(f"{options.spec} is sound, but the model has no feature extractor.")
        self.options = options
        self.column = find_column(splits, options.text, SOUND, options.spec, "audio")
        self.extractor = _part(options.processor, "feature_extractor")
        self.rate: int = self.extractor.sampling_rate

    def rows(self, rows: Any) -> Any:
        """Return the rows with their sounds not yet decoded, as the columns `CELL` and `ROW`."""
        import datasets

        return _undecoded(rows, self.column, datasets.Audio)

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Make what the feature extractor gives: input values [B, N] or features, with a mask if it makes one.

        Raises:
            DataError: a cell is no sound, or is damaged. The message names the row.
        """
        waves = [self._wave(sample[CELL], sample[ROW]) for sample in samples]
        padding = inspect.signature(self.extractor.__call__).parameters.get("padding")
        # Some extractors pad to a length of their own by default, and need it.
        more = {"padding": True} if padding is not None and padding.default is False else {}
        with blaming("processor"):
            return dict(self.extractor(waves, sampling_rate=self.rate, return_tensors="pt", **more))

    def _wave(self, cell: Any, row: int) -> Any:
        """Return the mean of the channels at the model's sampling rate, float32 [N]."""
        where = f"{self.options.spec}, row {row}: column '{self.column}'"
        rate = self.rate
        if isinstance(cell, dict) and "array" in cell:
            wave, rate = cell["array"], int(cell["sampling_rate"])
        elif isinstance(cell, dict):
            wave, rate = self._decoded(cell.get("bytes"), cell.get("path"), where)
        elif isinstance(cell, str):
            wave, rate = self._decoded(None, cell, where)
        else:
            wave = cell
        try:
            values: Any = np.asarray(wave, dtype=np.float32)
        except (TypeError, ValueError):
            values = np.zeros(())
        if values.ndim not in (1, 2) or not values.size:
            raise DataError(f"{where} contains {type(cell).__name__} values, not sounds.")
        values = values.mean(-1) if values.ndim == 2 else values
        if rate != self.rate:
            from scipy.signal import resample_poly

            common = gcd(rate, self.rate)
            values = resample_poly(values, self.rate // common, rate // common).astype(np.float32)
        return values

    def _decoded(self, content: bytes | None, path: str | None, where: str) -> tuple[Any, int]:
        """Return the samples [N, channels] of a sound file and their rate."""
        import soundfile

        if content is None:  # a path, relative to the working directory or to the file that names it
            places = () if path is None else (Path(path), Path(self.options.spec).parent / path)
            found = next((place for place in places if place.is_file()), None)
            if found is None:
                raise DataError(f"{where} names the file {path!r}, which does not exist.")
            content = found.read_bytes()
        try:
            wave, rate = soundfile.read(io.BytesIO(content), always_2d=True)
        except Exception as error:  # soundfile raises errors of its library
            raise DataError(f"{where}: the sound cannot be read: {error}") from error
        return wave, int(rate)


def takes_sound(processor: Any) -> bool:
    """Whether a processor makes a model's inputs of sounds."""
    return hasattr(_part(processor, "feature_extractor"), "sampling_rate")


def _part(processor: Any, name: str) -> Any:
    """Return a part of a processor that is made of several, or the processor itself."""
    return getattr(processor, name, processor)


def _undecoded(rows: Any, column: str, kind: Any) -> Any:
    if isinstance(rows.features[column], kind):
        rows = rows.cast_column(column, kind(decode=False))
    rows = rows.select_columns([column]).rename_column(column, CELL)
    return rows.add_column(ROW, list(range(len(rows))))
