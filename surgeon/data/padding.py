"""Find the real tokens of a batch, which are not padding, from its masks."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from torch import Tensor

from surgeon.data.batch import Batch

log = logging.getLogger("surgeon")


def token_mask(batch: Batch, lead: Sequence[int]) -> Tensor | None:
    """Return a mask of the real tokens, bool of shape `lead`, for values with the leading dimensions `lead`.

    It is the batch's first mask of that shape. A mask is a keyword input [B, T] whose name ends in `attention_mask`
    (Hugging Face: 1 for a real token) or `key_padding_mask` (`torch.nn.Transformer`: True or -inf for padding). A mask
    also fits values whose tokens were flattened. Padding without a mask counts as tokens, and so does padding in values
    that are not batch first, [T, B]; `warn_of_masks` warns of both.

    Returns None if no mask fits, or if every token is real.
    """
    mask = next(iter(_fitting(_masks(batch), lead).values()), None)
    return None if mask is None or bool(mask.all()) else mask.reshape(tuple(lead))


def real_tokens(batch: Batch, values: Tensor) -> Tensor:
    """Return the values of the tokens that are not padding: [..., d] → [N, d]."""
    mask = token_mask(batch, values.shape[:-1])
    return values.flatten(0, -2) if mask is None else values[mask]


def warn_of_masks(batch: Batch, leads: Iterable[Sequence[int]]) -> bool:
    """Warn if the masks do not tell what is padding: no mask fits any of the values, or several fit and differ.

    Args:
        leads: the leading dimensions of all values that are read.

    Returns:
        Whether a warning was logged for this batch.
    """
    masks, shapes = _masks(batch), list(dict.fromkeys(map(tuple, leads)))
    fitting = {shape: _fitting(masks, shape) for shape in shapes}
    padded = {name: mask for name, mask in masks.items() if not bool(mask.all())}
    # Values without a token dimension, such as pooled values [B], have no padding.
    if padded and any(len(shape) > 1 for shape in shapes) and not any(fitting.values()):
        log.warning(
            "Padding counts as tokens: %s, which does not fit any layer's input, %s. A mask must be "
            "[batch, tokens], and the inputs must be batch first (batch_first=True).",
            " and ".join(f"{name} is {list(mask.shape)}" for name, mask in padded.items()),
            " and ".join(str([*shape, "d"]).replace("'", "") for shape in shapes),
        )
        return True
    for shape, found in fitting.items():
        names = list(found)
        different = [name for name in names[1:] if not found[name].equal(found[names[0]])]
        if different:
            log.warning(
                "%s and %s differ, and both fit layers with inputs of %s. %s is used for all of these layers. Pad the "
                "inputs to different lengths to tell the masks apart.",
                names[0],
                " and ".join(different),
                list(shape),
                names[0],
            )
            return True
    return False


def _masks(batch: Batch) -> dict[str, Tensor]:
    """Return every mask [B, T] by its name, True for a real token."""
    return {
        name: value.bool() if name.endswith("attention_mask") else value == 0
        for name, value in batch.kwargs.items()
        if name.endswith(("attention_mask", "key_padding_mask")) and isinstance(value, Tensor) and value.dim() == 2
    }


def _fitting(masks: dict[str, Tensor], lead: Sequence[int]) -> dict[str, Tensor]:
    """Return the masks that fit values of these leading dimensions: their shape, or flattened tokens."""
    return {name: mask for name, mask in masks.items() if tuple(lead) in (tuple(mask.shape), (mask.numel(),))}
