"""Elementwise functions as models spell them: by module, by method, in place and written out."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SQRT_2, SQRT_2_PI = math.sqrt(2.0), math.sqrt(2.0 / math.pi)
Function = Callable[..., Tensor]

COMMON: dict[str, tuple[str, Function]] = {
    "relu_module": ("relu", nn.ReLU()),
    "relu_module_inplace": ("relu", nn.ReLU(inplace=True)),
    "relu_function": ("relu", F.relu),
    "relu_function_inplace": ("relu", torch.relu_),
    "relu_method": ("relu", lambda h: h.relu()),
    "relu_clamp": ("relu", lambda h: h.clamp(min=0)),
    "relu_clamp_min_inplace": ("relu", lambda h: h.clamp_min_(0.0)),
    "relu_maximum": ("relu", lambda h: torch.maximum(h, torch.zeros_like(h))),
    "relu_where": ("relu", lambda h: torch.where(h > 0, h, 0.0)),
    "relu_mask": ("relu", lambda h: h * (h > 0)),
    "relu_mask_float": ("relu", lambda h: h * (h > 0).float()),
    "relu_mask_to": ("relu", lambda h: (h > 0).to(h.dtype) * h),
    "relu_masked_fill": ("relu", lambda h: h.masked_fill(h < 0, 0.0)),
    "relu_threshold": ("relu", nn.Threshold(0.0, 0.0)),
    "relu_abs": ("relu", lambda h: 0.5 * (h + h.abs())),
    "gelu_module": ("gelu", nn.GELU()),
    "gelu_function": ("gelu", F.gelu),
    "gelu_erf": ("gelu", lambda h: 0.5 * h * (1.0 + torch.erf(h / SQRT_2))),
    "gelu_erf_reordered": ("gelu", lambda h: h * 0.5 * (torch.erf(h * (1 / SQRT_2)) + 1.0)),
    "gelu_erf_expanded": ("gelu", lambda h: h / 2 + h * torch.erf(h / SQRT_2) / 2),
    "gelu_erfc": ("gelu", lambda h: 0.5 * h * torch.erfc(-h * math.sqrt(0.5))),
    "gelu_normal_cdf": ("gelu", lambda h: h * torch.special.ndtr(h)),
    "gelu_tanh_module": ("gelu_tanh", nn.GELU(approximate="tanh")),
    "gelu_tanh_pow": ("gelu_tanh", lambda h: 0.5 * h * (1 + torch.tanh(SQRT_2_PI * (h + 0.044715 * torch.pow(h, 3))))),
    "gelu_tanh_horner": ("gelu_tanh", lambda h: h * 0.5 * (1 + torch.tanh(SQRT_2_PI * h * (1 + 0.044715 * h * h)))),
    "gelu_tanh_cube": ("gelu_tanh", lambda h: 0.5 * h * (torch.tanh((h * h * h * 0.044715 + h) * SQRT_2_PI) + 1)),
    "gelu_tanh_sigmoid": ("gelu_tanh", lambda h: h * torch.sigmoid(2 * SQRT_2_PI * (h + 0.044715 * h**3))),
    "quick_gelu": ("quick_gelu", lambda h: h * torch.sigmoid(1.702 * h)),
    "quick_gelu_inplace": ("quick_gelu", lambda h: h.mul_(torch.sigmoid(h * 1.702))),
    "silu_module": ("silu", nn.SiLU()),
    "silu_module_inplace": ("silu", nn.SiLU(inplace=True)),
    "silu_function": ("silu", F.silu),
    "silu_sigmoid": ("silu", lambda h: h * torch.sigmoid(h)),
    "silu_sigmoid_first": ("silu", lambda h: h.sigmoid() * h),
    "silu_sigmoid_inplace": ("silu", lambda h: h.sigmoid().mul_(h)),
    "silu_exp": ("silu", lambda h: h / (1 + torch.exp(-h))),
    "silu_reciprocal": ("silu", lambda h: h * torch.reciprocal(1 + torch.exp(h.neg()))),
    "silu_tanh": ("silu", lambda h: 0.5 * h * (1 + torch.tanh(0.5 * h))),
    "relu2_square": ("relu2", lambda h: torch.square(F.relu(h))),
    "relu2_power": ("relu2", lambda h: F.relu(h) ** 2),
    "relu2_product": ("relu2", lambda h: F.relu(h) * h),
    "relu2_self_product": ("relu2", lambda h: (r := F.relu(h)) * r),
    "leaky_relu": ("leaky_relu", nn.LeakyReLU()),
    "elu": ("elu", nn.ELU()),
    "mish": ("mish", nn.Mish()),
    "mish_composed": ("mish", lambda h: h * torch.tanh(F.softplus(h))),
    "sigmoid": ("sigmoid", torch.sigmoid),
    "tanh": ("tanh", torch.tanh),
    "gelu_special_erf": ("gelu", lambda h: torch.multiply(0.5 * h, 1.0 + torch.special.erf(torch.divide(h, SQRT_2)))),
    "silu_special_expit": ("silu", lambda h: torch.multiply(h, torch.special.expit(h))),
    "silu_negative": ("silu", lambda h: torch.true_divide(h, torch.negative(h).exp() + 1)),
    "relu_absolute": ("relu", lambda h: torch.subtract(torch.absolute(h), torch.negative(h)) * 0.5),
    "relu_greater": ("relu", lambda h: h * torch.greater(h, 0).type_as(h)),
    "gelu_inplace": ("gelu", torch.ops.aten.gelu_),
    "relu_in_float64": ("relu", lambda h: F.relu(h.double()).to(h.dtype)),
    "gelu_in_float32": ("gelu", lambda h: F.gelu(h.float()).type_as(h)),
}
"""Elementwise functions that have a common name."""

UNCOMMON: dict[str, Function] = {
    "leaky_relu_steep": nn.LeakyReLU(0.2),
    "relu6": nn.ReLU6(),
    "hardswish": nn.Hardswish(),
    "hardswish_composed": lambda h: h * F.relu6(h + 3) / 6,
    "softplus": nn.Softplus(),
    "selu": nn.SELU(),
    "celu": nn.CELU(1.3),
    "hardtanh": nn.Hardtanh(),
    "softsign": nn.Softsign(),
    "tanhshrink": nn.Tanhshrink(),
    "softshrink": nn.Softshrink(),
    "sine": torch.sin,
    "gaussian": lambda h: torch.exp(-h * h),
    "laplace": lambda h: 0.5 * (1 + torch.erf((h - 0.707107) / (0.282095 * SQRT_2))),
    "relu_shifted": lambda h: F.relu(h - 0.1),
    "relu_scaled": lambda h: 1.5 * F.relu(h),
    "relu_shifted_far": lambda h: F.relu(h - 30.0),
    "relu_times_tiny": lambda h: 1e-4 * F.relu(h),
    "relu_steeper_beyond_8": lambda h: torch.where(h > 8, 2 * h, F.relu(h)),
    "relu_steeper_beyond_30": lambda h: F.relu(h) + F.relu(h - 30.0),
    "silu_clamped_at_7": lambda h: F.silu(h.clamp(max=7.0)),
    "gelu_clamped_at_10": lambda h: F.gelu(h).clamp(-10.0, 10.0),
    "square": torch.square,
    "absolute": torch.abs,
    "constant": torch.ones_like,
    "rounded": lambda h: torch.round(F.gelu(h) * 64) / 64,
    "relu_of_gelu": lambda h: F.relu(F.gelu(h)),
    "gelu_minus_identity": lambda h: F.gelu(h) - h,
    "identity_in_disguise": lambda h: F.relu(h) - F.relu(-h),
    "swish_one_and_a_half": lambda h: h * torch.sigmoid(1.5 * h),
    "nan_to_num": lambda h: torch.nan_to_num(F.relu(h)),
}
"""Elementwise functions that may be refused. Several agree with a common one near zero, where most values lie."""
