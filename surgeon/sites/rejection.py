"""Candidates that were refused, as values: a stable code, where it stands, and the words for the user.

Programs read the code, people read the reason. Nothing in the toolkit branches on the words.
"""

from __future__ import annotations

from dataclasses import dataclass

CODES = {
    # Found while looking for feed-forward layers and linear layers.
    "no-activation": "There is nothing to make sparse: two linear layers in a row.",
    "unknown-activation": "Add the activation to surgeon.kernels.activations.ACTIVATIONS, or use a known one.",
    "not-gated": "A gated layer multiplies activation(gate) by up, and nothing else.",
    "widths-differ": "The activation has to keep its width, or halve it in a gated layer.",
    "too-many-linears": "A feed-forward layer starts from one linear layer, or from two if it is gated.",
    "different-inputs": "Let gate and up read the same value.",
    "barrier": "Neurons do not stay apart. Move the named op in front of the first linear or behind the second one.",
    "parameter-between": "Fold the parameter into one of the linear layers.",
    "value-from-outside": "The layer depends on more than its input. Add the value outside of it.",
    "escapes": "Another part of the model reads the hidden values, so they are all needed.",
    "tokens-reshaped": "Each token has to go through the layer by itself.",
    "changes-shape": "Move the change of shape out of the layer.",
    "depends-on-data": "Make the shape between the linear layers follow from the input's shape.",
    "cannot-run": "What stands between the linear layers could not be tried on numbers. The reason names the op.",
    "unreadable-linear": "The product is not one of an input and a weight. The reason says what it is.",
    "weight-is-shared": "Untie the weight, or leave the layer dense.",
    "one-weight-twice": "Untie the two weights of the layer.",
    "different-activations": "Give the places that share the weights one activation.",
    "shares-a-linear": "The linear layer belongs to the other feed-forward layer.",
    "constant": "Compute the value once and store it.",
    "pooler": "It is a pooler or a classifier head, which is small and runs once per sample.",
    "head": "It computes the model's output and stays as it is.",
    # Found by passes.
    "already-done": "Nothing is left to do for it.",
    "no-value": "Give the option a pattern that fits the site, or `*` as the last one.",
    "width-does-not-divide": "Choose one of the sizes that the reason names.",
    "nothing-to-route": "Give the layer more experts, or fewer that always run.",
    "too-narrow": "Raise cost_factor, or leave the layer alone with `skip`.",
    "residual-width": "Use kind=plain for layers whose output is not as wide as their input.",
    "in-op-form": "Run the pass before `lower`.",
}
"""Every code of the built-in passes, and what to do about it. `docs/refusals.md` explains them."""


@dataclass(frozen=True)
class Rejection:
    """A candidate that was refused, and the first condition that failed.

    code: stable, for programs; one of `CODES`, or a third-party pass's own. reason: in words, for the user.
    path: of the site; filled in by the pass that asked. node: the name of the graph's node that the reason is about.
    """

    code: str
    reason: str
    path: str = ""
    node: str = ""
