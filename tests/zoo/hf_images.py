"""Tables of transformers models that see images and videos."""

from __future__ import annotations

from typing import Any

import torch

from .hf_row import Row

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
    Row("DabDetrModel", 8, None, note="four FFNs with PReLU, and four small MLPs", inputs="pixels_64",
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

ROWS: tuple[Row, ...] = (*VISION, *VIDEO)
