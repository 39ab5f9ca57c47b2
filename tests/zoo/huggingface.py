"""transformers models from tiny configs: two layers, width 32, hidden width 64, vocabulary 101, random weights.

What is known of each model stands in the tables (`hf_text`, `hf_images`, ...); this module turns a row into a case. No
test downloads anything.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from . import hf_images, hf_other, hf_text, hf_variants
from .case import Case, Inputs, Registry
from .hf_row import DROP, Row

VOCABULARY, LENGTH, IMAGE = 101, 8, 32

TINY: dict[str, Any] = {
    **{"hidden_size": 32, "d_model": 32, "num_hidden_layers": 2, "num_layers": 2, "num_attention_heads": 4},
    **{"num_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "d_kv": 8},
    **{"intermediate_size": 64, "ffn_dim": 64, "d_ff": 64, "vocab_size": VOCABULARY, "max_position_embeddings": 64},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
    # Encoder-decoders.
    **{"encoder_layers": 2, "decoder_layers": 2, "num_encoder_layers": 2, "num_decoder_layers": 2},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
    # Mixtures of experts, and attention with low-rank projections.
    **{"moe_intermediate_size": 32, "shared_expert_intermediate_size": 64, "first_k_dense_replace": 1},
    **{"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4},
    **{"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8},
    # Images and sound.
    **{"image_size": IMAGE, "patch_size": 8, "num_mel_bins": 16},
}
"""Sizes by the names under which configs know them; a config gets those that it declares."""

CASES = Registry("hf")


def tiny_config(config_class: Any, overrides: dict[str, Any]) -> Any:
    """Return a config of the class with the sizes of `TINY`, its parts included, then `overrides`."""
    return config_class(**_sizes(config_class, overrides))


def _sizes(config_class: Any, overrides: dict[str, Any]) -> dict[str, Any]:
    try:
        default = config_class()
    except Exception:  # no defaults for everything: then the overrides have to name what is missing
        default = None
    sizes = {name: size for name, size in TINY.items() if _takes(config_class, default, name)}
    for name, part in getattr(config_class, "sub_configs", {}).items():
        given = overrides.get(name, {})
        if isinstance(given, dict) and hasattr(part, "model_type") and part.__name__ != "AutoConfig":
            sizes[name] = _sizes(part, given)
            overrides = {key: value for key, value in overrides.items() if key != name}
    return {name: value for name, value in {**sizes, **overrides}.items() if value is not DROP}


def _takes(config_class: Any, default: Any, name: str) -> bool:
    """Whether the config has a single settable number of that name."""
    static = inspect.getattr_static(config_class, name, None)
    if isinstance(static, property):
        return False
    if default is None:
        return True
    try:
        value = getattr(default, name)
    except Exception:
        return False
    return not isinstance(value, list | tuple) and (value is not None or name not in ("q_lora_rank",))


# Inputs ---------------------------------------------------------------------------------------------------------------


def _ids(batch: int, length: int = LENGTH) -> Tensor:
    return torch.randint(3, VOCABULARY - 1, (batch, length))


def _text(batch: int) -> Inputs:
    ids = _ids(batch)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _padded(batch: int) -> Inputs:
    ids = _ids(batch)
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask}


INPUTS: dict[str, Callable[[int], Inputs]] = {
    "text": _text,
    "padded": _padded,
    "ids": lambda batch: {"input_ids": _ids(batch)},
    "seq2seq": lambda batch: {**dict(_text(batch)), "decoder_input_ids": _ids(batch, LENGTH - 1)},
    "choices": lambda batch: {"input_ids": torch.randint(3, VOCABULARY - 1, (batch, 2, LENGTH))},
    "pixels": lambda batch: {"pixel_values": torch.randn(batch, 3, IMAGE, IMAGE)},
    "pixels_64": lambda batch: {"pixel_values": torch.randn(batch, 3, 64, 64)},
    "gray": lambda batch: {"pixel_values": torch.randn(batch, 1, IMAGE, IMAGE)},
    "video": lambda batch: {"pixel_values": torch.randn(batch, 4, 3, IMAGE, IMAGE)},
    "wave": lambda batch: {"input_values": torch.randn(batch, 800)},
    "mel": lambda batch: {"input_features": torch.randn(batch, 16, LENGTH * 4)},
    "mel_last": lambda batch: {"input_features": torch.randn(batch, LENGTH * 4, 16)},
    "text_and_pixels": lambda batch: {**dict(_text(batch)), "pixel_values": torch.randn(batch, 3, IMAGE, IMAGE)},
}
"""Example inputs by kind, each a function of the batch size."""


# Cases ----------------------------------------------------------------------------------------------------------------


def _add(row: Row) -> None:
    model_class = getattr(transformers, row.model)
    make_inputs = row.inputs if callable(row.inputs) else INPUTS[row.inputs]

    def build() -> nn.Module:
        config = tiny_config(model_class.config_class, row.config)
        model: nn.Module = (row.make or model_class)(config)
        return model.eval()

    CASES.add(
        Case(
            name=row.name or row.model,
            build=build,
            inputs=make_inputs,
            required=row.required,
            count=row.count,
            gated=row.gated,
            activation=row.activation,
            traps=row.traps,
            quick=row.quick,
            note=row.note,
            tolerance=row.tolerance,
            fixed_batch=row.fixed_batch,
            alternatives=row.alternatives,
            untraceable=row.untraceable,
        )
    )


for _row in (*hf_text.ROWS, *hf_variants.ROWS, *hf_images.ROWS, *hf_other.ROWS):
    _add(_row)
