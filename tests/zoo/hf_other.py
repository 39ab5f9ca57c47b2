"""Tables of transformers models that hear, read texts with images or layouts, or forecast."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .case import Inputs
from .hf_row import Row

TEXT_LENGTH, VOCABULARY = 8, 101


def _text(batch: int) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCABULARY - 1, (batch, TEXT_LENGTH))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _decoder_ids(batch: int) -> Tensor:
    return torch.randint(3, VOCABULARY - 1, (batch, TEXT_LENGTH - 1))


def _boxes(batch: int) -> Tensor:
    return torch.randint(0, 9, (batch, TEXT_LENGTH, 4)).sort(-1).values


def _text_with_image_tokens(batch: int) -> Inputs:
    ids = torch.randint(3, 90, (batch, 20))
    ids[:, 1:17] = 100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(batch, 3, 32, 32)}


def _text_with_image_prefix(batch: int) -> Inputs:
    inputs = dict(_text_with_image_tokens(batch))
    return {**inputs, "token_type_ids": torch.zeros_like(inputs["input_ids"])}


# Sound ----------------------------------------------------------------------------------------------------------------

WAVE: dict[str, Any] = {
    "conv_dim": [16, 16], "conv_kernel": [10, 3], "conv_stride": [5, 2], "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
SOUND = [
    Row("Wav2Vec2ForCTC", 2, "gelu", inputs="wave", config=WAVE, quick=True),
    Row("Wav2Vec2ForSequenceClassification", 2, "gelu", inputs="wave", config=WAVE),
    Row("HubertForCTC", 2, "gelu", inputs="wave", config=WAVE),
    Row("UniSpeechForCTC", 2, "gelu", inputs="wave", config=WAVE),
    Row("UniSpeechSatForCTC", 2, "gelu", inputs="wave", config=WAVE),
    Row("WavLMForCTC", 2, "gelu", inputs="wave", config=WAVE),
    Row("Wav2Vec2ConformerForCTC", 4, "gelu", inputs="wave", config=WAVE, note="two FFNs in each layer"),
    Row("Data2VecAudioForCTC", 2, "gelu", inputs="wave", config={**WAVE, "num_conv_pos_embeddings": 2,
        "conv_pos_kernel_size": 3}),
    Row("SEWForCTC", 2, "gelu", inputs="wave", config={**WAVE, "squeeze_factor": 2}),
    Row("SEWDForCTC", 2, "gelu", inputs="wave", config={**WAVE, "squeeze_factor": 2}),
    Row("Wav2Vec2BertForCTC", 4, "silu", inputs="mel_last", config={"feature_projection_input_dim": 16}),
    Row("WhisperForConditionalGeneration", 4, "gelu", config={"max_source_positions": 16, "max_target_positions": 64},
        inputs=lambda b: {"input_features": torch.randn(b, 16, 32), "decoder_input_ids": _decoder_ids(b)}),
    Row("WhisperForAudioClassification", 2, "gelu", inputs="mel", config={"max_source_positions": 16}),
    Row("Speech2TextForConditionalGeneration", 4, "relu", config={"input_feat_per_channel": 16, "conv_channels": 32},
        inputs=lambda b: {"input_features": torch.randn(b, 32, 16), "decoder_input_ids": _decoder_ids(b)}),
    Row("ASTForAudioClassification", 2, "gelu", config={"max_length": 32, "frequency_stride": 4, "time_stride": 4},
        inputs=lambda b: {"input_values": torch.randn(b, 32, 16)}),
    Row("SpeechT5ForTextToSpeech", 4, "gelu", config={
        "speaker_embedding_dim": 8, "speech_decoder_prenet_units": 16, "speech_decoder_postnet_units": 16,
            "vocab_size": 81,
    }, inputs=lambda b: {"input_ids": torch.randint(3, 80, (b, 8)), "decoder_input_values": torch.randn(b, 4, 16)}),
    Row("MoonshineForConditionalGeneration", 4, None, None, config={
        "encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 2, "encoder_num_attention_heads": 4,
            "decoder_num_attention_heads": 4,
        "encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4,
    }, inputs=lambda b: {"input_values": torch.randn(b, 2000), "decoder_input_ids": _decoder_ids(b)}),
    Row("SeamlessM4TForSpeechToText", 8, None, config={
        "feature_projection_input_dim": 16, "speech_encoder_layers": 2, "speech_encoder_attention_heads": 4,
        "speech_encoder_intermediate_size": 64, "num_conv_pos_embeddings": 4,
    }, inputs=lambda b: {"input_features": torch.randn(b, 16, 16), "decoder_input_ids": _decoder_ids(b)}),
    Row("ClapAudioModel", 2, "gelu", config={
        "spec_size": 64, "patch_embeds_hidden_size": 8, "depths": [1, 1], "num_attention_heads": [2, 2],
            "hidden_size": 16,
        "window_size": 4, "enable_fusion": False,
    }, inputs=lambda b: {"input_features": torch.randn(b, 1, 64, 16), "is_longer": torch.zeros(b, 1,
        dtype=torch.bool)}),
    Row("ClapTextModel", 2, "gelu"),
    Row("ParakeetForCTC", 4, "silu", inputs="mel_last", config={
        "encoder_config": {"num_mel_bins": 16, "subsampling_conv_channels": 8, "conv_kernel_size": 3},
    }),
]  # fmt: skip

# Text with images or layouts ------------------------------------------------------------------------------------------

LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2,
    "intermediate_size": 64, "vocab_size": VOCABULARY,
}  # fmt: skip
TOWER: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32,
        "patch_size": 8,
}  # fmt: skip
CLIP: dict[str, Any] = {"projection_dim": 16}
MULTIMODAL = [
    Row(model, count, activation, inputs="text_and_pixels", config=CLIP if has_projection else {},
        quick=model == "CLIPModel")
    for model, count, activation, has_projection in [
        ("CLIPModel", 4, "quick_gelu", True),
        ("MetaClip2Model", 4, "quick_gelu", True),
        ("SiglipModel", 5, "gelu_tanh", False),
        ("AltCLIPModel", 4, None, True),
        ("ChineseCLIPModel", 4, None, True),
        ("GroupViTModel", 21, None, True),
        ("OwlViTModel", 4, "quick_gelu", True),
        ("Owlv2Model", 4, "quick_gelu", True),
        ("CLIPSegModel", 4, "quick_gelu", True),
        ("BlipModel", 4, "gelu", True),
        ("FlavaModel", 6, "gelu", False),
        ("Tipsv2Model", 4, None, False),
        ("GitForCausalLM", 4, None, False),
    ]
] + [
    Row("CLIPTextModel", 2, "quick_gelu"),
    Row("CLIPTextModelWithProjection", 2, "quick_gelu"),
    Row("SiglipTextModel", 2, "gelu_tanh"),
    Row("BridgeTowerModel", 8, None, inputs="text_and_pixels", config={
        "hidden_size": 64, "text_config": {"hidden_size": 64}, "vision_config": {"hidden_size": 64},
    }),
    Row("LxmertModel", 5, "gelu", config={"visual_feat_dim": 16, "l_layers": 2, "x_layers": 1, "r_layers": 1},
        inputs=lambda b: {**_text(b), "visual_feats": torch.randn(b, 3, 16), "visual_pos": torch.rand(b, 3, 4)}),
    Row("VisualBertForPreTraining", 2, "gelu", config={"visual_embedding_dim": 16}),
    Row("ViltModel", 2, "gelu", untraceable="patches are chosen by their values",
        inputs=lambda b: {**_text(b), "pixel_values": torch.randn(b, 3, 32, 32)}),
    Row("LayoutLMForTokenClassification", 2, "gelu", config={"max_2d_position_embeddings": 32},
        inputs=lambda b: {**_text(b), "bbox": _boxes(b)}),
    Row("LayoutLMv3Model", 2, "gelu", inputs=lambda b: {**_text(b), "bbox": _boxes(b)}, config={
        "input_size": 32, "coordinate_size": 6, "shape_size": 4, "visual_embed": False,
            "max_2d_position_embeddings": 32,
    }),
    Row("LiltModel", 4, "gelu", inputs=lambda b: {**_text(b), "bbox": _boxes(b)}, config={
        "channel_shrink_ratio": 2, "hidden_size": 48, "max_2d_position_embeddings": 32,
    }, note="two FFNs in each layer: for text and for layout"),
    Row("BrosModel", 2, "gelu", inputs=lambda b: {**_text(b), "bbox": torch.rand(b, TEXT_LENGTH, 4)},
        config={"hidden_size": 64, "dim_bbox": 8}),
    Row("UdopForConditionalGeneration", 4, "relu", untraceable="patches are chosen by the boxes of the text", config={
        "relative_bias_args": [{"type": "1d"}, {"type": "horizontal"}, {"type": "vertical"}],
            "max_2d_position_embeddings": 32,
    }, inputs=lambda b: {
        **_text(b), "bbox": torch.rand(b, TEXT_LENGTH, 4), "decoder_input_ids": _decoder_ids(b),
            "pixel_values": torch.randn(b, 3, 32, 32),
    }),
    Row("Blip2QFormerModel", 2, "gelu", config={"encoder_hidden_size": 32},
        inputs=lambda b: {"query_embeds": torch.randn(b, 4, 32), "encoder_hidden_states": torch.randn(b, 5, 32)}),
    Row("Pix2StructForConditionalGeneration", 4, "gelu_tanh", True,
        config={"vision_config": {"patch_embed_hidden_size": 12,
        "seq_len": 16}},
        inputs=lambda b: {"flattened_patches": torch.rand(b, 6, 14), "decoder_input_ids": _decoder_ids(b)}),
    Row("LlavaForConditionalGeneration", 5, None, None, fixed_batch=True, inputs=_text_with_image_tokens, config={
        "vision_config": {**TOWER, "model_type": "clip_vision_model", "num_hidden_layers": 3, "projection_dim": 16},
            "text_config": LLAMA,
        "image_token_id": 100, "image_token_index": 100,
    }),
    Row("PaliGemmaForConditionalGeneration", 4, None, None, alternatives=(5,), inputs=_text_with_image_prefix, config={
        "vision_config": {**TOWER, "model_type": "siglip_vision_model"}, "projection_dim": 32, "image_token_id": 100,
        "text_config": {**LLAMA, "model_type": "gemma", "num_key_value_heads": 1, "head_dim": 8},
            "image_token_index": 100,
    }),
    Row("Gemma3ForConditionalGeneration", 2, "gelu_tanh", True, config={
        "vision_config": {**TOWER, "model_type": "siglip_vision_model", "num_hidden_layers": 1},
    }, note="text alone: the vision tower does not run"),
    Row("Qwen2VLForConditionalGeneration", 2, "silu", True, config={
        "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
        "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 8},
    }, note="text alone: the vision tower does not run"),
    Row("Idefics3ForConditionalGeneration", 2, "silu", True, config={"vision_config": {}, "text_config": LLAMA}),
]  # fmt: skip

# Series ---------------------------------------------------------------------------------------------------------------

PATCHES: dict[str, Any] = {
    "context_length": 32, "patch_length": 8, "patch_stride": 8, "num_input_channels": 3, "prediction_length": 4,
}  # fmt: skip
SERIES: dict[str, Any] = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2], "num_time_features": 1}


def _series(batch: int) -> Inputs:
    return {
        "past_values": torch.rand(batch, 10) + 1, "past_time_features": torch.rand(batch, 10, 1),
        "past_observed_mask": torch.ones(batch, 10), "future_values": torch.rand(batch, 4) + 1,
        "future_time_features": torch.rand(batch, 4, 1),
    }  # fmt: skip


def _trajectory(batch: int) -> Inputs:
    return {
        "states": torch.randn(batch, 4, 5), "actions": torch.randn(batch, 4, 3), "rewards": torch.randn(batch, 4, 1),
        "returns_to_go": torch.randn(batch, 4, 1), "timesteps": torch.arange(4).expand(batch, 4).contiguous(),
        "attention_mask": torch.ones(batch, 4, dtype=torch.long),
    }  # fmt: skip


OTHER = [
    Row("PatchTSTForPrediction", 2, "gelu", inputs=lambda b: {"past_values": torch.randn(b, 32, 3)},
        config=PATCHES),
    Row("PatchTSMixerForPrediction", 4, "gelu", inputs=lambda b: {"past_values": torch.randn(b, 32, 3)},
        config={**PATCHES, "d_model": 16}),
    Row("TimeSeriesTransformerForPrediction", 4, "gelu", inputs=_series, config=SERIES),
    Row("InformerForPrediction", 4, "gelu", untraceable="transformers builds another attention mask under tracing",
        inputs=_series, config=SERIES),
    Row("AutoformerForPrediction", 4, "gelu", inputs=_series, config={**SERIES, "label_length": 4,
        "moving_average": 3}),
    Row("TimesFmModelForPrediction", 2, None, alternatives=(4,), fixed_batch=True, config={"patch_length": 8,
        "context_length": 64,
        "horizon_length": 8},
        inputs=lambda b: {"past_values": torch.randn(b, 64), "freq": torch.zeros(b, dtype=torch.long)}),
    Row("DecisionTransformerModel", 2, "relu", inputs=_trajectory, config={"state_dim": 5, "act_dim": 3,
        "max_ep_len": 16}),
]  # fmt: skip

ROWS: tuple[Row, ...] = (*SOUND, *MULTIMODAL, *OTHER)
