"""The Triton kernels of the dynamic-k FFN and of linear layers that skip inputs, for NVIDIA and AMD GPUs.

`backend` says which calls they take and does not import Triton; `host` computes them. The operators use them on a GPU
unless `SURGEON_GPU=torch` is set.

There are three ways to compute the layer.

*Expert by expert*: only what is selected is computed. `plan` sorts the selected (token, expert) pairs by expert on the
device, so the host does not wait for their number. The forward pass gathers rows of x, multiplies tiles of them, and
adds up the outputs of each token's pairs. If the fp32 output fits in half of the L2 cache, the additions are atomic.
This takes one kernel, or two with the hidden values in memory. It takes two if one would leave multiprocessors idle, or
if an expert has more neurons than one can hold (128; half if gated; in fp32 half, none on an H100). If the output does
not fit, or if `torch.use_deterministic_algorithms` asks for it, the output of every pair is written, rounded to the
dtype of x. These outputs are then added up in fp32 in a fixed order. Up to 16 tokens are decoded: one kernel, no plan.

*Spread*: adding up a pair costs the same however few neurons it has, so small experts lose more there than they save.
This way computes the hidden values of the pairs that run as above, and writes them to their places among zeros. The
second product is torch's product of the dense layer.

*Masked*: both products are torch's. One kernel between them computes the activation of what is selected and clears the
rest. This is neither slower nor faster than the dense layer.

`fastest_way` chooses by `cost_model`, on GPUs that `devices` has a model of: NVIDIA's. `SURGEON_GPU=triton` always goes
expert by expert.

The backward pass computes the hidden values again. It goes expert by expert if the forward pass does, and adds up the
gradient of x in the same way. Otherwise it is masked: products of the dense layer, with one kernel between them.

Rules that go through a token's scores in ascending order find their thresholds without sorting, with one program per
token.

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
| 8 or 4 bits: the trunk of a router | 0 | 2 |
| 8 or 4 bits, up to 16 tokens | 0 | 3 |
| 8 or 4 bits, atomic | 4 for each range of tokens | 1, and 2 for each range |
| 8 or 4 bits, ordered | 4 for each range of tokens | 1, 1 for each range, and 2 for each range of columns |

Weights of 8 and 4 bits (`int8_host`, `int8_kernels`) always go expert by expert, forward only: the gradient of x is
that of the same weights as numbers, by the kernels above. A kernel rounds the tokens, one writes the hidden values in
fp32, and one rounds these, multiplies and adds up. They never stay on the chip: their scale takes all neurons of an
expert. Products are of bytes, summed in int32. Weights in float8 become fp16 in registers, bit by bit: compute
capability 8.0 has no instruction for it, gfx942 one for another float8 only, and on 9.0 and 10.0 `tl.dot` of small
tiles of float8 makes them fp16 too. Products are then of fp16, summed in fp32. Of the router the trunk is a kernel; its
output, the scores and a `max` threshold are torch's.

In addition, PyTorch fills the fp32 output with the bias, and converts it if x has a half type: one launch each. If
spread, it fills the hidden values with zeros.

Memory is allocated for every pair, because the host does not know how many run. The plan takes 4 bytes per pair, 8 if
ordered. The forward in two kernels takes one hidden value in the dtype of x per neuron and token, as the dense FFN
does. The backward takes two, or three if gated. If ordered, the outputs of the pairs take up to 512 MiB
(`host.PARTIAL_BYTES`): they are computed in ranges of columns, and in ranges of tokens if 128 columns of all tokens are
too much. With weights of 8 or 4 bits the hidden values take up to 512 MiB too, by ranges of tokens.

The plan, the ordered forward, the ordered gradient of x and the gradients of the weights are reproducible. Atomic sums
change in their last bits from run to run.

All this but weights of 8 and 4 bits, and linear layers, was verified on an NVIDIA H100 with torch 2.11 and Triton 3.6
(`tests/kernels/triton/test_hardware.py`):

- fp32, TF32, fp16 and bf16 against float64, all ways and backward, with drawn and with real sizes;
- thresholds, several thousand experts, more than 2³¹ elements, and NaN in one row;
- the same bits twice where that is promised;
- capture in a CUDA graph, so that nothing waits for the host, and `torch.compile`.

Tile sizes for such chips were chosen there by time (examples/speed has the results).

No other chip was verified on hardware, and the kernels for weights of 8 and 4 bits on none. The tests compare all
kernels with a float64 reference in Triton's interpreter. They also compile them for sm_80, sm_90, sm_100 and gfx942,
and read registers, spills, shared memory and instructions. That says nothing about races or speed where nothing was
run. Tile sizes there are estimates.

Linear layers that skip inputs (`surgeon.kernels.sparse_linear`) are one kernel for up to 16 tokens, whose sums are
atomic. Its programs go through all inputs, but the masks of their loads leave out rows of the weight that no token
keeps. With more tokens, and where `torch.use_deterministic_algorithms` asks for equal bits, torch's product runs. It
was interpreted and compiled like the others, but not verified on any hardware.

Tiles of fewer than 16 neurons are padded to 16, which `tl.dot` needs, and the padding is computed.
"""
