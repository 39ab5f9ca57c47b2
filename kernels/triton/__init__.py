"""The Triton kernels of the dynamic-k FFN, for NVIDIA and AMD graphics processors.

`chosen`, `fastest_way`, `supports`, `forward` and `backward`, and for thresholds `chosen_for_scores` and
`sorted_threshold`, are all there is to call; importing this module imports no Triton. The operators take them on a GPU
unless `SURGEON_GPU=torch` is set.

There are three ways. *Expert by expert*, only what is selected is computed: `plan` sorts the selected (token, expert)
pairs by expert on the device, without the host waiting for their number. The forward pass multiplies tiles of them,
whose rows of x are gathered, and adds up what the pairs of a token give. Where the output in fp32 fits in half of the
L2 cache it adds to it atomically, in one kernel, or in two with the hidden values in memory: where one would leave
processors idle, or an expert has more neurons than it can hold (128; half if gated; in fp32 half, none on an H100).
Where it does not fit, and where `torch.use_deterministic_algorithms` asks for it, every pair's output is written,
rounded to the dtype of x, and added up in fp32 in a fixed order. Up to 16 tokens are decoded: one kernel, no plan.

What a pair costs to add up does not depend on how few neurons it has, so small experts lose more there than they save.
*Spread*, the hidden values of the pairs that run are computed likewise and put in their places among zeros; the second
product is torch's, of the dense layer. *Masked*, both products are, and one kernel between them computes the activation
of what is selected and clears the rest: not slower than the dense layer, nor faster.

`fastest_way` chooses by `cost_model`, on GPUs that `devices` has a model of: NVIDIA's. `SURGEON_GPU=triton` asks for
expert by expert in any case.
The backward pass computes hidden values anew. Where the forward pass goes expert by expert it does, too, and its
gradient of x is added up likewise. Elsewhere it is masked: products of the dense layer, and between them one kernel.

Thresholds of the rules that go through a token's scores in their order are found without sorting, one program a token.

| kernels launched | plan | then |
| --- | --- | --- |
| forward, up to 16 tokens | 0 | 1 |
| forward, atomic: fused or in two kernels | 4 | 1 or 2 |
| forward, ordered | 4 for each range of tokens | 1, and 2 for each range of columns |
| forward, spread | 4 | 1, beside torch's product |
| forward, masked | 0 | 1, beside torch's products |
| backward | 4 | 1, and 1 for x (2 if ordered), and 2 for the weights (3 if gated) |
| backward, masked | 0 | 1, beside torch's products |
| thresholds | 0 | 1 |

Besides, PyTorch fills the fp32 output with the bias, and converts it if x is of a half type: one launch each. If
spread, it fills the hidden values with zeros.

Memory, which must be had for every pair because the host does not know how many run: 4 bytes per pair for the plan, 8
if ordered; one hidden value in the dtype of x per neuron and token for the forward in two kernels, as in the dense
FFN, and two or three (gated) for the backward. What pairs give takes up to 512 MiB (`host.PARTIAL_BYTES`) if ordered:
it goes through ranges of columns, and of tokens where 128 columns of all are too much.

Reproducible: plan, ordered forward, ordered gradient of x, gradients of the weights. Atomic sums change in their last
bits from run to run.

Verified on an NVIDIA H100 with torch 2.11 and Triton 3.6 (`tests/kernels/triton/test_hardware.py`): fp32, TF32, fp16
and bf16 against float64, all ways and backward, with drawn and with real sizes; thresholds; several thousand experts;
more than 2³¹ elements; NaN in one row; the same bits twice where that is promised; capture in a CUDA graph, so that
nothing waits for the host; `torch.compile`. Tile sizes for such chips were chosen there by time (examples/speed has the
results).

Not verified on hardware: every other chip. The tests compare all kernels with a float64 reference in Triton's
interpreter and compile them for sm_80, sm_90, sm_100 and gfx942, reading off registers, spills, shared memory and
instructions. That says nothing of speed on sm_80, sm_100 and gfx942, whose tile sizes are estimates, nor of races
there.

Below 16 neurons, tiles are padded to 16, which `tl.dot` needs, and the padding is computed.
"""

from __future__ import annotations

import logging
import os
from functools import cache, lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from surgeon.kernels.experts import Experts, Gradients
from surgeon.kernels.gpu_model import cost as cost_model
from surgeon.kernels.gpu_model.cost import Way
from surgeon.kernels.gpu_model.devices import model_of

__all__ = [
    "available",
    "backward",
    "chosen",
    "chosen_for_scores",
    "fastest_way",
    "forward",
    "sorted_threshold",
    "supports",
]

log = logging.getLogger("surgeon")

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_MOST_SCORES = 8192  # of a token, which a program holds in registers


@cache
def available() -> bool:
    """Whether Triton is installed, without importing it."""
    return find_spec("triton") is not None


def supports(x: Tensor, experts: Experts, activation: str) -> str | None:
    """Say why the kernels cannot compute this, or None if they can.

    Args:
        x: [N, d_in].
        experts: the weights, same dtype and device as `x`.
        activation: a name of `surgeon.kernels.activations.ACTIVATIONS`.
    """
    why = _runs_nowhere(x.device)
    if why is not None:
        return why
    from surgeon.kernels.triton.elementwise import ACTIVATIONS

    if x.dtype not in _DTYPES:
        return f"Triton's kernels compute in float32, float16 and bfloat16, not in {x.dtype}"
    if activation not in ACTIVATIONS:
        return f"Triton's kernels know the activations {', '.join(ACTIVATIONS)}, not {activation}"
    if 0 in (*experts.w1.shape, experts.w2.shape[2]):
        return "Triton's kernels need every dimension of the weights to be at least 1"
    return None


def _runs_nowhere(device: torch.device) -> str | None:
    """Say why no kernel runs on a device, or None if they do."""
    if not available():
        return "Triton is not installed"
    from surgeon.kernels.triton import launch

    if device.type != "cuda" and not launch.INTERPRETED:
        return f"Triton's kernels run on CUDA and ROCm devices, not on {device.type}"
    found = launch.chip(device)
    if found.backend == "cuda" and found.capability < 80:
        return f"Triton's kernels need compute capability 8.0, this device has {found.capability / 10}"
    return None


def chosen(x: Tensor, experts: Experts, activation: str) -> bool:
    """Whether these kernels are to compute this: on a GPU, unless `SURGEON_GPU=torch` is set, if they can.

    On a processor only in Triton's interpreter (`TRITON_INTERPRET=1`) with `SURGEON_GPU=triton`, for tests.
    """
    return _wanted(x.device) and _or_say(supports(x, experts, activation))


def chosen_for_scores(scores: Tensor, tau: Tensor) -> bool:
    """The same of `sorted_threshold`, of which float64 and more than 8,192 scores of a token are left to torch."""
    small = scores.dim() > 0 and 0 < scores.shape[-1] <= _MOST_SCORES and scores.numel() > 0
    fits = small and scores.dtype == tau.dtype == torch.float32 and tau.device == scores.device
    return fits and _wanted(scores.device) and _or_say(_runs_nowhere(scores.device))


def _wanted(device: torch.device) -> bool:
    asked = os.environ.get("SURGEON_GPU")
    if device.type == "cpu":
        return asked == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    return asked != "torch"


def _or_say(why: str | None) -> bool:
    """Whether there is no reason against; a reason is said, once."""
    if why is not None:
        _say_once(why)
    return why is None


def fastest_way(x: Tensor, experts: Experts) -> Way:
    """The way that should be fastest by `cost_model`, on a GPU that `devices` has a model of; on others by expert.

    That depends on how much is selected, which the host does not know: a fifth is assumed. `SURGEON_GPU=triton` asks
    for expert by expert in any case.
    """
    if x.device.type != "cuda" or os.environ.get("SURGEON_GPU") == "triton":
        return "experts"
    gated, dtype = experts.gate is not None, str(x.dtype).removeprefix("torch.")
    return _fastest_way(x.device, x.shape[0], *experts.w1.shape, gated, dtype)


@lru_cache(4096)
def _fastest_way(gpu: torch.device, tokens: int, count: int, neurons: int, width: int, gated: bool, dtype: str) -> Way:
    device = model_of(gpu)
    if device is None or tokens == 0:
        return "experts"
    return cost_model.fastest_way(device, cost_model.LayerShape(width, count * neurons, neurons, gated), tokens, dtype)


@cache
def _say_once(why: str) -> None:
    log.warning("The torch backend runs instead of Triton's kernels: %s.", why)


def forward(
    x: Tensor,
    scores: Tensor,
    threshold: Tensor,
    experts: Experts,
    b2: Tensor | None,
    activation: str,
    *,
    way: Way = "experts",
    ordered: bool = False,
) -> Tensor:
    """Return Σ over selected experts of h_e w2_e, plus b2: a new contiguous tensor [N, d_out] in the dtype of `x`.

    Only for arguments that `supports` has no objection to. Sums over experts are accumulated in fp32; hidden values
    are rounded to the dtype of `x` between the two products, as they are in the dense FFN. fp32 is multiplied in TF32
    if PyTorch may (`torch.backends.cuda.matmul`).

    Args:
        x: [N, d_in].
        scores: [N, E], any floating dtype.
        threshold: [N], any floating dtype.
        experts: the weights, same dtype as `x`.
        b2: [d_out] or None.
        activation: one of `elementwise.ACTIVATIONS`.
        way: what of it is computed expert by expert, and what densely.
        ordered: add up experts in a fixed order, so that equal inputs give equal bits; dense products do anyway.
    """
    from surgeon.kernels.triton import host

    return host.forward(x, scores, threshold, experts, b2, activation, way=way, ordered=ordered)


def backward(
    grad: Tensor,
    x: Tensor,
    scores: Tensor,
    threshold: Tensor,
    experts: Experts,
    activation: str,
    need_x: bool = True,
    need_weights: bool = True,
    *,
    way: Way = "experts",
    ordered: bool = False,
) -> Gradients:
    """Return the gradients of `x` and the weights for `grad`, the gradient of the output [N, d_out].

    Arguments are those of `forward`, which need not be called first; what is not needed is None. Every `way` but expert
    by expert is masked. `ordered` is about the gradient of `x`: those of the weights are reproducible anyway.
    """
    from surgeon.kernels.triton import host

    return host.backward(
        grad, x, scores, threshold, experts, activation, need_x, need_weights, way=way, ordered=ordered
    )


def sorted_threshold(scores: Tensor, tau: Tensor, rule: str) -> Tensor:
    """`surgeon::sorted_threshold` without sorting, where `chosen_for_scores`.

    Args:
        scores: [..., E], float32, not negative.
        tau: a scalar, float32.
        rule: "cumulative", "energy" or "top_k".
    """
    from surgeon.kernels.triton import host

    return host.sorted_threshold(scores, tau, rule)
