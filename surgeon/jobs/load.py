"""Show what the tokens of some data run and activate in each layer, and what each token of one text or image runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surgeon.data.batch import Batch
from surgeon.dynamic.knobs import get_tau, set_tau
from surgeon.errors import DataError, UsageError, first_line
from surgeon.graph.calls import argument_names, as_args_kwargs
from surgeon.jobs.evaluation import eval_batches, held_out, other_data
from surgeon.jobs.open_model import Opened
from surgeon.json_values import NOT_IN_JSON
from surgeon.measure.load import LayerLoad, measure_load
from surgeon.measure.meter import token_load
from surgeon.models.example_inputs import token_fields
from surgeon.progress import Tell

_NO_PATCHES = 5  # a class token and four registers


@dataclass(frozen=True)
class LoadMap:
    """What each token of one sample runs, as a share of the multiply-adds that layers can skip, from 0 to 1.

    texts: the tokens of a text, in order, with the special ones; () for an image. loads: theirs; of an image those of
    the patches, row by row, without other tokens. rows: the rows of patches; 0 for a text.
    picture: the image, float32 [H, W] or [H, W, C] in [0, 1]; not in JSON.
    """

    texts: tuple[str, ...]
    loads: tuple[float, ...]
    rows: int = 0
    picture: Any = field(default=None, repr=False, compare=False, metadata=NOT_IN_JSON)


@dataclass(frozen=True)
class Loaded:
    """Loads of a saved surgery.

    data: what they were measured on, in words; None without data. tau: by layer. layers: empty without data.
    """

    model: str
    data: str | None
    tau: dict[str, float]
    layers: list[LayerLoad]
    shown: LoadMap | None
    notes: tuple[str, ...] = ()


def load(
    opened: Opened,
    *,
    tau: float | None = None,
    text: str | None = None,
    image: Path | None = None,
    progress: Tell | None = None,
) -> Loaded:
    """Measure loads on the held-out data, if any data was read, and of each token of a text or patch of an image.

    Args:
        tau: for all layers; by default as stored. text, image: at most one of them.

    Raises:
        UsageError: the model has no layers that skip or does not take texts or images. DataError: the image cannot be
            read.
    """
    if tau is not None:
        set_tau(opened.graph, tau)
    layers = [] if opened.data is None else measure_load(opened.graph, eval_batches(opened), progress=progress)
    shown = None
    if text is not None:
        shown = _text_map(opened, text)
    elif image is not None:
        shown = _image_map(opened, image)
    taus = get_tau(opened.graph)
    notes = list(other_data(opened))
    if not any(taus.values()):
        notes.append("tau is 0, at which everything runs. Give another one with --tau.")
    data = None if opened.data is None else opened.data.description
    return Loaded(opened.spec, data, taus, layers, shown, tuple(notes))


def _text_map(opened: Opened, text: str) -> LoadMap:
    tokenizer = opened.origin.tokenizer
    if tokenizer is None:
        raise UsageError(f"{opened.spec} has no tokenizer, so it takes no text.")
    made = tokenizer([text], return_tensors="pt", truncation=True)
    wanted = set(argument_names(opened.graph))
    inputs = {name: made[name] for name in token_fields(tokenizer, opened.origin.config) if name in wanted}
    loads = _loads(opened, inputs)[0]
    ids = inputs["input_ids"][0].tolist()
    if len(loads) != len(ids):
        raise UsageError(f"The layers of {opened.spec} do not run on the tokens of a text, so there is no map of it.")
    return LoadMap(tuple(tokenizer.decode([one]) for one in ids), tuple(loads.tolist()))


def _image_map(opened: Opened, file: Path) -> LoadMap:
    from PIL import Image

    shape = _image_shape(opened)
    try:
        image = Image.open(file).convert("L" if shape[1] == 1 else "RGB")
    except OSError as error:
        raise DataError(f"{file}: the image cannot be read: {first_line(error)}.") from error
    processor = getattr(opened.origin.processor, "image_processor", opened.origin.processor)
    if processor is not None:
        pixels = processor(images=[image], return_tensors="pt")["pixel_values"]
    else:
        values = torch.from_numpy(np.array(image.resize((shape[3], shape[2])))).float() / 255
        pixels = values[None, None] if shape[1] == 1 else values.permute(2, 0, 1)[None]
    name = next(iter(as_args_kwargs(opened.inputs)[1]), None)
    loads = _loads(opened, pixels if name is None else {name: pixels})[0]
    side = math.isqrt(len(loads))
    # Tokens that are no patches, such as a class token and registers, stand before the patches.
    if pixels.shape[2] != pixels.shape[3] or len(loads) - side * side > _NO_PATCHES:
        raise UsageError(
            f"The {len(loads)} tokens of {opened.spec} are no square of patches, so there is no map of them."
        )
    shown = loads[len(loads) - side * side :]
    return LoadMap((), tuple(shown.tolist()), side, np.asarray(image) / 255)


def sample_maps(opened: Opened, count: int = 4) -> list[LoadMap]:
    """Return the maps of the first held-out samples: texts, or images of which layers see a square of patches.

    Raises:
        UsageError: the layers do not run on the tokens of a text or the patches of an image.
    """
    batch = next(iter(held_out(opened)))
    taken = Batch(tuple(x[:count] for x in batch.args), {name: x[:count] for name, x in batch.kwargs.items()})
    loads = token_load(opened.graph, taken.kwargs or taken.args)
    found = [
        made
        for row in range(min(count, batch.size))
        if (made := _map_of(opened, taken, row, loads[row] if loads.dim() == 2 else loads[:0])) is not None
    ]
    if not found:
        raise UsageError(f"The layers of {opened.spec} run on no tokens of texts or patches of images.")
    return found


def _map_of(opened: Opened, batch: Batch, row: int, loads: Tensor) -> LoadMap | None:
    """The map of one sample; None if its layers do not run on tokens or patches."""
    tokenizer, ids = opened.origin.tokenizer, batch.kwargs.get("input_ids")
    if ids is not None and tokenizer is not None and len(loads) == ids.shape[1]:
        there = batch.kwargs.get("attention_mask", torch.ones_like(ids))[row].bool()
        texts = tuple(tokenizer.decode([one]) for one in ids[row][there].tolist())
        return LoadMap(texts, tuple(loads[there].tolist()))
    values = next(iter((*batch.args, *batch.kwargs.values())))[row]
    side = math.isqrt(len(loads))
    if values.dim() != 3 or not side or len(loads) - side * side > _NO_PATCHES or values.shape[0] not in (1, 3):
        return None
    picture = values.float() - values.min()
    picture = (picture / picture.max().clamp_min(1e-12)).permute(1, 2, 0).squeeze(-1)
    return LoadMap((), tuple(loads[len(loads) - side * side :].tolist()), side, picture.numpy())


def _image_shape(opened: Opened) -> torch.Size:
    args, kwargs = as_args_kwargs(opened.inputs)
    values = [*args, *kwargs.values()]
    shape = values[0].shape if len(values) == 1 and isinstance(values[0], Tensor) else torch.Size()
    if len(shape) != 4 or shape[1] not in (1, 3):
        raise UsageError(f"{opened.spec} does not take images [B, C, H, W] of one or three channels.")
    return shape


def _loads(opened: Opened, inputs: Mapping[str, Tensor] | Tensor) -> Tensor:
    """The load of each token, [1, T]."""
    try:
        found = token_load(opened.graph, inputs)
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"{opened.spec} cannot be run on this: {first_line(error)}.") from error
    if found.dim() != 2 or len(found) != 1:
        raise UsageError(f"The layers of {opened.spec} do not run on one row of tokens, so there is no map of them.")
    return found
