"""The passes. Each has a file of its own; all of them share `contract`, `base`, `options` and `verification`.

`registry` finds the passes, including those of other packages.
"""

from surgeon.passes.base import Pass
from surgeon.passes.contract import FitContext, SiteRefused
from surgeon.passes.lower import Lower
from surgeon.passes.mlpify import Mlpify
from surgeon.passes.moeify import Moeify
from surgeon.passes.options import PerSite, option
from surgeon.passes.quantize import Quantize
from surgeon.passes.recover import Recover
from surgeon.passes.report import SiteChange
from surgeon.passes.sparsify import Sparsify
from surgeon.passes.swap_activation import SwapActivation
from surgeon.passes.trained import FineTunedPass, TrainedPass

__all__ = [
    "FineTunedPass",
    "FitContext",
    "Lower",
    "Mlpify",
    "Moeify",
    "Pass",
    "PerSite",
    "Quantize",
    "Recover",
    "SiteChange",
    "SiteRefused",
    "Sparsify",
    "SwapActivation",
    "TrainedPass",
    "option",
]
