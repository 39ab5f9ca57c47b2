"""Refused candidates as values: a stable code, the place in the model, and the reason in words.

Programs read the code, and people read the reason. The toolkit never branches on the words of a reason.
"""

from __future__ import annotations

from dataclasses import dataclass

from surgeon.json_values import Plain

CODES = {
    # Found while looking for feed-forward layers and linear layers.
    "no-activation": "There is nothing to make sparse: two linear layers in a row.",
    "unknown-activation": "Add the activation to surgeon.kernels.activations.ACTIVATIONS, or use a known one.",
    "not-gated": "A gated layer multiplies activation(gate) by up, and nothing else.",
    "widths-differ": "The activation must keep the width, or halve it in a gated layer.",
    "too-many-linears": "A feed-forward layer starts from one linear layer, or from two if it is gated.",
    "different-inputs": "Let gate and up read the same value.",
    "barrier": "Move the named op before the first linear layer or after the second one.",
    "parameter-between": "Fold the parameter into one of the linear layers.",
    "value-from-outside": "The layer depends on more than its input. Use this value outside the layer.",
    "escapes": "The layer stays dense, because another part of the model reads its hidden values.",
    "tokens-reshaped": "Each token must pass through the layer independently of the others.",
    "changes-shape": "Move the reshaping out of the layer.",
    "depends-on-data": "Make the shape between the linear layers depend only on the input's shape.",
    "cannot-run": "The ops between the linear layers fail on test values. The reason shows the error.",
    "unreadable-linear": "Store the weight and the bias as parameters. The reason says which one is computed.",
    "unusable-weights": "Let the weights be plain floating-point tensors, or leave the layer alone with `skip`.",
    "weights-differ": "Convert the weights to one dtype, for example model.float(), and move them to one device.",
    "under-autocast": "Convert the model without autocast, and call the converted graph under torch.autocast yourself.",
    "in-subgraph": "Move the layer out of the condition or the loop that runs it.",
    "weight-is-shared": "Untie the weight, or leave the layer dense.",
    "one-weight-twice": "Untie the two weights of the layer.",
    "different-activations": "Give the places that share the weights one activation.",
    "shares-a-linear": "A linear layer can belong to one feed-forward layer only.",
    "constant": "Compute the value once and store it.",
    "pooler": "It is a pooler or a classifier head, which is small and runs once per sample.",
    "head": "It computes the model's output and stays as it is.",
    # Found by passes.
    "already-done": "Nothing is left to do.",
    "no-value": "Give the option a pattern that matches the site, or add `*` as the last pattern.",
    "too-few-neurons": "Use fewer or smaller experts in this layer: the option takes a value for each site.",
    "not-finite": "Repair the weights, or leave the layer alone with `skip`.",
    "nothing-to-route": "Use more experts, or fewer experts that always run.",
    "too-narrow": "Raise cost_factor, or leave the layer alone with `skip`.",
    "unknown-router": "Run the pass before the router is changed by other code.",
    "neuron-router": "Use another router, or keep the experts in float.",
    "too-wide": "Leave the layer alone with `skip`, split it into more experts if its neurons are too many, or take "
    "`weights=fp8`.",
    "both-activated": "Keep its activations: the layer would be no known one with another activation on one side.",
    "residual-width": "Use kind=plain for layers whose output is not as wide as their input.",
    "in-op-form": "Run the pass before `lower`.",
    "has-experts": "Run the pass before `moeify`. `refit` has nothing to do: it is for linear layers that skip inputs.",
    "skips-neurons": "Nothing is to be done: `refit` is for linear layers that skip inputs.",
    "no-gate": "Use sparsify-inputs: a layer without a gate skips the inputs of its second linear layer.",
    "skips-nothing": "Set tau first, with `surgeon tune` or the option `tau` of `sparsify-inputs`.",
    "skips": "Set its tau to 0 first, or leave it as it is.",
    "no-classes": "Only in a classifier of whole samples can samples leave or tokens halt: let it return its classes "
    "and nothing else.",
    "answers-tokens": "Use experts (moeify): they skip work inside of every layer, so no layer lacks a token.",
    "no-blocks": "Early exits and token halting need at least two blocks with feed-forward layers.",
    "no-single-value": "Let later blocks read nothing of earlier ones but the output of the block before.",
    "early-exit": "Nothing is to be done: the pass is for experts or linear layers.",
    "fixed-batch": "Trace the model with example inputs of at least two samples, so that the batch can change.",
    "batch-not-first": "Let all values of the model have the batch in the first dimension.",
    "needs-batch-size": "Use the exits without `lower`, or put them only where no such op follows, with `skip`.",
    "tokens-meet": "Use early-exit or experts (moeify): there no token lacks another one.",
    "tokens-change": "Let tokens halt only behind later blocks, with `only`, or use early-exit.",
    "needs-length": "Use token halting without `lower`: it saves multiply-adds in all counts, but no time.",
    "unclear-shape": "Name the sizes of the shape, so that it is clear for an empty batch too.",
    "post-norm": "Use sparsify-inputs without rotate: it works in the stream's own basis too.",
    "stream-is-read": "Let norms alone read the stream, linear layers alone what they give, and return neither.",
    "stream-is-written": "Let what is added to the stream come from a linear layer, an embedding or a parameter.",
    "mixed-norms": "Let all norms that read the stream be of one kind.",
    "values-are-mixed": "Let nothing but reshaping stand between the projections and the attention.",
    "values-are-read": "Let nothing but the attention read the values, and the output projection what it gives.",
    # Found by grafting.
    "no-place": "Compute the layer in a module of its own, or make its activation a module.",
    "tied-weight": "Use the graph, or leave the layer alone with `skip`.",
    "graft-differs": "Use the graph, or change the model so that it does not use the parts of the layer itself.",
}
"""Each code of the built-in passes, with advice. `docs/refusals.md` explains them."""


@dataclass(frozen=True)
class Rejection(Plain):
    """A candidate that was refused, and the first condition that failed.

    code: a stable code for programs: one of `CODES`, or a third-party pass's own. reason: the reason in words.
    path: the path of the site, filled in by the pass that asked. node: the name of the node that the reason is about.
    """

    code: str
    reason: str
    path: str = ""
    node: str = ""
