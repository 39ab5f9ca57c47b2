"""The dynamic-k FFN in plain torch: forward and backward that compute only the selected experts.

There are five ways to compute it. *By expert*: gather the tokens that selected an expert, run it, add the rows back.
*In runs*: if all tokens selected the same experts, as a single token does, run consecutive experts without a copy.
*By neuron*: for few tokens, read the weights of each token's selected neurons in place, as a sparse product.
*Together*: copy the experts that any token selected and run them as one layer, with a mask for the pairs that are not
selected. *Dense*: the same with every expert and without a copy. `torch_plan.plan` takes the way that should be
cheapest, so selecting many experts costs about as much as the dense FFN. All ways give the same result up to rounding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from surgeon.kernels.activations import Activation, activation
from surgeon.kernels.backends import Backend, Call
from surgeon.kernels.experts import Experts, Gradients, selected
from surgeon.kernels.torch import plan as torch_plan

# Each CPU thread holds this many bytes of the inputs or products at once, so that they stay in its cache. It takes at
# least this many rows, because products of fewer rows are slow.
_CACHED_BYTES, _LEAST_ROWS = 400_000, 128


def forward(x: Tensor, mask: Tensor, experts: Experts, b2: Tensor | None, activation_name: str) -> Tensor:
    """Return Σ over selected experts of h_e w2_e, plus b2: a new contiguous tensor [N, d_out] in the dtype of `x`.

    Sums over experts are accumulated in fp32 for half types.

    Args:
        x: [N, d_in].
        mask: [N, E] bool.
        experts: the weights, same dtype as `x`.
        b2: [d_out] or None.
        activation_name: a name of `ACTIVATIONS`.
    """
    act, dtype, result_dtype = activation(activation_name), _compute_dtype(x), x.dtype
    x = x.to(dtype)
    sparse = x.device.type == "cpu" and dtype in (torch.float32, torch.float64) and experts.w1.dtype == dtype
    way = torch_plan.plan(mask, experts, sparse=sparse)
    if isinstance(way, torch_plan.Together):
        flat = (experts if way.used is None else experts.take(way.used)).flat().to(dtype)
        h = _hidden(x, flat, act)
        if way.mask is not None:
            _clear(h, way.mask)
        # One product, which adds in fp32 itself.
        out = torch.mm(h, flat.w2) if b2 is None else torch.addmm(b2.to(dtype), h, flat.w2)
        return out.to(result_dtype)
    start = x.new_zeros(experts.w2.shape[2]) if b2 is None else b2
    out = start.to(_accumulator(result_dtype)).expand(len(x), -1).clone(memory_format=torch.contiguous_format)
    match way:
        case torch_plan.ByExpert():
            _add_experts(out, x, way, experts, act)
        case torch_plan.InRuns(runs):
            _add_runs(out, x, runs, experts.flat(), act)
        case torch_plan.ByNeuron():
            out.add_(_by_neuron(x, way, experts.flat(), act))
    return out.to(result_dtype)


def backward(
    grad: Tensor,
    x: Tensor,
    mask: Tensor,
    experts: Experts,
    activation_name: str,
    *,
    need_x: bool = True,
    need_weights: bool = True,
) -> Gradients:
    """Return the gradients of `forward`, all but b2's, given `grad` [N, d_out]. Hidden activations are recomputed.

    Gradients have the shapes and dtypes of their inputs; those of experts no token selected are zero.
    """
    act, dtype = activation(activation_name), _compute_dtype(x)
    source, grad = x.to(dtype), grad.to(dtype)
    grad_x = torch.zeros_like(x, dtype=_accumulator(x.dtype), memory_format=torch.contiguous_format) if need_x else None
    grads = Experts(*(None if t is None or not need_weights else t.new_zeros(t.shape) for t in experts))  # type: ignore[arg-type]

    def run(part: Experts, grad_part: Experts | None, rows: Tensor | None, keep: Tensor | None) -> None:
        inputs, grad_out = _take(source, rows), _take(grad, rows)
        up = F.linear(inputs, part.w1, part.b1)
        grad_h = F.linear(grad_out, part.w2)
        if keep is not None:
            _clear(grad_h, keep)
        z = None if part.gate is None else F.linear(inputs, part.gate, part.b_gate)
        if z is None:
            h, grad_z, grad_up = act.fn(up), None, act.backward(grad_h, up)
        else:
            a, b = act.fn(z), up if act.up is None else act.up.fn(up)
            h, grad_z, grad_up = a * b, act.backward(grad_h * b, z), grad_h * a
            if act.up is not None:
                grad_up = act.up.backward(grad_up, up)
        if grad_x is not None:
            _add_product(grad_x, rows, grad_up, part.w1)
            if grad_z is not None and part.gate is not None:
                _add_product(grad_x, rows, grad_z, part.gate)
        if grad_part is not None:
            if keep is not None:
                _clear(h, keep)
            grad_part.w2.copy_(torch.mm(h.t(), grad_out))
            for target, bias, g in ((grad_part.w1, grad_part.b1, grad_up), (grad_part.gate, grad_part.b_gate, grad_z)):
                if target is not None and g is not None:
                    target.copy_(torch.mm(g.t(), inputs))
                if bias is not None and g is not None:
                    bias.copy_(g.sum(0))

    match torch_plan.plan(mask, experts, forward=False):
        case torch_plan.ByExpert(rows_of, _):
            for expert, rows in rows_of.items():
                run(experts.one(expert).to(dtype), grads.one(expert) if need_weights else None, rows, None)
        case torch_plan.Together(_, mask_or_none):
            run(experts.flat().to(dtype), grads.flat() if need_weights else None, None, mask_or_none)
    return Gradients(None if grad_x is None else grad_x.to(x.dtype), *grads)


def _add_experts(out: Tensor, x: Tensor, way: torch_plan.ByExpert, experts: Experts, act: Activation) -> None:
    """Add Σ over the experts of `way` of h_e w2_e to `out` [N, d_out]."""
    most = way.most
    if x.device.type == "cpu":
        cached = _CACHED_BYTES // (x.element_size() * max(1, x.shape[1]))
        most = min(most, max(_LEAST_ROWS, cached) * torch.get_num_threads())
    parts = [
        (expert, part)
        for expert, rows in way.rows.items()
        # Parts of equal size: a small rest would be multiplied slowly.
        for part in ((None,) if rows is None else rows.tensor_split(-(-len(rows) // most)))
    ]
    sizes = [len(x) if part is None else len(part) for _, part in parts]
    # These buffers are reused, so they stay in the cache.
    neurons = experts.w1.shape[1]
    gathered, product = x.new_empty(most, x.shape[1]), x.new_empty(most, out.shape[1])
    gates = None if experts.gate is None else x.new_empty(max(sizes, default=0), neurons)
    hs = x.new_empty(sum(sizes), neurons).split_with_sizes(sizes)
    # All first products before the second ones, so that the cache need not hold both the inputs and the outputs.
    for (expert, part), h in zip(parts, hs, strict=True):
        _hidden(_take(x, part, gathered), experts.one(expert).to(x.dtype), act, h, gates)
    w2 = experts.w2.unbind()
    for (expert, part), h in zip(parts, hs, strict=True):
        _add_product(out, part, h, w2[expert].to(x.dtype), product)


def _hidden(
    x: Tensor, experts: Experts, act: Activation, out: Tensor | None = None, gates: Tensor | None = None
) -> Tensor:
    """Compute `hidden` in less memory: in `out` [n, m], if given, with the gates in `gates`, of n rows or more."""

    def linear(weight: Tensor, bias: Tensor | None, into: Tensor | None) -> Tensor:
        if into is None:
            return F.linear(x, weight, bias)
        weight = weight.t()
        return torch.mm(x, weight, out=into) if bias is None else torch.addmm(bias, x, weight, out=into)

    up = linear(experts.w1, experts.b1, out)
    if experts.gate is None:
        return act.in_place(up)
    gate = linear(experts.gate, experts.b_gate, None if gates is None else gates[: len(x)])
    if act.up is not None:
        up = act.up.in_place(up)
    return up.mul_(act.in_place(gate))


def _add_runs(out: Tensor, x: Tensor, runs: list[slice], experts: Experts, act: Activation) -> None:
    """Add Σ over the neurons in `runs` of h w2 to `out` [N, d_out]. experts: flat."""
    for run in runs:
        neurons = experts.one(run).to(x.dtype)
        _add_product(out, None, _hidden(x, neurons, act), neurons.w2)


def _clear(h: Tensor, mask: Tensor) -> None:
    """Set to zero in place, NaN included, what `mask` [N, E] does not select in `h` [N, E·s].

    This works on the bits. On a CPU it is several times faster than filling or choosing with a mask that is broadcast.
    """
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[h.element_size()]
    h.view(*mask.shape, -1).view(bits).bitwise_and_(mask.to(bits).neg_().unsqueeze(-1))


def _by_neuron(x: Tensor, way: torch_plan.ByNeuron, experts: Experts, act: Activation) -> Tensor:
    """Return Σ over the neurons of `way` of h w2, [N, d_out], by sparse products, which copy no weights except biases.

    experts: flat.
    """
    neurons = len(experts.w1)

    def linear(weight: Tensor, bias: Tensor | None) -> Tensor:
        start = x.new_zeros(len(way.columns)) if bias is None else bias.index_select(0, way.columns)
        sparse = torch.sparse_csr_tensor(way.ends, way.columns, start, (len(x), neurons), check_invariants=False)
        product: Tensor = torch.sparse.sampled_addmm(sparse, x, weight.t())
        return product.values()

    up = linear(experts.w1, experts.b1)
    if experts.gate is None:
        h = act.fn(up)
    else:
        h = act.fn(linear(experts.gate, experts.b_gate)) * (up if act.up is None else act.up.fn(up))
    return F.embedding_bag(
        way.columns, experts.w2, way.ends, mode="sum", per_sample_weights=h, include_last_offset=True
    )


def _take(source: Tensor, rows: Tensor | None, into: Tensor | None = None) -> Tensor:
    """Return the given rows, or all. If rows are copied, they are written to `into`, which has at least as many."""
    if rows is None:
        return source
    return torch.index_select(source, 0, rows, out=None if into is None else into[: len(rows)])


def _add_product(out: Tensor, rows: Tensor | None, a: Tensor, b: Tensor, into: Tensor | None = None) -> None:
    """Add `a @ b` to `rows` of `out`, or to all; its dtype may be wider. `into` [≥ len(a), d] may be overwritten."""
    if rows is not None:
        product = torch.mm(a, b, out=None if into is None else into[: len(a)])
        out.index_add_(0, rows, product.to(out.dtype))
    elif out.dtype == a.dtype:
        out.addmm_(a, b)
    else:
        out.add_(torch.mm(a, b))


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in torch_plan.HALF else dtype


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype to multiply matrices in: fp32 for half types on processors that would only emulate them."""
    emulated = x.device.type == "cpu" and x.dtype in torch_plan.HALF and not torch_plan.multiplies(x.dtype)
    return torch.float32 if emulated else x.dtype


def _forward_call(call: Call) -> Tensor:
    return forward(call.x, selected(call.scores, call.threshold), call.experts, call.b2, call.activation)


def _backward_call(call: Call, grad: Tensor, need_x: bool, need_weights: bool) -> Gradients:
    mask = selected(call.scores, call.threshold)
    return backward(grad, call.x, mask, call.experts, call.activation, need_x=need_x, need_weights=need_weights)


BACKEND = Backend(lambda _: True, _forward_call, _backward_call)
