"""Tables of transformers models that see, hear, read layouts or forecast."""

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


# Images ---------------------------------------------------------------------------------------------------------------

SWIN: dict[str, Any] = {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4, "patch_size": 4}
SWIN_BACKBONE: dict[str, Any] = {
    "model_type": "swin", "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 2,
        "patch_size": 2,
    "image_size": 64, "out_features": ["stage1", "stage2", "stage3", "stage4"],
}  # fmt: skip
RESNET_BACKBONE: dict[str, Any] = {
    "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1],
        "out_features": ["stage4"],
}  # fmt: skip
DINO_BACKBONE: dict[str, Any] = {
    "model_type": "dinov2", "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 32,
        "patch_size": 8,
    "out_features": ["stage1", "stage2", "stage3", "stage4"], "apply_layernorm": True, "reshape_hidden_states": False,
}  # fmt: skip
TWO_STAGES: dict[str, Any] = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}
DEPTH_HEAD: dict[str, Any] = {"neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8}
NO_TIMM: dict[str, Any] = {"use_timm_backbone": False, "use_pretrained_backbone": False, "num_queries": 4}
CLIP: dict[str, Any] = {"projection_dim": 16}

VISION = [
    Row(model, count, activation, gated, inputs="pixels", quick=model in ("ViTForImageClassification",
        "Dinov2ForImageClassification"))
    for model, count, activation, gated in [
        ("ViTModel", 2, "gelu", False),
        ("ViTForImageClassification", 2, "gelu", False),
        ("ViTMAEModel", 2, "gelu", False),
        ("ViTMSNForImageClassification", 2, "gelu", False),
        ("VitDetModel", 2, "gelu", False),
        ("DeiTForImageClassification", 2, "gelu", False),
        ("BeitForImageClassification", 2, "gelu", False),
        ("Data2VecVisionForImageClassification", 2, "gelu", False),
        ("Dinov2ForImageClassification", 2, "gelu", False),
        ("Dinov2WithRegistersForImageClassification", 2, "gelu", False),
        ("DINOv3ViTModel", 2, "gelu", False),
        ("IJepaForImageClassification", 2, "gelu", False),
        ("CLIPForImageClassification", 2, "quick_gelu", False),
        ("CLIPVisionModel", 2, "quick_gelu", False),
        ("CLIPVisionModelWithProjection", 2, "quick_gelu", False),
        ("MetaClip2ForImageClassification", 2, "quick_gelu", False),
        ("ChineseCLIPVisionModel", 2, "quick_gelu", False),
        ("SiglipForImageClassification", 2, "gelu_tanh", False),
        ("SiglipVisionModel", 3, "gelu_tanh", False),
        ("BlipVisionModel", 2, "gelu", False),
        ("Aimv2VisionModel", 2, "silu", True),
        ("MLCDVisionModel", 2, "gelu", False),
        ("SamVisionModel", 2, "gelu", False),
        ("InternVLVisionModel", 2, "gelu", False),
        ("PixioModel", 2, "gelu", False),
        ("RadioModel", 2, "gelu", False),
        ("Sapiens2Model", 2, "silu", True),
        ("SegformerForImageClassification", 0, None, False),
        ("SegformerForSemanticSegmentation", 0, None, False),
        ("PvtV2ForImageClassification", 0, None, False),
        ("GLPNModel", 0, None, False),
        ("SwiftFormerForImageClassification", 0, None, False),
        ("MobileViTForImageClassification", 9, "silu", False),
        ("MobileNetV2ForImageClassification", 0, None, False),
    ]
] + [
    Row("PixtralVisionModel", 2, "gelu", True, inputs="pixels", fixed_batch=True, note="all images are one sequence"),
    Row("SwinModel", 2, "gelu", inputs="pixels", config=SWIN),
    Row("SwinForImageClassification", 2, "gelu", inputs="pixels", config=SWIN, quick=True),
    Row("Swinv2ForImageClassification", 2, "gelu", inputs="pixels", config={**SWIN, "pretrained_window_sizes": [0, 0]}),
    Row("Swin2SRModel", 2, "gelu", inputs="pixels", config={**SWIN, "embed_dim": 16, "patch_size": 1}),
    Row("DonutSwinModel", 2, "gelu", inputs="pixels", config=SWIN),
    Row("ConvNextForImageClassification", 2, "gelu", inputs="pixels", config=TWO_STAGES, quick=True),
    Row("ConvNextV2ForImageClassification", 0, inputs="pixels", config=TWO_STAGES,
        note="a global response norm stands between"),
    Row("DINOv3ConvNextModel", 4, "gelu", inputs="pixels", config={"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1,
        1]}),
    Row("FocalNetForImageClassification", 2, "gelu", inputs="pixels", config={
        "embed_dim": 8, "depths": [1, 1], "hidden_sizes": [8, 16], "focal_levels": [1, 1], "focal_windows": [3, 3],
            "patch_size": 4,
    }),
    Row("HieraForImageClassification", 2, "gelu", inputs="pixels", config={
        "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "image_size": [32, 32], "patch_kernel": [7, 7],
            "patch_stride": [4, 4],
        "patch_padding": [3, 3], "masked_unit_size": [4, 4], "query_stride": [2, 2], "num_query_pool": 1,
            "embed_dim_multiplier": 2.0,
    }),
    Row("PvtForImageClassification", 2, "gelu", inputs="pixels", config={
        "hidden_sizes": [8, 16], "depths": [1, 1], "num_encoder_blocks": 2, "num_attention_heads": [1, 2],
            "patch_sizes": [4, 2],
        "strides": [4, 2], "sequence_reduction_ratios": [2, 1], "mlp_ratios": [4, 4],
    }),
    Row("LevitForImageClassification", 0, inputs="pixels_64", note="a batch norm stands between", config={
        "image_size": 64, "patch_size": 16, "hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 2, 2],
            "depths": [1, 1, 1],
        "key_dim": [8, 8, 8], "down_ops": [["Subsample", 8, 2, 4, 2, 2], ["Subsample", 8, 3, 4, 2, 2]],
    }),
    Row("PoolFormerForImageClassification", 0, inputs="pixels", note="1×1 convolutions", config={
        "hidden_sizes": [8, 16], "depths": [1, 1], "num_encoder_blocks": 2, "patch_sizes": [7, 3], "strides": [4, 2],
            "padding": [2, 1],
    }),
    Row("MobileViTV2ForImageClassification", 0, inputs="pixels_64", config={"image_size": 64, "patch_size": 2,
        "width_multiplier": 0.25}),
    Row("ResNetForImageClassification", 0, inputs="pixels", config={"embedding_size": 8, "hidden_sizes": [8, 16],
        "depths": [1, 1]}),
    Row("RegNetForImageClassification", 0, inputs="pixels", config={
        "embedding_size": 8, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1], "groups_width": 8,
    }),
    Row("PerceiverForImageClassificationLearned", 4, "gelu", inputs="pixels", config={
        "num_latents": 4, "d_latents": 32, "d_model": 544, "num_self_attends_per_block": 2,
            "num_cross_attention_heads": 4,
        "qk_channels": 32, "v_channels": 32,
    }),
    Row("ImageGPTForImageClassification", 2, "quick_gelu", config={"vocab_size": 17, "n_positions": 16},
        inputs=lambda b: {"input_ids": torch.randint(0, 16, (b, 16))}),
    Row("ViTMAEForPreTraining", 3, "gelu", inputs="pixels", config={
        "decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 4,
            "decoder_intermediate_size": 64,
    }, note="patches are masked at random in evaluation too"),
    Row("DPTModel", 2, "gelu", inputs="pixels", config={"is_hybrid": False}),
    Row("DPTForDepthEstimation", 4, "gelu", inputs="pixels", config={
        **DEPTH_HEAD, "is_hybrid": False, "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3],
    }),
    Row("DepthAnythingForDepthEstimation", 4, "gelu", inputs="pixels", config={
        **DEPTH_HEAD, "backbone_config": DINO_BACKBONE, "head_hidden_size": 8, "reassemble_hidden_size": 32,
    }),
    Row("GLPNForDepthEstimation", 0, inputs="pixels"),
    Row("BeitForSemanticSegmentation", 4, "gelu", inputs="pixels", config={"num_hidden_layers": 4, "out_indices": [0, 1,
        2, 3]}),
    Row("UperNetForSemanticSegmentation", 4, "gelu", inputs="pixels", config={
        "backbone_config": {**SWIN_BACKBONE, "image_size": 32}, "hidden_size": 16, "use_auxiliary_head": False,
    }),
    Row("YolosForObjectDetection", 4, None, alternatives=(2,), inputs="pixels", note="two heads of three linears each",
        config={
        "image_size": [32, 32], "num_detection_tokens": 5,
    }),
    Row("DetrModel", 4, "relu", inputs="pixels_64", config={**NO_TIMM, "backbone_config": RESNET_BACKBONE}),
    Row("DetrForObjectDetection", 4, "relu", alternatives=(5,), inputs="pixels_64", config={**NO_TIMM,
        "backbone_config": RESNET_BACKBONE}),
    Row("ConditionalDetrModel", 4, "relu", alternatives=(6,), inputs="pixels_64", config={**NO_TIMM,
        "backbone_config": RESNET_BACKBONE}),
    Row("TableTransformerModel", 4, "relu", inputs="pixels_64", config={**NO_TIMM,
        "backbone_config": RESNET_BACKBONE}),
    Row("DabDetrModel", 0, None, alternatives=(4,), note="the FFNs have a learned activation", inputs="pixels_64",
        config={**NO_TIMM, "backbone_config": RESNET_BACKBONE}),
    Row("DeformableDetrModel", 4, "relu", inputs="pixels_64", config={
        **NO_TIMM, "backbone_config": {**RESNET_BACKBONE, "out_features": ["stage2", "stage3", "stage4"]},
    }),
    Row("RTDetrModel", 3, None, alternatives=(5,), fixed_batch=True, inputs="pixels_64", config={
        "backbone_config": {
            **RESNET_BACKBONE, "model_type": "rt_detr_resnet", "out_features": ["stage2", "stage3", "stage4"],
        }, "num_queries": 4, "encoder_hidden_dim": 32, "encoder_in_channels": [16, 16, 16], "decoder_in_channels": [32,
            32, 32],
        "encoder_layers": 1, "anchor_image_size": None, "num_denoising": 0,
    }),
    Row("MaskFormerForInstanceSegmentation", 6, None, alternatives=(7,), inputs="pixels_64", config={
        "backbone_config": SWIN_BACKBONE, "fpn_feature_size": 32, "mask_feature_size": 32, "decoder_config": {
            **NO_TIMM, "model_type": "detr", "d_model": 32, "encoder_layers": 1, "decoder_layers": 2,
                "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
                "backbone_config": RESNET_BACKBONE,
        },
    }),
    Row("Mask2FormerModel", 6, None, alternatives=(7,), inputs="pixels_64", config={
        "backbone_config": SWIN_BACKBONE, "feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32,
            "encoder_feedforward_dim": 64,
        "dim_feedforward": 64, "encoder_layers": 1, "decoder_layers": 2, "num_queries": 4,
    }),
    Row("SamModel", 4, None, alternatives=(9,), config={
        "vision_config": {"output_channels": 32, "num_pos_feats": 16},
        "prompt_encoder_config": {"hidden_size": 32, "image_size": 32, "patch_size": 8, "num_point_embeddings": 4,
            "mask_input_channels": 16},
        "mask_decoder_config": {"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 4, "iou_head_hidden_dim": 32},
    }, inputs=lambda b: {"pixel_values": torch.randn(b, 3, 32, 32), "input_points": torch.rand(b, 1, 2, 2)}),
]  # fmt: skip

# Videos ---------------------------------------------------------------------------------------------------------------

FRAMES: dict[str, Any] = {"num_frames": 4, "tubelet_size": 2}
VIDEO = [
    Row("VideoMAEModel", 2, "gelu", inputs="video", config=FRAMES),
    Row("VideoMAEForVideoClassification", 2, "gelu", inputs="video", config=FRAMES),
    Row("TimesformerForVideoClassification", 2, "gelu", inputs="video", config={"num_frames": 4}),
    Row("VivitForVideoClassification", 2, "gelu_tanh", inputs="video", config={
        "num_frames": 4, "video_size": [4, 32, 32], "tubelet_size": [2, 8, 8],
    }),
    Row("VJEPA2Model", 3, "gelu", config={
        "crop_size": 32, "frames_per_clip": 4, "hidden_size": 24, "pred_hidden_size": 24, "pred_num_attention_heads": 4,
        "pred_num_hidden_layers": 1,
    }, inputs=lambda b: {"pixel_values_videos": torch.randn(b, 4, 3, 32, 32)}),
]  # fmt: skip

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

ROWS: tuple[Row, ...] = (*VISION, *VIDEO, *SOUND, *MULTIMODAL, *OTHER)
