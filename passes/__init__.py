"""The passes, in the order in which they usually run, and their table by name."""

from typing import Any

from surgeon.passes.base import FitContext, Pass
from surgeon.passes.lower import Lower
from surgeon.passes.mlpify import Mlpify
from surgeon.passes.moeify import Moeify
from surgeon.passes.recover import Recover
from surgeon.passes.sparsify import Sparsify
from surgeon.passes.swap_activation import SwapActivation
from surgeon.passes.trained import FineTunedPass, TrainedPass

PASSES: dict[str, type[Pass[Any]]] = {
    cls.name: cls for cls in (Mlpify, SwapActivation, Sparsify, Moeify, Recover, Lower)
}

__all__ = [
    "PASSES",
    "FineTunedPass",
    "FitContext",
    "Lower",
    "Mlpify",
    "Moeify",
    "Pass",
    "Recover",
    "Sparsify",
    "SwapActivation",
    "TrainedPass",
]
