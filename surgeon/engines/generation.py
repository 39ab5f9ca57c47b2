"""Language models of transformers as models of OpenVINO that keep their cache: each call takes the new tokens alone."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.engines.installed import installed, silent
from surgeon.engines.openvino import conversion, name_ports
from surgeon.errors import SaveError, UsageError, first_line
from surgeon.kernels.sparse_linear import ordinary_ops
from surgeon.models.hugging_face import quiet_transformers
from surgeon.moe.site import refuse_float8
from surgeon.tracing.quiet import quiet

INPUTS = ("input_ids", "attention_mask", "position_ids", "beam_idx")
"""What the model takes, as OpenVINO GenAI and Optimum Intel give it: new tokens [batch, new], the mask of all tokens
[batch, all], the places of the new ones [batch, new], and for each sample which one's cache it goes on with [batch].
The last is int32, the others int64."""

_BATCH, _NEW, _PAST = 2, 3, 5  # of the example
_AUTO = torch.export.Dim.AUTO


class _Step(nn.Module):
    """One call of a language model, with the cache as a list of tensors: keys and values of every layer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, beam_idx: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        from transformers.cache_utils import DynamicCache, DynamicLayer

        cache = DynamicCache()
        beams = beam_idx.long()  # with int32 indices OpenVINO 2026.4 fuses the cache into attention, and fails at it
        for keys, values in zip(past[::2], past[1::2], strict=True):
            layer = DynamicLayer()  # type: ignore[no-untyped-call]
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys.index_select(0, beams), values.index_select(0, beams)
            cache.layers.append(layer)
        made = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache,
            use_cache=True,
        )  # fmt: skip
        return made.logits, [tensor for layer in made.past_key_values.layers for tensor in (layer.keys, layer.values)]


def convert_generator(model: Any) -> Any:
    """Convert a causal language model of transformers to a stateful `openvino.Model` with `INPUTS` and "logits".

    Args:
        model: in evaluation mode, with float32 weights. All layers have an ordinary cache of keys and values.

    Raises:
        UsageError: the model is no such model, has experts in float8, or OpenVINO is not installed. SaveError: it
            cannot be converted.
    """
    refuse_float8(model, "OpenVINO")
    openvino = installed("openvino")
    shapes = _cache_shapes(model)
    past = [torch.randn(shape) for shape in shapes]
    ones = torch.ones(_BATCH, _PAST + _NEW, dtype=torch.long)
    places = torch.arange(_PAST, _PAST + _NEW).repeat(_BATCH, 1)
    args = (torch.ones_like(places), ones, places, torch.arange(_BATCH, dtype=torch.int32), past)
    free: dict[str, Any] = {name: {0: _AUTO, 1: _AUTO} for name in INPUTS[:3]}
    free |= {"beam_idx": {0: _AUTO}, "past": [{0: _AUTO, 2: _AUTO}] * len(past)}
    inside, outside = ([f"{way}.{place}" for place in range(len(past))] for way in ("past", "present"))
    try:
        with quiet(), silent(), quiet_transformers(), torch.no_grad(), ordinary_ops():
            exported = torch.export.export(_Step(model).eval(), args, dynamic_shapes=free, strict=False)
        with silent():
            made = openvino.convert_model(exported, extension=conversion())
            name_ports(made, [*INPUTS, *inside], ["logits", *outside])
            for parameter, shape in zip(made.get_parameters()[len(INPUTS) :], shapes, strict=True):
                parameter.set_partial_shape(openvino.PartialShape([-1, shape[1], -1, shape[3]]))
            made.validate_nodes_and_infer_types()
            offline = importlib.import_module("openvino._offline_transformations")
            offline.apply_make_stateful_transformation(made, dict(zip(inside, outside, strict=True)))
    except Exception as error:  # torch and OpenVINO raise many types
        raise SaveError(f"OpenVINO cannot convert the language model with its cache: {first_line(error)}.") from error
    return made


def _cache_shapes(model: Any) -> list[tuple[int, int, int, int]]:
    """The shapes of keys and values of every layer, at the sizes of the example.

    Raises:
        UsageError: the model gives no logits, or another cache.
    """
    from transformers.cache_utils import DynamicLayer

    tokens = torch.ones(_BATCH, _PAST, dtype=torch.long)
    try:
        with torch.no_grad(), quiet_transformers():
            made = model(input_ids=tokens, attention_mask=tokens, use_cache=True)
        layers = made.past_key_values.layers
        shapes = [tensor.shape for layer in layers for tensor in (layer.keys, layer.values)]
        ordinary = made.logits.dim() == 3 and all(type(layer) is DynamicLayer for layer in layers)
    except Exception as error:  # a model may raise anything
        raise UsageError(f"{type(model).__name__} is no language model with a cache: {first_line(error)}.") from error
    if not ordinary:
        raise UsageError(f"{type(model).__name__} has no ordinary cache of keys and values in every layer.")
    return [tuple(shape) for shape in shapes]
