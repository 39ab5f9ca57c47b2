"""Make example inputs for tracing a Hugging Face model."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.errors import UsageError
from surgeon.models.hugging_face import blaming

log = logging.getLogger("surgeon")


BATCH = 2  # torch.export treats a dimension of size 1 as a constant
LENGTH = 8
_SENTENCES = (
    "The cat sat on the mat and looked at the rain.",
    "Nobody knew how long it would stay there, or why it came.",
)
GIVE_INPUTS = {
    "python": "Give example inputs.",
    "command": "Give example inputs: --inputs module:function, or a file of tensors.",
}
"""What to do about inputs that cannot be made, for an error."""


def example_inputs(
    model: nn.Module, *, tokenizer: Any | None = None, processor: Any | None = None, config: Any | None = None
) -> dict[str, Tensor]:
    """Make a batch of two that a Hugging Face model accepts, the same on every call.

    Text is two sentences of unequal length, padded by the tokenizer, so that the mask matters. Without a tokenizer the
    ids are drawn from the vocabulary, except special tokens. Images, video and audio are noise in the shape that the
    processor or the config asks for. A vision-language model that generates text gets text only.

    Args:
        model: the model. Its `forward` signature and `main_input_name` say which inputs it takes.
        tokenizer, processor: the model's tokenizer and processor, if it has them.
        config: the model's config, by default `model.config`.

    Returns:
        Keyword inputs on the CPU: ids and masks int64 `[2, length]`, floating tensors in the model's dtype.

    Raises:
        UsageError: the model is not from Hugging Face, or its inputs cannot be generated. The message says why.
    """
    config = config if config is not None else getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    if config is None or main is None:
        raise UsageError(
            f"{type(model).__name__} is not a Hugging Face model, so its inputs are unknown.",
            **GIVE_INPUTS,
        )
    maker = _Maker(model, config, tokenizer, processor)
    parameters = maker.parameters
    wanted = [main] if isinstance(main, str) else list(main)
    wanted += [name for name, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if "return_loss" in parameters:  # models that compare two modalities need both
        wanted += [name for name in ("input_ids", "pixel_values", "input_features") if name in parameters]
    if _pads_by_id(model) and "input_ids" in wanted and maker.first("pad_token_id") is None:
        raise UsageError(
            f"{type(model).__name__} needs pad_token_id to find the last token of each row, and its config has none. "
            "Set pad_token_id in config.json."
        )
    inputs: dict[str, Tensor] = {}
    for name in dict.fromkeys(wanted):
        if name not in inputs:
            if name not in _MAKERS:
                raise UsageError(
                    f"{type(model).__name__} takes the input '{name}', which cannot be generated.",
                    **GIVE_INPUTS,
                )
            inputs |= _MAKERS[name](maker)
    head = type(model).__name__
    derives_decoder = "ForSequenceClassification" in head or "ForQuestionAnswering" in head  # shifts the encoder's ids
    if "decoder_input_ids" in parameters and getattr(config, "is_encoder_decoder", False) and not derives_decoder:
        inputs |= {"decoder_input_ids": maker.ids(LENGTH - 1, decoder=True)}
    if "bbox" in parameters and "input_ids" in inputs:
        inputs |= maker.boxes(inputs["input_ids"])
    return {name: maker.cast(value) for name, value in inputs.items() if name in parameters}


def token_fields(tokenizer: Any, config: Any | None) -> tuple[str, ...]:
    """Return the names of the tokenizer's outputs that the model takes.

    A model without type embeddings gets no token types. Some tokenizers make them for every model, and GPT-2, for
    example, would add the embedding of token 0 to every position.
    """
    names = [name for name in tokenizer.model_input_names if name in ("input_ids", "attention_mask", "token_type_ids")]
    if not any(getattr(part, "type_vocab_size", 0) for part in _parts(config)):
        names = [name for name in names if name != "token_type_ids"]
    return tuple(names)


@dataclass(frozen=True)
class _Maker:
    """Generates the inputs of a model. Every random draw starts from the same seed."""

    model: nn.Module
    config: Any
    tokenizer: Any | None
    processor: Any | None

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.model.forward).parameters

    def first(self, *names: str) -> Any:
        """Return the first of these settings that the config, or a config inside it, has."""
        values = (getattr(part, name, None) for part in _parts(self.config) for name in names)
        return next((value for value in values if value is not None), None)

    def need(self, *names: str) -> Any:
        value = self.first(*names)
        if value is None:
            raise UsageError(
                f"{type(self.model).__name__}: the config has no {' or '.join(names)}, so the shape of the inputs is "
                f"unknown.",
                **GIVE_INPUTS,
            )
        return value

    def cast(self, value: Tensor) -> Tensor:
        dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)
        return value.to(dtype) if value.is_floating_point() else value

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(0))

    # --- text

    def text_config(self, decoder: bool) -> Any:
        part = getattr(self.config, "decoder" if decoder else "encoder", None)
        if hasattr(part, "vocab_size"):
            return part
        return self.config.get_text_config(decoder=decoder) if hasattr(self.config, "get_text_config") else self.config

    def ids(self, length: int, *, decoder: bool = False) -> Tensor:
        """Draw ids of ordinary tokens, int64 `[2, length]`."""
        part = self.text_config(decoder)
        vocabulary = getattr(part, "vocab_size", None) or self.need("vocab_size")
        ordinary = torch.ones(vocabulary, dtype=torch.bool)
        ordinary[[index for index in _special_ids(self.config, part) if 0 <= index < vocabulary]] = False
        choices = ordinary.nonzero().flatten() if ordinary.any() else torch.arange(vocabulary)
        picks = torch.randint(len(choices), (BATCH, length), generator=torch.Generator().manual_seed(0))
        return choices[picks]

    def longest(self) -> int:
        """Return the most tokens that the model has positions for, without the offset that a few models add."""
        part = self.text_config(decoder=False)
        limits = (
            getattr(part, name, None) for name in ("max_position_embeddings", "n_positions", "max_target_positions")
        )
        limit = next((value for value in limits if isinstance(value, int) and value > 0), 512)
        padding = getattr(part, "pad_token_id", None)
        return max(2, limit - (padding + 1 if isinstance(padding, int) and 0 <= padding < 4 else 0))

    def text(self) -> dict[str, Tensor]:
        with blaming("tokenizer"):
            made = self.tokenized() if self.tokenizer is not None else None
        return made if made is not None else self.drawn()

    def tokenized(self) -> dict[str, Tensor] | None:
        tokenizer = self.tokenizer
        assert tokenizer is not None
        limit = self.longest()
        rows = tokenizer(list(_SENTENCES), truncation=True, max_length=limit, add_special_tokens=True)
        lengths = [len(row) for row in rows["input_ids"]]
        if min(lengths) < min(4, limit):
            log.warning(
                "The tokenizer turns an example sentence into %d token(s). Random token ids are used instead.",
                min(lengths),
            )
            return None
        fields = token_fields(tokenizer, self.config)
        if tokenizer.pad_token_id is None:
            made = {name: torch.tensor([row[: min(lengths)] for row in rows[name]]) for name in fields}
        else:
            made = dict(tokenizer.pad({name: rows[name] for name in fields}, return_tensors="pt"))
        vocabulary = getattr(self.text_config(decoder=False), "vocab_size", None)
        if vocabulary is not None and int(made["input_ids"].max()) >= vocabulary:
            raise UsageError(
                f"The tokenizer gives id {int(made['input_ids'].max())}, but the model has only {vocabulary} "
                f"embeddings: they do not belong together.",
                **GIVE_INPUTS,
            )
        return made

    def drawn(self) -> dict[str, Tensor]:
        """Draw ids without a tokenizer, with token types if the model has embeddings for them.

        With a padding id the second row is two tokens shorter and padded.
        """
        part = self.text_config(decoder=False)
        ids = self.ids(min(LENGTH, self.longest()))
        mask = torch.ones_like(ids)
        length = ids.shape[1]
        padding, end = (_first_id(getattr(part, name, None), part) for name in ("pad_token_id", "eos_token_id"))
        short = length - 2 if padding is not None and length >= 6 else length
        if padding is not None:
            ids[1, short:] = padding
            mask[1, short:] = 0
        if end is not None:
            ids[0, length - 1] = ids[1, short - 1] = end
        made = {"input_ids": ids, "attention_mask": mask}
        if (self.first("type_vocab_size") or 0) > 1:  # a pair of sentences
            made["token_type_ids"] = (torch.arange(length) >= length // 2).long().expand(BATCH, -1).contiguous()
        return made

    def boxes(self, ids: Tensor) -> dict[str, Tensor]:
        limit = self.need("max_2d_position_embeddings")
        corner = torch.arange(ids.shape[1]) % (limit // 2)
        box = torch.stack([corner, corner, corner + limit // 4, corner + limit // 4], dim=-1)
        return {"bbox": box.expand(BATCH, -1, -1).contiguous()}

    # --- images, video, audio

    def image(self) -> dict[str, Tensor]:
        made = self.processed_images()
        if made is not None:
            return made
        height, width = _pair(self.first("image_size", "img_size", "crop_size", "input_size") or 64)
        channels = self.first("num_channels", "in_channels", "in_chans") or 3
        frames = self.first("num_frames", "frames_per_clip")
        # Timesformer and X-CLIP take video but say "image". Text models take frames only if they compare modalities.
        if frames and ("text" not in _modalities(self.model) or "return_loss" in self.parameters):
            return {"pixel_values": self.noise(BATCH, frames, channels, height, width)}
        return {"pixel_values": self.noise(BATCH, channels, height, width)}

    def processed_images(self) -> dict[str, Tensor] | None:
        if self.processor is None or "image_processor" not in _kind(self.processor):
            return None
        from PIL import Image

        channels = 1 if self.first("num_channels") == 1 else 3
        pixels = torch.randint(256, (BATCH, 96, 80, channels), generator=torch.Generator().manual_seed(0)).to(
            torch.uint8
        )
        images = [Image.fromarray(array.squeeze(-1).numpy() if channels == 1 else array.numpy()) for array in pixels]
        with blaming("processor"):
            return dict(self.processor(images=images, return_tensors="pt"))

    def video(self) -> dict[str, Tensor]:
        height, width = _pair(self.need("crop_size", "image_size"))
        frames = self.need("frames_per_clip", "num_frames")
        channels = self.first("num_channels", "in_chans") or 3
        return {"pixel_values_videos": self.noise(BATCH, frames, channels, height, width)}

    def processed_sound(self) -> dict[str, Tensor] | None:
        if self.processor is None or "feature_extractor" not in _kind(self.processor):
            return None
        with blaming("processor"):
            rate = self.processor.sampling_rate
            waves = [wave.numpy() for wave in self.noise(BATCH, rate)]
            return dict(self.processor(waves, sampling_rate=rate, return_tensors="pt", padding=True))

    def waves(self) -> dict[str, Tensor]:
        made = self.processed_sound()
        if made is not None:
            return made
        strides = self.first("conv_stride", "upsampling_ratios", "downsampling_ratios")
        if strides is None and self.first("num_mel_bins"):
            return {"input_values": self.noise(BATCH, self.need("max_length"), self.need("num_mel_bins"))}
        samples = 16 * math.prod(strides) if strides is not None else 16000
        channels = self.first("audio_channels")
        shape = (BATCH, samples) if strides is None or self.first("conv_stride") else (BATCH, channels or 1, samples)
        return {"input_values": self.noise(*shape)}

    def spectra(self) -> dict[str, Tensor]:
        made = self.processed_sound()
        if made is not None:
            return made
        positions = self.first("max_source_positions")
        if positions is not None and self.first("num_mel_bins"):
            return {"input_features": self.noise(BATCH, self.need("num_mel_bins"), 2 * positions)}
        width = self.need("input_feat_per_channel", "feature_projection_input_dim", "num_mel_bins", "input_dim")
        return {"input_features": self.noise(BATCH, 64, width)}

    def series(self) -> dict[str, Tensor]:
        return {"past_values": self.noise(BATCH, self.need("context_length"), self.need("num_input_channels"))}


_MAKERS: dict[str, Callable[[_Maker], dict[str, Tensor]]] = {
    "input_ids": _Maker.text,
    "decoder_input_ids": lambda maker: {"decoder_input_ids": maker.ids(LENGTH - 1, decoder=True)},
    "attention_mask": _Maker.text,
    "pixel_values": _Maker.image,
    "pixel_values_videos": _Maker.video,
    "input_values": _Maker.waves,
    "input_features": _Maker.spectra,
    "past_values": _Maker.series,
}


def _parts(config: Any) -> Iterator[Any]:
    """Iterate over a config and the configs inside it, the outer ones first."""
    if config is None:
        return
    yield config
    for value in vars(config).values():
        if hasattr(value, "model_type") and hasattr(value, "to_dict"):
            yield from _parts(value)


def _special_ids(*configs: Any) -> set[int]:
    """Return all ids that the configs name: `eos_token_id`, `image_token_index`, ..."""
    found: set[int] = set()
    for config in configs:
        for name, value in vars(config).items():
            if name.endswith(("_token_id", "_token_index")):
                found |= {index for index in (value if isinstance(value, list) else [value]) if isinstance(index, int)}
    return found


def _first_id(value: Any, config: Any) -> int | None:
    index = value[0] if isinstance(value, list) and value else value
    vocabulary = getattr(config, "vocab_size", None) or 0
    return index if isinstance(index, int) and 0 <= index < vocabulary else None


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, Mapping):
        return int(size["height"]), int(size["width"])
    if isinstance(size, list | tuple):
        return int(size[-2]) if len(size) > 1 else int(size[0]), int(size[-1])
    return int(size), int(size)


def _modalities(model: nn.Module) -> tuple[str, ...]:
    named = getattr(model, "input_modalities", ())
    return (named,) if isinstance(named, str) else tuple(named)


def _kind(processor: Any) -> str:
    """ "image_processor" or "feature_extractor", from the classes a processor is made of."""
    names = " ".join(base.__name__ for base in type(processor).__mro__)
    if "FeatureExtractionMixin" in names and "ImageProcess" not in names:
        return "feature_extractor"
    return "image_processor" if "ImageProcess" in names else "other"


def _pads_by_id(model: nn.Module) -> bool:
    """Whether `forward` compares with `config.pad_token_id` to pool the last token of each row."""
    forward = inspect.unwrap(model.forward)
    code = getattr(forward, "__code__", None)
    return "ForSequenceClassification" in type(model).__name__ and code is not None and "pad_token_id" in code.co_names
