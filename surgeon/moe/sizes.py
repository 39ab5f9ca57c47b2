"""How large experts and routers are where nobody says."""

from __future__ import annotations

import math

from surgeon.moe.clustering import nearest_divisors

# The size of experts aimed at, the sizes that a divisor of the width may have, and the width from which, without such a
# divisor, the last expert is filled up to the usual size.
_SIZE, _SIZES, _WIDE = 32, range(16, 65), 256
# A router may cost this share of the multiply-adds that it routes; its width is within limits.
_SHARE, _NARROWEST, _WIDEST = 0.025, 8, 128


def usual_size(neurons: int) -> int:
    """Return the number of neurons of an expert in a layer with so many: about 32, and a divisor if one is near."""
    about = max(1, round(neurons / _SIZE))
    divisor = min(nearest_divisors(neurons, about), key=lambda n: abs(neurons / n - _SIZE))
    if neurons // divisor in _SIZES:
        return neurons // divisor
    return _SIZE if neurons >= _WIDE else math.ceil(neurons / about)


def usual_width(multiply_adds: int, d_in: int, outputs: int) -> int:
    """Return the hidden width of a router: a multiple of 8, at which it costs 2.5% of what it routes.

    Args:
        multiply_adds: of what it routes, for one token.
        d_in, outputs: the router's inputs and scores.
    """
    width = int(_SHARE * multiply_adds / (d_in + outputs))
    return max(_NARROWEST, min(_WIDEST, width // 8 * 8))
