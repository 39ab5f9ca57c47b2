"""The Triton kernels of the dynamic-k FFN, for NVIDIA and AMD graphics processors.

`backend` says which calls they take and imports no Triton; `host` computes them. The operators take them on a GPU
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
