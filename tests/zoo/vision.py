"""timm models at small sizes, random weights. timm is optional: without it the registry is empty and says why.

A hidden width made by 1×1 convolutions is no FFN here: only linear layers count, whatever the axis they act on.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .case import Case, Inputs, Registry

CLASSES = 5
STAGES: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
VIT_48: dict[str, Any] = {"img_size": 28, "embed_dim": 48, "depth": 2, "num_heads": 4}

try:
    import timm

    CASES = Registry("timm")
except Exception as error:  # a missing or broken torchvision is no ImportError in every version
    timm = None
    CASES = Registry("timm", empty_because=f"timm cannot be imported: {error}")


def _images(size: int) -> Callable[[int], Inputs]:
    return lambda batch: (torch.randn(batch, 3, size, size),)


def _resolve(module: Any, value: Any) -> Any:
    """Look up `@name` in the model's module or in timm.layers; configs are given as `(@Class, {fields})`."""
    if isinstance(value, str) and value.startswith("@"):
        layers = importlib.import_module("timm.layers")
        return getattr(module, value[1:], None) or getattr(layers, value[1:], None) or getattr(nn, value[1:])
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], dict):
        return _resolve(module, value[0])(**{key: _resolve(module, item) for key, item in value[1].items()})
    return [_resolve(module, item) for item in value] if isinstance(value, list) else value


def timm_model(
    name: str, size: int, count: int | None, activation: str | None = None, gated: bool | None = False,
    *, model: str = "", quick: bool = False, note: str = "", exact: bool = True, **options: Any,
) -> None:  # fmt: skip
    """Register a model: `model` is an entry point of timm (default: the name), or `module:Class` below timm.models."""
    if timm is None:
        return

    def build() -> nn.Module:
        module_name, _, class_name = model.partition(":")
        if not class_name:
            built: nn.Module = timm.create_model(model or name, pretrained=False, num_classes=CLASSES, **options)
            return built.eval()
        module = importlib.import_module(f"timm.models.{module_name}")
        arguments = {key: _resolve(module, value) for key, value in options.items()}
        built = getattr(module, class_name)(num_classes=CLASSES, **arguments)
        return built.eval()

    CASES.add(
        Case(
            name=name, build=build, inputs=_images(size), count=count, activation=activation, gated=gated, quick=quick,
            note=note, exact=exact,
        )
    )  # fmt: skip


# fmt: off
# Transformers in one stage --------------------------------------------------------------------------------------------

for _name, _options in [
    ("vit_tiny_patch16_224", VIT),
    ("vit_base_patch16_rope_reg1_gap_256", VIT),
    ("vit_relpos_small_patch16_224", VIT),
    ("vit_srelpos_small_patch16_224", VIT),
    ("vit_dwee_patch16_reg1_gap_256", VIT),
    ("vit_small_patch14_dinov2", {**VIT_48, "embed_dim": 32}),
    ("flexivit_small", VIT),
    ("deit_tiny_distilled_patch16_224", VIT),
    ("deit3_small_patch16_224", VIT),
    ("beit_base_patch16_224", VIT),
    ("beitv2_base_patch16_224", VIT),
    ("convit_tiny", {**VIT, "local_up_to_layer": 1}),
    ("eva_giant_patch14_224", {**VIT_48, "mlp_ratio": 4.0}),
    ("samvit_base_patch16", {**VIT, "global_attn_indexes": (1,), "window_size": 2}),
]:
    timm_model(_name, int(_options["img_size"]), 2, "gelu", **_options)
for _name, _options in [
    ("vit_giant_patch14_dinov2", VIT_48),
    ("aimv2_large_patch14_224", VIT_48),
    ("eva02_tiny_patch14_224", VIT_48),
    ("vit_small_plus_patch16_dinov3", {**VIT, "embed_dim": 48}),
]:
    timm_model(_name, int(_options["img_size"]), 2, "silu", True, **_options)
for _name in ("vit_base_patch16_xp_224", "vit_dpwee_patch16_reg1_gap_256", "vit_pwee_patch16_reg1_gap_256"):
    timm_model(_name, 32, None, note="one projection for attention and FFN", exact=False, gated=None, **VIT)

timm_model("vit_base_patch16_clip_quickgelu_224", 32, 2, "quick_gelu", **VIT)
timm_model("vit_base_patch16_siglip_224", 32, 3, "gelu", note="the pooling has an FFN too", **VIT)
timm_model("beit3_base_patch16_224", 32, 0, note="a layer norm stands between", **VIT)
timm_model("cait_xxs24_224", 32, 4, "gelu", note="two blocks for the class token", **VIT)
timm_model(
    "xcit_nano_12_p16_224", 32, 4, "gelu", img_size=32, embed_dim=32, depth=2, num_heads=4,
        note="two blocks for the class token",
)
timm_model(
    "vit_resnet", 64, 2, "gelu", model="vit_small_r26_s32_224", img_size=64, embed_dim=32, depth=2, num_heads=4,
    note="convolutions with standardised weights",
)
timm_model(
    "tnt", 32, 4, "gelu", model="tnt:TNT", img_size=32, patch_size=8, embed_dim=32, inner_dim=8, depth=2,
        num_heads_inner=2,
    num_heads_outer=4, first_stride=4,
)
timm_model(
    "crossvit", 240, 4, "gelu", model="crossvit:CrossVit", img_size=240, img_scale=(1.0, 224 / 240), patch_size=(12,
        16),
    embed_dim=(16, 24), depth=((1, 1, 0), (1, 1, 0)), num_heads=(2, 2), mlp_ratio=(4, 4, 1),
)

# Mixers ---------------------------------------------------------------------------------------------------------------

MIXER: dict[str, Any] = {"model": "mlp_mixer:MlpMixer", "img_size": 32, "patch_size": 8, "num_blocks": 2,
    "embed_dim": 32}
timm_model("mixer", 32, 4, "gelu", **MIXER)
timm_model("gmixer", 32, 4, "silu", True, mlp_ratio=(1.0, 4.0), mlp_layer="@GluMlp", act_layer="@SiLU", **MIXER)
timm_model("resmlp", 32, 2, "gelu", mlp_ratio=4, block_layer="@ResBlock", norm_layer="@Affine", **MIXER)
timm_model(
    "gmlp", 32, 0, mlp_ratio=6, block_layer="@SpatialGatingBlock", mlp_layer="@GatedMlp",
        note="a gate over tokens stands between",
    **MIXER,
)

# Transformers in several stages ---------------------------------------------------------------------------------------

FOUR: dict[str, Any] = {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 24, 32), "num_heads": (1, 2, 2, 4)}
TWO_SWIN: dict[str, Any] = {"img_size": 32, "embed_dim": 8, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4}
for _name, _size, _count, _activation, _options in [
    ("swin_tiny_patch4_window7_224", 32, 2, "gelu", TWO_SWIN),
    ("swinv2_tiny_window8_256", 32, 2, "gelu", TWO_SWIN),
    ("swinv2_cr_tiny_224", 64, 4, "gelu", {"img_size": 64, "embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1,
        2, 2)}),
    ("twins_pcpvt_small", 64, 4, "gelu", {"img_size": 64, **FOUR}),
    ("twins_svt_small", 64, 4, "gelu", {"img_size": 64, **FOUR}),
    ("hiera_tiny_224", 64, 4, "gelu", {"img_size": (64, 64), "embed_dim": 8, "num_heads": 1, "stages": (1, 1, 1, 1)}),
    ("sequencer2d_s", 64, 4, "gelu", {
        "img_size": 64, "layers": (1, 1, 1, 1), "embed_dims": (16, 32, 32, 32), "hidden_sizes": (4, 8, 8, 8),
    }),
    ("mobilevit_xxs", 64, 9, "silu", {}),
    ("levit_128s", 64, 0, None, {
        "img_size": 64, "embed_dim": (16, 24, 32), "key_dim": 8, "num_heads": (2, 2, 2), "depth": (1, 1, 1),
    }),
    ("mobilevitv2_050", 64, 0, None, {}),
    ("efficientvit_b0", 64, 0, None, {}),
    ("efficientvit_m0", 64, 0, None, {"img_size": 64}),
]:
    timm_model(_name, _size, _count, _activation, **_options)

TRANSFORMER = "@MaxxVitTransformerCfg"
for _name, _size, _count, _activation, _model, _options in [
    ("davit", 64, 8, "gelu", "davit:DaVit", {**FOUR, "num_heads": (2, 2, 2, 2)}),
    ("pvt_v2", 64, 0, None, "pvt_v2:PyramidVisionTransformerV2", FOUR),
    ("gcvit", 64, 4, "gelu", "gcvit:GlobalContextVit", {
        "img_size": 64, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4), "embed_dim": 8, "window_ratio": (32, 32, 16,
            32),
    }),
    ("focalnet", 64, 0, None, "focalnet:FocalNet", {"depths": (1, 1, 1, 1), "embed_dim": 8}),
    ("edgenext", 64, 4, "gelu", "edgenext:EdgeNeXt", STAGES),
    ("volo", 64, 6, "gelu", "volo:VOLO", {
        "layers": (1, 1, 1, 1), "img_size": 64, "embed_dims": (24, 32, 32, 32), "num_heads": (2, 2, 2, 2),
    }),
    ("mvitv2", 64, 4, "gelu", "mvitv2:MultiScaleVit", {
        "cfg": ("@MultiScaleVitCfg", {"depths": (1, 1, 1, 1), "embed_dim": 8}), "img_size": 64,
    }),
    ("efficientformer", 224, 1, "gelu", "efficientformer:EfficientFormer", {
        "depths": (1, 1, 1, 2), "embed_dims": (8, 16, 24, 32), "num_vit": 1,
    }),
    ("tiny_vit", 224, 3, "gelu", "tiny_vit:TinyVit", {
        "depths": (1, 1, 1, 1), "embed_dims": (8, 16, 32, 32), "num_heads": (1, 1, 2, 2), "window_sizes": (7, 7, 14, 7),
    }),
    ("nest", 64, 3, "gelu", "nest:Nest", {
        "img_size": 64, "patch_size": 4, "depths": (1, 1, 1), "embed_dims": (8, 16, 32), "num_heads": (1, 2, 2),
            "num_levels": 3,
    }),
    ("pit", 64, 3, "gelu", "pit:PoolingVisionTransformer", {
        "img_size": 64, "patch_size": 8, "stride": 4, "stem_type": "overlap", "base_dims": (8, 8, 8), "depth": (1, 1,
            1),
        "heads": (2, 2, 2), "mlp_ratio": 4,
    }),
    ("visformer", 64, 0, None, "visformer:Visformer", {
        "img_size": 64, "init_channels": 8, "embed_dim": 32, "depth": (1, 1, 1), "num_heads": 2, "mlp_ratio": 4.0,
            "group": 4,
        "attn_stage": "011", "spatial_conv": "100", "norm_layer": nn.BatchNorm2d, "conv_init": True,
    }),
    ("maxvit", 64, 8, "gelu", "maxxvit:MaxxVit", {"img_size": 64, "cfg": ("@MaxxVitCfg", {
        "embed_dim": (8, 16, 32, 32), "depths": (1, 1, 1, 1), "block_type": ("M", "M", "M", "M"), "stem_width": 8,
        "transformer_cfg": (TRANSFORMER, {"window_size": (2, 2), "dim_head": 8}),
    })}),
    ("coatnet", 64, 0, None, "maxxvit:MaxxVit", {"img_size": 64, "cfg": ("@MaxxVitCfg", {
        "embed_dim": (8, 16, 32, 32), "depths": (1, 1, 1, 1), "stem_width": 8,
        "transformer_cfg": (TRANSFORMER, {"dim_head": 8, "rel_pos_type": "bias"}),
    })}),
    ("fastvit", 64, 0, None, "fastvit:FastVit", {
        "layers": (1, 1, 1, 1), "embed_dims": (16, 16, 32, 32), "mlp_ratios": (3, 3, 3, 3),
        "token_mixers": ("repmixer", "repmixer", "repmixer", "attention"),
    }),
    ("poolformer", 64, 0, None, "metaformer:MetaFormer", {
        **STAGES, "mlp_act": nn.GELU, "layer_scale_init_values": 0.1, "use_mlp_head": False,
    }),
    ("poolformerv2", 64, 0, None, "metaformer:MetaFormer", {**STAGES, "use_mlp_head": False}),
    ("caformer", 64, 0, None, "metaformer:MetaFormer", {
        "depths": (1, 1, 1, 1), "dims": (16, 16, 32, 32), "token_mixers": ["@SepConv", "@SepConv", "@Attention",
            "@Attention"],
        "norm_layers": ["@LayerNorm2d", "@LayerNorm2d", "@LayerNorm", "@LayerNorm"],
    }),
]:
    timm_model(_name, _size, _count, _activation, model=_model, **_options)

# Convolutional networks -----------------------------------------------------------------------------------------------

timm_model("convnext", 64, 4, "gelu", model="convnext:ConvNeXt", **STAGES)
timm_model("convnext_conv_mlp", 64, 0, model="convnext:ConvNeXt", conv_mlp=True, **STAGES)
timm_model("convnextv2", 64, 0, model="convnext:ConvNeXt", use_grn=True, ls_init_value=None, **STAGES)
for _name in ("inception_next_tiny", "mambaout_femto"):
    timm_model(_name, 64, 0, **STAGES)
for _name in ("resnet18", "starnet_s1", "repvit_m0_9", "ghostnet_100", "mobilenetv4_conv_small", "hgnetv2_b0"):
    timm_model(_name, 64, 0)
