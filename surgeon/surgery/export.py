"""Write a surgery as a directory of transformers, which `from_pretrained` reads and the hub takes.

    model.safetensors, or shards with an index    the weights
    config.json                                   the model's config, with the plan of the converted layers
    generation_config.json, tokenizer, processor  as far as the model has them
    README.md                                     the model card
    surgeon.json                                  the record of the surgery

The directory appears whole or not at all.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgeon.directories import OVERWRITE, restore
from surgeon.errors import LoadError, SaveError, UsageError, first_line
from surgeon.grafting.graft import graft as graft_graph
from surgeon.graph.given import path_of
from surgeon.graph.traced import TracedGraph
from surgeon.models.hugging_face import companions, is_pretrained, model_class, quiet_transformers, weight_files
from surgeon.models.sentence_transformers import copy_sentence_files
from surgeon.models.weight_files import sha256_of
from surgeon.passes.report import PassReport
from surgeon.surgery.artifact import written_whole
from surgeon.surgery.card import model_card
from surgeon.surgery.origin import Origin
from surgeon.surgery.record import Record, write_record

log = logging.getLogger("surgeon")

# Not the name of the record of a saved surgery: this directory is a model.
CARD, RECORD = "README.md", "surgeon.json"


def export(
    model: nn.Module | None,
    graph: TracedGraph,
    reports: Sequence[PassReport],
    inputs: Any,
    directory: str | Path,
    *,
    record: Record,
    origin: Origin,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
    share: bool = False,
) -> nn.Module:
    """Graft a graph into its model, and write the model so that `from_pretrained` reads it.

    Args:
        model: the model that the graph was made from. None builds it from the config, or reads it from where the
            surgery found it if its files are still the same.
        graph, reports, inputs, share: as `surgeon.grafting.graft.graft` takes them. record, origin: of the surgery.
        max_shard_size: the size of the largest weight file, such as "500MB".

    Returns:
        The model that was written.

    Raises:
        UsageError: the model is not one of transformers, its config describes another one, or a weight of it is not to
            be had.
        SaveError: the directory has other content, or cannot be written. Nothing half-written is left.
        VerificationError, TraceError: as `surgeon.grafting.graft.graft`.
    """
    from surgeon.pretrained.quantizer import attach, check_described

    directory = path_of(directory)
    restore(directory)
    check_exportable(directory, overwrite=overwrite)
    base = model if model is not None else base_of(record, origin)
    made: Any = rebuilt(base, graph, reports, inputs, origin, share=share)
    if not is_pretrained(made):
        what = f"{type(made).__name__} is not a model of transformers, so it has no from_pretrained."
        if hasattr(made, "merge_and_unload"):
            raise UsageError(f"{what} Merge its adapters first, or convert the base model and put them on the result.")
        raise UsageError(f"{what} Use surgeon.graft and torch.save, or Surgery.save.")
    check_described(made, made.surgeon_graft.plan)
    attach(made, made.surgeon_graft.plan)
    with written_whole(directory) as fresh, quiet_transformers():
        made.save_pretrained(fresh, max_shard_size=max_shard_size)
        for part in (origin.tokenizer, origin.processor):
            if part is not None:
                part.save_pretrained(fresh)
        if origin.path is not None:
            copy_sentence_files(Path(origin.path), fresh)
        # Where the model lay on this machine is nobody's business on the hub.
        path = None if record.input.path is None else Path(record.input.path).name
        write_record(replace(record, input=replace(record.input, path=path)), fresh, RECORD)
        (fresh / CARD).write_text(model_card(made, record, origin, inputs), encoding="utf-8")
    return made  # type: ignore[no-any-return]


def check_exportable(directory: Path, *, overwrite: bool) -> None:
    """Refuse a directory that holds something else.

    Raises:
        SaveError: it is a file, or is not empty and not a model that is to be overwritten.
    """
    if directory.exists() and not directory.is_dir():
        raise SaveError(f"{directory} is a file. Give a directory for the model.")
    if directory.is_dir() and any(directory.iterdir()):
        if not overwrite:
            raise SaveError(f"{directory} exists and is not empty.", **OVERWRITE)
        if not ((directory / "config.json").exists() and (directory / CARD).exists()):
            raise SaveError(f"{directory} is not empty and not an exported model. Give another directory.")


def rebuilt(
    base: nn.Module | None,
    graph: TracedGraph,
    reports: Sequence[PassReport],
    inputs: Any,
    origin: Origin,
    *,
    share: bool = False,
) -> nn.Module:
    """Graft a graph into its model. Without the model, one is made from its config, and takes all weights of the graph.

    Raises:
        UsageError: the graph does not have all weights of the model, and the model was not given.
    """
    with quiet_transformers():
        made_up = base is None
        model = _skeleton(origin) if base is None else base
        return graft_graph(model, graph, reports, inputs, share=share, made_up=made_up)


def origin_of(directory: Path) -> Origin:
    """What was saved beside a surgery: config, tokenizer and so on.

    Raises:
        LoadError: a file is damaged.
    """
    config, tokenizer, processor, generation = companions(directory)
    return Origin(str(directory), "artifact", None, config, tokenizer, processor, (), generation)


def base_of(record: Record, origin: Origin) -> nn.Module | None:
    """Read the model that the surgery started from, if it is still where it was."""
    path = None if record.input.path is None else Path(record.input.path)
    if path is None or record.input.kind != "hf" or not (path / "config.json").is_file():
        return None
    if sha256_of(weight_files(path)) != record.input.sha256:
        log.info("%s has changed since the surgery: the model is built from its config.", path)
        return None
    return read_base(path, origin)


def read_base(path: Path, origin: Origin) -> nn.Module:
    """Read the original model of a surgery from a directory.

    Raises:
        LoadError: it cannot be read.
    """
    with quiet_transformers():
        try:
            model: nn.Module = model_class(origin.config, None).from_pretrained(
                path, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:
            raise LoadError(f"{path} cannot be loaded as the original model: {first_line(error)}.") from error
    return model


def _skeleton(origin: Origin) -> nn.Module:
    """The model with random weights, all of which the graph has to have."""
    if origin.config is None or not hasattr(origin.config, "save_pretrained"):
        raise UsageError("The surgery has no config of transformers, so no model can be made of it. Use surgeon.graft.")
    dtype = getattr(origin.config, "dtype", None)
    made: nn.Module = model_class(origin.config, None)._from_config(origin.config, dtype=dtype or torch.float32)
    return made.eval()
